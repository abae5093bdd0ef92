"""Trackers: what they are sent, how a run goes on, and that a missing package is said at once."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trackers_read import distinct_seconds, scalars_of

from targetclip import tracking
from targetclip.command import Tracker
from targetclip.tracking import check_tracker, tracked


def test_tensorboard_is_sent_numbers_alone_and_settings_once(tmp_path: Path) -> None:
    settings = {"rate": 0.1, "sizes": [1, 2], "none": None}
    with tracked("tensorboard", tmp_path, settings, 0) as track:
        track({"loss": 0.5, "stage": "pairs", "flag": True}, 5)
        track({"loss": 0.25, "count": 3}, 10)
    assert scalars_of(tmp_path) == {"loss": {5: 0.5, 10: 0.25}, "count": {10: 3.0}}
    [kept] = tmp_path.rglob("hparams.yml")
    assert "rate: 0.1" in kept.read_text() and "sizes: '[1, 2]'" in kept.read_text()
    with tracked("tensorboard", tmp_path, settings, 10):
        pass
    assert [*tmp_path.rglob("hparams.yml")] == [kept]


def test_tensorboard_forgets_steps_that_a_resumed_run_takes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distinct_seconds(monkeypatch)
    with tracked("tensorboard", tmp_path, {}, 0) as track:
        for step in (5, 10, 15):
            track({"loss": float(step)}, step)
    with tracked("tensorboard", tmp_path, {}, 10) as track:
        track({"loss": 100.0}, 20)
    assert scalars_of(tmp_path) == {"loss": {5: 5.0, 10: 10.0, 20: 100.0}}


class Run:
    """Of the stand-in for wandb."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, Any], int]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.sent.append((values, step))

    def finish(self) -> None:
        self.finished = True


def test_a_run_of_wandb_goes_on_under_its_number_and_a_new_one_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []
    configs: list[dict[str, Any]] = []
    runs: list[Run] = []

    def init(**options: Any) -> Run:
        opened.append(options)
        runs.append(Run())
        return runs[-1]

    config = SimpleNamespace(update=lambda values, **options: configs.append(values))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, config=config))
    for step in (0, 7, 0):
        with tracked("wandb", tmp_path / "run", {"seed": 3}, step) as track:
            track({"loss": 0.5, "stage": "pairs"}, step + 1)
    assert [(o["project"], o["name"], o["resume"]) for o in opened] == [
        ("targetclip", "run", "allow")
    ] * 3
    first, resumed, anew = (options["id"] for options in opened)
    assert first == resumed != anew
    assert configs == [{"seed": 3}] * 2
    assert [run.sent for run in runs] == [[({"loss": 0.5}, s)] for s in (1, 8, 1)]
    assert all(run.finished for run in runs)


def test_a_run_that_fails_is_closed_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError), tracked("tensorboard", tmp_path, {}, 0) as track:
        track({"loss": 1.0}, 1)
        raise FloatingPointError
    assert scalars_of(tmp_path) == {"loss": {1: 1.0}}


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    with tracked(None, tmp_path, {}, 0) as track:
        track({"loss": 1.0}, 1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_whose_package_is_missing_is_one_clear_line(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match=f"^--tracker: .* pip install {tracker}, or leave"):
        check_tracker(tracker)
    check_tracker(None)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracker])
    check_tracker(tracker)
