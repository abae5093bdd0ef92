"""Time a step of the optimizer, the `release` recipe at 256 px, against what the machine can do.

Widths are StyleGAN2's config-f, the encoder is ViT-B/32, weights are random. A step renders the
recipe's sources edited, embeds them and goes back to the direction. Two floors are measured in the
same run: its operations at the best rate of any square matrix product and of any convolution of
the step, in the layout and by the library that is fastest; and the bytes that it must move at the
best rate of a large copy. The larger floor is the limit. Runs on the processor.

    python -m eval.studies.benchmark                                   # some minutes on two cores
    python -m eval.studies.benchmark --out runs/benchmark --compare-released

Much of the rest is the system handing out memory that the last step gave back. On Linux two
settings, good for any long optimization, let the process keep it:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m eval.studies.benchmark

`--compare-released` also times a step of the released loop: sources rendered again at every step,
gradients for the generator's weights, images enlarged seven times before they are averaged. Once it
keeps this project's convolutions, and once it has those of the release, which build the weights of
each sample and apply them in groups.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.sizes import Sizes
from targetclip import command
from targetclip.command import Precision, in_precision, start
from targetclip.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    out: Path | None = None
    """Folder for report.json; none is written without it."""
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    steps: int = 5
    """Steps timed in each precision, after one that is not."""
    matrix_sizes: tuple[int, ...] = (1024, 2048, 4096)
    copied_numbers: int = 2**27
    """Numbers of 4 bytes that are copied to measure memory; more than a cache holds."""
    compare_released: bool = False
    """Also time steps as the released loop makes them, in float32; for resolutions from 32 px."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.benchmark", Config, exclusive=True)

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from eval.costs import (
    convolution_rate,
    copy_rate,
    count_operations,
    least_bytes,
    machine,
    matrix_rate,
    peak_bytes,
    random_networks,
)
from targetclip.embedder import ClipEmbedder
from targetclip.generators.stylegan2 import DEMODULATION_EPSILON, SQRT2, StyledConv, StyleGAN2
from targetclip.losses import consistency_loss, transfer_loss
from targetclip.optimize import Progress
from targetclip.scene import Scene, random_latents

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_config(config: Config) -> None:
    """Raise a ValueError for options that leave nothing to time."""
    command.check_least(config, steps=1, copied_numbers=1)
    if config.compare_released and config.resolution < 32:
        raise ValueError(
            f"--compare-released averages blocks of resolution/32 px, found {config.resolution} "
            "px; give --resolution 32 or more"
        )
    if not config.precisions or not config.matrix_sizes:
        raise ValueError("expected a value of --precisions and of --matrix-sizes, found none")


def step_seconds(
    config: Config,
    scene: Scene,
    target: Float[Tensor, "1 embed"],
    sources: Float[Tensor, "sources num_ws w_dim"],
    precision: Precision,
) -> tuple[float, ...]:
    """Run the optimizer, and return the seconds of each step but the first."""
    ends: list[float] = []

    def on_step(progress: Progress) -> None:
        ends.append(time.perf_counter())

    release = RECIPES["release"]
    recipe = dataclasses.replace(release, steps=config.steps + 1, sources=config.sources)
    initial = random_latents(scene.generator, [config.sources])
    with in_precision(scene.device, precision):
        scene.search(target, recipe, initial, [0], bank=sources, on_step=on_step)
    return tuple(end - start for start, end in itertools.pairwise(ends))


def timing_of(
    precision: Precision,
    seconds: Sequence[float],
    operations: int,
    rates: Mapping[str, float],
    least: int,
    copied: float,
) -> dict[str, Any]:
    """Return the report of the step in one precision.

    `seconds` are of every timed step, and rates follow from their median: `gflops` in 10^9
    operations per second, `fraction` of the best of `rates`. `floor_seconds` are those of its
    operations at that rate and of its `least` bytes at `copied` (10^9 bytes per second).
    `above_limit` names the floors that a step was faster than: they are then no limits, and nothing
    is clipped.
    """
    median = statistics.median(seconds)
    gflops, best = operations / median / 1e9, max(rates.values())
    floors = {"operations": operations / best / 1e9, "memory": least / copied / 1e9}
    return {
        "precision": precision,
        "seconds": seconds,
        "steps_per_second": 1 / median,
        "gflops": gflops,
        **rates,
        "fraction": gflops / best,
        "least_gigabytes": least / 1e9,
        "floor_seconds": floors,
        "limit": max(floors, key=lambda name: floors[name]),
        "above_limit": [name for name, floor in floors.items() if floor > median],
    }


class GroupedConv(nn.Module):
    """A layer as the release computes it: it builds the weights of each sample, and applies them in
    one convolution of as many groups as samples (Karras et al. 2020, section 2.2)."""

    def __init__(self, layer: StyledConv) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, x: Float[Tensor, "batch channels height width"], w: Float[Tensor, "batch w_dim"]
    ) -> Float[Tensor, "batch out out_height out_width"]:
        layer, (batch, channels, height, width) = self.layer, x.shape
        weight = layer.weight / math.sqrt(layer.weight[0].numel())
        weight = weight * layer.affine(w)[:, None, :, None, None]
        power = weight.square().sum(dim=(2, 3, 4), keepdim=True)
        weight = weight * torch.rsqrt(power + DEMODULATION_EPSILON)
        x = x.reshape(1, batch * channels, height, width)
        if layer.upsample:
            weight = weight.transpose(1, 2).flatten(0, 1)
            x = F.conv_transpose2d(x, weight, stride=2, groups=batch)
            x = F.conv2d(x.transpose(0, 1), layer.blur[None, None], padding=1)
        else:
            x = F.conv2d(x, weight.flatten(0, 1), padding=1, groups=batch)
        x = x.reshape(batch, -1, *x.shape[2:]) + layer.noise_strength * layer.noise
        x = F.leaky_relu(x + layer.bias[:, None, None], 0.2) * SQRT2
        return x if layer.clamp is None else x.clamp(-layer.clamp, layer.clamp)


