"""Measure time and memory: the machine, seconds and peaks, operations of random networks.

Knows sizes and processes; nothing of files.
"""

import gc
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from targetclip.command import one_line, versions
from targetclip.embedder import ClipEmbedder, EncoderInput
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.scene import Scene

CPU = torch.device("cpu")
NOT_MEASURED = "not measured"
Measured = TypeVar("Measured")
MEMORY_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a generator and an embedder. Default: StyleGAN2's config-f at 256 px, ViT-B/32."""

    resolution: int = 256
    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128)
    """Widths at 4, 8, ... `resolution` px."""
    w_dim: int = 512
    mapping_layers: int = 8
    clip: str = "ViT-B-32"
    """A model of open_clip, or local-dir:FOLDER; its sizes are used, never its weights."""
    sources: int = RECIPES["release"].sources
    """Sources that a step of the optimizer edits."""
    max_images: int | None = None
    """Images rendered at once; fewer than `sources` bounds memory and renders twice. Default: all
    of a step."""


def no_reader(thing: object) -> Tensor:
    """Refuse a picture or a text: networks of random weights read neither."""
    raise NotImplementedError("networks of random weights embed rendered images only")


def random_networks(sizes: Sizes) -> tuple[StyleGAN2, ClipEmbedder]:
    """Make both networks with random weights, on torch's default device.

    Raises:
        ValueError: `clip` is no model of open_clip, or the widths do not fit the resolution.
    """
    import open_clip

    config = StyleGAN2Config(
        resolution=sizes.resolution,
        w_dim=sizes.w_dim,
        z_dim=sizes.w_dim,
        mapping_layers=sizes.mapping_layers,
        channels=sizes.channels,
    )
    model = open_clip.get_model_config(sizes.clip)
    if model is None:
        raise ValueError(f"expected --clip to be a model of open_clip, found {sizes.clip!r}")
    side = model["vision_cfg"]["image_size"]
    expected = EncoderInput(size=side, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    embedder = ClipEmbedder(open_clip.CLIP(**model), expected, no_reader, no_reader, model)
    generator = StyleGAN2(config).eval().requires_grad_(False)
    # Weights that are never written need no fingerprint, and those without values have none.
    generator.fingerprint = embedder.fingerprint = "random"
    return generator, embedder


def count_operations(sizes: Sizes) -> int:
    """Count the operations of a step of `release`, forward and backward, from shapes alone.

    Convolutions, matrix products and attention count, a multiplication and an addition as two. The
    embedding of the sources does not count: it is done once a run.
    """
    with torch.device("meta"):
        generator, embedder = random_networks(sizes)
        scene = Scene(generator=generator, embedder=embedder, max_images=sizes.max_images)
        ws = torch.zeros(sizes.sources, generator.num_ws, generator.w_dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            scene.features(ws, RECIPES["release"].preprocess).sum().backward()
    return int(counter.get_total_flops())


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, for the peak memory of a process never falls.

    Raises:
        ChildProcessError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(f"{function.__name__}: its process was killed") from error


def machine() -> dict[str, Any]:
    """Describe this machine: processor, threads, memory settings, versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_settings": {key: os.environ[key] for key in MEMORY_SETTINGS if key in os.environ},
        "versions": versions(),
    }


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device = CPU) -> float:
    """Return the seconds of one call."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def matrix_rate(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device = CPU) -> float:
    """Return the best rate of a product of two square matrices, in 10^9 operations per second.

    A size counts with the median of five products, after one to warm up.
    """
    rates = []
    for size in sizes:
        product = partial(torch.matmul, *torch.randn(2, size, size, device=device).to(dtype))
        product()
        seconds = statistics.median(seconds_of(product, device) for _ in range(5))
        rates.append(2 * size**3 / seconds / 1e9)
    return max(rates)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in a block that takes longer; again where it is swallowed."""

    def expire(number: int, frame: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def median_seconds(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median seconds of a call, after two to warm up."""
    work(), work()
    taken: list[float] = []
    while len(taken) < 3 or (len(taken) < 200 and sum(taken) < budget):
        taken.append(seconds_of(work, device))
    return statistics.median(taken)


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds, and begin a new peak; on a processor, neither can be done."""
    if device.type != "cpu":
        gc.collect()
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Return the peak memory since `free_memory`; on a processor, that of the process."""
    taken = peak_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated()
    return taken / 2**30


def tried(work: Callable[[], Measured]) -> Measured | str:
    """Return the result of a call, or why there is none."""
    try:
        return work()
    except Exception as error:
        return f"{NOT_MEASURED}: {type(error).__name__}: {one_line(error)[:300]}"
