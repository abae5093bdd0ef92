"""World files: what they may say, and what loading them gives."""

import shutil
from pathlib import Path

import pytest
import torch

from targetclip.identity import IdentityConfig, IdentityModel, SketchIdentity, save_identity
from targetclip.world import BUNDLED, load_parts, load_world, world_names

LEAST = 'name = "a"\ngenerator = "g.pt"\nembedder = "ViT-B-32"\n'


def written(folder: Path, text: str) -> str:
    path = folder / "world.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(name: str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_world(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_bundled_world_is_found_by_name_and_names_files_beside_it() -> None:
    assert "sketch64" in world_names()
    world = load_world("sketch64")
    assert world.name == "sketch64"
    assert world.generator.parent == BUNDLED / "sketch64"
    assert world.inverter is not None and world.inverter.parent == BUNDLED / "sketch64"


def test_paths_are_relative_to_the_file_and_not_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (tmp_path / name / "clip").mkdir(parents=True)
        (tmp_path / name / "weights.pt").touch()
    monkeypatch.chdir(tmp_path / "there")
    text = 'name = "a"\ngenerator = "g.pt"\nembedder = "clip"\ninverter = "i.safetensors"\n'
    world = load_world(written(tmp_path / "here", text))
    assert world.generator == tmp_path / "here" / "g.pt"
    assert world.embedder == str(tmp_path / "here" / "clip")
    assert world.inverter == tmp_path / "here" / "i.safetensors"
    world = load_world(written(tmp_path / "here", LEAST + 'pretrained = "weights.pt"\n'))
    assert world.pretrained == str(tmp_path / "here" / "weights.pt")


def test_what_is_not_a_file_beside_the_world_stays_a_name(tmp_path: Path) -> None:
    world = load_world(written(tmp_path, LEAST + 'pretrained = "openai"\n'))
    assert (world.embedder, world.pretrained) == ("ViT-B-32", "openai")


def test_what_a_world_leaves_out_has_a_default(tmp_path: Path) -> None:
    world = load_world(written(tmp_path, LEAST))
    assert (world.recipe, world.strength, world.truncation) == ("consistent", 1.0, 0.7)
    assert world.inverter is None and world.pretrained is None and world.identity is None
    assert (world.mapper, world.neutral) == (None, ())


def test_a_world_says_which_mapper_it_has_and_how_texts_are_read(tmp_path: Path) -> None:
    texts = 'neutral = ["a face", "a drawing"]\n'
    world = load_world(written(tmp_path, LEAST + 'mapper = "m.safetensors"\n' + texts))
    assert world.mapper == tmp_path / "m.safetensors"
    assert world.neutral == ("a face", "a drawing")


@pytest.mark.parametrize("name", ["sketch", "", "..", "sketch64/", "/etc", "a b"])
def test_an_unknown_world_is_refused_with_the_names_of_known_ones(name: str) -> None:
    assert "sketch64" in error_of(name) and repr(name) in error_of(name)


def test_a_world_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere.toml")
    assert path in error_of(path)
    (tmp_path / "folder.toml").mkdir()
    assert "folder.toml" in error_of(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml", "not a world file"),
        ('name = "a"\n', "missing embedder, generator"),
        (LEAST + "colour = 1\n", "unknown colour"),
        (LEAST + 'recipe = "guess"\n', "release, paper, consistent, found 'guess'"),
        (LEAST + 'strength = "strong"\n', "strength must be a number"),
        (LEAST + "strength = true\n", "strength must be a number"),
        (LEAST + "strength = nan\n", "strength must be finite"),
        (LEAST + "truncation = -inf\n", "truncation must be finite"),
        (LEAST + "inverter = 3\n", "inverter must be a text"),
        (LEAST + "identity = true\n", "identity must be a text"),
        (LEAST + "mapper = 3\n", "mapper must be a text"),
        (LEAST + 'neutral = "a face"\n', "neutral must be a list of texts, found 'a face'"),
        (LEAST + 'neutral = ["a face", 1]\n', "neutral must be a list of texts"),
        ('name = 1\ngenerator = "g.pt"\nembedder = "b"\n', "name must be a text"),
    ],
)
def test_a_world_file_with_a_mistake_is_refused_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    name = written(tmp_path, text)
    assert name in error_of(name) and said in error_of(name)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    path.write_bytes(b'name = "\xff\xfe"')
    assert "not a world file" in error_of(str(path))


def test_the_parts_of_a_world_fit_each_other(tiny_world: Path) -> None:
    parts = load_parts(load_world(str(tiny_world)), torch.device("cpu"))
    assert parts.inverter is not None
    with torch.no_grad():
        images = parts.generator.synthesis(parts.generator.mapping(torch.zeros(2, 8)))
        assert parts.generator.synthesis(parts.inverter(images)).shape == (2, 3, 16, 16)
        assert parts.embedder.embed_images(images).shape == (2, parts.embedder.embed_dim)


def test_a_world_whose_files_are_not_there_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    world = load_world(written(tmp_path, tiny_world.read_text()))
    with pytest.raises(FileNotFoundError, match=r"generator\.safetensors"):
        load_parts(world, torch.device("cpu"))


def test_a_world_has_an_identity_model_if_its_file_names_one(
    tiny_world: Path, tmp_path: Path
) -> None:
    assert load_parts(load_world(str(tiny_world)), torch.device("cpu")).identity is None
    folder = tmp_path / "world"
    shutil.copytree(tiny_world.parent, folder)
    world = load_world(written(folder, tiny_world.read_text() + 'identity = "who.safetensors"\n'))
    assert world.identity == folder / "who.safetensors"
    with pytest.raises(FileNotFoundError, match=r"who\.safetensors"):
        load_parts(world, torch.device("cpu"))
    save_identity(SketchIdentity(IdentityConfig(16, (8, 8), 8, 5)), world.identity)
    identity = load_parts(world, torch.device("cpu")).identity
    assert isinstance(identity, IdentityModel)
    assert identity.embed_images(torch.zeros(2, 3, 16, 16)).shape == (2, 5)
