"""README and docs: every command is run or parsed by its own parser, and what they say is so.

What needs hours, files that do not ship or somebody's cluster is parsed: RUN_BY names the tests
that run these commands at a small size.
"""

import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import cache
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from command_runs import MODULES, exit_code, report_of
from doc_blocks import PAGES, ROOT, blocks_of, commands_of, inline_commands
from PIL import Image

import predictor.cli.commands
import predictor.transfer
from predictor.cli.flags import Command
from targetclip.command import parse
from targetclip.world import load_scene, load_world

LANGUAGES = {"bash", "python", "toml", "text", "bibtex", "mermaid"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
CI = (ROOT / ".ci/run").read_text()
SCRIPTS = {"build.slurm": "data.build", "train.slurm": "train.mapper"}
PYTORCH = ["torch", "torchvision", "--index-url", "https://download.pytorch.org/whl/cpu"]
ON_THE_WORLD = ("README.md", "docs/first-transfer.md")  # other pages run in a tiny world
# Where commands that the pages give without running them are run, at a small size.
RUN_BY = {
    "data.build": "tests/data/test_build.py",
    "data.illustrated.challenge": "tests/data/illustrated/test_challenge.py",
    "train.encoder": "tests/train/test_encoder.py",
    "train.mapper": "tests/train/test_mapper.py",
    "train.own": "tests/train/test_own.py",
    "eval.calibrate": "tests/eval/test_calibrate.py",
    "eval.compare": "tests/eval/test_compare.py",
    "eval.referee": "tests/eval/test_referee.py",
    "eval.studies.arithmetic": "tests/eval/studies/test_arithmetic.py",
    "eval.studies.benchmark": "tests/eval/studies/test_benchmark.py",
    "eval.studies.challenge": "tests/eval/studies/test_challenge.py",
    "eval.studies.scale": "tests/eval/studies/test_scale.py",
    "eval.studies.scaling": "tests/eval/studies/test_scaling.py",
    "eval.studies.speed": "tests/eval/studies/test_speed.py",
    "eval.studies.styles": "tests/eval/studies/test_styles.py",
    "eval.studies.teachers": "tests/eval/studies/test_teachers.py",
    "eval.studies.texts": "tests/eval/studies/test_texts.py",
    "eval.studies.gap": "tests/eval/studies/test_gap.py",
    "eval.studies.gpu": "tests/eval/studies/test_gpu.py",
    "eval.studies.tradeoff": "tests/eval/studies/test_tradeoff.py",
    "tests.proof.faults": "tests/proof/test_faults.py",
    "tests.proof.full_size": "tests/proof/test_full_size.py",
    "tests.proof.protocol": "tests/proof/test_protocol.py",
}


# Parsing


def parsed(kind: Any, args: list[str]) -> Any:
    """Parse a command line by a command's own parser; one that asks for --help is right too."""
    with redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        try:
            return parse(kind, "docs", None, args)
        except SystemExit as ended:
            assert ended.code == 0, said.getvalue()
            return None


def check_module(name: str, args: list[str]) -> None:
    """Check a `python -m` command of this project."""
    assert name in RUN_BY or "--help" in args, f"no test is known to run {name}"
    parsed(import_module(name).Config, args)


def check_pip(args: list[str]) -> None:
    """Check what is installed: the project with extras that it has, or the processor's torch."""
    assert args[0] == "install"
    if args[1] == "-e":
        [project] = args[2:]
        assert (match := re.fullmatch(r"\.(?:\[([\w,]+)\])?", project)), project
        assert {*(match[1] or "").split(",")} - {""} <= EXTRAS.keys()
    else:
        assert args[1:] == PYTORCH


def check_launch(args: list[str]) -> None:
    """Check a command that accelerate launches."""
    with redirect_stderr(StringIO()) as said:
        try:
            launch = launch_command_parser().parse_args(args[1:])
        except SystemExit:
            pytest.fail(said.getvalue())
    assert args[0] == "launch" and launch.module
    check_module(launch.training_script, launch.training_script_args)


def check(words: list[str]) -> None:
    """Check a command of a page; fail for one that is not known."""
    program, args = words[0], words[1:]
    if program == "targetclip":
        assert args == ["--version"] or parsed(Command, args) is not None
    elif program == "python" and args[0] == "-m":
        check_module(args[1], args[2:])
    elif program == "accelerate":
        check_launch(args)
    elif program in ("pip", "pip3"):
        check_pip(args)
    elif program == "sbatch":
        assert (ROOT / args[0]).is_file()
        check_module(SCRIPTS[Path(args[0]).name], args[1:])
    elif program in ("kubectl", "sky"):
        assert yaml.safe_load((ROOT / args[-1]).read_text())
    elif program in ("pytest", "ruff", "mypy", "lint-imports", "mkdocs"):
        [line] = [line for line in CI.splitlines() if line.startswith(" ".join(words[:2]))]
        assert {*args} <= {*line.split()}
    else:
        assert words == ["python3", "-m", "venv", ".venv"], f"no test knows how to check {words}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_its_program_takes(page: str) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block
    for block in blocks_of(page, "bash"):
        commands = list(commands_of(block))
        assert commands, block
        for words in commands:
            check(words)
    for words in inline_commands(page):
        check(words)


def test_the_challenge_gives_commands_that_their_programs_take() -> None:
    page = "data/challenge/README.md"
    commands = [words for block in blocks_of(page, "bash") for words in commands_of(block)]
    assert len(commands) > 2
    for words in [*commands, *inline_commands(page)]:
        check(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_pasted_into_any_shell(page: str) -> None:
    for block in blocks_of(page, "bash"):
        # No continued line, no brace expansion, no quotes that only some shells take off.
        assert not re.search(r"\\$|\{|'|\*", block.text, re.MULTILINE), block.text


@pytest.mark.parametrize("module", RUN_BY)
def test_what_is_parsed_here_is_run_by_the_test_that_is_named(module: str) -> None:
    text = (ROOT / RUN_BY[module]).read_text()
    assert re.search(rf"{re.escape(module)}\b", text) or re.search(
        rf"from {re.escape(module.rpartition('.')[0])} import .*\b{module.rpartition('.')[2]}", text
    )


@pytest.mark.parametrize("page", PAGES)
def test_world_files_of_a_page_are_world_files(page: str, tmp_path: Path) -> None:
    for block in blocks_of(page, "toml"):
        path = tmp_path / "world.toml"
        path.write_text(block.text)
        assert load_world(str(path)).generator.parent == tmp_path


def test_a_page_is_checked_for_what_could_be_wrong_with_it() -> None:
    wrong = (
        "targetclip transfer --targets a.png --out out",
        "python -m data.build --out pairs --steps many",
        "python -m data.nothing --out pairs",
        "accelerate launch --multi-gpus -m train.mapper --out out",
        "pip install -e .[vedio]",
        "make all",
    )
    for line in wrong:
        with pytest.raises((AssertionError, ModuleNotFoundError, pytest.fail.Exception)):
            check(line.split())


# Running


@pytest.fixture(scope="module")
def small_world(who_world: Path, tradeoff_mapper: Path) -> Path:
    """The tiny world with all that the bundled one has, its defaults included."""
    world = who_world.with_name("docs.toml")
    text = who_world.read_text().replace('recipe = "consistent"', 'recipe = "identity"')
    text += f'mapper = {json.dumps(str(tradeoff_mapper))}\nneutral = ["a face", "a person"]\n'
    world.write_text(text)
    return world


@pytest.fixture(scope="module")
def loads_once() -> Iterator[None]:
    """Networks of a world are loaded once for all pages."""
    once = cache(load_scene)
    with pytest.MonkeyPatch.context() as patch:
        for module in (predictor.cli.commands, predictor.transfer):
            patch.setattr(module, "load_scene", once)
        yield


Run = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_page(
    small_world: Path, loads_once: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Run]:
    """Run the `targetclip` commands of a page in a folder with the examples; return the folder."""

    @cache
    def run(page: str) -> Path:
        folder = tmp_path_factory.mktemp("page")
        shutil.copytree(ROOT / "examples", folder / "examples")
        with chdir(folder), redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
            for block in blocks_of(page, "bash"):
                for words in commands_of(block) if block.reason is None else ():
                    if words[0] == "targetclip":
                        code = exit_code(*run_as(words[1:], page))
                        lacks = words[1:] == ["world", "check", "ffhq1024"]
                        assert code == (1 if lacks else 0), f"{words}: {said.getvalue()}"
        return folder

    def run_as(args: list[str], page: str) -> list[str]:
        """Return the arguments, for a tiny world and few steps where the page's would be slow."""
        if args[0] not in ("transfer", "optimize") or page in ON_THE_WORLD:
            return args
        few = list(args)
        if "--steps" in args:
            few[args.index("--steps") + 1] = "2"
        elif args[0] == "optimize" or "--recipe" in args:
            few += ["--steps", "2"]
        return [*few, "--world", str(small_world)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TARGETCLIP_HOME", str(tmp_path_factory.mktemp("home")))
        yield run


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_do_what_they_say(page: str, run_page: Run) -> None:
    folder = run_page(page)
    for block in blocks_of(page, "bash"):
        for words in commands_of(block) if block.reason is None else ():
            if words[0] == "targetclip" and "--out" in words:
                out = folder / words[words.index("--out") + 1]
                assert report_of(out)["finished"] is True


def test_the_picture_of_the_readme_is_what_its_first_command_writes(run_page: Run) -> None:
    made = np.asarray(Image.open(run_page("README.md") / "out/grid.png").convert("RGB"), np.int16)
    kept = np.asarray(Image.open(ROOT / "docs/transfer.png").convert("RGB"), np.int16)
    assert made.shape == kept.shape
    assert abs(made - kept).mean() < 0.1  # other processors round otherwise


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")])
def test_the_python_of_a_page_runs(page: str, loads_once: None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with chdir(tmp_path), redirect_stdout(StringIO()):
        for block in blocks_of(page, "python"):
            exec(compile(block.text, page, "exec"), {})
    assert [path for path in tmp_path.iterdir() if path.name != "examples"]


# report.json


def keys_of(report: dict[str, Any]) -> set[str]:
    """Return the keys of a report, and those of its entries whose keys do not vary."""
    keys = {*report}
    for entry in [report, *report.get("targets", [])]:
        keys |= {*entry}
        for name in ("scores", "scores_on_own_sources", "direction", "gate", "fingerprints"):
            if isinstance(inner := entry.get(name), dict):
                keys |= {*inner}
    return keys


def test_every_key_of_a_report_is_explained_and_no_other(run_page: Run) -> None:
    written = set[str]()
    for page in PAGES:
        for path in run_page(page).rglob("report.json"):
            if "examples" not in path.parts:
                written |= keys_of(json.loads(path.read_text()))
    text = (ROOT / "docs/report.md").read_text("utf-8")
    cells = re.findall(r"^\| (`.+?) \|", text, re.MULTILINE)
    explained = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    named = {*re.findall(r"`(\w+)`", text)}
    assert sorted(written - named) == []
    # Runs that no page makes: photographs, clips with a face, failures, bf16, these layers
    rare = {"photos", "face", "frames_without_face", "error", "precision", "middle", "fine"}
    assert sorted(explained - written - rare) == []


# The pages as such


def test_the_command_reference_has_every_command() -> None:
    page = (ROOT / "docs/commands.md").read_text("utf-8")
    places = re.findall(r"^<!-- help: (.+) -->$", page, re.MULTILINE)
    proofs = ["tests.proof.faults", "tests.proof.full_size", "tests.proof.protocol"]
    asked = ["transfer", "optimize", "studio", "world list", "world check"]
    expected = [f"targetclip {name}" for name in asked]
    expected += [f"python -m {module}" for module in [*MODULES, *proofs]]
    assert sorted(places) == sorted(expected)


def test_every_page_is_in_the_sites_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = re.findall(r"(\S+\.md)$", menu, re.MULTILINE)
    assert sorted(named) == sorted(os.path.basename(page) for page in PAGES[1:])


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("https:")]
    assert len(links) > 15
    assert not [link for link in links if not (ROOT / link).exists()]
