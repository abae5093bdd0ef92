"""The study of scaling: the law and its prediction, and trainings from command to report."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.targets import default_targets
from eval.studies.scaling import Config, fitted, predicted, run, train_alone
from predictor.mapper import load_mapper
from targetclip.command import Stop, parse
from targetclip.world import load_world
from train import mapper as trainer
from train import mapper_settings

SIZES = [16, 64, 256, 1024, 4096]
TRAINED: list[str] = []
REAL = "3 targets, seed 1"


def losses(a: float, b: float, c: float) -> np.ndarray[Any, Any]:
    return np.array([a + b * n**-c for n in SIZES])


# The law


@pytest.mark.parametrize(("a", "b", "c"), [(0.2, 1.5, 0.5), (0.0, 0.9, 0.1), (0.3, 4.0, 1.2)])
def test_a_law_is_found_again_and_goes_on(a: float, b: float, c: float) -> None:
    law = fitted(SIZES, losses(a, b, c)[None])
    assert law.exponent[0] == pytest.approx(c)
    assert law.floor[0] == pytest.approx(a)
    assert law.at(16384)[0] == pytest.approx(a + b * 16384**-c)
    said = predicted(SIZES, losses(a, b, c), 16384, 3)
    assert (said["a"], said["b"], said["c"]) == pytest.approx((a, b, c))


def test_a_line_in_the_logarithm_is_nearly_the_laws_limit() -> None:
    line = 1 - 0.05 * np.log(SIZES)
    assert fitted(SIZES, line[None]).at(16384)[0] == pytest.approx(
        1 - 0.05 * np.log(16384), abs=4e-3
    )


def test_the_interval_holds_what_it_promises() -> None:
    random, sizes = np.random.default_rng(0), [n for n in SIZES for _ in range(3)]
    true = np.array([0.2 + 1.5 * n**-0.5 for n in sizes])
    to_come, inside, widths = 0.2 + 1.5 * 16384**-0.5, 0, []
    for _ in range(100):
        said = predicted(sizes, true + 0.01 * random.normal(size=15), 16384, 3)
        inside += said["low"] <= to_come + 0.01 * random.normal(size=3).mean() <= said["high"]
        widths.append(said["high"] - said["low"])
    assert 85 <= inside <= 100 and max(widths) < 0.1


# The command


@pytest.fixture
def small(face_world: Path, tmp_path: Path) -> Callable[..., Config]:
    def configured(**changes: Any) -> Config:
        usual: dict[str, Any] = {
            "sizes": (2, 3, 5),
            "predict": 8,
            "seeds": 2,
            "steps": 1,
            "batch_size": 2,
            "targets": ("generated:12@17",),
            "validation": ("generated:2@23",),
            "judged": 2,
            "sources": 2,
        }
        return Config(out=tmp_path, world=str(face_world), **{**usual, **changes})

    return configured


@pytest.fixture
def train(
    write_mapper: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str], Path], None]:
    """Trains the first mapper in this process, and puts one of random weights for the others."""
    monkeypatch.setattr(Stop, "listen", lambda stop: None)  # of a thread, which gets no signals
    TRAINED.clear()

    def work(words: list[str], log: Path) -> None:
        assert words[1:3] == ["-m", "train.mapper"]
        config = parse(mapper_settings.Config, "train", None, words[3:])
        assert log.parent.name == f"{config.data.max_targets} targets, seed {config.seed}"
        TRAINED.append(log.parent.name)
        if TRAINED[-1] == REAL:
            trainer.run(config)
        else:
            write_mapper(config.out / "mapper.safetensors", {}, seed=len(TRAINED))

    return work


def test_a_prediction_is_written_before_the_trainings_that_it_is_of(
    small: Callable[..., Config], train: Callable[[list[str], Path], None], tmp_path: Path
) -> None:
    path, seen = tmp_path / "report.json", []

    def watched(words: list[str], log: Path) -> None:
        if log.parent.name.startswith("8 "):
            report = json.loads(path.read_text())
            assert report["prediction"]["size"] == 8 and len(report["trainings"]) >= 6
            seen.append(report["prediction"])
        train(words, log)

    report = run(small(), watched)
    assert len(seen) == 2 and seen[0] == seen[1] == report["prediction"]
    assert len(report["trainings"]) == 8 and set(report["outcome"]) == {
        "objective",
        "score missed",
        "essence missed",
    }
    assert all(
        report["prediction"]["written"] <= report["trainings"][n]["began"] for n in TRAINED[6:]
    )
    text = (tmp_path / "report.md").read_text()
    assert "| 8 | 2 |" in text and "Prediction for 8 targets, written 20" in text
    assert (tmp_path / "chart.png").is_file()
    assert len([*(tmp_path / "bank").iterdir()]) == 1
    record = load_mapper(tmp_path / "trainings" / REAL / "mapper.safetensors")[1]
    assert record.recipe["max_targets"] == 3 and record.recipe["schedule"] == ["transfer@64:1"]


def test_after_an_interruption_only_what_is_lacking_is_trained(
    small: Callable[..., Config],
    train: Callable[[list[str], Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(globals(), "REAL", "")

    def dies(words: list[str], log: Path) -> None:
        if log.parent.name.startswith("8 "):
            raise ChildProcessError("killed")
        train(words, log)

    with pytest.raises(ChildProcessError, match="killed"):
        run(small(), dies)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [f"{n} targets, seed {seed}" for n in (2, 3, 5) for seed in (0, 1)] == TRAINED
    assert sorted(kept["trainings"]) == TRAINED
    TRAINED.clear()
    report = run(small(jobs=2), train)
    assert sorted(TRAINED) == ["8 targets, seed 0", "8 targets, seed 1"]
    assert report["prediction"] == kept["prediction"]
    assert {name: report["trainings"][name] for name in kept["trainings"]} == kept["trainings"]
    TRAINED.clear()
    assert run(small(), train) == report and not TRAINED
    with pytest.raises(ValueError, match="is of another comparison"):
        run(small(steps=2), train)


def test_a_training_that_came_before_its_prediction_is_refused(
    small: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "trainings/8 targets, seed 1").mkdir(parents=True)
    with pytest.raises(ValueError, match="was trained before its prediction: delete it"):
        run(small())


def test_a_process_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with pytest.raises(ChildProcessError, match=r"the training failed: no bank here"):
        train_alone([sys.executable, "-c", "exit('first\\nno bank here')"], log)
    assert log.read_text() == "first\nno bank here\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": (2, 3)}, "expected three numbers or more from 2 on"),
        ({"sizes": (1, 3, 5)}, "expected three numbers or more from 2 on"),
        ({"sizes": (3, 2, 5)}, "in rising order"),
        ({"predict": 5}, "and a larger one"),
        ({"jobs": 0}, "--jobs: expected 1 or more"),
    ],
)
def test_options_without_sense_are_refused(
    changes: dict[str, Any], said: str, small: Callable[..., Config]
) -> None:
    with pytest.raises(ValueError, match=said):
        run(small(**changes))


def test_the_bank_is_that_of_the_shipped_mappers_targets() -> None:
    kinds = [spec.partition(":")[0] for spec in Config(out=Path()).targets]
    world = load_world("avatars")
    assert kinds == [spec.partition(":")[0] for spec in default_targets(world, 17, 1, samples=1)]
