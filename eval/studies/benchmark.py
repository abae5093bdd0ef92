"""How fast a step of the optimizer is: the `release` recipe at 256 px, against matrix products.

Widths are StyleGAN2's config-f, the encoder is ViT-B/32, weights are random. A step renders the
recipe's sources edited, embeds them and goes back to the direction; the sources themselves are
embedded once. Its floating-point operations per second are given as a fraction of the rate of the
best square matrix product measured in the same run. Runs on the processor.

    python -m eval.studies.benchmark                                   # some minutes on two cores
    python -m eval.studies.benchmark --out runs/benchmark --compare-released

Much of what is left is the system handing out memory that the last step gave back. On Linux these
two settings, which a command for a long optimization takes as well, let the process keep it:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m eval.studies.benchmark

`--compare-released` also times a step as the released loop makes it: sources rendered again at
every step, gradients for the generator's weights, images enlarged seven times before they are
averaged. It keeps this project's convolutions, where the released ones are grouped and slower.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from targetclip.embedder import ClipEmbedder, EncoderInput
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.losses import consistency_loss, transfer_loss
from targetclip.optimize import Progress, embed_latents, optimize_directions
from targetclip.precision import in_bfloat16
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import random_latents

Precision = Literal["fp32", "bf16"]

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
MEMORY_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")


@dataclass(frozen=True)
class Config:
    out: Path | None = None
    """Folder for report.json; none is written without it."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    steps: int = 5
    """Steps timed in each precision, after one that is not."""
    sources: int = RECIPES["release"].sources
    max_images: int = 64
    """Images rendered at once; fewer than `sources` bounds memory and renders twice."""
    resolution: int = 256
    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128)
    """Widths at 4, 8, ... `resolution` px."""
    w_dim: int = 512
    mapping_layers: int = 8
    clip: str = "ViT-B-32"
    """A model of open_clip, or local-dir:FOLDER; its sizes are used, never its weights."""
    matrix_sizes: tuple[int, ...] = (1024, 2048, 4096)
    compare_released: bool = False
    """Also time a step as the released loop makes it, in float32; for resolutions from 32 px."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.compare_released and self.resolution < 32:
            raise ValueError(
                f"--compare-released averages blocks of resolution/32 px, found {self.resolution} "
                "px; give --resolution 32 or more"
            )
        if self.steps < 1 or not self.precisions or not self.matrix_sizes:
            raise ValueError(
                f"expected --steps of 1 or more, a precision and a matrix size, found "
                f"{self.steps}, {self.precisions} and {self.matrix_sizes}"
            )

    @property
    def recipe(self) -> Recipe:
        """The `release` recipe, long enough for one step that is not timed."""
        return dataclasses.replace(RECIPES["release"], steps=self.steps + 1, sources=self.sources)


@dataclass(frozen=True)
class Run:
    """The step in one precision."""

    precision: Precision
    seconds: tuple[float, ...]
    """Of every step that was timed."""
    steps_per_second: float
    """From the median."""
    gflops: float
    """Counted operations per second of the median step, in 10^9."""
    matrix_gflops: float
    """The same of the best matrix product."""
    fraction: float
    """Of the matrix product's rate."""
    peak_gigabytes: float
    """Largest memory of the process so far, earlier precisions included."""


def random_networks(config: Config) -> tuple[StyleGAN2, ClipEmbedder]:
    """Both networks with random weights, made on torch's current default device."""
    import open_clip

    sizes = StyleGAN2Config(
        config.resolution, config.w_dim, config.w_dim, config.mapping_layers, config.channels
    )
    model = open_clip.get_model_config(config.clip)
    if model is None:
        raise ValueError(f"expected --clip to be a model of open_clip, found {config.clip!r}")
    wanted = EncoderInput(model["vision_cfg"]["image_size"], (0.5,) * 3, (0.5,) * 3, "bicubic")
    # Pictures and texts are not embedded here: nothing to read them with is needed.
    embedder = ClipEmbedder(open_clip.CLIP(**model), wanted, no_reader, no_reader, model)
    generator = StyleGAN2(sizes).eval().requires_grad_(False)
    # Weights that are never written need no fingerprint, and those without values have none.
    generator.fingerprint = embedder.fingerprint = "random"
    return generator, embedder


def no_reader(thing: object) -> Tensor:
    raise NotImplementedError("the benchmark embeds rendered images only")


