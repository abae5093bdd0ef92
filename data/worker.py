"""One worker of a build: claim a chunk, optimize its targets, publish their pairs, go on.

Any number of workers on any hosts may start and stop at any time. A worker that dies costs its work
since the last checkpoint; another breaks its claim and goes on from there. Workers exchange nothing
but files, so a slow one holds nobody up.
"""

import dataclasses
import hashlib
import io
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from datasets import Features
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from data.claims import Claim, claim, owner_name
from data.pairs import Failure, Pair, chunk_bytes, features
from data.plan import Plan
from data.publish import At, go_on, publish_file, replace_file
from data.targets import Target
from targetclip.command import Precision, Stop, Stopped, in_precision, is_out_of_memory
from targetclip.optimize import Optimized, Progress
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.seeds import PAIR_SOURCES

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 300.0  # a chunk of more than one target lasts no longer
MOST_TARGETS = 512


class ClaimLost(Exception):
    """Another worker has taken the chunk over; it goes on from the last checkpoint."""


# Directions and their scores


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A scene, and the settings that all pairs of a run share."""

    scene: Scene
    recipe_name: str
    recipe: Recipe
    bank: Float[Tensor, "bank num_ws w_dim"]
    """Sources that directions are optimized on."""
    held_out: Float[Tensor, "sources num_ws w_dim"]
    """Sources that no direction is optimized on; every pair is scored on them."""
    precision: Precision = "fp32"
    """Of searches and scores. Embeddings of targets are computed in float32."""

    def scene_for(self, targets: int) -> Scene:
        """Return the scene, with the images of a step of so many targets at once unless it limits
        them: the batch size was tried on steps, so the same number fits elsewhere."""
        at_once = self.scene.max_images or targets * self.recipe.sources
        return self.scene.with_max_images(at_once)

    def prepare(self, targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return raw embeddings of targets and, unless they are zero, starts of directions."""
        pictures = [target.picture for target in targets]
        embeddings = self.scene.embed_targets(pictures, self.recipe)
        if self.recipe.initial == "zero":
            return embeddings, None
        return embeddings, self.scene.initial(pictures, self.recipe.initial, seeds)

    def optimize_chunk(
        self,
        plan: Plan,
        chunk: int,
        on_step: Callable[[Progress], None],
        resume: dict[str, Any] | None,
    ) -> Optimized:
        """Find the directions of a chunk's targets."""
        rows, device = plan.rows(chunk), self.scene.device
        initial = torch.zeros(rows.stop - rows.start, *self.bank.shape[1:])
        if plan.initial is not None:
            initial = torch.from_numpy(np.array(plan.initial[rows]))
        with in_precision(device, self.precision):
            return self.scene_for(plan.batch_size).search(
                torch.from_numpy(np.array(plan.embeddings[rows])).to(device),
                self.recipe,
                initial.to(device),
                plan.targets["seed"][rows.start : rows.stop].to_pylist(),
                bank=self.bank,
                on_step=on_step,
                resume=resume,
            )

    def held_out_scores(
        self,
        embeddings: Float[Tensor, "targets embed"],
        directions: Float[Tensor, "targets num_ws w_dim"],
    ) -> Float[Tensor, "targets scores"]:
        """Return transfer before and after the edit, and consistency, on held-out sources."""
        with in_precision(self.scene.device, self.precision):
            scores = self.scene_for(len(directions)).score(
                embeddings,
                self.held_out,
                directions,
                preprocess=self.recipe.preprocess,
                differences=self.recipe.differences,
            )
        # As 1 minus the transfer loss: pairs keep the bits that they had when it was so written.
        cosines = torch.stack([scores.target_before, scores.target_after]).mean(dim=-1)
        before, after = 1 - (1 - cosines)
        return torch.stack([before, after, scores.consistency], dim=1)

    def rows(
        self, plan: Plan, chunk: int, result: Optimized, seconds: float
    ) -> tuple[list[Pair], list[Failure]]:
        """Return pairs and failures of an optimized chunk, which took so many seconds in all."""
        embeddings = torch.from_numpy(np.array(plan.embeddings[plan.rows(chunk)]))
        scores = self.held_out_scores(embeddings.to(self.scene.device), result.directions).cpu()
        directions, coefficients = (
            result.directions.float().cpu(),
            result.coefficients.float().cpu(),
        )
        own = torch.stack([result.loss, result.transfer, result.consistency], dim=1).cpu()
        values = torch.cat([directions.flatten(1), coefficients, scores, own], dim=1)
        valid = values.isfinite().all(dim=1) & (embeddings.norm(dim=1) > 0)
        targets = plan.targets.slice(plan.rows(chunk).start, len(embeddings)).to_pylist()
        pairs: list[Pair] = []
        failures: list[Failure] = []
        for i, target in enumerate(targets):
            reason = result.failures[i]
            if reason is None and not valid[i]:
                reason = "its embedding is zero, or its direction or scores are not finite"
            if reason is not None:
                failures.append(Failure(target["id"], target["origin"], "optimize", reason))
                continue
            before, after, consistency = scores[i].tolist()
            pairs.append(
                Pair(
                    id=target["id"],
                    split=target["split"],
                    origin=target["origin"],
                    embedding=F.normalize(embeddings[i], dim=0).numpy(),
                    norm=float(embeddings[i].norm()),
                    direction=directions[i].numpy(),
                    coefficients=coefficients[i].numpy(),
                    loss=float(result.loss[i]),
                    transfer=1 - float(result.transfer[i]),
                    consistency=1 - float(result.consistency[i]),
                    held_out_transfer=after,
                    held_out_consistency=consistency,
                    held_out_before=before,
                    steps=int(result.steps[i]),
                    seconds=seconds / len(targets),
                    seed=target["seed"],
                    recipe=self.recipe_name,
                )
            )
        return pairs, failures


