"""The folder of results: whose it is, what a second run removes, and two runs at once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import report_of

from predictor.cli.output import unique_names, words_of
from targetclip.command import locked_folder

Run = Callable[..., int]
ROOT = Path(__file__).parents[3]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_a_second_run_removes_the_results_of_the_first_and_nothing_else(
    run: Run, tmp_path: Path, direction_file: Path
) -> None:
    out = tmp_path / "out"
    assert run("transfer", "--num-sources", 4, "--direction", direction_file) == 0
    (out / "notes.txt").write_text("precious")
    assert run("transfer", "--num-sources", 2, "--direction", direction_file) == 0
    results = {"grid.png", "index.html", "edited_000.png", "edited_001.png"}
    ours = {"report.json", "direction.safetensors", *results}
    assert names_in(out) == {*ours, "notes.txt"}
    report = report_of(out)
    assert {*report["files"]} == ours and report["finished"] is True
    # The direction that is applied may be that of the folder itself.
    own = out / "direction.safetensors"
    assert run("transfer", "--num-sources", 1, "--direction", own, "--strength", 0.5) == 0
    assert names_in(out) == {*ours - {"edited_001.png"}, "notes.txt"}


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"report.json": json.dumps({"command": "optimize", "files": []})}, "targetclip optimize"),
        ({"report.json": json.dumps({"mean": 1})}, "'report.json' of another origin"),
        ({"report.json": "not JSON"}, "'report.json' of another origin"),
        *(
            ({name: "mine"}, f"'{name}' of another origin")
            for name in ("grid.png", "index.html", "strip.png", "morph.gif", "morph.mp4")
        ),
        ({"edited_me.png": "mine"}, "'edited_me.png' of another origin"),
    ],
)
def test_results_of_others_are_refused_unless_overwrite_says_so(
    run: Run,
    tmp_path: Path,
    direction_file: Path,
    there: dict[str, str],
    said: str,
    unloadable_world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in there.items():
        (out / name).write_text(content)
    given = ("--num-sources", 1, "--direction", direction_file)
    assert run("transfer", "--world", unloadable_world, *given) == 1
    line = last_line(capsys)
    assert said in line and line.endswith("give another folder, or --overwrite")
    assert {name: (out / name).read_text() for name in there} == there
    assert run("transfer", *given, "--overwrite") == 0
    assert report_of(out)["command"] == "transfer"


def test_a_picture_that_is_read_is_not_replaced(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "out", ("--direction", direction_file)
    assert run("transfer", "--num-sources", 1, *given) == 0
    before = (out / "edited_000.png").read_bytes()
    assert run("transfer", "--sources", out / "edited_000.png", *given) == 1
    assert "is read by this run and would be replaced" in last_line(capsys)
    assert (out / "edited_000.png").read_bytes() == before


def test_a_run_that_was_killed_leaves_a_folder_that_the_same_command_takes(
    run: Run, tmp_path: Path, direction_file: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"command": "transfer", "finished": False}))
    (out / "edited_077.png").write_text("half")
    assert run("transfer", "--num-sources", 1, "--direction", direction_file) == 0
    assert not (out / "edited_077.png").exists()


def test_two_runs_at_once_in_one_folder_are_refused_and_a_kill_frees_it(
    run: Run, tmp_path: Path, direction_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given = tmp_path / "out", ("--num-sources", 1, "--direction", direction_file)
    program = (
        "import sys, time; from pathlib import Path; from targetclip.command import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert run("transfer", *given) == 1
        assert "another run is writing into" in last_line(capsys)
        assert names_in(out) == set()
    finally:
        holder.kill()
        holder.communicate()
    assert run("transfer", *given) == 0
    with locked_folder(out):
        pass


def test_names_are_unique_however_letters_are_cased_and_fit_into_a_file_name() -> None:
    assert unique_names(["a", "A", "a", "b", "grid.png"], ["grid.png"]) == [
        "a", "A_2", "a_3", "b", "grid.png_2",
    ]  # fmt: skip
    [long] = unique_names(["ü" * 120])
    assert len(os.fsencode(long)) <= 150 and unique_names(["..."]) == ["picture"]
    assert words_of("Green hair, & a hat!") == "Green_hair_a_hat" and words_of("?!") == "text"
