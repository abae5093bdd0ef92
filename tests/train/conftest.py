"""What the tests of all trainings share."""

import signal
from collections.abc import Iterator

import pytest

from targetclip.command import SIGNALS


@pytest.fixture(scope="module", autouse=True)
def signals_kept() -> Iterator[None]:
    """A training listens to signals; afterwards they do what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
