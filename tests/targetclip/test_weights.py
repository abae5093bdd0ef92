"""Files of tensors: the same bytes for the same content, and every damage named."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from targetclip.weights import load_weights, read_tensors, save_half, save_tensors, tensor_bytes

TENSORS = {"b": torch.arange(3.0), "a": torch.ones(2, 2), "ü": torch.zeros(1)}
METADATA = {"format": "kind/1", "record": '{"naïve": 1}', "config": "x", "z": "", "y": "1"}
WRITE = """
import sys, torch
from targetclip.weights import tensor_bytes
tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
metadata = {name: name for name in "qwertyuiopasdfghjkl"}
sys.stdout.write(tensor_bytes(tensors, metadata).hex())
"""


def read(path: Path, *formats: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    return read_tensors(path, "kind", formats or ("kind/1",), "make one")


def test_tensors_and_their_record_come_back(tmp_path: Path) -> None:
    save_tensors(tmp_path / "f.safetensors", TENSORS, METADATA)
    metadata, tensors = read(tmp_path / "f.safetensors")
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert file.metadata() == METADATA


def test_the_same_content_gives_the_same_bytes_in_every_process() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", WRITE], check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    backwards = dict(reversed(METADATA.items()))
    assert tensor_bytes(TENSORS, METADATA) == tensor_bytes(TENSORS, backwards)


def test_another_format_a_damaged_file_and_no_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match="no such kind file: make one"):
        read(path)
    save_tensors(path, TENSORS, METADATA)
    with pytest.raises(ValueError, match="expected format other/1 or other/2, found kind/1"):
        read(path, "other/1", "other/2")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="expected a safetensors file"):
        read(path)


def test_a_picture_given_as_weights_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "face.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match=r"\(kind\), found a picture \(PNG\); give .* --target"):
        read(path)


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    state = nn.Linear(2, 3).state_dict()
    for damaged, message in (
        ({"weight": state["weight"]}, "do not fit"),
        ({**state, "weight": torch.ones(3, 3)}, "do not fit"),
        ({**state, "bias": torch.ones(3, dtype=torch.int64)}, "do not fit"),
        ({**state, "bias": torch.tensor([0.0, float("nan"), 0.0])}, "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            load_weights(nn.Linear(2, 3), damaged, path)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    save_half(tmp_path / "f.safetensors", module, {"format": "kind/1"})
    _, state = read(tmp_path / "f.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    load_weights(other, state, tmp_path)
    torch.testing.assert_close(other.weight, module.weight, rtol=1e-3, atol=1e-4)
    assert other.weight.dtype == torch.float32
