"""Figures of long work, sent to an experiment tracker by accelerate's own trackers.

Knows which trackers there are and how a run is named and resumed there; nothing of what the figures
are. Services are spoken to by accelerate and their packages alone.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from targetclip.command import Tracker, write_file

Track = Callable[[Mapping[str, Any], int], None]
"""Sends the figures of a step; what is no number stays out."""

PROJECT = "targetclip"  # of wandb
RUN = "wandb-run"  # file with the number of a run of wandb, by which it goes on


def check_tracker(tracker: Tracker | None) -> None:
    """Raise a ValueError for a tracker whose package is not installed."""
    if tracker is not None and tracker not in map(str, get_available_trackers()):
        raise ValueError(
            f"--tracker: expected the package {tracker}, found none: pip install {tracker}, or "
            "leave the flag out"
        )


def run_id(out: Path, step: int) -> str:
    """Return the number of a folder's run: a new one where it begins, else that of before."""
    path = out / RUN
    if step == 0 or not path.is_file():
        write_file(path, secrets.token_hex(8))
    return path.read_text()


def options_of(tracker: Tracker, out: Path, step: int) -> dict[str, Any]:
    """Return how a tracker is opened, so that it goes on after `step`."""
    if tracker == "tensorboard":
        # Steps that were sent after the last checkpoint are taken again.
        return {"logging_dir": out, "purge_step": step + 1}
    # It ignores steps that it has; taken again, they give the same figures.
    return {"dir": out, "name": out.name, "id": run_id(out, step), "resume": "allow"}


@contextmanager
def tracked(
    tracker: Tracker | None, out: Path, settings: Mapping[str, Any], step: int
) -> Iterator[Track]:
    """Within the block, give the function that sends figures. For the main process alone.

    Args:
        tracker: None: figures go nowhere.
        out: folder of the run, which names it; tensorboard's files go into out/tensorboard.
        settings: of the run, sent where it begins; anything that JSON holds.
        step: the one that the run has reached; at 0 it begins.
    """
    if tracker is None:
        yield lambda figures, step: None
        return
    name = PROJECT if tracker == "wandb" else tracker
    out.mkdir(parents=True, exist_ok=True)
    opened = LOGGER_TYPE_TO_CLASS[tracker](name, **options_of(tracker, out, step))
    opened.start()
    try:
        if step == 0:
            plain = (bool, int, float, str)
            opened.store_init_configuration(
                {k: v if isinstance(v, plain) else json.dumps(v) for k, v in settings.items()}
            )

        def track(figures: Mapping[str, Any], step: int) -> None:
            numbers = {k: v for k, v in figures.items() if type(v) in (int, float)}
            opened.log(numbers, step=step)

        yield track
    finally:
        opened.finish()
