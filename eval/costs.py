"""Measure time and memory: the machine and its limits, seconds and peaks, what a step must do.

Knows sizes and processes; nothing of files.
"""

import gc
import itertools
import multiprocessing
import os
import platform
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eval.sizes import Sizes
from targetclip.command import one_line, versions
from targetclip.embedder import ClipEmbedder, EncoderInput
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.scene import Scene

CPU = torch.device("cpu")
aten = torch.ops.aten
NOT_MEASURED = "not measured"
Measured = TypeVar("Measured")
MEMORY_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")


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


def take_shapes_through(sizes: Sizes, mode: AbstractContextManager[object]) -> None:
    """Take a step of `release`, forward and backward, on shapes alone, watched by a mode.

    The sources are not embedded: that is done once a run.
    """
    with torch.device("meta"):
        generator, embedder = random_networks(sizes)
        scene = Scene(generator=generator, embedder=embedder, max_images=sizes.max_images)
        ws = torch.zeros(sizes.sources, generator.num_ws, generator.w_dim, requires_grad=True)
        with mode:
            scene.features(ws, RECIPES["release"].preprocess).sum().backward()


def count_operations(sizes: Sizes) -> int:
    """Count the operations of a step of `release`.

    Convolutions, matrix products and attention count, a multiplication and an addition as two.
    """
    counter = FlopCounterMode(display=False)
    take_shapes_through(sizes, counter)
    return int(counter.get_total_flops())


def least_bytes(sizes: Sizes, bytes_each: int) -> int:
    """Count the bytes that a step of `release` moves at least, if no cache holds a map.

    A map of the generator is written, read by the next layer, and read once more on the way back;
    its gradient is written and read. Weights, four bytes each, are read there and back. All else
    is thought to be fused with the convolutions, and what the encoder computes is left out.
    """
    with torch.device("meta"):
        generator, embedder = random_networks(sizes)
    convs: Any = generator.convs
    maps: int = sum(conv.noise.numel() * len(conv.bias) for conv in convs)
    parts: tuple[Any, ...] = (convs, generator.to_rgbs, embedder.clip.visual)
    weights: int = sum(weight.numel() for part in parts for weight in part.parameters())
    return 5 * sizes.sources * maps * bytes_each + 2 * 4 * weights


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


# What a machine can do at most


def best_seconds(work: Callable[[], object], device: torch.device = CPU, repeats: int = 5) -> float:
    """Return the least seconds of a call after one to warm up: a limit is no median."""
    work()
    return min(seconds_of(work, device) for _ in range(repeats))


def matrix_rate(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device = CPU) -> float:
    """Return the best rate of a product of two square matrices, in 10^9 operations per second."""
    rates = []
    for size in sizes:
        product = partial(torch.matmul, *torch.randn(2, size, size, device=device).to(dtype))
        rates.append(2 * size**3 / best_seconds(product, device) / 1e9)
    return max(rates)


def copy_rate(count: int, device: torch.device = CPU) -> float:
    """Return the best rate of reading and writing so many numbers of 4 bytes, in 10^9 bytes per
    second: copied, and multiplied in place, where a processor need not read what it overwrites."""
    source, target = torch.rand(2, count, device=device)
    works = partial(target.copy_, source), partial(target.mul_, 0.5)
    return 8 * count / min(best_seconds(work, device) for work in works) / 1e9


class Convolutions(TorchDispatchMode):
    """Counts convolutions, forward and backward, by their arguments; filters of single channels
    are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[tuple[Any, ...]]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        groups = {aten.convolution.default: 8, aten.convolution_backward.default: 9}.get(func)
        if groups is not None and args[groups] == 1:
            shapes = (one.shape if isinstance(one, Tensor) else one for one in args)
            self.found[func, *(tuple(o) if isinstance(o, list) else o for o in shapes)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def with_mkldnn(enabled: bool) -> Iterator[None]:
    """Let processors use mkldnn, or torch's own kernels; all other settings stay."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    mkldnn.enabled = enabled
    try:
        yield
    finally:
        mkldnn.enabled = before


def convolution_rate(
    sizes: Sizes, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[float, float]:
    """Time every convolution of a step of `release` alone, forward and backward, in the layout
    and, on a processor, by the library that is fastest for it.

    Returns:
        The best rate in 10^9 operations per second, and the seconds of all.
    """
    watch = Convolutions()
    take_shapes_through(sizes, watch)
    layouts, libraries = (torch.contiguous_format, torch.channels_last), (True, False)
    ways = list(itertools.product(layouts, libraries if device.type == "cpu" else (True,)))
    calls = range(1 if device.type == "cpu" else 10)  # an accelerator is not waited for each time

    def operations_and_seconds(work: Callable[[], object]) -> tuple[int, float]:
        with FlopCounterMode(display=False) as counter:
            work()
        seconds = best_seconds(lambda: [work() for _ in calls], device, 3) / len(calls)
        return int(counter.get_total_flops()), seconds

    def numbers(given: tuple[Any, ...]) -> int:
        return sum(one.numel() for one in given if isinstance(one, torch.Size))

    best, total = 0.0, 0.0
    for key, times in sorted(watch.found.items(), key=lambda item: numbers(item[0])):
        found = {}
        for layout, library in ways:
            given = [
                torch.randn(one, device=device).to(dtype, memory_format=layout)
                if isinstance(one, torch.Size)
                else one
                for one in key[1:]
            ]
            with with_mkldnn(library):
                found[layout, library] = operations_and_seconds(partial(key[0], *given))
        operations, seconds = min(found.values(), key=lambda one: one[1])
        best, total = max(best, operations / seconds / 1e9), total + times * seconds
        # Kernels of torch's own that are far behind on small maps would take minutes on large ones.
        ways = [
            (x, library) for x, library in ways if library or found[x, library][1] < 2 * seconds
        ]
    return best, total


class Expired(Exception):
    """Something took too long. No TimeoutError: compilers catch those of their own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Expired in a block that takes longer; again where it is swallowed."""

    def expire(number: int, frame: object) -> None:
        raise Expired(f"took longer than {seconds:.0f} s")

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
        with suppress(RuntimeError):  # refused after a CUDA graph that could not be captured
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
