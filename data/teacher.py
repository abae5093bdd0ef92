"""The teacher of a build: directions of planned targets, their scores, and how many fit together.

Knows the search and the rows that come of it; nothing of who works on what, or of folders.
"""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data.pairs import Failure, Pair
from data.plan import Plan
from data.targets import Target
from targetclip.command import Precision, in_precision, is_out_of_memory
from targetclip.optimize import Optimized, Progress
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.seeds import PAIR_SOURCES

CHUNK_SECONDS = 300.0  # a chunk of more than one target lasts no longer
MOST_TARGETS = 512


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
        return replace(self.scene, max_images=at_once)

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

    recipe = replace(teacher.recipe, steps=3)
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


def search_in_batches(
    scene: Scene,
    embeddings: Float[Tensor, "targets embed"],
    recipe: Recipe,
    initial: Float[Tensor, "targets num_ws w_dim"],
    seeds: Sequence[int],
    *,
    label: str,
    precision: Precision = "fp32",
    held: Float[Tensor, "targets bank num_ws w_dim"] | None = None,
) -> tuple[Float[Tensor, "targets num_ws w_dim"], list[str | None]]:
    """Find directions with a progress bar, as many targets at once as `max_images` allows.

    Args:
        held: see `optimize_directions`.

    Returns:
        The directions, and why each failed; None where it did not.
    """
    at_once = max(1, scene.at_once // recipe.sources)
    directions, failures = [], list[str | None]()
    with tqdm(total=len(seeds) * recipe.steps, desc=label, unit="step", leave=False) as bar:
        for start in range(0, len(seeds), at_once):
            part = slice(start, start + at_once)
            rows = len(seeds[part])

            def on_step(progress: Progress, rows: int = rows) -> None:
                bar.update(rows)

            with in_precision(scene.device, precision):
                result = scene.search(
                    embeddings[part],
                    recipe,
                    initial[part],
                    seeds[part],
                    held=None if held is None else held[part],
                    on_step=on_step,
                )
            directions.append(result.directions)
            failures += result.failures
    return torch.cat(directions), failures
