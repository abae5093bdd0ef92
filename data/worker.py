"""One worker of a build: claim a chunk, optimize its targets, publish their pairs, go on.

Any number of workers on any hosts may start and stop at any time. A worker that dies costs what it
did since its last checkpoint; whoever breaks its claim goes on from there. Nothing is exchanged
between workers but files, so a slow one holds nobody up.
"""

import hashlib
import io
import json
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from datasets import Features
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from data.claims import Claim, claim, owner_name
from data.pairs import Failure, Pair, chunk_bytes
from data.plan import Plan
from data.publish import fault_point, publish_file, replace_file
from data.targets import Target
from targetclip.embedder import ImageEmbedder
from targetclip.encoders.identity import IdentityModel
from targetclip.encoders.inverter import LatentInverter
from targetclip.generators import Generator
from targetclip.losses import consistency_loss, transfer_loss
from targetclip.optimize import Optimized, Progress, embed_latents, optimize_directions
from targetclip.recipes import Recipe
from targetclip.targets import embed_targets, initial_directions

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A signal asked to stop; what has been done is saved."""


class ClaimLost(Exception):
    """Another worker has taken the chunk over; it goes on from the last checkpoint."""


class Stop:
    """Remembers the first signal that asks this process to stop; the work looks at it."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> None:
        """From now on SIGTERM, SIGUSR1 and Ctrl-C only ask; the work ends at a good place."""
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal handler; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        """Raise Stopped if a signal has come."""
        if self.signal is not None:
            raise Stopped


@dataclass(frozen=True)
class Teacher:
    """The optimizer with all it needs but the targets."""

    generator: Generator
    embedder: ImageEmbedder
    recipe: Recipe
    recipe_name: str
    bank: Float[Tensor, "bank num_ws w_dim"]
    held_out: Float[Tensor, "sources num_ws w_dim"]
    """Sources that no direction is optimized on, to score them all alike."""
    max_images: int | None
    """Images rendered at once; None: those of a step."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """Precision to compute in."""
    inverter: LatentInverter | None = None
    """For recipes that start from the target's inversion."""
    identity: IdentityModel | None = None
    """For recipes with an identity loss."""
    optimize: Callable[..., Optimized] = optimize_directions

    def images_at_once(self, targets: int) -> int:
        """How many images are rendered at once when so many targets are optimized together.

        The bank and the held-out sources are in pieces of a step's size, for what fits was tried
        on steps.
        """
        return self.max_images or targets * self.recipe.sources

    def prepare(self, targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        """Raw embeddings of targets, and where their directions start unless that is zero.

        Not in `autocast`: a dataset's embeddings do not depend on the optimizer's precision.
        """
        pictures = [target.picture for target in targets]
        embeddings = embed_targets(self.generator, self.embedder, pictures, self.recipe)
        if self.recipe.initial == "zero":
            return embeddings, None
        return embeddings, initial_directions(
            self.generator, self.inverter, pictures, self.recipe.initial, seeds
        )

    def optimize_chunk(
        self,
        plan: Plan,
        chunk: int,
        on_step: Callable[[Progress], None],
        resume: dict[str, Any] | None,
    ) -> Optimized:
        """Directions of a chunk's targets."""
        rows = plan.rows(chunk)
        shape = (rows.stop - rows.start, *self.bank.shape[1:])
        initial = np.zeros(shape, np.float32) if plan.initial is None else plan.initial[rows]
        device = self.bank.device
        with self.autocast():
            return self.optimize(
                self.generator,
                self.embedder,
                torch.from_numpy(np.array(plan.embeddings[rows])).to(device),
                self.bank,
                self.recipe,
                torch.from_numpy(np.array(initial)).to(device),
                plan.targets["seed"][rows.start : rows.stop].to_pylist(),
                on_step=on_step,
                max_images=self.images_at_once(plan.batch_size),
                resume=resume,
                identity=self.identity,
            )

    @torch.no_grad()
    def held_out_scores(
        self,
        embeddings: Float[Tensor, "targets embed"],
        directions: Float[Tensor, "targets num_ws w_dim"],
    ) -> Float[Tensor, "targets scores"]:
        """Transfer score before and after the edit, and consistency, on the held-out sources."""
        at_once = self.images_at_once(len(directions))

        def embed(ws: Tensor) -> Tensor:
            return embed_latents(self.generator, self.embedder, ws, self.recipe.preprocess, at_once)

        with self.autocast():
            before = embed(self.held_out)
            edited = embed((self.held_out[None] + directions[:, None]).flatten(0, 1))
        edited = edited.unflatten(0, (len(directions), len(self.held_out)))
        before = before.expand(len(directions), -1, -1)
        after = 1 - transfer_loss(edited, embeddings)
        consistency = 1 - consistency_loss(before, edited, self.recipe.differences)
        return torch.stack([1 - transfer_loss(before, embeddings), after, consistency], dim=1)

    def rows(
        self, plan: Plan, chunk: int, found: Optimized, seconds: float
    ) -> tuple[list[Pair], list[Failure]]:
        """Pairs and failures of an optimized chunk; `seconds` is what all of it took."""
        embeddings = torch.from_numpy(np.array(plan.embeddings[plan.rows(chunk)]))
        scores = self.held_out_scores(embeddings.to(self.bank.device), found.directions).cpu()
        directions, coefficients = found.directions.float().cpu(), found.coefficients.float().cpu()
        own = torch.stack([found.loss, found.transfer, found.consistency], dim=1).cpu()
        values = torch.cat([directions.flatten(1), coefficients, scores, own], dim=1)
        valid = values.isfinite().all(dim=1) & (embeddings.norm(dim=1) > 0)
        named = plan.targets.slice(plan.rows(chunk).start, len(embeddings)).to_pylist()
        pairs: list[Pair] = []
        failures: list[Failure] = []
        for i, target in enumerate(named):
            reason = found.failures[i]
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
                    loss=float(found.loss[i]),
                    transfer=1 - float(found.transfer[i]),
                    consistency=1 - float(found.consistency[i]),
                    held_out_transfer=after,
                    held_out_consistency=consistency,
                    held_out_before=before,
                    steps=int(found.steps[i]),
                    seconds=seconds / len(named),
                    seed=target["seed"],
                    recipe=self.recipe_name,
                )
            )
        return pairs, failures


