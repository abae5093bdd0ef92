"""The notebook of the examples: its cells run in order, and it is kept without outputs.

The cells run in this process, which is quicker than a kernel that loads torch again; what Jupyter
gives them is put in its place.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CELLS: list[dict[str, Any]] = json.loads(
    (ROOT / "examples" / "quickstart.ipynb").read_text("utf-8")
)["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}


def test_the_notebook_is_kept_without_outputs() -> None:
    assert CODE and len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_every_cell_of_the_notebook_runs_and_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: list[int] = []

    def animation(filename: str) -> Image.Image:
        with Image.open(filename) as file:
            frames.append(getattr(file, "n_frames", 1))
            return file.copy()

    (tmp_path / "examples").symlink_to(ROOT / "examples")  # results go beside it
    monkeypatch.chdir(tmp_path)
    jupyter = ModuleType("IPython.display")
    vars(jupyter)["Image"] = animation
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", jupyter)
    shown: list[Image.Image] = []
    names: dict[str, Any] = {"display": shown.append}
    for name, source in CODE.items():
        before = len(shown)
        exec(compile(source, f"cell {name}", "exec"), names)
        assert len(shown) == before + (name != "install")
    assert frames and frames[0] > 24
    assert all(picture.width >= 2 * 256 and picture.height >= 256 for picture in shown)
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"ada_joker.png", "morph.gif", "joker.safetensors"}


def test_without_a_clone_the_notebook_takes_the_address_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="put the repository's address into REPOSITORY"):
        exec(CODE["install"], {})

    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked\nmkdir -p "$5/examples"\n')
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent), prepend=os.pathsep)
    exec(CODE["install"].replace('REPOSITORY = ""', 'REPOSITORY = "an address"'), {})
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:4] == ["clone", "--depth", "1", "an address"]
