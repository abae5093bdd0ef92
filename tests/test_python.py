"""The project as people use it from Python: the names, and the lines that README shows.

The lines run in a process of their own, in another folder, without the tests' checks of types.
"""

import ast
import importlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from doc_blocks import blocks_of

import predictor
import targetclip
from predictor import load_essence
from predictor.direction import Direction
from targetclip.media.images import read_picture, tensor_to_pictures

ROOT = Path(__file__).parents[1]

[README] = [block.text for block in blocks_of("README.md", "python")]

MORE = """
import numpy as np
from PIL import Image
from targetclip import Direction, load_essence, mixed

essence = load_essence("avatars", "cpu")
glasses = essence.direction(text="round glasses", mode="instant")
joker = Direction.load("joker.safetensors", essence)
both = 0.5 * joker + 0.5 * glasses
assert both.method == "mapper" and (both.vector == mixed([joker, glasses], [0.5, 0.5]).vector).all()
print(joker)
images = essence.edit(np.asarray(Image.open("examples/ada.png").convert("RGB")), both, [0, 0.5, 1])
assert images.shape == (3, 1, 3, 128, 128)
assert np.array_equal(np.float32(2) * np.ones(2), [2, 2])

def message(ask):
    try:
        ask()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print("no error")

message(lambda: essence.direction("green hair"))
message(lambda: essence.direction("examples/joker.png", "optimise"))
message(lambda: essence.direction("examples/joker.png", recipe="relaese"))
message(lambda: essence.direction(text="examples/joker.png"))
message(lambda: essence.direction(["examples/ada.png", "examples/joker.png"]))
message(lambda: essence.direction())
message(lambda: essence.edit(3, joker))
message(lambda: essence.edit(["examples/ada.png", None], joker))
message(lambda: essence.edit("examples/adda.png", joker))
message(lambda: joker * joker)
message(lambda: joker + 1)
"""

SAID = """\
Direction(12 x
FileNotFoundError: no picture at 'green hair': check the path, or give words as text='green hair'
ValueError: mode: expected one of instant, auto, refine, optimize, found 'optimise': did you mean
ValueError: recipe: expected one of release, paper, consistent, identity, found 'relaese': did you
ValueError: text='examples/joker.png' names a picture: give it without text=
ValueError: expected one target, found 2: find the direction of each, and mix them: 0.5 * first +
ValueError: expected a picture, or words as text=, found both or neither
TypeError: expected a picture (a path, a Pillow image, an array or a tensor), found int
TypeError: expected a picture (a path, a Pillow image, an array or a tensor), found NoneType
FileNotFoundError: no picture at 'examples/adda.png': check the path, or give words as
TypeError: unsupported operand type(s) for *: 'Direction' and 'Direction'
TypeError: unsupported operand type(s) for +: 'Direction' and 'int'
"""


def run(code: str, folder: Path) -> str:
    """Run Python in a folder; return what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder beside nothing of ours but the example pictures."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "examples").mkdir()
    for name in ("joker", "ada", "bruno"):
        shutil.copy(ROOT / "examples" / f"{name}.png", folder / "examples")
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What README's lines and more of them print, in one process: it takes seconds to start."""
    return run(README + MORE, folder)


def test_readmes_lines_give_the_pictures_that_the_parts_give(folder: Path, printed: str) -> None:
    essence = load_essence("avatars")
    direction = essence.predict(read_picture(ROOT / "examples/joker.png"))
    ws = essence.scene.invert([read_picture(ROOT / "examples/ada.png")])
    [expected] = tensor_to_pictures(essence.scene.edit(ws, direction.offsets(ws), 0.8))
    with_bruno = read_picture(folder / "ada.png")  # inverted beside another: rounding may differ
    pairs = zip(with_bruno.tobytes(), expected.tobytes(), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 1
    saved = Direction.load(folder / "joker.safetensors", essence)
    assert (saved.vector - direction.vector).norm() < 1e-4 * direction.vector.norm()
    assert saved.method == "mapper" and saved.probe is not None


def test_errors_speak_python_in_one_line(printed: str) -> None:
    lines = printed.splitlines()
    expected = SAID.splitlines()
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)
        assert "--" not in line  # flags belong to the command


@pytest.mark.parametrize("package", [targetclip, predictor], ids=lambda package: package.__name__)
def test_every_name_is_there_and_known_to_type_checkers(package: object) -> None:
    name = getattr(package, "__name__", "")
    exported = set(importlib.import_module(name).__all__)
    tree = ast.parse((ROOT / name / "__init__.py").read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == exported - {"Mode"}
    for attribute in exported:
        assert getattr(package, attribute) is not None
    with pytest.raises(AttributeError, match="no attribute 'load_essense'"):
        package.load_essense  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_has_its_version_and_names_without_torch(tmp_path: Path) -> None:
    assert targetclip.__version__ == metadata.version("targetclip")
    code = """
import sys, targetclip, predictor
assert {"load_essence", "Direction", "__version__"} <= {*dir(targetclip)}
targetclip.__version__, targetclip.load_world, predictor.Mode
assert "torch" not in sys.modules
assert targetclip.load_essence is predictor.load_essence
assert "torch" in sys.modules
"""
    run(code, tmp_path)
