"""What every command needs: errors in one line, exit codes, device, precision, files, versions.

Knows processes and files; nothing of networks. Importing it does not import torch, so that usage
errors and Ctrl-C are answered at once.

Exit codes: 0 success; 1 bad input, a file that cannot be read or written, or no memory; 2 a usage
error; 130 stopped by a signal, and what was done is kept.
"""

import errno
import json
import os
import platform
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib import import_module, metadata
from io import StringIO
from itertools import dropwhile, takewhile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
Asked = TypeVar("Asked")

FAILED, USAGE, STOPPED = 1, 2, 130
PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"
PACKAGES = ("targetclip", "torch", "open_clip_torch", "numpy", "pillow")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stopped(Exception):
    """A signal asked to stop; what has been done is saved."""


class Stop:
    """Remembers the first signal that asks this process to stop; long work checks it."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """Turn SIGTERM, SIGUSR1, SIGHUP and Ctrl-C into requests that `check` answers."""
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal is not None:
            raise Stopped


# Running a command


def one_line(text: object) -> str:
    """Return a text, or the message of an error, without line breaks."""
    return " ".join(str(text).split())


def usage_message(box: str) -> str:
    """Return what a usage error of tyro says, without its frame, its title and the help below."""
    rows = [row.strip("│╭╮╰╯ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def has_words(row: str) -> bool:
        return bool(row.strip("─-"))

    # Where the terminal knows no frames there is a rule under the title instead.
    below_title = dropwhile(lambda row: not has_words(row), rows[1:])
    message = " ".join(takewhile(has_words, below_title))
    return re.sub(r"^Error parsing \w+: ", "", message)  # a class's name, where options disagree


def parse(
    kind: type[Asked] | Any, prog: str, description: str | None, args: list[str] | None = None
) -> Asked:
    """Return the options of a command line as an object of `kind`.

    Raises:
        SystemExit: code 0 after --help; code 2 after a usage error, which is one line.
    """
    import tyro

    box = StringIO()
    try:
        with redirect_stderr(box):
            asked: Asked = tyro.cli(kind, prog=prog, description=description, args=args)
    except SystemExit as ended:
        if ended.code:
            print(f"{prog}: {usage_message(box.getvalue())} (see --help)", file=sys.stderr)
            raise SystemExit(USAGE) from None
        raise
    return asked


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the processor or on an accelerator."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def guarded(work: Callable[[], int | None], prog: str) -> int:
    """Call `work` and return the exit code; an error that a user can mend is one line."""
    try:
        return work() or 0
    except (KeyboardInterrupt, Stopped):
        print(f"{prog}: stopped; what was done is kept", file=sys.stderr)
        return STOPPED
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"{prog}: error: out of memory: lower --batch-size or --max-images, or add "
            "--checkpoint-layers, where the command has them",
            file=sys.stderr,
        )
    return FAILED


def main(run: Callable[[Any], object], kind: Any, description: str | None, prog: str) -> NoReturn:
    """Parse the command line into `kind`, call `run` with it, and end the process.

    A whole number that `run` returns is the exit code.
    """

    def work() -> int:
        result = run(parse(kind, prog, description))
        return result if type(result) is int else 0

    sys.exit(guarded(work, prog))


def start(module: str) -> NoReturn:
    """Import a module that is a command, call its `main`, and end the process.

    For the first lines of such a module, so that Ctrl-C is answered in one line while it imports.
    """

    def work() -> int:
        import_module(module).main()
        return 0

    sys.exit(guarded(work, f"python -m {module}"))


# Device and precision


def choose_device(name: str | None = None) -> "torch.device":
    """Return the named device or, without a name, an accelerator or else the processor.

    Raises:
        ValueError: torch knows no such device, or it cannot compute.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.get_default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices exist but cannot compute
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def choose_precision(asked: Precision | None = None, default: Precision = "fp32") -> Precision:
    """Return the precision that is asked for, else accelerate's variable, else the default.

    Raises:
        ValueError: the variable names a precision that is not computed here.
    """
    launched = os.environ.get(PRECISION_VARIABLE, "").strip().lower()
    known: dict[str, Precision] = {"no": "fp32", "fp32": "fp32", "bf16": "bf16"}
    if launched and launched not in known:
        raise ValueError(
            f"{PRECISION_VARIABLE} (accelerate's --mixed_precision): expected no or bf16, found "
            f"{launched!r}: set one of these, or give --precision"
        )
    if asked is not None:
        return asked
    return known[launched] if launched else default


@contextmanager
def in_precision(device: "torch.device", precision: Precision) -> Iterator[None]:
    """Compute convolutions, matrix products and attention in a precision; weights stay as they are.

    On a processor, attention in bfloat16 is computed unfused: the fused one has the slower
    backward pass.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if precision == "fp32":
        yield
        return
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16), plain:
        yield


# Files


@contextmanager
def full_disk_explained(path: Path, size: int | None = None) -> Iterator[None]:
    """Explain an error of a full disk, quota or file size: what was written, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        room = "room" if size is None else f"room for the {size} bytes"
        raise OSError(
            error.errno,
            f"expected {room} of {str(path)!r}, found "
            f"{os.strerror(error.errno)!r}; free some space and run the same command again; "
            "nothing finished is lost",
        ) from error


def temporary_beside(path: Path) -> Path:
    """Return a new hidden name in the folder of `path`, for a file until it is whole."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write into; create it first")
    # Process numbers repeat from host to host, so they alone do not make a name unique.
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder and say so with these two; databases go on too.
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; afterwards the file has the name `path`, whole.

    An error inside leaves what `path` held before. The written content survives a loss of power.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: the file cannot be written. A full disk is explained.
    """
    temporary = temporary_beside(path)
    with full_disk_explained(path):
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file that a reader, or a killed writer, finds old or new but never in part.

    Raises:
        FileNotFoundError, OSError: as `whole_file`.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, indented for people; values that JSON does not know become texts."""
    write_file(path, json.dumps(content, indent=2, default=str) + "\n")


def make_folder(out: Path) -> None:
    """Make an output folder and check that it can be written into, before any work.

    Raises:
        OSError: it cannot.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(out / "write")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out: cannot write into {out}: {error.strerror}") from error


# Records


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    named = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            named[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            named[name] = "not installed"
    return named


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 4)
