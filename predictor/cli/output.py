"""What the `targetclip` command writes: lines for people, and the folder of a run's results.

Progress and warnings go to standard error, results to standard output. A run owns the names of its
results. It removes those that an earlier run of the same command lists in its report.json, and
leaves every other file. Two runs never write into one folder at once.
"""

import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from targetclip.command import make_folder, one_line, say, write_json

PACKAGES = ("targetclip", "predictor")
REPORT, DIRECTION, GRID, PAGE = "report.json", "direction.safetensors", "grid.png", "index.html"
STRIP, MORPHS = "strip.png", {"gif": "morph.gif", "mp4": "morph.mp4"}  # written where asked for
VIDEO, FRAMES = "edited.mp4", "frames"  # written of clips
OURS = re.compile(
    r"(report\.json|direction\.safetensors|grid\.png|index\.html|strip\.png|morph\.(gif|mp4)|"
    r"edited\.mp4|frames)$|(edited|photo)_.*\.png$"
)
LONGEST = 150  # bytes of a name, so that what is added to it still fits into a file name


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


def unique_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return names for files or folders: equal ones get a number, however letters are cased."""
    used = {name.casefold() for name in taken}
    result = []
    for name in names:
        short = os.fsdecode(os.fsencode(name.lstrip("."))[:LONGEST]) or "picture"
        unique, count = short, 1
        while unicodedata.normalize("NFC", unique).casefold() in used:
            count += 1
            unique = f"{short}_{count}"
        used.add(unicodedata.normalize("NFC", unique).casefold())
        result.append(unique)
    return result


def words_of(text: str) -> str:
    """Return a text as the name of a file: its letters and digits, joined by "_"."""
    return "_".join(re.findall(r"\w+", text))[:60] or "text"


def earlier_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of an earlier run in a folder; {} for another file of that name."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


class OutputFolder:
    """A folder for the results of one run.

    Args:
        command: that writes them, such as "transfer".
        inputs: files that the run reads; none of them may be replaced.

    Raises:
        OSError: the folder cannot be written into.
        FileExistsError: it holds results that are not this command's to replace.
    """

    def __init__(
        self, path: Path, command: str, *, overwrite: bool = False, inputs: Iterable[Path] = ()
    ) -> None:
        self.path, self.command, self.overwrite = path, command, overwrite
        self.inputs = tuple(inputs)
        self.files: list[str] = []
        """Names of what this run has written, in the folder."""
        self.cleared = False
        self.older = self.older_results()

    def older_results(self) -> list[str]:
        """Return the names of results that this run replaces, after checking the folder."""
        report = earlier_report(self.path)
        present = sorted(os.listdir(self.path)) if self.path.is_dir() else []
        ours = [name for name in present if OURS.match(name) and not self.is_empty_folder(name)]
        by = None if report is None else report.get("command")
        listed = []
        if report and by == self.command:
            listed = [str(name) for name in report.get("files", [])]
            if not report.get("finished", False):
                listed += ours  # it was ended before it could list them
        tops = {REPORT, *(name.split("/")[0] for name in listed)} if listed else set()
        strange = [name for name in ours if name not in tops]
        self.check_inputs({*listed, *ours})
        if strange and (not self.overwrite or FRAMES in strange):
            other = isinstance(by, str) and by != self.command
            whose = f"results of targetclip {by}" if other else f"{strange[0]!r} of another origin"
            hint = f"remove {FRAMES}" if FRAMES in strange else "--overwrite"
            raise FileExistsError(
                f"--out: {str(self.path)!r} holds {whose}: give another folder, or {hint}"
            )
        return list(dict.fromkeys(listed))

    def check_inputs(self, names: Iterable[str]) -> None:
        """Raise a FileExistsError for an input that is among the files that may be replaced."""
        replaced = {(self.path / name).resolve() for name in names}
        for path in self.inputs:
            if path.resolve() in replaced:
                raise FileExistsError(
                    f"--out: {str(path)!r} is read by this run and would be replaced: "
                    "give another folder"
                )

    def is_empty_folder(self, name: str) -> bool:
        """Tell whether something in the folder is a folder without content."""
        path = self.path / name
        return path.is_dir() and not path.is_symlink() and not any(path.iterdir())

    def within(self, name: str) -> "OutputFolder":
        """Return a folder in this one, for the results of one of several targets."""
        return OutputFolder(self.path / name, self.command, overwrite=self.overwrite)

    def take(self, name: str) -> Path:
        """List a result, and return its path."""
        if name not in self.files:
            self.files.append(name)
        return self.path / name

    def clear(self) -> None:
        """Remove the older results; do nothing the second time.

        Until the report is written, report.json says that the run has not finished.
        """
        if self.cleared:
            return
        self.cleared = True
        make_folder(self.path)
        folders = set()
        for name in self.older:
            path = self.path / name
            if ".." in Path(name).parts or Path(name).is_absolute():
                continue
            if path.is_dir() and not path.is_symlink():
                folders.add(path)
                continue
            path.unlink(missing_ok=True)
            folders |= {one for one in path.parents if one.is_relative_to(self.path)}
        for path in sorted(folders - {self.path}, reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        write_json(
            self.path / REPORT, {"command": self.command, "finished": False, "files": [REPORT]}
        )

    def write_report(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Write report.json, which lists all results; return its content."""
        self.take(REPORT)
        whole = {"command": self.command, "finished": True, **report, "files": self.files}
        write_json(self.path / REPORT, whole)
        return whole
