"""How many targets to optimize together: found by trying.

Knows the teacher and the clock; nothing of plans or files.
"""

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable

import psutil  # type: ignore[import-untyped]
import torch

from data.worker import Teacher
from targetclip.optimize import Progress, optimize_directions

CHUNK_SECONDS = 300.0  # what a chunk lasts at most, if more than one target is in it
MOST_TARGETS = 512


def most_memory() -> int:
    """Bytes of main memory that this process has held at most."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def fitting_batch_size(try_batch: Callable[[int], float], steps: int) -> int:
    """The number of targets that are fastest together: doubled for as long as that pays.

    Ends where memory does, where a target gets less than 5 % faster, or where a chunk would last
    longer than `CHUNK_SECONDS`.

    Args:
        try_batch: seconds of one step with so many targets; raises when they do not fit.

    Raises:
        ValueError: not even one target fits.
    """
    best, fastest = 1, math.inf
    size = 1
    while size <= MOST_TARGETS:
        free = psutil.virtual_memory().available
        used = psutil.Process().memory_info().rss
        try:
            seconds = try_batch(size)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if size == 1:
                raise ValueError(
                    "expected memory for a step of one target, found too little; "
                    "give a smaller --max-images, or --checkpoint-layers"
                ) from error
            break
        if seconds / size > 0.95 * fastest or (size > 1 and seconds * steps > CHUNK_SECONDS):
            break
        best, fastest = size, seconds / size
        # A machine that runs out of its main memory does not say so: it kills. Twice the targets
        # take at most twice what these took, which is given back already: hence the peak.
        if 2 * (most_memory() - used) > free:
            break
        size *= 2
    return best


def time_step(teacher: Teacher, size: int) -> float:
    """Seconds of a step with so many targets, after one to warm up."""
    random = torch.Generator().manual_seed(0)
    embed = teacher.embedder.embed_dim
    device = teacher.bank.device
    times: list[float] = []

    def on_step(progress: Progress) -> None:
        float(progress.loss.sum())  # waits for a device that computes in the background
        times.append(time.perf_counter())

    recipe = dataclasses.replace(teacher.recipe, steps=3)
    with teacher.autocast():
        optimize_directions(
            teacher.generator,
            teacher.embedder,
            torch.randn(size, embed, generator=random).to(device),
            teacher.bank[: max(recipe.sources, 8)],
            recipe,
            torch.zeros(size, *teacher.bank.shape[1:], device=device),
            list(range(size)),
            on_step=on_step,
            max_images=teacher.images_at_once(size),
            identity=teacher.identity,
        )
    return times[-1] - times[-2]
