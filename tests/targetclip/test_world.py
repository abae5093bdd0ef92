"""World files: what they may hold, and the networks that loading them gives."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from targetclip.encoders.identity import (
    AvatarIdentity,
    IdentityConfig,
    IdentityModel,
    save_identity,
)
from targetclip.generators import load_generator
from targetclip.world import (
    BUNDLED,
    World,
    load_any_identity,
    load_any_inverter,
    load_scene,
    load_world,
    world_names,
)

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "worlds").glob("*.toml"))
CPU = torch.device("cpu")
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
    assert "avatars" in world_names()
    world = load_world("avatars")
    assert world.name == "avatars"
    assert world.generator.parent == BUNDLED / "avatars"
    assert world.inverter is not None and world.inverter.parent == BUNDLED / "avatars"


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


def test_a_byte_order_mark_before_the_first_key_is_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    path.write_bytes(b"\xef\xbb\xbf" + LEAST.encode())
    assert load_world(str(path)).name == "a"


def test_a_tilde_is_the_home_folder_in_a_world_and_before_its_own_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clip").mkdir()
    text = 'name = "a"\ngenerator = "~/g.pt"\nembedder = "local-dir:~/clip"\nmapper = "~/m.pt"\n'
    written(tmp_path, text)
    world = load_world("~/world.toml")
    assert (world.path, world.generator) == (tmp_path / "world.toml", tmp_path / "g.pt")
    assert (world.mapper, world.embedder) == (tmp_path / "m.pt", str(tmp_path / "clip"))


def test_backslashes_divide_folders_on_every_system(tmp_path: Path) -> None:
    (tmp_path / "nets" / "clip").mkdir(parents=True)
    text = "name = 'a'\ngenerator = 'nets\\g.pt'\nembedder = 'nets\\clip'\n"
    world = load_world(written(tmp_path, text))
    assert world.generator == tmp_path / "nets" / "g.pt"
    assert world.embedder == str(tmp_path / "nets" / "clip")


def test_without_a_home_folder_a_path_in_it_is_refused_and_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "found no home folder" in error_of(
        written(tmp_path, LEAST + 'mapper = "~no_such_user/m"\n')
    )
    monkeypatch.setenv("HOME", "")
    assert load_world("avatars").name == "avatars"


@pytest.mark.parametrize(("name", "meant"), [("avatras", "avatars"), ("FFHQ", "ffhq1024")])
def test_a_misspelt_world_gets_its_nearest_neighbour(name: str, meant: str) -> None:
    assert error_of(name).endswith(f"did you mean {meant!r}?")


def test_a_name_without_a_file_beside_the_world_stays_a_name(tmp_path: Path) -> None:
    world = load_world(written(tmp_path, LEAST + 'pretrained = "openai"\n'))
    assert (world.embedder, world.pretrained) == ("ViT-B-32", "openai")


def test_what_a_world_leaves_out_has_a_default(tmp_path: Path) -> None:
    world = load_world(written(tmp_path, LEAST))
    assert (world.recipe, world.strength, world.truncation) == ("consistent", 1.0, 0.7)
    assert world.inverter is None and world.pretrained is None and world.identity is None
    assert (world.mapper, world.neutral) == (None, ())
    assert (world.makes, world.aligner) == (None, None)


def test_a_world_says_which_mapper_it_has_and_how_texts_are_read(tmp_path: Path) -> None:
    texts = 'neutral = ["a face", "a drawing"]\n'
    world = load_world(written(tmp_path, LEAST + 'mapper = "m.safetensors"\n' + texts))
    assert world.mapper == tmp_path / "m.safetensors"
    assert world.neutral == ("a face", "a drawing")


@pytest.mark.parametrize("name", ["sketch", "", "..", "avatars/", "/etc", "a b"])
def test_an_unknown_world_is_refused_with_the_names_of_known_ones(name: str) -> None:
    assert "avatars" in error_of(name) and repr(name) in error_of(name)


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
        (LEAST + 'invertor = "i.pt"\n', "did you mean 'inverter'?"),
        (LEAST + 'recipe = "consistant"\n', "did you mean 'consistent'?"),
        (LEAST + 'recipe = "guess"\n', "release, paper, consistent, identity, found 'guess'"),
        (LEAST + 'recipe = "identity"\n', "has an identity loss: name an identity model"),
        (LEAST + 'strength = "strong"\n', "strength must be a number"),
        (LEAST + "strength = true\n", "strength must be a number"),
        (LEAST + "strength = nan\n", "strength must be finite"),
        (LEAST + "truncation = -inf\n", "truncation must be finite"),
        (LEAST + "inverter = 3\n", "inverter must be a text"),
        (LEAST + "identity = true\n", "identity must be a text"),
        (LEAST + "mapper = 3\n", "mapper must be a text"),
        (LEAST + 'neutral = "a face"\n', "neutral must be a list of texts, found 'a face'"),
        (LEAST + 'neutral = ["a face", 1]\n', "neutral must be a list of texts"),
        (LEAST + 'aligner = "dlib"\n', "aligner must be 'ffhq' or left out, found 'dlib'"),
        (LEAST + "makes = 1\n", "makes must be a text"),
        (LEAST + 'files = "here"\n', "files must be tables such as [files.generator]"),
        (LEAST + "[files]\ngenerator = 1\n", "files.generator must be a table, found 1"),
        (LEAST + "[files.mapper]\n", "can have files.generator, files.embedder"),
        (LEAST + "[files.name]\n", "unknown files.name"),
        (LEAST + "[files.generator]\nhash = 1\n", "files.generator: unknown hash: expected page"),
        (LEAST + "[files.embedder]\nsize = 1\n", "'ViT-B-32' is a folder: leave out hub"),
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


def test_the_networks_of_a_world_fit_each_other(tiny_world: Path) -> None:
    scene = load_scene(load_world(str(tiny_world)), CPU)
    assert scene.inverter is not None
    with torch.no_grad():
        images = scene.generator.synthesis(scene.generator.mapping(torch.zeros(2, 8)))
        assert scene.generator.synthesis(scene.inverter(images)).shape == (2, 3, 16, 16)
        assert scene.embedder.embed_images(images).shape == (2, scene.embedder.embed_dim)


def test_a_world_whose_files_are_not_there_is_refused(tiny_world: Path, tmp_path: Path) -> None:
    world = load_world(written(tmp_path, tiny_world.read_text()))
    with pytest.raises(FileNotFoundError, match=r"generator\.safetensors"):
        load_scene(world, CPU)


def test_a_world_has_an_identity_model_if_its_file_names_one(
    tiny_world: Path, tmp_path: Path
) -> None:
    assert load_scene(load_world(str(tiny_world)), CPU).identity is None
    folder = tmp_path / "world"
    shutil.copytree(tiny_world.parent, folder)
    world = load_world(written(folder, tiny_world.read_text() + 'identity = "one.safetensors"\n'))
    assert world.identity == folder / "one.safetensors"
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors"):
        load_scene(world, CPU)
    save_identity(AvatarIdentity(IdentityConfig(16, (8, 8), 8, 5)), world.identity)
    identity = load_scene(world, CPU).identity
    assert isinstance(identity, IdentityModel)
    assert identity.embed_images(torch.zeros(2, 3, 16, 16)).shape == (2, 5)


def files_of(world: World) -> dict[str, Path | None]:
    return {file.role: file.path for file in world.files}


def test_a_world_lists_its_files_with_what_it_says_of_them(tmp_path: Path) -> None:
    table = '[files.generator]\npage = "https://github.com/a/b"\nsize = 3\n'
    text = LEAST + 'pretrained = "openai"\nmapper = "m.safetensors"\n' + table
    world = load_world(written(tmp_path, text))
    assert files_of(world) == {
        "generator": tmp_path / "g.pt",
        "embedder": None,  # open_clip's
        "mapper": tmp_path / "m.safetensors",
    }
    generator, embedder, mapper = world.files
    assert (generator.facts.page, generator.facts.size) == ("https://github.com/a/b", 3)
    assert embedder.name == "ViT-B-32 (openai)" and mapper.facts.page is None


def test_an_embedder_is_a_folder_or_a_file_of_weights_or_a_name(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    folder = load_world(written(tmp_path, LEAST.replace("ViT-B-32", "clip"))).files[1]
    assert folder.folder and folder.path == tmp_path / "clip"
    world = load_world(written(tmp_path, LEAST + 'pretrained = "w.safetensors"\n'))
    assert world.files[1].path == tmp_path / "w.safetensors" and not world.files[1].folder
    assert world.pretrained == str(tmp_path / "w.safetensors")  # though it is not there
    hub = load_world(written(tmp_path, LEAST.replace("ViT-B-32", "hf-hub:a/b"))).files[1]
    assert (hub.name, hub.path) == ("hf-hub:a/b", None)


def test_what_does_not_ship_with_a_bundled_world_belongs_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGETCLIP_HOME", str(tmp_path))
    world = load_world(str(BUNDLED / "ffhq1024" / "world.toml"))
    assert world.argument == "ffhq1024"
    assert world.generator == tmp_path / "ffhq1024" / "stylegan2-ffhq-config-f.pt"
    with pytest.raises(FileNotFoundError) as caught:
        load_scene(world, CPU)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{world.generator}: no such file")
    assert message.endswith("see targetclip world check ffhq1024 --download")
    shipped = load_world("avatars")
    assert shipped.generator == BUNDLED / "avatars" / "generator.safetensors"


def test_ten_lines_make_a_world(tiny_world: Path, clip_dir: Path, tmp_path: Path) -> None:
    for name in ("generator", "inverter"):
        shutil.copy(tiny_world.with_name(f"{name}.safetensors"), tmp_path)
    shutil.copytree(clip_dir, tmp_path / "clip")
    save_identity(AvatarIdentity(IdentityConfig(16, (8, 8), 8, 5)), tmp_path / "who.safetensors")
    text = """name = "mine"
