"""Direction files and files of the release: each kind is read, and every other file is refused."""

import io
import json
import logging
import pickle
from collections import OrderedDict
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Touch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from targetclip.directions import (
    FORMAT,
    direction_bytes,
    load_direction,
    looks_like_latent,
    read_released,
    released_direction,
    released_latents,
    warn_of_latent,
)
from targetclip.generators.stylegan2 import (
    MAPPING_LR_MULTIPLIER,
    StyleGAN2,
    StyleGAN2Config,
)
from targetclip.scene import random_latents

FIXTURES = Path(__file__).parents[1] / "fixtures"
NUM_WS, W_DIM = 6, 8

RECORD = {"method": "optimizer", "recipe": "release", "seed": 3, "settings": {"steps": 5}}


@cache
def generator(seed: int = 0, resolution: int = 16) -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = {16: (4, 4, 4), 32: (4, 4, 4, 4)}[resolution]
        return StyleGAN2(
            StyleGAN2Config(
                resolution=resolution, w_dim=8, z_dim=8, mapping_layers=1, channels=widths
            )
        )


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (NUM_WS, W_DIM)), generator=torch.Generator().manual_seed(seed))


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


# Files of the release


def saved(folder: Path, content: Any, name: str = "joker") -> Path:
    """A file as the release saves it: arrays as .npy, all else as .pt."""
    path = folder / f"{name}{'.npy' if isinstance(content, np.ndarray) else '.pt'}"
    if isinstance(content, np.ndarray):
        np.save(path, content, allow_pickle=True)
    else:
        torch.save(content, path)
    return path


def released_error(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_released(path)
    message = str(caught.value)
    assert "\n" not in message and repr(str(path)) in message
    return message


# Files of the release that are read


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (4,), (4, 1), (1, 4)])
@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_axes_before_the_last_two_become_one(
    tmp_path: Path, lead: tuple[int, ...], suffix: str
) -> None:
    tensor = numbers(*lead, NUM_WS, W_DIM)
    items = read_released(saved(tmp_path, tensor.numpy() if suffix == "npy" else tensor))
    assert torch.equal(items, tensor.reshape(-1, NUM_WS, W_DIM))


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", "longdouble"])
def test_numpy_numbers_of_any_width_and_byte_order_become_float32(
    tmp_path: Path, dtype: str
) -> None:
    array = numbers(1, NUM_WS, W_DIM).numpy().astype(dtype)
    items = read_released(saved(tmp_path, array))
    assert items.dtype == torch.float32
    np.testing.assert_array_equal(items.numpy(), array.astype(np.float32))


