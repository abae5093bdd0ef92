"""Who is on a picture: the similarity, the network and its file."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from targetclip.encoders.identity import (
    FORMAT,
    AvatarIdentity,
    EmbedderWithIdentity,
    IdentityConfig,
    IdentityModel,
    feature_model,
    identity_similarity,
    load_identity,
    save_identity,
)

CONFIG = IdentityConfig(16, (8, 16), 12, 5)


class MeanColour:
    """A model of another kind: a person is the mean colour of a picture."""

    fingerprint = "c" * 64

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        return F.normalize(images.mean(dim=(2, 3)), dim=1)


@pytest.fixture
def identity() -> AvatarIdentity:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AvatarIdentity(CONFIG).requires_grad_(False)


def images(count: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_identity(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("size", [16, 8, 40])
def test_images_of_any_square_size_become_unit_vectors(identity: AvatarIdentity, size: int) -> None:
    features = identity.embed_images(images(size=size))
    assert features.shape == (3, 5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_a_picture_and_its_enlargement_show_the_same_person(identity: AvatarIdentity) -> None:
    smooth = F.interpolate(images(size=4), size=16, mode="bicubic")
    large = F.interpolate(smooth, size=64, mode="bicubic")
    assert (identity_similarity(identity, smooth, large) > 0.99).all()
    assert (identity_similarity(identity, smooth, smooth.flip(0))[[0, 2]] < 0.99).all()


def test_images_that_are_not_square_are_refused(identity: AvatarIdentity) -> None:
    with pytest.raises(ValueError, match="square"):
        identity.embed_images(torch.zeros(1, 3, 16, 8))


def test_embeddings_pass_a_gradient_to_the_images(identity: AvatarIdentity) -> None:
    leaf = images(size=32).requires_grad_(True)
    identity.embed_images(leaf)[:, 0].sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_similarity_is_the_cosine_of_each_row_for_any_model() -> None:
    model = MeanColour()
    assert isinstance(model, IdentityModel)
    before, after = images(), images(size=8, seed=2).requires_grad_(True)
    similarity = identity_similarity(model, before, after)
    a, b = before.mean(dim=(2, 3)), after.mean(dim=(2, 3))
    torch.testing.assert_close(similarity, (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)))
    assert not similarity.requires_grad
    torch.testing.assert_close(identity_similarity(model, before, before), torch.ones(3))


def test_batches_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="found 3 and 1"):
        identity_similarity(MeanColour(), images(3), images(1))


class Brightness:
    """Embeds an image as its mean, at either preprocessing."""

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: str = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        return images.mean(dim=(1, 2, 3))[:, None] * (2 if preprocess == "release" else 1)


def test_side_by_side_are_the_embedders_numbers_and_then_the_identity_models() -> None:
    shown, both = images(), EmbedderWithIdentity(Brightness(), MeanColour())
    for preprocess in ("consistent", "release"):
        features = both.embed_images(shown, preprocess)
        assert torch.equal(features[:, :1], Brightness().embed_images(shown, preprocess))
        assert torch.equal(features[:, 1:], MeanColour().embed_images(shown))


def test_a_search_looks_at_people_only_where_that_has_a_weight() -> None:
    plain = Brightness()
    assert (
        feature_model(plain, MeanColour(), 0.0) is plain
        and feature_model(plain, None, 0.0) is plain
    )
    assert isinstance(feature_model(plain, MeanColour(), 0.1), EmbedderWithIdentity)
    with pytest.raises(ValueError, match="needs an identity model, found none"):
        feature_model(plain, None, 0.1)


def test_a_saved_model_is_the_same_but_for_half_precision(
    identity: AvatarIdentity, tmp_path: Path
) -> None:
    path = tmp_path / "identity.safetensors"
    save_identity(identity, path)
    loaded = load_identity(path)
    assert loaded.config == CONFIG and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in identity.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert loaded.fingerprint == load_identity(path).fingerprint != identity.fingerprint
    again = tmp_path / "again.safetensors"
    save_identity(loaded, again)
    assert load_identity(again).fingerprint == loaded.fingerprint


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "another/1"}, "found another/1"),
        ({"config": None}, "config is damaged"),
        ({"config": "{"}, "config is damaged"),
        ({"config": json.dumps({**asdict(CONFIG), "colour": 1})}, "config is damaged"),
        ({"config": json.dumps({**asdict(CONFIG), "hidden": 13})}, "weights do not fit"),
    ],
)
def test_a_file_that_is_not_an_identity_model_is_refused(
    identity: AvatarIdentity, tmp_path: Path, metadata: dict[str, str | None], said: str
) -> None:
    path = tmp_path / "identity.safetensors"
    assert "no such" in error_of(path)
    whole = {"format": FORMAT, "config": json.dumps(asdict(CONFIG)), **metadata}
    entries = {name: text for name, text in whole.items() if text is not None}
    save_file(identity.state_dict(), path, entries)
    assert said in error_of(path)
