"""The file map names every module, the files to read first exist, and illustrators are named."""

import re
from pathlib import Path

import pytest

from data.illustrated.avatars import HELD_OUT, TRAINED, credit

ROOT = Path(__file__).parents[1]
PACKAGES = ("targetclip", "predictor", "data", "train", "eval")
PAGE = (ROOT / "docs/how-it-is-built.md").read_text("utf-8")


def section(title: str) -> str:
    """Return a section of the page."""
    return PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]


FILES = section("Files")
FIRST = re.findall(r"`((?:targetclip|predictor|train)/\w+\.py)`", section("Read first"))


def part_of(package: str) -> str:
    """Return the lines of the file map that follow a package's name."""
    rest = FILES.partition(f"\n{package}/")[2]
    return re.split(r"\n(?=\w+/)", rest)[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_file_map_names_every_module(package: str) -> None:
    words = set(re.findall(r"\w+", part_of(package)))
    modules = {
        path.stem for path in (ROOT / package).rglob("*.py") if not path.stem.startswith("__")
    }
    assert modules and modules <= words


def test_the_file_map_names_no_module_that_is_gone() -> None:
    named = {name for package in PACKAGES for name in re.findall(r"(\w+)\.py", part_of(package))}
    there = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert len(named) > 30 and named <= there


def test_the_files_to_read_first_are_seven_and_there() -> None:
    assert len(FIRST) == 7
    assert all((ROOT / name).is_file() for name in FIRST)


@pytest.mark.parametrize("page", ["docs/licences.md", "targetclip/worlds/avatars/README.md"])
def test_every_illustrator_is_named_with_the_licence_of_the_style(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for style in TRAINED + HELD_OUT:
        known = credit(style)
        assert f"| [{style}]({known.source}) | {known.illustrator} | {known.licence} |" in text


def test_every_example_is_credited_to_the_illustrator_of_its_style() -> None:
    folder = ROOT / "examples"
    rows = re.findall(
        r"^\| (.+?) \| \[(.+?)\]\((.+?)\) \|", (folder / "README.md").read_text(), re.M
    )
    assert {n for names, _, _ in rows for n in names.split(", ")} == {
        p.stem for p in folder.glob("*.png")
    }
    assert all(credit(style).source == source for _, style, source in rows)
