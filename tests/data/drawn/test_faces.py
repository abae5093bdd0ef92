"""Latents that stand for faces, faces by number, and banks of pictures."""

import math
import multiprocessing.dummy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.drawn import faces
from data.drawn.faces import (
    GROUPS,
    bank,
    draw_parameters,
    draw_wide,
    faces_from_z,
    psnr,
    sample_z,
    to_images,
    wide_face,
    ws_from_z,
)
from data.drawn.sketch import LAYERS, NAMES, Extras, Face, Style, draw
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config

KEYS = [(0, 0), (0, 1), (5, 0)]


def random_z(count: int = 4, z_dim: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, len(GROUPS), z_dim, generator=generator)


def test_a_parameter_is_the_normal_cdf_of_its_groups_normalised_z() -> None:
    z = random_z()
    found = faces_from_z(z)
    for face in range(len(z)):
        for i, name in enumerate(NAMES):
            group = z[face, GROUPS.index(LAYERS[name])].double()
            unit = group[i] / group.square().mean().sqrt()
            expected = 0.5 * (1 + math.erf(float(unit) / math.sqrt(2)))
            assert float(found[face, i]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_parameters_are_in_range_and_do_not_know_the_length_of_z(scale: float) -> None:
    found = faces_from_z(scale * random_z(500))
    assert found.min() >= 0 and found.max() <= 1
    torch.testing.assert_close(found, faces_from_z(random_z(500)), rtol=1e-3, atol=1e-3)


def test_parameters_are_spread_evenly() -> None:
    values = faces_from_z(random_z(4000)).flatten()
    counts = torch.histc(values, 10, 0, 1) / len(values)
    assert (counts - 0.1).abs().max() < 0.01


def test_every_second_latent_mixes_groups_and_the_seed_decides() -> None:
    z = sample_z(6, 40, seed=1)
    assert torch.equal(z, sample_z(6, 40, seed=1))
    assert not torch.equal(z, sample_z(6, 40, seed=2))
    same = [(latent == latent[0]).all().item() for latent in z]
    assert same == [True, False] * 3


def test_each_group_of_layers_takes_its_own_w() -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(
                resolution=64, w_dim=8, z_dim=40, mapping_layers=2, channels=(4, 4, 4, 4, 4)
            )
        )
        z = random_z(2)
        ws = ws_from_z(generator, z)
        layers = {0: (0, 1, 2), 1: (3, 4, 5), 2: (6, 7, 8, 9)}
        for group, places in layers.items():
            expected = generator.mapping(z[:, group])
            for place in places:
                torch.testing.assert_close(ws[:, place], expected[:, place])
        assert generator.synthesis(ws).shape == (2, 3, 64, 64)


def test_a_number_names_a_face_and_no_two_are_the_same() -> None:
    keys = [(seed, index) for seed in range(5) for index in range(40)]
    found = [wide_face(*key) for key in keys]
    assert found == [wide_face(*key) for key in keys]
    assert len({face for face, _, _ in found}) == len(keys)
    assert all(0 <= value <= 1 for face, _, _ in found for value in face.values())


def test_styles_and_extras_are_as_common_as_asked() -> None:
    plain = [wide_face(1, i, styled=0.0, extra=0.0) for i in range(50)]
    assert {triple[1:] for triple in plain} == {(Extras(), Style())}
    wide = [wide_face(1, i, styled=1.0, extra=1.0) for i in range(200)]
    assert all(extras != Extras() and style != Style() for _, extras, style in wide)
    kinds: Counter[str] = Counter()
    for _, extras, _ in wide:
        kinds.update(name for name, value in vars(extras).items() if value)
    assert len(kinds) == 6 and min(kinds.values()) > 20


def test_a_face_is_drawn_from_its_parameters_and_from_its_number() -> None:
    face, extras, style = wide_face(3, 4)
    np.testing.assert_array_equal(draw_wide((3, 4)), np.asarray(draw(face, extras, style)))
    np.testing.assert_array_equal(draw_parameters(face.values()), np.asarray(draw(face)))
    assert Face(*face.values().tolist()) == face


# Banks


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in threads: processes take seconds to start."""
    monkeypatch.setattr(faces, "get_context", lambda kind: multiprocessing.dummy)


def test_a_bank_is_drawn_by_processes_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "bank.npy"
    pictures = bank(path, KEYS, draw_wide)
    for key, picture in zip(KEYS, pictures, strict=True):
        np.testing.assert_array_equal(picture, draw_wide(key))
    assert [entry.name for entry in path.parent.iterdir()] == ["bank.npy"]


def undrawn(key: tuple[int, int]) -> np.ndarray:
    raise AssertionError("drawn again")


def test_a_kept_bank_is_not_drawn_again_and_cannot_be_changed(
    tmp_path: Path, threads: None
) -> None:
    path = tmp_path / "bank.npy"
    first = np.array(bank(path, KEYS, draw_wide))
    again = bank(path, KEYS, undrawn)
    np.testing.assert_array_equal(first, again)
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 0


def test_a_drawing_that_fails_leaves_no_bank(tmp_path: Path, threads: None) -> None:
    path = tmp_path / "bank.npy"

    def fails_late(key: tuple[int, int]) -> np.ndarray:
        if key == KEYS[-1]:
            raise MemoryError
        return draw_wide(key)

    with pytest.raises(MemoryError):
        bank(path, KEYS, fails_late)
    assert not list(tmp_path.iterdir())
    assert len(bank(path, KEYS, draw_wide)) == len(KEYS)


@pytest.mark.parametrize("shape", [(2, 64, 64, 3), (3, 32, 32, 3), (3,)])
def test_a_bank_of_another_size_is_refused_and_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "bank.npy"
    np.save(path, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="delete it") as caught:
        bank(path, KEYS, undrawn)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.exists()


def test_pictures_of_a_bank_become_images_without_touching_it(
    tmp_path: Path, threads: None
) -> None:
    pictures = bank(tmp_path / "bank.npy", KEYS, draw_wide)
    images = to_images(pictures[:])
    assert images.shape == (3, 3, 64, 64) and images.dtype == torch.float32
    expected = pictures[1, 10, 20].astype(float) / 127.5 - 1
    np.testing.assert_allclose(images[1, :, 10, 20], expected, atol=1e-6)
    images.zero_()
    np.testing.assert_array_equal(pictures[0], draw_wide(KEYS[0]))


def test_psnr_is_in_decibels_of_the_whole_range() -> None:
    truth = torch.zeros(2, 3, 8, 8)
    assert psnr(truth + 0.2, truth) == pytest.approx(20, abs=1e-3)  # a tenth of the range
    assert psnr(truth + 0.02, truth) == pytest.approx(40, abs=1e-3)
    beyond = torch.ones(1, 3, 8, 8)
    assert psnr(5 * beyond, beyond - 0.2) == pytest.approx(20, abs=1e-3)  # as a screen shows it