def make_teacher(
    scene: Scene,
    recipe_name: str,
    recipe: Recipe,
    held_out: int = 16,
    precision: Precision = "fp32",
) -> Teacher:
    """Return a teacher with its sources; `held_out` is their number."""
    return Teacher(
        scene=scene,
        recipe_name=recipe_name,
        recipe=recipe,
        bank=scene.bank_of(recipe),
        held_out=scene.sources(held_out, PAIR_SOURCES),
        precision=precision,
    )


# How many targets are optimized together


def memory() -> tuple[int, int, int]:
    """Return bytes of main memory: free ones, those of this process now, and its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = psutil.Process().memory_info().rss
    return psutil.virtual_memory().available, used, peak * (1 if sys.platform == "darwin" else 1024)


def fitting_batch_size(
    try_batch: Callable[[int], float],
    steps: int,
    memory: Callable[[], tuple[int, int, int]] = memory,
) -> int:
    """Return the number of targets that are fastest together: doubled for as long as that pays.

    Ends where memory does, where a target gets less than 5 % faster, or where a chunk would last
    longer than `CHUNK_SECONDS`.

    Args:
        try_batch: returns the seconds of one step of so many targets; raises if they do not fit.
        memory: as the function of this name.

    Raises:
        ValueError: not even one target fits.
    """
    best, fastest = 1, math.inf
    size = 1
    while size <= MOST_TARGETS:
        free, used, _ = memory()
        try:
            seconds = try_batch(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise ValueError(
                    "expected memory for a step of one target, found too little; "
                    "give a smaller --max-images, or --checkpoint-layers"
                ) from error
            break
        if seconds / size > 0.95 * fastest or (size > 1 and seconds * steps > CHUNK_SECONDS):
            break
        best, fastest = size, seconds / size
        # A machine without main memory kills instead of raising. Twice the targets take at most
        # twice as much as these took, which is given back already: hence the peak.
        if 2 * (memory()[2] - used) > free:
            break
        size *= 2
    return best


def time_step(teacher: Teacher, size: int) -> float:
    """Return the seconds of a step of so many targets, after one to warm up."""
    random = torch.Generator().manual_seed(0)
    device = teacher.scene.device
    times: list[float] = []

    def on_step(progress: Progress) -> None:
        float(progress.loss.sum())  # waits for a device that computes in the background
        times.append(time.perf_counter())

    recipe = dataclasses.replace(teacher.recipe, steps=3)
    with in_precision(device, teacher.precision):
        teacher.scene_for(size).search(
            torch.randn(size, teacher.scene.embedder.embed_dim, generator=random).to(device),
            recipe,
            torch.zeros(size, *teacher.bank.shape[1:], device=device),
            range(size),
            bank=teacher.bank[: max(recipe.sources, 8)],
            on_step=on_step,
        )
    return times[-1] - times[-2]


# The worker


def chunk_name(chunk: int) -> str:
    """Return the name of a chunk's files."""
    return f"{chunk:06d}"


def no_progress(chunk: int, progress: Progress) -> None:
    """Do nothing after a step."""


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
    on_step: Callable[[int, Progress], None] = no_progress
    """Is called after every step with the number of the chunk."""
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

        Raises:
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
