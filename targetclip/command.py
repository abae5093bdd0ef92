"""What every command needs: errors in one line, exit codes, device, precision, files, versions.

Knows processes and files; nothing of networks. Importing it does not import torch, so that usage
errors and Ctrl-C are answered at once.

Exit codes: 0 success; 1 bad input, a file that cannot be read or written, or no memory; 2 a usage
error; 130 stopped by a signal, and what was done is kept.
"""

import errno
import fcntl
import json
import os
import platform
import re
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from difflib import get_close_matches
from importlib import import_module, metadata
from io import StringIO, TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
Tracker = Literal["tensorboard", "wandb"]
"""Where a long work's figures can be sent; see `targetclip.tracking`."""
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
        """Turn SIGTERM, SIGUSR1, SIGHUP and Ctrl-C into requests that `check` answers.

        A hang-up that is ignored, as under nohup, stays ignored.
        """
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a misspelt one; None if none is like it."""
    lower = {one.lower(): one for one in known}
    matches = get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    return lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error that names the nearest known name; nothing if none is near."""
    near = nearest(name, known)
    return f": did you mean {near!r}?" if near is not None else ""


def usage_blocks(box: str) -> list[list[str]]:
    """Return the rows of a usage error of tyro, split at its rules, without its frame."""
    rows = [row.strip("│╭╮╰╯ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    blocks: list[list[str]] = [[]]
    for row in rows[1:]:  # below the title
        if row.strip("─-"):
            blocks[-1].append(row)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def usage_message(box: str, args: Sequence[str]) -> str:
    """Return what a usage error of tyro says and what to do about it, as one line.

    Args:
        box: what tyro printed.
        args: the command line.
    """
    blocks = usage_blocks(box)
    message = " ".join(blocks[0]) if blocks else "the command line cannot be read"
    # The name of the class whose options disagree.
    message = re.sub(r"^Error parsing (?!--)\S+: ", "", message)
    rest = [row for block in blocks[1:] for row in block]
    text = " ".join(rest)
    for arg in args:
        if re.fullmatch(r"-[A-Za-gi-z]", arg):
            flags = sorted({*re.findall(r"--[a-z][a-z-]+", box)})
            near = [flag for flag in ("--out", *flags) if flag[2] == arg[1]]
            return f"unknown option {arg}: did you mean {near[0] if near else '--help'}?"
    if message.startswith("Missing from"):
        names = [row for row in blocks[0][1:] if re.match(r"--|[A-Z_]+$", row)]
        return f"expected {' and '.join(names)}, found none"
    if match := re.match(r"Unrecognized options: ([^\s,]+)", message):
        name = match[1]
        if commands := re.search(r"Available subcommands: (.+?)(?: For |$)", text):
            known = commands[1].replace(",", " ").split()
            hint = did_you_mean(name, known) or f": expected {', '.join(known)}"
            return f"unknown command {name!r}{hint}"
        flags = [row.split()[0] for row in rest if row.startswith("--")]
        if "Perhaps you meant" in text and flags:
            return f"unknown option {name}: did you mean {' or '.join(dict.fromkeys(flags[:2]))}?"
        return f"unknown option {name}" if name.startswith("-") else f"{name!r} is of no option"
    if match := re.match(
        r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", message
    ):
        known = [choice.strip(" '") for choice in match[3].split(",")]
        known = sorted(choice for choice in known if choice not in ("", "None"))
        hint = did_you_mean(match[1], known)
        return f"{match[2]}: expected {' or '.join(known)}, found {match[1]!r}{hint}"
    for kind, named in (("a whole number", "INT|int"), ("a number", "FLOAT|float")):
        pattern = rf"Error parsing (--\S+): .*(?:{named})\b.*?('[^']*'|\[[^]]*\])"
        if match := re.match(pattern, message):
            return f"{match[1]}: expected {kind}, found {match[2].strip('[]')}"
    return message


def parse(
    kind: type[Asked] | Any, prog: str, description: str | None, args: list[str] | None = None
) -> Asked:
    """Return the options of a command line as an object of `kind`.
    SystemExit: code 0 after --help; code 2 after a usage error, which is one line."""
    import tyro

    box, args = StringIO(), sys.argv[1:] if args is None else args
    # Flags stand in groups where `kind` nests classes, and are named without the group.
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    page = StringIO()  # of --help
    try:
        with redirect_stderr(box), redirect_stdout(page):
            asked: Asked = tyro.cli(
                kind, prog=prog, description=description, args=args, config=config
            )
    except SystemExit as ended:
        # Help texts say what the default is where it is None.
        hint = re.compile(r"\(default:(\s+│?\s*│?\s*)(None)?\)")
        if page.getvalue():
            say(hint.sub(lambda text: re.sub(r"[^\s│]", " ", text[0]), page.getvalue()).rstrip())
        if ended.code:
            message = usage_message(box.getvalue(), args)
            print(f"{prog}: {message} (see --help)", file=sys.stderr)
            raise SystemExit(USAGE) from None
        raise
    return asked


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the processor or on an accelerator."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Within the block, treat SIGTERM and SIGHUP as Ctrl-C: what was done is kept.

    Only the first of them counts: a closing terminal or a scheduler may send several. A signal that
    is ignored, as SIGHUP under nohup, stays ignored. Does nothing outside the main thread.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for one in handlers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for one in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(one) == signal.SIG_DFL:
                handlers[one] = signal.signal(one, interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def say(text: str, *, error: bool = False) -> None:
    """Print a line to standard output or standard error; a reader that is gone is no error."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:  # a closed pipe, or a terminal that hung up
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_next(out: Path, results: str, then: str, *, error: bool = False) -> None:
    """Print where a command's results are and what comes next."""
    say(f"{out}: {results}; next: {then}", error=error)


def guarded(work: Callable[[], int | None], prog: str) -> int:
    """Call `work` and return the exit code; an error that a user can mend is one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # escapes for what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except (KeyboardInterrupt, Stopped):
        say(f"{prog}: stopped; what was done is kept", error=True)
        return STOPPED
    except (ValueError, OSError, FloatingPointError) as error:
        say(f"{prog}: error: {one_line(error)}", error=True)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        say(
            f"{prog}: error: out of memory: lower --batch-size or --max-images, or add "
            "--checkpoint-layers, where the command has them",
            error=True,
        )
    return FAILED


def main(
    run: Callable[[Any], object],
    kind: Any,
    description: str | None,
    prog: str,
    args: list[str] | None = None,
    *,
    exclusive: bool = False,
) -> NoReturn:
    """Parse the command line into `kind`, call `run` with it, and end the process.

    A whole number that `run` returns is the exit code. With `exclusive` a second run into the same
    `--out` is refused. Without `args` the command line is that of the process.
    """

    def work() -> int:
        asked = parse(kind, prog, description, args)
        out = asked.out if exclusive else None
        with nullcontext() if out is None else locked_folder(out):
            result = run(asked)
        return result if type(result) is int else 0

    sys.exit(guarded(work, prog))


def start(name: str, kind: Any, *, exclusive: bool = False) -> NoReturn:
    """Check the command line of a module that is a command, import the module, call its `run` with
    its `Config`, and end the process.

    Such a module calls this where its imports of torch begin, which take seconds: --help and usage
    errors are answered before them, and Ctrl-C while they run is answered in one line.

    Args:
        kind: its `Config`, which stands above the call.
        exclusive: see `main`.
    """
    prog = f"python -m {name}"

    def work() -> NoReturn:
        # Read again below: the class of the module that runs is another one than that imported.
        parse(kind, prog, sys.modules["__main__"].__doc__)
        if os.environ.get("RANK", "0") == "0":  # of a launch, only the first process speaks
            say(f"{name}: starting", error=True)
        module = import_module(name)
        main(module.run, module.Config, module.__doc__, prog, exclusive=exclusive)

    sys.exit(guarded(work, prog))


def command_line(
    module: str, flags: Mapping[str, Any], defaults: Mapping[str, Any], launcher: str = "python"
) -> str:
    """Return the command with these flags, without those that have their defaults.

    Args:
        module: that is run, such as train.mapper.
        flags: values by the names of fields; of a path its name alone is shown.
        defaults: of those flags that have one.
        launcher: what stands before -m.
    """
    words = [*launcher.split(), "-m", module]
    for name, value in flags.items():
        if name in defaults and defaults[name] == value:
            continue
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        shown = [v.resolve().name if isinstance(v, Path) else str(v) for v in values]
        flag = f"--{name.replace('_', '-')}"
        # What begins with a dash would else be taken for a flag.
        dashed = len(shown) == 1 and shown[0].startswith("-")
        words += [f"{flag}={shown[0]}"] if dashed else [flag, *shown]
    return shlex.join(words)


# Device and precision


def check_least(config: object, **least: int) -> None:
    """Raise a ValueError for a number of a command's options that is too small; None passes.

    Args:
        least: the smallest value of each, by the name of its field.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag}: expected {bound} or more, found {value}")


def choose_device(name: str | None = None) -> "torch.device":
    """Return the named device or, without a name, an accelerator or else the processor.
    ValueError: torch knows no such device, or it cannot compute."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.get_default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices exist but cannot compute
    except (RuntimeError, AssertionError, ImportError) as error:
        known = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
        raise ValueError(
            f"--device: expected {' or '.join(known)}, found {name!r}, which cannot be used here "
            f"({one_line(error).split('. ')[0][:80]}): leave it out, and the best is taken"
        ) from error
    return device


def choose_precision(asked: Precision | None = None, default: Precision = "fp32") -> Precision:
    """Return the precision that is asked for, else accelerate's variable, else the default.
    ValueError: the variable names a precision that is not computed here."""
    if asked is not None:
        return asked
    launched = os.environ.get(PRECISION_VARIABLE, "").strip().lower()
    known: dict[str, Precision] = {"no": "fp32", "fp32": "fp32", "bf16": "bf16"}
    if launched and launched not in known:
        raise ValueError(
            f"{PRECISION_VARIABLE} (accelerate's --mixed_precision): expected no or bf16, found "
            f"{launched!r}: set one of these, or give --precision"
        )
    return known[launched] if launched else default


def fast_precision(device: "torch.device") -> Precision:
    """Return bf16 where it is fast: accelerators have it, and some processors."""
    import torch

    # The public name of the check is newer than the oldest torch that the project takes.
    fast = device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())
    return "bf16" if fast else "fp32"


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

    FileNotFoundError: the folder does not exist. OSError: the file cannot be written. A full disk
    is explained.
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
    FileNotFoundError, OSError: as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, indented for people; values that JSON does not know become texts."""
    write_file(path, json.dumps(content, indent=2, default=str) + "\n")


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Make an output folder, and hold it for one run; the system frees it however the run ends.
    BlockingIOError: another run holds it. OSError: it cannot be written into."""
    make_folder(out)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                f"--out: another run is writing into {str(out)!r}: wait for its end, or give "
                "another folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def make_folder(out: Path) -> None:
    """Make an output folder and check that it can be written into, before any work.
    OSError: it cannot."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = temporary_beside(out / "write")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"--out: cannot write into {out}: {error.strerror}; give another folder"
        ) from error


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