def chunk_name(chunk: int) -> str:
    """Name of a chunk's files."""
    return f"{chunk:06d}"


@dataclass
class Worker:
    """Works through a plan's chunks until none is left to claim.

    Args:
        work: the build's folder, shared by all workers.
        lease: seconds without a heartbeat after which a worker counts as dead.
        checkpoint_seconds: of work that a kill may cost.
        max_attempts: how often a chunk may end its worker without getting any further before its
            targets are given up.
        on_step: called after every step, for progress.
    """

    work: Path
    plan: Plan
    teacher: Teacher
    columns: Features
    stop: Stop
    lease: float
    checkpoint_seconds: float
    max_attempts: int
    on_step: Callable[[int, Progress], None]
    owner: str = field(default_factory=owner_name)

    def published(self) -> set[str]:
        """Names of the chunks that are done."""
        return {path.stem for path in (self.work / "chunks").glob("[0-9]*.parquet")}

    def run(self, wait: bool) -> bool:
        """Do chunks until all are done or in other hands; True if all are done.

        With `wait`, stay until the others have published theirs, and take over from those that die.

        Raises:
            Stopped: a signal came. A checkpoint of the chunk at hand is saved.
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
        """Claim and do a chunk, unless it is done; False if it is in other hands."""
        self.stop.check()
        name = chunk_name(chunk)
        path = self.work / "chunks" / f"{name}.parquet"
        if path.exists():
            return True
        held = claim(self.work / "claims", name, self.owner, self.lease)
        if held is None:
            return False
        try:
            if not path.exists():  # it may have been published just before it was claimed
                with held.kept_alive():
                    self.do_chunk(chunk, held)
        except ClaimLost:
            logger.warning("chunk %s: taken over by another worker", name)
        except FileNotFoundError:
            if held.heartbeat():
                raise
            # Halted for longer than the lease: another has merged, and swept what was half written.
            logger.warning("chunk %s: taken over by another worker", name)
        finally:
            held.release()
        return True

    def newest_checkpoint(self, chunk: int) -> dict[str, Any] | None:
        """What the worker that came furthest with a chunk has left."""
        best: dict[str, Any] | None = None
        for path in (self.work / "checkpoints").glob(f"{chunk_name(chunk)}.*.pt"):
            try:
                content = path.read_bytes()
                # torch.load does not notice every flipped bit.
                if hashlib.sha256(content[32:]).digest() != content[:32]:
                    raise ValueError("it is cut short or altered")
                found = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            except FileNotFoundError:
                continue
            except Exception as error:  # a damaged file raises nearly anything
                logger.warning("%s: not readable, left out: %s", path, error)
                continue
            if best is None or found["search"]["step"] > best["search"]["step"]:
                best = found
        return best

    def count_attempt(self, chunk: int, step: int) -> int:
        """How often work on a chunk has begun at this step; one that got further starts anew."""
        path = self.work / "attempts" / chunk_name(chunk)
        try:
            record = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            record = {"step": step, "count": 0}
        count = record["count"] + 1 if record["step"] == step else 1
        replace_file(path, json.dumps({"step": step, "count": count}).encode())
        return int(count)

    def do_chunk(self, chunk: int, held: Claim) -> None:
        """Optimize a chunk from its newest checkpoint on, and publish it."""
        left = self.newest_checkpoint(chunk)
        resume = left["search"] if left is not None else None
        before = float(left["seconds"]) if left is not None else 0.0
        attempts = self.count_attempt(chunk, resume["step"] if resume is not None else 0)
        if attempts > self.max_attempts:
            self.give_up(chunk, f"its worker died {self.max_attempts} times without getting on")
            return
        start = saved = time.monotonic()

        def on_step(progress: Progress) -> None:
            nonlocal saved
            fault_point("in-chunk")
            if held.lost:
                raise ClaimLost
            stopping = self.stop.signal is not None  # asked once: it may come at any time
            if stopping or time.monotonic() - saved > self.checkpoint_seconds:
                seconds = before + time.monotonic() - start
                self.save_checkpoint(chunk, progress, seconds)
                saved = time.monotonic()
            if stopping:
                raise Stopped
            self.on_step(chunk, progress)

        found = self.teacher.optimize_chunk(self.plan, chunk, on_step, resume)
        seconds = before + time.monotonic() - start
        self.publish(chunk, *self.teacher.rows(self.plan, chunk, found, seconds))

    def save_checkpoint(self, chunk: int, progress: Progress, seconds: float) -> None:
        """Keep what a kill would cost; in a file of this worker's own."""
        content = io.BytesIO()
        torch.save({"search": progress.snapshot(), "seconds": seconds}, content)
        path = self.work / "checkpoints" / f"{chunk_name(chunk)}.{self.owner}.pt"
        replace_file(path, hashlib.sha256(content.getvalue()).digest() + content.getvalue())
        fault_point("after-checkpoint")

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
        if not publish_file(path, chunk_bytes(pairs, failures, self.columns)):
            logger.warning("chunk %s: another worker was first", name)
        for left in (self.work / "checkpoints").glob(f"{name}.*.pt"):
            left.unlink(missing_ok=True)
        (self.work / "attempts" / name).unlink(missing_ok=True)