def count_operations(config: Config) -> int:
    """Floating-point operations of a step, forward and backward, from the shapes alone.

    Convolutions, matrix products and attention count, a multiplication and an addition as two;
    what is done once a run, the embedding of the sources, does not.
    """
    with torch.device("meta"):
        generator, embedder = random_networks(config)
        ws = torch.zeros(config.sources, generator.num_ws, generator.w_dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            preprocess = config.recipe.preprocess
            embed_latents(generator, embedder, ws, preprocess, config.max_images).sum().backward()
    return int(counter.get_total_flops())


def matrix_rate(dtype: torch.dtype, sizes: tuple[int, ...], repeats: int = 5) -> float:
    """The best rate of a product of two square matrices, in 10^9 operations per second.

    Each size counts with its median, as a step does: a single fortunate product is no rate.
    """
    rates = []
    for size in sizes:
        left, right = torch.randn(2, size, size).to(dtype)
        left @ right
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
        rates.append(2 * size**3 / statistics.median(seconds) / 1e9)
    return max(rates)


def peak_gigabytes() -> float:
    """The most memory this process ever held, in 10^9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def time_steps(
    config: Config,
    generator: StyleGAN2,
    embedder: ClipEmbedder,
    target: Float[Tensor, "1 embed"],
    sources: Float[Tensor, "sources num_ws w_dim"],
    dtype: torch.dtype,
) -> tuple[float, ...]:
    """Seconds of each step but the first, of a run of the optimizer."""
    ends: list[float] = []

    def note(progress: Progress) -> None:
        ends.append(time.perf_counter())

    initial = random_latents(generator, [config.seed + config.sources])
    with in_bfloat16(sources.device) if dtype == torch.bfloat16 else contextlib.nullcontext():
        optimize_directions(
            generator, embedder, target, sources, config.recipe, initial, [config.seed],
            note, config.max_images,
        )  # fmt: skip
    return tuple(end - start for start, end in itertools.pairwise(ends))


def released_step(
    generator: StyleGAN2,
    embedder: ClipEmbedder,
    target: Float[Tensor, "1 embed"],
    sources: Float[Tensor, "sources num_ws w_dim"],
    direction: Float[Tensor, "1 num_ws w_dim"],
) -> float:
    """Seconds of a step as the released loop makes it (see the module docstring)."""

    def embed(ws: Tensor) -> Tensor:
        images = F.interpolate(generator.synthesis(ws), scale_factor=embedder.image_size // 32)
        small = F.avg_pool2d(images, generator.resolution // 32)
        embeddings: Tensor = embedder.clip.encode_image(small)
        return embeddings[None]

    recipe = RECIPES["release"]
    generator.requires_grad_(True)
    start = time.perf_counter()
    direction = direction.clone().requires_grad_(True)
    before, after = embed(sources), embed(sources + direction)
    loss = recipe.transfer_weight * transfer_loss(after, target)
    loss = loss + recipe.consistency_weight * consistency_loss(before, after, recipe.differences)
    loss.sum().backward()
    seconds = time.perf_counter() - start
    generator.requires_grad_(False)
    generator.zero_grad(set_to_none=True)
    return seconds


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_settings": {key: os.environ[key] for key in MEMORY_SETTINGS if key in os.environ},
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "open_clip_torch")},
    }


def table(runs: list[Run], operations: int, released: float | None) -> str:
    """The report for people."""
    lines = [
        f"{operations / 1e9:.1f} GFLOP a step",
        f"{'':6}{'s/step':>8}{'min':>8}{'max':>8}{'steps/s':>9}"
        f"{'GFLOP/s':>9}{'matrix':>9}{'fraction':>10}{'peak GB':>9}",
    ]
    for run in runs:
        lines.append(
            f"{run.precision:6}{statistics.median(run.seconds):8.3f}{min(run.seconds):8.3f}"
            f"{max(run.seconds):8.3f}{run.steps_per_second:9.3f}{run.gflops:9.1f}"
            f"{run.matrix_gflops:9.1f}{run.fraction:10.1%}{run.peak_gigabytes:9.2f}"
        )
    if released is not None:
        lines.append(f"a step as the released loop makes it: {released:.3f} s")
    return "\n".join(lines)


def run(config: Config) -> dict[str, Any]:
    """Time everything, print a table, and write and return the report."""
    torch.manual_seed(config.seed)
    operations = count_operations(config)
    generator, embedder = random_networks(config)
    # As after training, w stays near its mean; any target will do.
    sources = random_latents(generator, range(config.seed, config.seed + config.sources))
    target = torch.randn(1, embedder.embed_dim)

    runs = []
    for precision in config.precisions:
        rate = matrix_rate(DTYPES[precision], config.matrix_sizes)
        seconds = time_steps(config, generator, embedder, target, sources, DTYPES[precision])
        median = statistics.median(seconds)
        gflops = operations / median / 1e9
        runs.append(
            Run(precision, seconds, 1 / median, gflops, rate, gflops / rate, peak_gigabytes())
        )
    released = None
    if config.compare_released:
        released = released_step(generator, embedder, target, sources, sources[:1])

    print(table(runs, operations, released))
    report = {
        "config": dataclasses.asdict(config) | {"out": None},
        "machine": machine(),
        "gflop_per_step": operations / 1e9,
        "runs": [dataclasses.asdict(run) for run in runs],
        "released_seconds": released,
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main() -> None:
    run(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
