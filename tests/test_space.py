"""Tests of the Hugging Face Space in examples/space."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "examples" / "space"


def named(requirement: str) -> str:
    return re.split(r"[<>=\[ ]", requirement)[0].lower()


def test_its_requirements_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert {*wanted} <= {*project["dependencies"]}
    front = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    [gradio] = project["optional-dependencies"]["studio"]
    assert front["sdk"] == "gradio" and gradio == f"gradio>={front['sdk_version'][:-2]}"
    assert (SPACE / front["app_file"]).is_file() and front["python_version"] == "3.12"


def test_what_it_installs_is_all_that_its_packages_import(tmp_path: Path) -> None:
    for package in ("targetclip", "predictor"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("worlds"))
    shutil.copy(SPACE / "app.py", tmp_path)
    # Every other package of an environment for development is hidden.
    hidden = "accelerate datasets pyarrow psutil torchmetrics dicebear matplotlib dlib av pytest"
    code = (
        "import importlib.metadata as m; found = m.Distribution.from_name\n"
        "def hidden(name):\n"
        "    if name == 'targetclip': raise m.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "m.Distribution.from_name = hidden\n"  # a Space runs the packages and does not install them
        f"import sys; sys.modules.update(dict.fromkeys({hidden.split()!r})); "
        "import app, predictor.studio.server, predictor.studio.page, predictor.cli.options"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
