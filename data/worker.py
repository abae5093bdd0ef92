"""One worker of a build: claim a chunk, optimize its targets, publish their pairs, go on; merge.

Any number of workers on any hosts may start and stop at any time. A worker that dies costs its work
since the last checkpoint; another breaks its claim and goes on from there. Workers exchange nothing
but files, so a slow one holds nobody up.
"""

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from datasets import Features

from data.card import FAILURES, REPORT, DatasetInfo
from data.claims import Claim, claim, clock_ns, owner_name
from data.dataset import mean_scores, merge
from data.pairs import Failure, Pair, chunk_bytes, features
from data.plan import Plan
from data.publish import At, go_on, publish_file, replace_file
from data.teacher import Teacher
from targetclip.command import Stop, Stopped, versions
from targetclip.optimize import Progress

logger = logging.getLogger(__name__)

PACKAGES = ("accelerate", "datasets", "pyarrow")  # in the report beside those of all commands


class ClaimLost(Exception):
    """Another worker has taken the chunk over; it goes on from the last checkpoint."""


def chunk_name(chunk: int) -> str:
    """Return the name of a chunk's files."""
    return f"{chunk:06d}"


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Works through a plan's chunks until none is left to claim."""

    work: Path
    """The build's folder, shared by all workers."""
    plan: Plan
    teacher: Teacher
    stop: Stop
    lease: float = 120.0
    """Seconds without a heartbeat after which a worker counts as dead."""
    checkpoint_seconds: float = 60.0
    """Of work that a kill may cost."""
    max_attempts: int = 5
    """How often a chunk may end its worker without any progress, before it is given up."""
    on_step: Callable[[int, Progress], None] | None = None
    """Is called after every step with the number of the chunk."""
    on_chunk: Callable[[list[Pair], list[Failure]], None] | None = None
    """Is called with what a chunk gave, once it is published."""
    at: At = go_on
    """Is called at the points in-chunk and after-checkpoint, and those of claims and files."""
    owner: str = field(default_factory=owner_name)

    @property
    def columns(self) -> Features:
        """Columns of the chunks."""
        return features(self.plan.embeddings.shape[1], *self.teacher.bank.shape[1:])

    def published(self) -> set[str]:
        """Return the names of the chunks that are done."""
        return {path.stem for path in (self.work / "chunks").glob("[0-9]*.parquet")}

    def run(self, wait: bool) -> bool:
        """Do chunks until all are done or held by others; return True if all are done.

        With `wait`, stay until the others have published theirs, and take over from those that die.

        Stopped: a signal came. A checkpoint of the current chunk is saved.
        """
        for name in ("claims", "checkpoints", "chunks", "attempts"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        # Workers begin in different places, so they seldom ask for the same chunk.
        first = int.from_bytes(self.owner.encode()[-4:], "big") % self.plan.chunks
        order = [*range(first, self.plan.chunks), *range(first)]
        while True:
            done = self.published()
            left = [chunk for chunk in order if chunk_name(chunk) not in done]
            if not left:
                return True
            tried = [self.try_chunk(chunk) for chunk in left]
            if not any(tried):
                if not wait:
                    return False
                time.sleep(min(2.0, self.lease / 4))
                self.stop.check()

    def try_chunk(self, chunk: int) -> bool:
        """Claim and do a chunk, unless it is done; return False if another holds it."""
        self.stop.check()
        name = chunk_name(chunk)
        path = self.work / "chunks" / f"{name}.parquet"
        if path.exists():
            return True
        held = claim(self.work / "claims", name, self.owner, self.lease, self.at)
        if held is None:
            return False
        try:
            if not path.exists():  # it may have been published just before it was claimed
                with held.kept_alive():
                    self.do_chunk(chunk, held)
        except (ClaimLost, FileNotFoundError) as error:
            # Files vanish after a halt of more than a lease: another has merged and swept up.
            if isinstance(error, FileNotFoundError) and held.heartbeat():
                raise
            logger.warning("chunk %s: taken over by another worker", name)
        finally:
            held.release()
        return True

    def newest_checkpoint(self, chunk: int) -> dict[str, Any] | None:
        """Read the checkpoint of the worker that came furthest with a chunk."""
        best: dict[str, Any] | None = None
        for path in (self.work / "checkpoints").glob(f"{chunk_name(chunk)}.*.pt"):
            try:
                content = path.read_bytes()
                # torch.load does not notice every flipped bit.
                if hashlib.sha256(content[32:]).digest() != content[:32]:
                    raise ValueError("it is cut short or altered")
                saved = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            except FileNotFoundError:
                continue
            except Exception as error:  # a damaged file raises nearly anything
                logger.warning("%s: not readable, left out: %s", path, error)
                continue
            if best is None or saved["search"]["step"] > best["search"]["step"]:
                best = saved
        return best

    def count_attempt(self, chunk: int, step: int) -> int:
        """Return how often work on a chunk has begun at this step; another step counts anew."""
        path = self.work / "attempts" / chunk_name(chunk)
        try:
            record = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            record = {"step": step, "count": 0}
        count = record["count"] + 1 if record["step"] == step else 1
        replace_file(path, json.dumps({"step": step, "count": count}).encode(), self.at)
        return int(count)

    def do_chunk(self, chunk: int, held: Claim) -> None:
        """Optimize a chunk from its newest checkpoint on, and publish it."""
        saved = self.newest_checkpoint(chunk)
        resume = saved["search"] if saved is not None else None
        before = float(saved["seconds"]) if saved is not None else 0.0
        attempts = self.count_attempt(chunk, resume["step"] if resume is not None else 0)
        if attempts > self.max_attempts:
            self.give_up(chunk, f"its worker died {self.max_attempts} times without getting on")
            return
        start = last_saved = time.monotonic()

        def on_step(progress: Progress) -> None:
            nonlocal last_saved
            self.at("in-chunk")
            if held.lost:
                raise ClaimLost
            stopping = self.stop.signal is not None  # read once: it may come at any time
            if stopping or time.monotonic() - last_saved > self.checkpoint_seconds:
                self.save_checkpoint(chunk, progress, before + time.monotonic() - start)
                last_saved = time.monotonic()
            if stopping:
                raise Stopped
            if self.on_step is not None:
                self.on_step(chunk, progress)

        result = self.teacher.optimize_chunk(self.plan, chunk, on_step, resume)
        seconds = before + time.monotonic() - start
        self.publish(chunk, *self.teacher.rows(self.plan, chunk, result, seconds))

    def save_checkpoint(self, chunk: int, progress: Progress, seconds: float) -> None:
        """Save the state of a chunk's search, in a file of this worker's own."""
        content = io.BytesIO()
        torch.save({"search": progress.snapshot(), "seconds": seconds}, content)
        path = self.work / "checkpoints" / f"{chunk_name(chunk)}.{self.owner}.pt"
        digest = hashlib.sha256(content.getvalue()).digest()
        replace_file(path, digest + content.getvalue(), self.at)
        self.at("after-checkpoint")

    def give_up(self, chunk: int, reason: str) -> None:
        """Publish a chunk that cannot be done, as failures."""
        rows = self.plan.rows(chunk)
        targets = self.plan.targets.slice(rows.start, rows.stop - rows.start).to_pylist()
        failures = [Failure(t["id"], t["origin"], "optimize", reason) for t in targets]
        logger.warning("chunk %s: given up: %s", chunk_name(chunk), reason)
        self.publish(chunk, [], failures)

    def publish(self, chunk: int, pairs: list[Pair], failures: list[Failure]) -> None:
        """Make a chunk's pairs final, unless another worker has; then tidy up."""
        name = chunk_name(chunk)
        path = self.work / "chunks" / f"{name}.parquet"
        if not publish_file(path, chunk_bytes(pairs, failures, self.columns), self.at):
            logger.warning("chunk %s: another worker was first", name)
        for checkpoint in (self.work / "checkpoints").glob(f"{name}.*.pt"):
            checkpoint.unlink(missing_ok=True)
        (self.work / "attempts" / name).unlink(missing_ok=True)
        if self.on_chunk is not None:
            self.on_chunk(pairs, failures)


# After the last chunk


def remove_leftovers(out: Path, work: Path, lease: float) -> None:
    """Remove files that killed workers left; one younger than a lease may be a living worker's."""
    before = clock_ns(work) - int(lease * 1e9)
    left = [
        path for name in ("claims", "checkpoints", "attempts") for path in work.glob(f"{name}/*")
    ]
    left += [
        path for folder in (work / "chunks", out / "data", out) for path in folder.glob(".*.tmp")
    ]
    for path in left:
        with suppress(FileNotFoundError):
            if path.stat().st_mtime_ns < before:
                path.unlink()


def merge_all(
    out: Path, work: Path, plan: Plan, info: DatasetInfo, at: At = go_on
) -> dict[str, Any]:
    """Make the dataset of all chunks; return its report: counts, mean scores and settings.
    FileNotFoundError: a chunk is not done. ValueError, OSError: as `data.dataset.merge`."""
    chunks = [work / "chunks" / f"{chunk_name(chunk)}.parquet" for chunk in range(plan.chunks)]
    missing = [path.stem for path in chunks if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {plan.chunks} chunks are not done, {missing[0]} the first: "
            "run the build again, without --only merge"
        )
    columns = features(plan.embeddings.shape[1], info.num_ws, info.w_dim)
    merge(chunks, out, columns, info, plan.failures, at=at)
    report = {
        "splits": mean_scores(out),
        "failures": len((out / FAILURES).read_text().splitlines()),
        "settings": plan.settings,
        "batch_size": plan.batch_size,
        "not_taken": plan.not_taken,
        "versions": versions() | {name: metadata.version(name) for name in PACKAGES},
    }
    replace_file(out / REPORT, (json.dumps(report, indent=2) + "\n").encode(), at)
    return report
