"""ArcFace against stored outputs of the public implementation, its crop, and files not of it."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Touch
from torch import Tensor
from torch.nn import functional as F

from targetclip.encoders.arcface import COUNTER, ArcFace, aligned_face, load_arcface
from targetclip.encoders.identity import IdentityModel

FIXTURES = Path(__file__).parents[2] / "fixtures"
KEYS: dict[str, list[int]] = json.loads((FIXTURES / "ir_se50.keys.json").read_text())

State = dict[str, Any]
Edit = Callable[[State], object]


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def seeded(seeded_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> ArcFace:
    arrays = seeded_weights.seeded_state(FIXTURES / "ir_se50.keys.json", equalized=False)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    path = saved(state, tmp_path_factory.mktemp("arcface") / "model_ir_se50.pth")
    network = load_arcface(path)
    path.unlink()  # 175 MB
    return network


def images(side: int, count: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(side)
    return torch.rand(count, 3, side, side, generator=random) * 2 - 1


# The public implementation


def test_the_public_weights_give_the_reference_features(seeded: ArcFace) -> None:
    with np.load(FIXTURES / "ir_se50.npz") as arrays:
        x16, features = torch.from_numpy(arrays["x16"]), torch.from_numpy(arrays["features"])
    actual = seeded.embed_images(x16)
    assert actual.shape == (1, 512)
    assert float((actual - features).abs().max()) < 1e-4 * float(features.std())


def test_our_names_are_exactly_those_of_the_public_layout() -> None:
    with torch.device("meta"):
        state = ArcFace().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == KEYS


@pytest.mark.parametrize("side", [256, 300, 512])
def test_large_pictures_are_averaged_and_cropped_as_in_the_release(side: int) -> None:
    picture = images(side)
    cropped = F.adaptive_avg_pool2d(picture, 256)[:, :, 35:223, 32:220]
    torch.testing.assert_close(aligned_face(picture), F.adaptive_avg_pool2d(cropped, 112))


def test_small_pictures_are_enlarged_smoothly() -> None:
    picture = images(64)
    enlarged = F.interpolate(picture, size=256, mode="bilinear", align_corners=False)
    torch.testing.assert_close(aligned_face(picture), aligned_face(enlarged), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 3, 256, 128), (1, 3, 512, 256), (1, 3, 300, 400)])
def test_pictures_that_are_not_square_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="square"):
        aligned_face(torch.zeros(shape))


def test_unit_features_pass_a_gradient_to_the_face_and_nowhere_else(seeded: ArcFace) -> None:
    leaf = images(256, count=2).requires_grad_(True)
    features = seeded.embed_images(leaf)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    features[0, 0].backward()
    assert leaf.grad is not None
    face = leaf.grad[0, :, 35:223, 32:220]
    assert float((face != 0).float().mean()) > 0.99
    assert int((leaf.grad != 0).sum()) == int((face != 0).sum())  # neither border nor other image


# Files


def small_state() -> State:
    """One number behind every shape: a file of kilobytes stands for one of 175 MB."""
    return {
        name: torch.tensor([index / 1000]).expand(shape) if shape else torch.tensor(7)
        for index, (name, shape) in enumerate(KEYS.items())
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_state(), tmp_path_factory.mktemp("arcface") / "small.pth")


def test_every_weight_of_a_file_is_in_the_network_which_is_frozen(small: Path) -> None:
    before = torch.get_rng_state()
    network = load_arcface(str(small))
    assert torch.equal(torch.get_rng_state(), before)
    stored = small_state()
    for name, tensor in network.named_parameters():
        assert torch.equal(tensor, stored[name]), name
        assert not tensor.requires_grad
    for name, tensor in network.named_buffers():
        assert name.endswith(COUNTER) or torch.equal(tensor, stored[name]), name
    assert not any(module.training for module in network.modules())


def test_names_of_a_parallel_training_are_read(small: Path, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in small_state().items()}
    path = saved(state, tmp_path / "parallel.pth")
    assert load_arcface(path).fingerprint == load_arcface(small).fingerprint


def test_the_fingerprint_is_that_of_the_weights_alone(small: Path, tmp_path: Path) -> None:
    network = load_arcface(small)
    assert isinstance(network, IdentityModel)
    old = {name: tensor for name, tensor in small_state().items() if KEYS[name]}
    path = tmp_path / "old.pth"
    torch.save(old, path, _use_new_zipfile_serialization=False)  # old files have no counters
    assert load_arcface(path).fingerprint == network.fingerprint

    changed = small_state() | {"output_layer.4.bias": torch.ones(512)}
    other = load_arcface(saved(changed, tmp_path / "changed.pth"))
    assert other.fingerprint != network.fingerprint


# Files that are not such weights


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_arcface(path)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < 400
    return message


def lose_the_output(state: State) -> None:
    for name in [name for name in state if name.startswith("output_layer.3")]:
        del state[name]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lose_the_output, "missing 2 (first output_layer.3.bias), unexpected none"),
        (lambda s: s.clear(), "unexpected none"),
        (lambda s: s.update({3: torch.zeros(1)}), "found dict"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(edit: Edit, said: str, tmp_path: Path) -> None:
    state = small_state()
    edit(state)
    assert said in error_of(saved(state, tmp_path / "weights.pth"))


def test_a_bare_tensor_is_refused(tmp_path: Path) -> None:
    assert "found Tensor" in error_of(saved(torch.zeros(3), tmp_path / "weights.pth"))


def test_missing_and_damaged_files_are_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    assert "no such ArcFace weights" in error_of(path)
    assert "no such ArcFace weights" in error_of(tmp_path)
    path.write_bytes(small.read_bytes()[:-4])
    assert "damaged" in error_of(path)


def test_weights_that_ask_to_run_code_are_refused_and_did_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = saved(small_state() | {"more": Touch(trace)}, tmp_path / "weights.pth")
    assert "asks to run code" in error_of(path)
    assert not trace.exists()

    torch.load(path, weights_only=False)
    assert trace.exists(), "the file of this test was harmless"
