"""From a checkpoint to a mapper in one command: what it plans, skips, resumes and reports."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_runs import module_exit_code

from predictor.mapper import Mapper, load_mapper
from targetclip.command import STOPPED, Stop
from train import loop
from train.own import HUB, MAPPER, PROGRESS, REPORT, Config, run

SMALL = {
    "pairs": 40,
    "steps": 6,
    "build_flags": "--steps 2 --batch-size 20 --held-out 2",
    "train_flags": "--targets generated:20@17 --validation generated:2@23 --width 16 --depth 1 "
    "--batch-size 2 --sources 2 --pairs-batch-size 8 --correction 4 --evaluate-every 3",
    "calibrate_flags": "--targets generated:60@29 --count 2 --fitted 6 --sources 2 --probes 2",
    "compare_flags": "--targets 2 --slow 1 --sources 2 --references 4 --max-steps 2",
}


class Here:
    """Runs stages in this process, and remembers which."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def __call__(self, words: Sequence[str], processes: int, stop: Stop) -> int:
        self.begun.append(words[0])
        return module_exit_code(import_module(words[0]), *words[1:])


@pytest.fixture
def small(tiny_world: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes configurations of seconds."""

    def make(**changes: Any) -> Config:
        return Config(**{"out": tmp_path / "out", "world": str(tiny_world), **SMALL, **changes})

    return make


def test_a_checkpoint_becomes_a_calibrated_mapper_though_it_was_stopped_on_the_way(
    small: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, first, second, third = small(), Here(), Here(), Here()
    out, log = config.out, loop.Trainer.log

    def log_and_stop(trainer: loop.Trainer[Any], *figures: Any) -> None:
        log(trainer, *figures)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "log", log_and_stop)
        assert run(config, first) == STOPPED
    assert first.begun == ["train.own", "data.build", "train.mapper"]
    assert not (out / "mapper/mapper.safetensors").exists()
    assert run(config, second) == 0
    assert second.begun == ["train.own", "train.mapper", "eval.calibrate", "eval.compare"]
    steps = [
        json.loads(line)["step"] for line in (out / "mapper/log.jsonl").read_text().splitlines()
    ]
    assert steps == [3, 6, 7]

    mapper, record = load_mapper(out / MAPPER)
    assert record.calibration["threshold"] and mapper.config.correction is not None
    assert "python -m eval.calibrate" in record.command
    assert Mapper.from_pretrained(out / HUB).fingerprint
    report = (out / REPORT).read_text()
    for name in (MAPPER, "mapper/grid.png", "compare/report.md", f"{HUB}/README.md"):
        assert name in report and (out / name).is_file()
    assert "| mapper | " in report and "[0." in report
    seconds = json.loads((out / PROGRESS).read_text())
    assert all(f"| {name} | " in report and row["done"] for name, row in seconds.items())

    capfd.readouterr()
    assert run(config, third) == 0 and third.begun == ["train.own"]
    assert capfd.readouterr().out.count(" done ") == 4
    assert run(small(seed=1), Here()) == 1
    assert "pairs.--seed: planned '0', found '1'" in capfd.readouterr().err
