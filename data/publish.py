"""Files that appear whole or not at all.

Knows bytes and paths; nothing of what is in them or who works on what. Needs a file system with
hard links, where a rename is atomic: any local Unix one, NFS, Lustre. Not an object store.

Test hook: with TARGETCLIP_FAULT=NAME:COUNT:ACTION in the environment a process kills (`kill`) or
stops (`stop`) itself at its COUNT-th call of `fault_point(NAME)`.
"""

import errno
import hashlib
import os
import re
import secrets
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)

FAULT = re.compile(r"([a-z-]+):([1-9][0-9]*):(kill|stop)")
fault_calls: Counter[str] = Counter()
fault_lock = threading.Lock()


def fault_point(name: str) -> None:
    """Nothing, unless TARGETCLIP_FAULT names this point: then an end or a halt, as it says.

    Raises:
        ValueError: TARGETCLIP_FAULT is set, but not to NAME:COUNT:ACTION.
    """
    fault = os.environ.get("TARGETCLIP_FAULT")
    if not fault:
        return
    parts = FAULT.fullmatch(fault)
    if parts is None:
        raise ValueError(
            "expected TARGETCLIP_FAULT=NAME:COUNT:ACTION, with COUNT from 1 on and ACTION kill or "
            f"stop, found {fault!r}; correct or unset it"
        )
    if parts[1] != name:
        return
    with fault_lock:
        fault_calls[name] += 1
        reached = fault_calls[name] == int(parts[2])
    if reached:
        # Raised in this very thread, so nothing after this line runs first.
        signal.raise_signal(signal.SIGKILL if parts[3] == "kill" else signal.SIGSTOP)


@contextmanager
def full_disk_explained(path: Path, size: int) -> Iterator[None]:
    """Say of a disk, quota or file size that is exhausted what was to be written and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise OSError(
            error.errno,
            f"expected room for the {size} bytes of {str(path)!r}, found "
            f"{os.strerror(error.errno)!r}; free some space and run the same command again; "
            "nothing finished is lost",
        ) from error


@contextmanager
def whole_temporary(path: Path, content: bytes) -> Iterator[Path]:
    """A file beside `path` that holds `content`, safe on the disk; gone afterwards."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write into; create it first")
    # Process numbers repeat from host to host, so they alone do not make a name unique.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    with full_disk_explained(path, len(content)):
        try:
            with temporary.open("xb", buffering=0) as file:
                fault_point("before-write")
                rest = memoryview(content)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            fault_point("after-write")
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


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


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, over what is there; whoever reads or is killed finds the old one or the new.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be written; the old file is as it was. A full disk is explained.
    """
    with whole_temporary(path, content) as temporary:
        os.replace(temporary, path)
        sync_folder(path.parent)


def is_linked(temporary: Path, path: Path) -> bool:
    """Whether both names are one file."""
    try:
        return os.path.samestat(temporary.lstat(), path.lstat())
    except FileNotFoundError:
        return False


def publish_file(path: Path, content: bytes) -> bool:
    """Write a file that must not exist yet: of many writers, on any host, the first one wins.

    True if this call published it; False if the name was taken, and what has it is untouched.
    Either way the file that now has the name is whole and survives a loss of power.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be written, or the file system has no hard links. A full disk is
            explained.
    """
    with whole_temporary(path, content) as temporary:
        try:
            os.link(temporary, path)
            published = True
        except FileExistsError:
            # NFS repeats a request whose answer was lost: the name taken may be by this very link.
            published = is_linked(temporary, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            # No way around it keeps both promises. A rename replaces what another writer has
            # published since one looked; a marker made with O_EXCL before the rename blocks the
            # name for ever if its maker dies between the two.
            raise OSError(
                error.errno,
                f"{str(path)!r}: expected a file system with hard links, found "
                f"{os.strerror(error.errno)!r}; give a folder on another one, e.g. ext4, XFS, NFS "
                "or Lustre",
            ) from error
        if published:
            fault_point("after-link")
        # Also of a file that another published: it may have been killed before it came so far.
        sync_folder(path.parent)
    return published


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
