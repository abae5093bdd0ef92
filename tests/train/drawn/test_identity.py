"""Training the identity model: what it learns, from whom, and that a killed run goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.drawn.faces import draw_parameters, faces_from_z, sample_z
from data.drawn.sketch import ESSENCE, IDENTITY, NAMES
from targetclip.command import Stop, Stopped
from targetclip.generators import load_generator
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from train.drawn.identity import (
    Config,
    changed_alone,
    features_of,
    figures_of,
    held_out_pairs,
    run,
    train_identity,
    with_essence_of,
)
from train.loop import CHECKPOINT, LOG

OWN = [NAMES.index(name) for name in IDENTITY]
ESSENTIAL = [NAMES.index(name) for name in ESSENCE]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of seconds: a random generator, a bank of a few faces, galleries of ten."""
    monkeypatch.setattr("train.drawn.identity.GALLERY", 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(
                resolution=64, w_dim=96, z_dim=96, mapping_layers=2, channels=(8, 8, 8, 8, 8)
            )
        )
    path = tmp_path / "generator.safetensors"
    save_safetensors(generator, path)
    faces = faces_from_z(sample_z(24, 96, seed=0)).numpy()
    np.save(tmp_path / "faces-0-24.npy", np.stack([draw_parameters(values) for values in faces]))
    return Config(path, tmp_path / "identity", faces=24, steps=3, batch_size=8, galleries=1)


def test_features_are_standardised_and_say_nothing_of_essence() -> None:
    faces = torch.rand(4000, len(NAMES), generator=torch.Generator().manual_seed(0))
    features = features_of(faces)
    assert features.mean(dim=0).abs().max() < 0.1
    torch.testing.assert_close(
        features.T @ features / len(features), torch.eye(features.shape[1]), rtol=0, atol=0.1
    )
    other = faces.clone()
    other[:, ESSENTIAL] = other[:, ESSENTIAL].flip(0)
    assert torch.equal(features_of(other), features)
    for column in OWN:
        other = faces.clone()
        other[:, column] = other[:, column].flip(0)
        assert not torch.allclose(features_of(other), features)


def test_the_second_latent_is_the_same_person_with_the_others_essence() -> None:
    first, other = sample_z(20, 96, seed=1), sample_z(20, 96, seed=2)
    second = with_essence_of(first, other)
    found = faces_from_z(second)
    torch.testing.assert_close(found[:, OWN], faces_from_z(first)[:, OWN])
    torch.testing.assert_close(found[:, ESSENTIAL], faces_from_z(other)[:, ESSENTIAL])
    assert torch.equal(second[::2, 0], second[::2, 2])
    with pytest.raises(ValueError, match="z_dim 62 or more, found 32"):
        with_essence_of(sample_z(20, 32, seed=1), sample_z(20, 32, seed=2))


class Colour:
    """A model for which a person is a colour, whatever else the picture shows."""

    fingerprint = "c" * 64

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)), dim=1)


def test_figures_tell_a_model_that_knows_people_from_one_that_does_not() -> None:
    random = torch.Generator().manual_seed(0)
    people = torch.randn(200, 3, 1, 1, generator=random).expand(-1, -1, 4, 4)
    found = figures_of(Colour(), {"known": (people, 2 * people), "mixed": (people, people.flip(0))})
    assert found["known_found_of_100"] == 1 and found["known_same"] == pytest.approx(1)
    assert found["mixed_found_of_100"] < 0.1
    for name in ("known", "mixed"):
        assert abs(found[f"{name}_others"]) < 0.1 < found[f"{name}_others_99_percent"]


class Corner(Colour):
    """A model that looks at the backdrop alone."""

    def embed_images(self, images: Tensor) -> Tensor:
        return super().embed_images(images[..., :3, :3])


def test_what_a_model_does_not_see_leaves_its_cosine_at_1() -> None:
    found = changed_alone(Corner(), 5, seed=4)
    assert found.pop("background") < 0.999 < 0.99999 < min(found.values())


def test_held_out_people_are_drawn_and_generated_twice(config: Config) -> None:
    pairs = held_out_pairs(load_generator(config.generator), 6, seed=3)
    again = held_out_pairs(load_generator(config.generator), 6, seed=3)
    assert set(pairs) == {"drawn", "styled", "generated"}
    for name, (first, second) in pairs.items():
        assert first.shape == second.shape == (6, 3, 64, 64)
        assert (first - second).abs().mean(dim=(1, 2, 3)).min() > 1e-3
        assert torch.equal(first, again[name][0]) and torch.equal(second, again[name][1])
    # The collar and the backdrop belong to the person.
    first, second = pairs["drawn"]
    torch.testing.assert_close(first[..., :4, 0], second[..., :4, 0])
    torch.testing.assert_close(first[..., -1, 12], second[..., -1, 12])


class StopAt(Stop):
    """Asks to stop during the second step."""

    left = 2

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        """Read once a step."""
        self.left -= 1
        return 15 if self.left == 0 else None

    @signal.setter
    def signal(self, number: int | None) -> None:
        pass


def test_a_stopped_run_goes_on_to_the_same_weights(config: Config) -> None:
    whole = train_identity(config, Stop())
    stopped = replace(config, out=config.out.with_name("stopped"))
    with pytest.raises(Stopped):
        train_identity(stopped, StopAt())
    assert torch.load(stopped.out / CHECKPOINT, weights_only=True)["step"] == 2
    with pytest.raises(ValueError, match="of other settings: noise"):
        train_identity(replace(stopped, noise=0.2), Stop())
    for name, tensor in train_identity(stopped, Stop()).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_run_ends_with_a_file_and_its_figures(config: Config) -> None:
    run(config)
    path = config.out / "identity.safetensors"
    report = (config.out / "report.json").read_text()
    figures = json.loads(report)
    assert 0 <= figures["drawn_found_of_100"] <= 1
    log = json.loads((config.out / LOG).read_text().splitlines()[-1])
    # Measured on other people than those of the log.
    assert set(figures) - {"changed_alone"} == set(log) - {"step", "loss"}
    assert figures["drawn_same"] != log["drawn_same"]
    assert set(figures["changed_alone"]) == set(IDENTITY)

    elsewhere = config.out.with_name("elsewhere")
    run(replace(config, out=elsewhere, measure=path))
    assert (elsewhere / "report.json").read_text() == report
    assert [file.name for file in elsewhere.iterdir()] == ["report.json"]
