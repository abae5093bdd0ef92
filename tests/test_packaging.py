"""What people get when they install the project."""

import email
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from predictor.studio.server import SOURCES, TARGETS

ROOT = Path(__file__).parents[1]
WORLDS = sorted((ROOT / "targetclip" / "worlds").glob("*/world.toml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    [path] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(path)


def files_below(folder: Path) -> set[str]:
    """Paths of the files of a world's part, a file or a folder; none if it is not made yet."""
    found = [folder] if folder.is_file() else folder.rglob("*")
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


def test_the_wheel_holds_the_method_and_the_product_and_no_more(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    [info] = [top for top in tops if top.endswith(".dist-info")]
    assert info.startswith("targetclip-") and tops - {info} == {"targetclip", "predictor"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name]
    for package in ("targetclip", "predictor"):
        modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")}
        assert {*modules, f"{package}/py.typed"} <= set(wheel.namelist())
    assert "predictor/gallery.html" in wheel.namelist()


def test_every_world_is_in_the_wheel_with_all_that_it_names(wheel: zipfile.ZipFile) -> None:
    assert WORLDS
    for world in WORLDS:
        content = tomllib.loads(world.read_text(encoding="utf-8"))
        expected = files_below(world)
        for key in ("generator", "embedder", "inverter", "identity", "mapper"):
            if key in content:
                named = files_below(world.parent / content[key])
                assert named or world.parent.name == "ffhq1024", f"{world}: {key} is missing"
                expected |= named
        assert expected <= set(wheel.namelist())


def test_the_examples_of_the_studio_are_in_the_wheel_with_their_illustrators(
    wheel: zipfile.ZipFile,
) -> None:
    folder = "predictor/studio/examples"
    names = {f"{folder}/{name}.png" for name in (*TARGETS, *SOURCES)}
    assert names | {f"{folder}/README.md"} == {
        name for name in wheel.namelist() if name.startswith(folder)
    }


def test_the_wheel_has_the_command_and_the_licence(wheel: zipfile.ZipFile) -> None:
    texts = {name.split("/")[-1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert b"targetclip = predictor.cli:main" in wheel.read(texts["entry_points.txt"])
    assert "MIT" in wheel.read(texts["LICENSE"]).decode()


def test_the_wheel_says_where_more_is_to_be_read(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    facts = email.message_from_bytes(wheel.read(name))
    assert facts["Project-URL"] == "Paper, https://arxiv.org/abs/2110.12427"
    assert facts["Requires-Python"] == ">=3.11" and "Typing :: Typed" in facts.get_all("Classifier")
