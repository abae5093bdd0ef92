"""Faults at named points of a build: what `data.build.run` takes as `at`."""

import signal
import threading
from collections.abc import Callable
from typing import Literal

Action = Literal["kill", "stop"]


def fault_at(place: str, count: int, action: Action = "kill") -> Callable[[str], None]:
    """Return an `at` that kills or stops this process at the `count`-th call with `place`."""
    lock, calls = threading.Lock(), 0

    def at(point: str) -> None:
        nonlocal calls
        with lock:
            calls += point == place
            reached = point == place and calls == count
        if reached:
            # Raised in this very thread, so nothing after this line runs first.
            signal.raise_signal(signal.SIGKILL if action == "kill" else signal.SIGSTOP)

    return at
