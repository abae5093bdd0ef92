"""Direction files: what is written is read again, and nothing else is."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from targetclip.directions import FORMAT, direction_bytes, load_direction
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config

RECORD = {"method": "optimizer", "recipe": "release", "seed": 3, "settings": {"steps": 5}}


@cache
def generator(seed: int = 0, resolution: int = 16) -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = {16: (4, 4, 4), 32: (4, 4, 4, 4)}[resolution]
        return StyleGAN2(StyleGAN2Config(resolution, 8, 8, 1, widths))


def numbers(seed: int = 0) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def error_of(path: Path, of: StyleGAN2) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_direction(path, of)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_a_direction_and_its_record_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    path.write_bytes(direction_bytes(numbers(), generator(), RECORD))
    stored = load_direction(path, generator())
    assert torch.equal(stored.direction, numbers()) and stored.record == RECORD


def test_a_direction_that_needs_a_gradient_or_lies_across_memory_is_written_too(
    tmp_path: Path,
) -> None:
    path = tmp_path / "direction.safetensors"
    vector = numbers().double().T.contiguous().T.requires_grad_(True)
    path.write_bytes(direction_bytes(vector, generator(), {}))
    stored = load_direction(path, generator()).direction
    assert stored.dtype == torch.float32 and not stored.requires_grad
    assert torch.equal(stored, numbers())


def test_a_direction_of_another_generator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    path.write_bytes(direction_bytes(numbers(), generator(), RECORD))
    for other in (generator(seed=1), generator(resolution=32)):
        message = error_of(path, other)
        assert generator().fingerprint[:12] in message and other.fingerprint[:12] in message
    assert "[6, 8]" in message and "[8, 8]" in message


@pytest.mark.parametrize(
    "vector",
    [
        torch.full((6, 8), float("nan")),
        torch.full((6, 8), float("inf")),
        torch.zeros(6, 8, dtype=torch.float64),
        torch.zeros(6, 8, dtype=torch.int64),
    ],
)
def test_values_that_are_no_finite_float32_are_refused(tmp_path: Path, vector: Tensor) -> None:
    path = tmp_path / "direction.safetensors"
    metadata = {"format": FORMAT, "generator": generator().fingerprint, "record": "{}"}
    path.write_bytes(save({"direction": vector}, metadata))
    assert "finite float32" in error_of(path, generator())


@pytest.mark.parametrize("record", ["{", "[1]", "null", "3", "[" * 100_000])
def test_a_damaged_record_is_refused(tmp_path: Path, record: str) -> None:
    path = tmp_path / "direction.safetensors"
    metadata = {"format": FORMAT, "generator": generator().fingerprint, "record": record}
    path.write_bytes(save({"direction": numbers()}, metadata))
    assert "record is damaged" in error_of(path, generator())


def test_files_that_are_no_directions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    assert "no such" in error_of(path, generator())
    assert "no such" in error_of(tmp_path, generator())
    path.write_bytes(save({"weight": numbers()}))
    assert FORMAT in error_of(path, generator())
    path.write_bytes(save({"direction": numbers()}, {"format": "another/1"}))
    assert "another/1" in error_of(path, generator())
    path.write_bytes(save({"weight": numbers()}, {"format": FORMAT}))
    assert FORMAT in error_of(path, generator())
    for content in (b"", b"\0" * 8, b"\xff" * 64, b"a picture", json.dumps(RECORD).encode()):
        path.write_bytes(content)
        assert "safetensors" in error_of(path, generator())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_gives_a_direction_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(direction_bytes(numbers(), generator(), RECORD))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else (
        content
    )  # fmt: skip
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        assert load_direction(path, generator()).direction.isfinite().all()
    except ValueError as error:
        assert "\n" not in str(error) and str(path) in str(error)
