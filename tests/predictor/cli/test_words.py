"""What the command says: mistakes and what was meant, progress, endings, --quiet, --json."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_runs import exit_code, one_line, report_of

import targetclip

Run = Callable[..., int]
ROOT = Path(__file__).parents[3]
JOKER = str(ROOT / "examples" / "joker.png")
GIVEN = ("--target", JOKER, "--out", "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["transfr"], "unknown command 'transfr': did you mean 'transfer'?"),
        (["world", "chek"], "unknown command 'chek': did you mean 'check'?"),
        (["transfer", "--taget", "x", "--out", "o"], "--taget: did you mean --target?"),
        (["transfer", *GIVEN, "--num_sorces", "3"], "did you mean --num-sources?"),
        (["transfer", "--target", "x", "-o", "out"], "unknown option -o: did you mean --out?"),
        (["transfer", "--target", "x"], "expected --out FOLDER, found none"),
        (["transfer", *GIVEN, "more"], "'more' is"),
        (["transfer", *GIVEN, "--num-sources", "2.5"],
         "--num-sources: expected a whole number, found '2.5'"),
        (["transfer", *GIVEN, "--strength", "much"], "--strength: expected a number, found 'much'"),
        (["transfer", *GIVEN, "--mode", "optimise"], "found 'optimise': did you mean 'optimize'?"),
        (["transfer", *GIVEN, "--recipe", "relase"], "found 'relase': did you mean 'release'?"),
        (["transfer", *GIVEN, "--world", "avatras"], "did you mean 'avatars'"),
        (["transfer", *GIVEN, "--device", "gpu"], "--device: expected cpu"),
        (["transfer", *GIVEN, "--mapper", JOKER], "expected a mapper file, found the picture"),
        (["transfer", *GIVEN, "--direction", JOKER], "expected a direction file, found the pic"),
        (["transfer", *GIVEN, "--sources", "https://a.org/b.png"], "found the URL"),
        (["transfer", "--out", "o", "--target", "https://a.org/b.png"], "download it first"),
        (["transfer", "--out", "o", "--target", "green hair"], "by --text 'green hair'"),
        (["transfer", "--out", "o", "--target", JOKER.replace("joker", "jokr")],
         "joker.png'?"),
        (["transfer", "--out", "o", "--target", "a.mp4"], "no picture at 'a.mp4'"),
        (["transfer", "--out", "o", "--text", JOKER], "a picture is given by --target"),
        (["transfer", "--out", "o", "--text", "no/such.jpg"], "a picture is given by --target"),
        (["transfer", "--out", "o", "--text", "http://a.org/b"], "a picture is given by --target"),
        (["transfer", "--out", "o", "--target", ""], "expected no empty argument"),
        (["transfer", *GIVEN, "--clip", "--sources", JOKER], "--clip: expected --sources with one"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_was_meant(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) in (1, 2)
    assert said in one_line(capsys.readouterr().err)


def test_words_that_happen_to_be_a_folder_are_a_text(
    run: Run, tmp_path: Path, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glasses").mkdir()
    world = tiny_world.with_name("wordy.toml")
    world.write_text(tiny_world.read_text() + 'neutral = ["a face"]\n')
    assert run("optimize", "--world", world, "--text", "glasses") == 0


def test_a_run_says_where_its_results_are_and_what_comes_next(
    run: Run, tmp_path: Path, faces: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my out"
    assert run("optimize", "--out", out) == 0
    *_, wrote, following = capsys.readouterr().out.splitlines()
    assert wrote == f"direction by optimizer; wrote {out / 'direction.safetensors'}"
    command = f"targetclip transfer --target {faces[0]} --direction '{out}/direction.safetensors'"
    assert following == f"next: {command} --sources ... --out ..."
    assert run("transfer", "--num-sources", 1) == 0
    captured = capsys.readouterr()
    *_, look, following = captured.out.splitlines()
    sheet, page = (tmp_path / "out" / name for name in ("grid.png", "index.html"))
    assert look == f"direction by optimizer; look at {sheet}, or open {page}"
    assert following.startswith("next: targetclip transfer ")
    assert captured.err.startswith("targetclip: loading tiny\n")


def test_auto_says_why_it_goes_on(
    run: Run, tmp_path: Path, tiny_mapper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--mapper", tiny_mapper, "--mode", "auto", "--steps", 2, "--num-sources", 1)
    assert run("transfer", *given) == 0
    printed = capsys.readouterr().err
    reasons = re.findall(r"probe score (-?\d\.\d\d), 0\.50 wanted: (\w+)", printed)
    method = report_of(tmp_path / "out")["method"]
    assert [verb for _, verb in reasons] == ["refining", "optimizing"][: len(reasons)]
    assert bool(reasons) == (method != "mapper")
    assert all(float(score) < 0.5 for score, _ in reasons)


def test_quiet_prints_nothing_and_json_the_report_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("transfer", "--num-sources", 1, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert run("transfer", "--num-sources", 1, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == report_of(tmp_path / "out") and "loss=" in captured.err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"targetclip {targetclip.__version__}\n"


def started(*arguments: object, **changes: str | None) -> "subprocess.CompletedProcess[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        env={name: value for name, value in environment.items() if value is not None},
        timeout=120,
    )


def test_a_name_that_the_terminal_cannot_print_fails_no_run(
    tiny_world: Path, faces: list[Path], tmp_path: Path
) -> None:
    target, out = tmp_path / "Žofie.png", tmp_path / "výsledky"
    target.write_bytes(faces[0].read_bytes())
    given = ("--world", tiny_world, "--target", target, "--steps", 2, "--num-sources", 1)
    ended = started(
        "-m", "predictor.cli", "transfer", *given, "--out", out, PYTHONIOENCODING="ascii"
    )
    assert ended.returncode == 0 and b"v\\xfdsledky" in ended.stdout
    assert report_of(out)["target"] == str(target)


def test_a_reader_that_is_gone_fails_no_run(
    tiny_world: Path, faces: list[Path], tmp_path: Path
) -> None:
    given = ("--world", tiny_world, "--target", faces[0], "--steps", 2, "--num-sources", 1)
    program = "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\nfrom predictor import cli\n"
    ended = started(
        "-c", f"{program}cli.main({['transfer', *map(str, given), '--out', str(tmp_path / 'o')]})"
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "o" / "grid.png").is_file()


def test_commands_work_without_a_home_directory(
    tiny_world: Path, faces: list[Path], tmp_path: Path
) -> None:
    given = ("--world", tiny_world, "--target", faces[0], "--steps", 2, "--num-sources", 1)
    lines = [["world", "list"], ["transfer", *map(str, given), "--out", str(tmp_path / "out")]]
    for line in lines:
        program = f"""
import pwd
def nobody(*_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
from predictor import cli
cli.main({line})
"""
        ended = started("-c", program, HOME=None, USER=None, LOGNAME=None, TARGETCLIP_HOME=None)
        assert ended.returncode == 0, ended.stderr
        if line == lines[0]:
            assert b"avatars" in ended.stdout and b"set HOME" in ended.stdout
