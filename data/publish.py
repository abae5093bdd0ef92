"""Files that appear whole or not at all.

Knows bytes and paths; nothing of their meaning or of who works. Needs a file system with hard links
and atomic renames: any local Unix one, NFS, Lustre. Not an object store.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from targetclip.command import full_disk_explained, sync_folder, temporary_beside, whole_file

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)

At = Callable[[str], None]
"""Is called with the name of a point in the work. A test ends or halts the process there."""


def go_on(point: str) -> None:
    """Do nothing, at any point."""


def fill(path: Path, content: bytes, at: At) -> None:
    """Write a temporary file."""
    path.touch(exist_ok=False)
    at("before-write")
    path.write_bytes(content)
    at("after-write")


def replace_file(path: Path, content: bytes, at: At = go_on) -> None:
    """Write a file as `targetclip.command.write_file` does, with points before and after.
    FileNotFoundError, OSError: as `whole_file`."""
    with full_disk_explained(path, len(content)), whole_file(path) as temporary:
        fill(temporary, content, at)


def is_linked(temporary: Path, path: Path) -> bool:
    """Tell whether both names are one file."""
    try:
        return os.path.samestat(temporary.lstat(), path.lstat())
    except FileNotFoundError:
        return False


def publish_file(path: Path, content: bytes, at: At = go_on) -> bool:
    """Write a file that must not exist yet: of many writers, on any host, the first one wins.

    Either way the file that has the name afterwards is whole and survives a loss of power.

    Returns:
        True if this call published it; False if the name was taken: that file is untouched.

    Raises:
        FileNotFoundError: the folder does not exist.
        OSError: it cannot be written, or the file system has no hard links. A full disk is
            explained.
    """
    temporary = temporary_beside(path)
    with full_disk_explained(path, len(content)):
        try:
            fill(temporary, content, at)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            published = link(temporary, path)
            if published:
                at("after-link")
            # Also for another's file: its writer may have been killed before this.
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    return published


def link(temporary: Path, path: Path) -> bool:
    """Give a file a second name; return False if that is taken.
    OSError: the file system has no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the name may be taken by this very link.
        return is_linked(temporary, path)
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
    return True


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; the file is read in pieces.
    OSError: it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