def test_an_array_in_the_order_of_fortran_keeps_its_axes(tmp_path: Path) -> None:
    array = numbers(NUM_WS, W_DIM).numpy()
    items = read_released(saved(tmp_path, np.asfortranarray(array)))
    np.testing.assert_array_equal(items[0].numpy(), array)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_any_width_become_float32_without_a_gradient(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensor = numbers(1, NUM_WS, W_DIM).to(dtype).requires_grad_(True)
    items = read_released(saved(tmp_path, tensor))
    assert items.dtype == torch.float32 and not items.requires_grad
    assert torch.equal(items, tensor.detach().float())


@pytest.mark.parametrize("kind", [list, tuple])
def test_the_tensors_of_a_list_are_its_items_in_order(tmp_path: Path, kind: type) -> None:
    tensors = [numbers(1, NUM_WS, W_DIM), numbers(NUM_WS, W_DIM, seed=1)]
    items = read_released(saved(tmp_path, kind(tensors)))
    assert torch.equal(items, torch.stack([tensors[0][0], tensors[1]]))


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_the_only_tensor_of_a_dict_is_read(tmp_path: Path, kind: type) -> None:
    tensor = numbers(1, NUM_WS, W_DIM)
    path = saved(tmp_path, kind(direction=tensor, steps=1000, target="joker"))
    assert torch.equal(read_released(path), tensor)


def test_a_parameter_is_a_tensor(tmp_path: Path) -> None:
    tensor = numbers(NUM_WS, W_DIM)
    assert torch.equal(read_released(saved(tmp_path, torch.nn.Parameter(tensor)))[0], tensor)


def test_the_direction_a_released_run_saved_is_read_as_it_was(tmp_path: Path) -> None:
    with np.load(FIXTURES / "official_trajectory.npz") as arrays:
        array = arrays["saved_direction"]
    direction = released_direction(saved(tmp_path, array), 8, 512)
    np.testing.assert_array_equal(direction.numpy(), array[0])


def test_latents_are_read_however_many(tmp_path: Path) -> None:
    for count in (1, 4):
        latents = numbers(count, NUM_WS, W_DIM)
        assert torch.equal(released_latents(saved(tmp_path, latents), NUM_WS, W_DIM), latents)


# Files that are refused


@pytest.mark.parametrize("read", [released_direction, released_latents])
@pytest.mark.parametrize("size", [(NUM_WS, W_DIM + 1), (NUM_WS - 1, W_DIM), (W_DIM, NUM_WS)])
def test_another_size_than_the_generators_is_refused(
    tmp_path: Path, read: Any, size: tuple[int, int]
) -> None:
    path = saved(tmp_path, numbers(1, *size).numpy())
    with pytest.raises(ValueError) as caught:
        read(path, NUM_WS, W_DIM)
    message = str(caught.value)
    assert f"[{NUM_WS}, {W_DIM}]" in message and str(list(size)) in message
    assert "\n" not in message and repr(str(path)) in message


def test_a_file_of_several_is_no_direction(tmp_path: Path) -> None:
    path = saved(tmp_path, numbers(4, NUM_WS, W_DIM))
    with pytest.raises(ValueError, match="expected one direction, found 4"):
        released_direction(path, NUM_WS, W_DIM)


@pytest.mark.parametrize(
    "shape", [(), (8,), (2, 3, 6, 8), (2, 1, 3, 6, 8), (0, 6, 8), (1, 0, 8), (1, 6, 0)]
)
@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    tensor = torch.zeros(shape)
    path = saved(tmp_path, tensor.numpy() if suffix == "npy" else tensor)
    assert f"found {list(shape)}" in released_error(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_numbers_that_are_no_finite_float32_are_refused(
    tmp_path: Path, value: float, suffix: str
) -> None:
    tensor = numbers(1, NUM_WS, W_DIM).double()
    tensor[0, 2, 3] = value
    path = saved(tmp_path, tensor.numpy() if suffix == "npy" else tensor)
    assert "NaN or infinity" in released_error(path)


@pytest.mark.parametrize(
    "content",
    [
        np.zeros((6, 8), np.int64),
        np.zeros((6, 8), np.complex64),
        np.full((6, 8), "text"),
        np.zeros((6, 8), [("direction", "f4")]),
        torch.zeros(6, 8, dtype=torch.int32),
        torch.zeros(6, 8, dtype=torch.complex64),
        torch.zeros(6, 8).to_sparse(),
        torch.zeros(6, 8, device="meta"),
        [torch.zeros(6, 8), 3],
        [[torch.zeros(6, 8)]],
        "text",
        None,
    ],
)
def test_what_is_no_array_of_floating_point_numbers_is_refused(
    tmp_path: Path, content: Any
) -> None:
    assert "expected an array of floating-point numbers" in released_error(saved(tmp_path, content))


def test_dicts_and_lists_that_leave_a_choice_are_refused(tmp_path: Path) -> None:
    tensor = numbers(NUM_WS, W_DIM)
    assert "with 2" in released_error(saved(tmp_path, {"direction": tensor, "target": tensor}))
    assert "with 0" in released_error(saved(tmp_path, {"steps": 1000}))
    assert "empty list" in released_error(saved(tmp_path, []))
    unequal = released_error(saved(tmp_path, [tensor, numbers(5, W_DIM)]))
    assert "[5, 8], [6, 8]" in unequal


def test_files_that_ask_to_run_code_are_refused_and_run_none(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = Touch(sprung)
    boxed = np.array([trap], dtype=object)
    for content in (boxed, trap, [numbers(NUM_WS, W_DIM), trap]):
        assert "asks to run code" in released_error(saved(tmp_path, content))
    path = tmp_path / "pickled.npy"
    path.write_bytes(pickle.dumps(trap))
    assert "asks to run code" in released_error(path)
    assert not sprung.exists()


def test_files_that_are_not_there_or_of_another_kind_are_refused(tmp_path: Path) -> None:
    assert "no file at" in released_error(tmp_path / "joker.npy")
    (tmp_path / "folder.pt").mkdir()
    assert "no file at" in released_error(tmp_path / "folder.pt")
    for name in ("joker.safetensors", "joker.npz", "joker", "joker.png"):
        (tmp_path / name).write_bytes(b"anything")
        assert ".npy or .pt" in released_error(tmp_path / name)
    archive = io.BytesIO()
    np.savez(archive, direction=numbers(NUM_WS, W_DIM).numpy())
    for content in (b"", b"\0" * 64, b"no array", b"\x93NUMPY"):
        for suffix in ("npy", "pt"):
            path = tmp_path / f"damaged.{suffix}"
            path.write_bytes(content)
            assert "damaged" in released_error(path)
    path = tmp_path / "renamed.npy"
    path.write_bytes(archive.getvalue())
    assert "floating-point" in released_error(path)


@pytest.mark.parametrize("suffix", ["npy", "pt"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_gives_finite_items_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    tensor = numbers(1, NUM_WS, W_DIM)
    folder = tmp_path_factory.getbasetemp()
    path = saved(folder, tensor.numpy() if suffix == "npy" else tensor, "damaged")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    # Of the header, mostly: wrong numbers cannot be noticed.
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, min(len(content), 160) - 1))] = data.draw(
            st.integers(0, 255)
        )
    path.write_bytes(content)
    try:
        assert read_released(path).isfinite().all()
    except ValueError as error:
        assert "\n" not in str(error) and repr(str(path)) in str(error)


# Latents given as directions, and pictures


@cache
def off_centre() -> StyleGAN2:
    """A generator of random weights, whose mean w is far from 0."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sizes = StyleGAN2Config(
            resolution=16, w_dim=64, z_dim=64, mapping_layers=1, channels=(8, 8, 8)
        )
        network = StyleGAN2(sizes)
        network.mapping_network.layers[0].get_parameter("bias").fill_(4 / MAPPING_LR_MULTIPLIER)
        many = network.mapping_network(torch.randn(4000, 64))
        network.mapping_network.w_avg.copy_(many.mean(dim=0))
    return network


@pytest.mark.parametrize("truncation", [0.3, 0.7, 1.0])
def test_a_latent_is_told_from_a_direction(truncation: float) -> None:
    latents = random_latents(off_centre(), range(50), truncation)
    assert all(looks_like_latent(latent, off_centre()) for latent in latents)
    others = random_latents(off_centre(), range(50, 100), truncation)
    for factor in (0.2, 1.0, 1.5):
        assert not any(looks_like_latent(factor * d, off_centre()) for d in latents - others)


def test_where_the_mean_is_nothing_no_latent_is_told_from_a_direction() -> None:
    latents = random_latents(off_centre(), range(50), 1.0) - off_centre().mean_w
    centred = deepcopy(off_centre())
    centred.mapping_network.w_avg.zero_()
    assert not any(looks_like_latent(latent, centred) for latent in latents)


def test_a_file_of_a_latent_given_as_a_direction_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = random_latents(off_centre(), range(2), 0.7)
    with caplog.at_level(logging.WARNING):
        warn_of_latent(tmp_path / "joker.npy", first - second, off_centre())
        assert not caplog.records
        warn_of_latent(tmp_path / "me.pt", first, off_centre())
    assert "me.pt" in caplog.text and "looks like a latent" in caplog.text


@pytest.mark.parametrize("name", ["face.png", "face.safetensors", "face.pt"])
def test_a_picture_is_no_direction_whatever_its_name(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    message = error_of(tmp_path / name, generator())
    assert "found a picture (PNG)" in message and "--target" in message
    with pytest.raises(ValueError, match="found a picture"):
        read_released(tmp_path / name)
