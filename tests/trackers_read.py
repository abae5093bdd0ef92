"""What a tracker was sent, read back."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer


def distinct_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each of tensorboard's files seem to be begun in a second of its own, as those of a run
    and of its continuation are: they are read in the order of their names, which begin with it."""
    seconds = itertools.count(1_700_000_000)
    clock = SimpleNamespace(time=lambda: float(next(seconds)))
    monkeypatch.setattr(event_file_writer, "time", clock)


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """Read tensorboard's files below a folder: the value of each step by the name of the figure."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