def released_seconds(
    generator: StyleGAN2,
    embedder: ClipEmbedder,
    target: Float[Tensor, "1 embed"],
    sources: Float[Tensor, "sources num_ws w_dim"],
    grouped: bool,
) -> float:
    """Return the seconds of a step as the released loop makes it (see the module docstring), with
    its own convolutions if `grouped`."""

    def embed(ws: Tensor) -> Tensor:
        images = F.interpolate(generator.synthesis(ws), scale_factor=embedder.image_size // 32)
        small = F.avg_pool2d(images, generator.resolution // 32)
        embeddings: Tensor = embedder.clip.encode_image(small)
        return embeddings[None]

    recipe, convs = RECIPES["release"], generator.convs
    if grouped:
        layers: Any = convs
        generator.convs = nn.ModuleList(GroupedConv(layer) for layer in layers)
    generator.requires_grad_(True)
    start = time.perf_counter()
    direction = sources[:1].clone().requires_grad_(True)
    before, after = embed(sources), embed(sources + direction)
    loss = recipe.transfer_weight * transfer_loss(after, target)
    loss = loss + recipe.consistency_weight * consistency_loss(before, after, recipe.differences)
    loss.sum().backward()
    seconds = time.perf_counter() - start
    generator.convs = convs
    generator.requires_grad_(False)
    generator.zero_grad(set_to_none=True)
    return seconds


def report_table(report: Mapping[str, Any]) -> str:
    """Return the report as lines of text."""
    lines = [
        f"{report['gflop_per_step']:.1f} GFLOP a step; memory copied at "
        f"{report['copied_gigabytes_per_second']:.1f} GB/s, read and written",
        f"{'':6}{'s/step':>8}{'min':>8}{'max':>8}{'GFLOP/s':>9}{'matrix':>9}{'convs':>9}"
        f"{'fraction':>10}{'floor: s':>10}{'memory s':>10}{'convs s':>9}{'peak GB':>9}",
    ]
    for row in report["runs"]:
        seconds, floors = row["seconds"], row["floor_seconds"]
        lines.append(
            f"{row['precision']:6}{statistics.median(seconds):8.3f}{min(seconds):8.3f}"
            f"{max(seconds):8.3f}{row['gflops']:9.1f}{row['matrix_gflops']:9.1f}"
            f"{row['convolution_gflops']:9.1f}{row['fraction']:10.1%}{floors['operations']:10.3f}"
            f"{floors['memory']:10.3f}{row['convolution_seconds']:9.3f}{row['peak_gigabytes']:9.2f}"
        )
    for row in report["runs"]:
        for name in row["above_limit"]:
            lines.append(
                f"{row['precision']}: a step was faster than its floor of {name}, which is no "
                "limit then: other work slowed its measurement, or a cache held the maps"
            )
    for name, seconds in report["released_seconds"].items():
        times = ", ".join(
            f"{row['precision']} {seconds / statistics.median(row['seconds']):.1f}"
            for row in report["runs"]
        )
        lines.append(f"the released loop, {name}: {seconds:.3f} s a step; so many times: {times}")
    return "\n".join(lines)


def run(config: Config) -> dict[str, Any]:
    """Time everything, print a table, and write and return the report.

    Raises:
        ValueError: options that leave nothing to time, or networks that cannot be.
        OSError: --out cannot be written into.
    """
    check_config(config)
    if config.out is not None:
        command.make_folder(config.out)
    torch.manual_seed(0)
    operations = count_operations(config)
    generator, embedder = random_networks(config)
    scene = Scene(generator=generator, embedder=embedder, max_images=config.max_images)
    # As after training, w stays near its mean; any target will do.
    sources = random_latents(generator, range(config.sources))
    target = torch.randn(1, embedder.embed_dim)

    steps = {}
    for one in config.precisions:
        steps[one] = step_seconds(config, scene, target, sources, one), peak_bytes() / 1e9
    copied, timings = copy_rate(config.copied_numbers), []
    for precision, (seconds, peak) in steps.items():
        dtype = DTYPES[precision]
        rate, alone = convolution_rate(config, dtype)
        matrix = matrix_rate(dtype, config.matrix_sizes)
        rates = {"matrix_gflops": matrix, "convolution_gflops": rate}
        least = least_bytes(config, dtype.itemsize)
        timing = timing_of(precision, seconds, operations, rates, least, copied)
        timings.append({**timing, "convolution_seconds": alone, "peak_gigabytes": peak})
    released = {}
    if config.compare_released:
        for name, grouped in (("convolutions of this project", False), ("its own", True)):
            released[name] = released_seconds(generator, embedder, target, sources, grouped)
    report = {
        "config": dataclasses.asdict(config) | {"out": None},
        "machine": machine(),
        "gflop_per_step": operations / 1e9,
        "copied_gigabytes_per_second": copied,
        "runs": timings,
        "released_seconds": released,
    }
    print(report_table(report))
    if config.out is not None:
        command.write_json(config.out / "report.json", report)
        command.say_next(config.out, "report.json", "the same on another machine", error=True)
    return report
