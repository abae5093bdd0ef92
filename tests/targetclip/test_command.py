"""Commands: exit codes, one-line errors, signals, whole files, precision."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from targetclip.command import (
    FAILED,
    SIGNALS,
    STOPPED,
    Stop,
    Stopped,
    choose_device,
    choose_precision,
    did_you_mean,
    full_disk_explained,
    guarded,
    in_precision,
    main,
    make_folder,
    nearest,
    parse,
    signals_as_ctrl_c,
    whole_file,
    write_file,
    write_json,
)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    number: int = 3


# Errors and exit codes


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("expected\n  1, found 2"), FAILED, "prog: error: expected 1, found 2"),
        (FileNotFoundError(2, "No such file", "x"), FAILED, "No such file"),
        (FloatingPointError("loss is nan"), FAILED, "loss is nan"),
        (torch.OutOfMemoryError("CUDA"), FAILED, "out of memory: lower --batch-size"),
        (MemoryError(), FAILED, "out of memory"),
        (KeyboardInterrupt(), STOPPED, "stopped"),
        (Stopped(), STOPPED, "stopped"),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line(
    error: BaseException, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert guarded(fail, "prog") == code
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        guarded(lambda: {}["missing"], "prog")


def test_what_a_command_returns_is_its_exit_code() -> None:
    for result, code in ((None, 0), (5, 5), ("a report", 0), (True, 0)):
        with pytest.raises(SystemExit) as ended:
            main(lambda config, result=result: result, Config, "", "prog", ["--number", "7"])
        assert ended.value.code == code


@dataclass(frozen=True)
class WithFolder:
    out: Path


def test_a_second_run_of_an_exclusive_command_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--out", str(tmp_path / "out")]
    codes: list[object] = []

    def run(config: WithFolder) -> None:
        if not codes:
            codes.append("first")
            with pytest.raises(SystemExit) as ended:
                main(run, WithFolder, "", "prog", args, exclusive=True)
            codes.append(ended.value.code)

    with pytest.raises(SystemExit) as ended:
        main(run, WithFolder, "", "prog", args, exclusive=True)
    assert [*codes, ended.value.code] == ["first", FAILED, 0]
    assert "another run is writing into" in capsys.readouterr().err


def test_a_usage_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(lambda config: None, Config, "", "prog", ["--number", "many"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("prog: ") and message.count("\n") == 1 and "many" in message


@dataclass(frozen=True)
class Options:
    steps: int | None = None
    seed: int = 0
    rate: float = 0.1
    kind: Literal["paper", "release"] = "paper"
    out: Path = Path("out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stesp", "3"], "unknown option --stesp: did you mean --steps?"),
        (["--colour", "3"], "unknown option --colour"),
        (["--kind", "papre"], "--kind: expected paper or release, found 'papre': "
         "did you mean 'paper'?"),
        (["--kind", "x"], "--kind: expected paper or release, found 'x'"),
        (["--steps", "2.5"], "--steps: expected a whole number, found '2.5'"),
        (["--seed", "nan"], "--seed: expected a whole number, found 'nan'"),
        (["--rate", "fast"], "--rate: expected a number, found 'fast'"),
        (["-o", "x"], "unknown option -o: did you mean --out?"),
        (["x"], "'x' is of no option"),
        (["--steps"], "Missing value for argument '--steps'. Expected 1 values."),
    ],
)  # fmt: skip
def test_a_usage_error_names_what_was_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Options, "prog", "", arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"prog: {said} (see --help)\n"


@pytest.mark.parametrize(
    ("name", "near"),
    [("relase", "release"), ("PAPER", "paper"), ("optimise", "optimize"), ("zzz", None)],
)
def test_the_nearest_name_is_found_if_any_is_near(name: str, near: str | None) -> None:
    known = ("release", "paper", "optimize")
    assert nearest(name, known) == near
    assert did_you_mean(name, known) == (f": did you mean {near!r}?" if near else "")


def test_ctrl_c_while_a_command_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "from targetclip.command import start\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Config: ...\n"
        'if __name__ == "__main__":\n'
        '    start("slow", Config)\n'
        'import time\nprint("importing", flush=True)\ntime.sleep(60)\n'
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "slow"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs of a shell ignore Ctrl-C, and hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == STOPPED
    assert "Traceback" not in message and "stopped" in message
    assert message.startswith("slow: starting\n")  # before the import, which takes long


COMMANDS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("targetclip", "predictor", "data", "train", "eval", "tests/proof")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '\nif __name__ == "__main__":' in path.read_text()
]
WITH_A_MISTAKE = """
import json, runpy, sys
answers = {}
for name in json.loads(sys.argv[1]):
    for flag in ("--help", "--mistake"):
        sys.argv[1:] = [flag]
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            answers[f"{name} {flag}"] = ended.code or 0, "torch" in sys.modules
print("answers", json.dumps(answers))
"""


def test_help_and_mistakes_of_every_command_do_not_wait_for_torch() -> None:
    assert "data.build" in COMMANDS and "eval.compare" in COMMANDS
    program = [sys.executable, "-c", WITH_A_MISTAKE, json.dumps(COMMANDS)]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    expected = {
        f"{name} {flag}": [code, False]
        for name in COMMANDS
        for flag, code in (("--help", 0), ("--mistake", 2))
    }
    assert json.loads(ended.stdout.rpartition("answers ")[2]) == expected


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_ctrl_c_once_within_the_block(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with signals_as_ctrl_c():
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
            for again in (signal.SIGTERM, signal.SIGHUP):  # these end nothing that is being saved
                os.kill(os.getpid(), again)
                time.sleep(0.01)
        assert signal.getsignal(number) == signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        with signals_as_ctrl_c():
            os.kill(os.getpid(), number)
            time.sleep(0.01)
    finally:
        signal.signal(number, before)


def test_the_first_signal_asks_and_a_second_ctrl_c_ends() -> None:
    stop = Stop()
    stop.check()
    stop.ask(signal.SIGINT, None)
    with pytest.raises(Stopped):
        stop.check()
    with pytest.raises(KeyboardInterrupt):
        stop.ask(signal.SIGINT, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_listener_outlives_signals_that_end_a_process(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    signal.signal(number, signal.SIG_DFL)
    try:
        stop = Stop()
        stop.listen()
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.signal == number
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        stop = Stop()
        stop.listen()
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.01)
        assert stop.signal is None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# Precision and device


@pytest.mark.parametrize(
    ("launched", "asked", "precision"),
    [
        (None, None, "fp32"),
        ("no", None, "fp32"),
        ("bf16", None, "bf16"),
        ("BF16", None, "bf16"),
        ("bf16", "fp32", "fp32"),
        (None, "bf16", "bf16"),
    ],
)
def test_precision_is_the_one_asked_for_or_that_of_the_launcher(
    launched: str | None, asked: str | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision(asked) == precision  # type: ignore[arg-type]


@pytest.mark.parametrize("launched", ["fp16", "fp8", "bananas"])
def test_a_precision_that_is_not_computed_here_is_refused(
    launched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=f"expected no or bf16, found '{launched}'"):
        choose_precision()
    assert choose_precision("fp32") == "fp32"  # as the message says


def test_bfloat16_computes_products_alone_in_half() -> None:
    cpu = torch.device("cpu")
    with in_precision(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with in_precision(cpu, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_device_that_cannot_compute_is_named() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "meta"):
        expected = f"--device: expected cpu.*, found '{name}', which cannot be used here"
        with pytest.raises(ValueError, match=expected):
            choose_device(name)


# Files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    write_file(path, "neu: ü")
    assert path.read_text("utf-8") == "neu: ü"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_file(tmp_path / "no" / "file", b"")


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"room for the 5 bytes of .*free some space"),
        full_disk_explained(tmp_path / "f", 5),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_json_is_for_people_and_takes_paths(tmp_path: Path) -> None:
    write_json(tmp_path / "f.json", {"path": Path("a/b"), "n": 1})
    text = (tmp_path / "f.json").read_text()
    assert json.loads(text) == {"path": "a/b", "n": 1} and text.endswith("}\n")


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out: cannot write into"):
        make_folder(tmp_path / "file" / "out")
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
