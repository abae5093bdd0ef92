"""What the `targetclip` command prints: progress and results for people, warnings for the report.

Progress and warnings go to standard error, results to standard output.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from targetclip.command import one_line, say

PACKAGES = ("targetclip", "predictor")


class Forgiving:
    """A stream whose reader may be gone: a closed pipe, a terminal that hung up."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        """Write, if anybody reads."""
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        """Flush, if anybody reads."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # so that tqdm knows whose lines to clear
        return self.stream is getattr(other, "stream", other)

    __hash__ = object.__hash__


class Console:
    """Prints what happens, and remembers the warnings.

    Args:
        quiet: print warnings alone.
        json: leave standard output to the report.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        self.quiet, self.json = quiet, json
        self.warnings: list[str] = []

    def progress(self, text: str) -> None:
        """Print what is being done."""
        if not self.quiet:
            say(f"targetclip: {one_line(text)}", error=True)

    def warn(self, text: str) -> None:
        """Print a warning once, and remember it for the report."""
        text = one_line(text)
        if text not in self.warnings:
            self.warnings.append(text)
            with tqdm.external_write_mode(file=sys.stderr):  # not into the middle of a bar
                say(f"targetclip: warning: {text}", error=True)

    def result(self, text: str) -> None:
        """Print a line of the results."""
        if not self.quiet and not self.json:
            say(text)

    def bar(self, over: Iterable[Any] | None = None, **settings: Any) -> Any:
        """Return a progress bar, as tqdm does."""
        return tqdm(over, disable=self.quiet, file=Forgiving(sys.stderr), **settings)

    @contextmanager
    def hearing_logs(self) -> Iterator[None]:
        """Within the block, take warnings that the project's modules log as the command's own."""
        console = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                console.warn(record.getMessage())

        handler = Handler(logging.WARNING)
        loggers = [logging.getLogger(name) for name in PACKAGES]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False  # to a root logger that some library may have set up
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
                logger.propagate = True
