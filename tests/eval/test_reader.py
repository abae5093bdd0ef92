"""The attribute reader's network, its readings and its file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.illustrated.codes import ATTRIBUTES, COUNTS, one_hot
from eval.reader import (
    FORMAT,
    HAIR_COLOURS,
    NAMES,
    OUTPUTS,
    PRESENT,
    READINGS,
    SPANS,
    AvatarReader,
    described,
    load_reader,
    save_reader,
    seen_identity,
    with_presence,
)
from targetclip.encoders.inverter import Inverter, InverterConfig, save_inverter


@pytest.fixture(scope="module")
def reader() -> AvatarReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AvatarReader().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def error_of(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_reader(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def face(**values: str) -> Tensor:
    """The readings of a face, by values of its attributes; the first where none is said."""
    known = [attribute.values.index(values.get(attribute.name, attribute.values[0]))
             for attribute in ATTRIBUTES]  # fmt: skip
    return with_presence(one_hot(torch.tensor([known])))[0]


def test_it_judges_pictures_of_any_size_as_other_judges_do(reader: AvatarReader) -> None:
    small = images().clamp(-1, 1)
    _, readings = reader.read(small)
    torch.testing.assert_close(reader.embed_images(small), readings, atol=1e-4, rtol=1e-4)
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert (reader.embed_images(large) - readings).abs().max() < 0.1
    with pytest.raises(ValueError, match="expected square images, found 128 x 64"):
        reader.embed_images(small[..., :64])
    other = AvatarReader()
    assert other.fingerprint != reader.fingerprint == reader.fingerprint


def test_readings_are_shares_and_each_picture_has_its_own(reader: AvatarReader) -> None:
    _, found = reader.read(100 * images())
    assert found.shape == (3, OUTPUTS) and found.min() >= 0
    for span in SPANS.values():
        torch.testing.assert_close(found[:, span].sum(dim=1), torch.ones(3))
    _, together = reader.read(images())
    for i in range(3):
        torch.testing.assert_close(reader.read(images()[i : i + 1])[1][0], together[i])
    assert not torch.allclose(together[0], together[1], atol=1e-6)


def test_readings_name_the_values_that_the_network_finds_likeliest(reader: AvatarReader) -> None:
    _, found = reader.read(images())
    values = reader.values(images().clamp(-1, 1))
    for i, name in enumerate(NAMES):
        assert torch.equal(found[:, SPANS[name]].argmax(dim=1), values[:, i])


def test_what_is_there_follows_from_the_values() -> None:
    bare = face()
    dressed = face(top="turban", facialHair="beardLight", accessories="round")
    for kind in PRESENT:
        assert bare[SPANS[kind]].tolist() == [1, 0]
        assert dressed[SPANS[kind]].tolist() == [0, 1]
    assert face(facialHair="moustacheFancy")[SPANS["beard"]].tolist() == [1, 0]


def test_shades_hide_eyes_and_brows_and_nothing_else() -> None:
    clear, shaded = face(accessories="round"), face(accessories="sunglasses")
    seen = seen_identity(torch.stack([clear, shaded]))
    names = [{r.name for r in READINGS if row[r.start]} for row in seen]
    assert names[0] == {r.name for r in READINGS if not r.essence}
    assert names[0] - names[1] == {"eyes", "eyebrows"} and names[1] < names[0]


def test_checks_from_outside_get_booleans_and_a_colour(reader: AvatarReader) -> None:
    found = reader.present(images())
    assert set(found) == {"glasses", "beard", "hat", "hair_colour"}
    assert all(found[kind].dtype == torch.bool and len(found[kind]) == 3 for kind in PRESENT)
    assert found["hair_colour"].max() < len(HAIR_COLOURS) == COUNTS[NAMES.index("hairColor")]


def test_a_saved_reader_is_the_same_but_for_half_precision(
    reader: AvatarReader, tmp_path: Path
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
    reader: AvatarReader, tmp_path: Path
) -> None:
    path = tmp_path / "reader.safetensors"
    state = reader.state_dict()
    for metadata in (
        {"format": "another/1", "reads": described()},
        {"format": FORMAT, "reads": json.dumps({"hat": []})},
        {"format": FORMAT, "reads": "{"},
        {"format": FORMAT},
        None,
    ):
        save_file(state, path, metadata)
        assert "make one with python -m train.world.reader" in error_of(path)
    save_file(dict(list(state.items())[1:]), path, {"format": FORMAT, "reads": described()})
    assert "weights do not fit" in error_of(path)
    save_inverter(
        Inverter(
            InverterConfig(
                resolution=16, num_ws=6, w_dim=8, generator="a" * 64, channels=(8,), hidden=8
            )
        ),
        path,
    )
    assert FORMAT in error_of(path)


def test_missing_cut_and_foreign_files_are_refused(reader: AvatarReader, tmp_path: Path) -> None:
    path = tmp_path / "reader.safetensors"
    assert "no such reader" in error_of(path)
    save_reader(reader, path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-4], b"not safetensors at all"):
        path.write_bytes(content)
        assert "safetensors" in error_of(path)
