"""What a hostile checkpoint holds: code that runs where a file is unpickled without care."""

from collections.abc import Callable
from pathlib import Path


class Touch:
    """Unpickled by the standard loader, this creates a file: the trace of code that ran."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], object], tuple[Path]]:
        return Path.touch, (self.trace,)
