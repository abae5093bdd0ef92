"""The attribute reader's network and its file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.drawn.readings import OUTPUTS, READINGS
from eval.reader import FORMAT, AttributeReader, agreement, load_reader, mean_errors, save_reader
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter

NAMES = json.dumps([reading.name for reading in READINGS])


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AttributeReader().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_reader(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_readings_are_between_nothing_and_one_and_each_picture_has_its_own(
    reader: AttributeReader,
) -> None:
    found = reader(100 * images())
    assert found.shape == (3, OUTPUTS) and found.min() >= 0 and found.max() <= 1
    together = reader(images())
    for i in range(3):
        torch.testing.assert_close(reader(images()[i : i + 1])[0], together[i])
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_saved_reader_is_the_same_but_for_half_precision(
    reader: AttributeReader, tmp_path: Path
) -> None:
    path = tmp_path / "reader.safetensors"
    save_reader(reader, path)
    loaded = load_reader(path)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in reader.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    torch.testing.assert_close(loaded(images()), reader(images()), rtol=1e-2, atol=2e-3)


def test_a_reader_of_other_attributes_or_another_network_is_refused(
    reader: AttributeReader, tmp_path: Path
) -> None:
    path = tmp_path / "reader.safetensors"
    state = reader.state_dict()
    for metadata in (
        {"format": "another/1", "readings": NAMES},
        {"format": FORMAT, "readings": json.dumps(["hat"])},
        {"format": FORMAT, "readings": "{"},
        {"format": FORMAT},
        None,
    ):
        save_file(state, path, metadata)
        assert "make one with python -m train.drawn.reader" in error_of(path)
    save_file(dict(list(state.items())[1:]), path, {"format": FORMAT, "readings": NAMES})
    assert "weights do not fit" in error_of(path)
    save_inverter(
        Inverter(
            InverterConfig(
                resolution=16, num_ws=6, w_dim=8, generator="a" * 64, channels=(8,), hidden=8
            )
        ),
        path,
    )
    assert "targetclip-reader/1" in error_of(path)


def test_missing_cut_and_foreign_files_are_refused(reader: AttributeReader, tmp_path: Path) -> None:
    path = tmp_path / "reader.safetensors"
    assert "no such reader" in error_of(path)
    save_reader(reader, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-4], b"not safetensors at all"):
        path.write_bytes(content)
        assert "safetensors" in error_of(path)


def test_errors_are_taken_over_the_faces_that_show_the_reading() -> None:
    truth, seen = torch.zeros(3, OUTPUTS), torch.ones(3, OUTPUTS, dtype=torch.bool)
    found = truth.clone()
    found[0] = 0.5
    hat = next(reading for reading in READINGS if reading.name == "hat")
    seen[0, hat.span] = False
    errors = mean_errors(found, truth, seen)
    assert errors["hat"] == 0
    assert errors["hair_colour"] == errors["nose"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize(("name", "limit"), [("hat", 0.5), ("glasses", 0.5), ("beard", 0.25)])
def test_agreement_is_about_being_there(name: str, limit: float) -> None:
    at = next(reading.start for reading in READINGS if reading.name == name)
    found, truth = torch.zeros(4, OUTPUTS), torch.zeros(4, OUTPUTS)
    found[:, at] = torch.tensor([limit + 0.01, limit - 0.01, 1.0, 0.0])
    truth[:, at] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert agreement(found, truth, name) == 0.75