makes = "my pictures"
generator = "generator.safetensors"
embedder = "clip"
inverter = "inverter.safetensors"
identity = "who.safetensors"
truncation = 0.8
strength = 1.2
recipe = "paper"
neutral = ["a picture", "a drawing"]
"""
    assert len(text.splitlines()) == 10
    world = load_world(written(tmp_path, text))
    assert world.argument == str(tmp_path / "world.toml")
    scene = load_scene(world, CPU)
    ws = scene.generator.mapping(torch.zeros(1, 8), world.truncation)
    images = scene.generator.synthesis(ws).detach()
    assert scene.inverter is not None and scene.inverter(images).shape == ws.shape
    assert scene.identity is not None and scene.identity.embed_images(images).shape == (1, 5)


def test_public_checkpoints_are_known_by_their_suffix(tiny_world: Path, tmp_path: Path) -> None:
    """Each reader names the file that it expects."""
    generator = load_generator(tiny_world.with_name("generator.safetensors"))
    for name in ("e4e.pt", "arc.pth", "arc.pt", "who.pkl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"e4e\.pt: expected an e4e checkpoint"):
        load_any_inverter(tmp_path / "e4e.pt", generator, CPU)
    for name in ("arc.pth", "arc.pt"):
        with pytest.raises(ValueError, match=rf"{name}: expected ArcFace's IR-SE50 weights"):
            load_any_identity(tmp_path / name, CPU)
    with pytest.raises(ValueError, match=r"who\.pkl: expected an identity model .* found \.pkl$"):
        load_any_identity(tmp_path / "who.pkl", CPU)
    with pytest.raises(ValueError, match=r"who\.pkl: expected an inverter .* found \.pkl$"):
        load_any_inverter(tmp_path / "who.pkl", generator, CPU)


def test_a_world_is_read_without_torch() -> None:
    code = "import sys, targetclip.world as w; w.load_world('avatars')"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=BUNDLED.parents[1])


def test_photographs_of_faces_are_a_bundled_world_whose_files_do_not_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGETCLIP_HOME", str(tmp_path))
    world = load_world("ffhq1024")
    assert (world.aligner, world.truncation, world.mapper) == ("ffhq", 0.7, None)
    assert files_of(world) == {
        "generator": tmp_path / "ffhq1024" / "stylegan2-ffhq-config-f.pt",
        "embedder": None,
        "inverter": tmp_path / "ffhq1024" / "e4e_ffhq_encode.pt",
        "identity": tmp_path / "ffhq1024" / "model_ir_se50.pth",
    }
    with pytest.raises(FileNotFoundError, match=r"get it from https://.* --download$"):
        load_scene(world, CPU)


@pytest.mark.parametrize(
    "name", ["ffhq1024", *map(str, EXAMPLES)], ids=lambda name: Path(name).stem
)
def test_worlds_of_public_checkpoints_say_where_to_get_them_and_under_which_licence(
    name: str,
) -> None:
    world = load_world(name)
    assert world.makes and len(set(world.neutral)) >= 10
    for file in world.files:
        if file.path is not None:
            assert file.facts.licence and file.facts.page
            assert file.facts.page.startswith("https://github.com/")
