"""Claims: which worker works on what, for as long as it is alive.

A claim is a small file with its owner's name that the owner touches again and again. A claim that
was not touched for a lease is stale: anybody may break it. Claims only save work: in rare races, or
after a halt, two may work on the same thing. `data.publish.publish_file` keeps the result right.
Knows names and owners; nothing of the work.
"""

import errno
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.publish import At, go_on
from targetclip.command import full_disk_explained

logger = logging.getLogger(__name__)

GONE = (errno.ENOENT, errno.ESTALE)  # NFS says the second of a file removed while it is open


def owner_name() -> str:
    """Return a name that no other worker has: host, process number and a random part.

    It consists of letters, digits, `_` and `-`, so it may be part of a file name.
    """
    host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class ClaimFile:
    """A claim file as it was read; no two claims are equal."""

    owner: str
    inode: int
    mtime_ns: int


def parse_owner(content: bytes) -> str:
    """Return the owner that a claim file names; empty if its maker was killed before writing."""
    try:
        record = json.loads(content)
    except ValueError:
        return ""
    return str(record.get("owner", "")) if isinstance(record, dict) else ""


def look(path: Path) -> ClaimFile | None:
    """Read the claim at `path`; return None if there is none."""
    try:
        # NFS asks the server anew for a file that is opened; a bare stat may be a minute old.
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            return ClaimFile(parse_owner(file.read()), stat.st_ino, stat.st_mtime_ns)
    except OSError as error:
        if error.errno in GONE:
            return None
        raise


def clock_ns(folder: Path) -> int:
    """Return the time of the file system in ns, as claims have it; clocks of hosts differ."""
    probe = folder / f".{secrets.token_hex(8)}.now"
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime_ns
    finally:
        probe.unlink(missing_ok=True)


def create(path: Path, owner: str) -> bool:
    """Make the claim file; return False if there is one."""
    record = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid()}
    content = json.dumps(record).encode()
    with full_disk_explained(path, len(content)):
        try:
            file = path.open("xb")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return True


def remove_only(path: Path, matches: Callable[[ClaimFile], bool], at: At = go_on) -> bool:
    """Remove the claim if it matches; of many who try, one gets True."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.aside")
    at("before-removal")
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return False
    try:
        # Between a look and the rename others may have broken this claim and made their own. Only
        # the file that was put aside is certain.
        claimed = look(aside)
        if claimed is not None and matches(claimed):
            return True
        at("before-return")
        # Put it back, unless somebody has claimed anew: then its owner will notice that it lost.
        with suppress(FileExistsError):
            os.link(aside, path)
        return False
    finally:
        aside.unlink(missing_ok=True)


class Claim:
    """A claim that was ours when it was made; `lost` is set by the heartbeat that misses it."""

    def __init__(self, path: Path, owner: str, lease: float, at: At = go_on) -> None:
        self.path = path
        self.owner = owner
        self.lease = lease
        self.at = at
        self.lost = False

    def heartbeat(self) -> bool:
        """Show that the owner is alive; return False if the claim is no longer ours.
        OSError: the file system fails; the claim may still be ours."""
        try:
            # By the open file and not by name, so another's claim is never the one touched.
            with self.path.open("rb") as file:
                if parse_owner(file.read()) == self.owner:
                    os.utime(file.fileno())
                    return True
        except OSError as error:
            if error.errno not in GONE:
                raise
        self.lost = True
        return False

    def release(self) -> None:
        """Remove the claim if it is still ours.
        OSError: the file system fails; the claim goes stale in time."""
        self.at("before-release")
        claimed = look(self.path)
        if claimed is not None and claimed.owner == self.owner:
            remove_only(self.path, lambda other: other.owner == self.owner, self.at)

    def beat_until(self, stop: threading.Event) -> None:
        """Send four heartbeats a lease until `stop` is set or the claim is lost."""
        while not stop.wait(self.lease / 4):
            try:
                if not self.heartbeat():
                    return
            except OSError as error:
                logger.warning("%s: heartbeat failed, trying again: %s", self.path, error)

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Send heartbeats in the background during the `with` block; do not release."""
        stop = threading.Event()
        name = f"heartbeat of {self.path.name}"
        thread = threading.Thread(target=self.beat_until, args=(stop,), name=name, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def claim(folder: Path, name: str, owner: str, lease: float, at: At = go_on) -> Claim | None:
    """Claim `name` for `owner`, breaking a stale claim; return None if somebody holds it.

    Args:
        folder: of the claims, on a file system that all workers share.
        name: of the work, usable as a file name.
        owner: this worker, see `owner_name`.
        lease: seconds without a heartbeat after which a claim is stale, by the file system's
            clock. The same for all workers.
        at: is called at the points before-look, before-removal, before-return, after-removal,
            after-claim and before-release.

    Raises:
        ValueError: the lease is not above 0.
        OSError: the folder is missing or cannot be written. A full disk is explained.
    """
    if not lease > 0:
        raise ValueError(f"expected a lease above 0 seconds, found {lease}")
    path = folder / name
    if not create(path, owner):
        # The clock first: the shorter the time from the look to the removal, the rarer the races.
        now_ns = clock_ns(folder)
        at("before-look")
        held = look(path)
        if held is not None:  # it may have been released just now
            if now_ns - held.mtime_ns <= lease * 1e9:
                return None
            if not remove_only(path, lambda other: other == held, at):
                return None
            at("after-removal")
            logger.warning("%s: broke the stale claim of %r", path, held.owner)
        if not create(path, owner):
            return None
    at("after-claim")
    return Claim(path, owner, lease, at)
