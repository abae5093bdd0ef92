"""Measure what building pairs costs: the builder's own overhead, processes, memory, a large plan.

Four measurements, each a ratio or a curve within one run, on the bundled world:

    python -m eval.studies.scale --out runs/scale  # half an hour on two idle cores
    python -m eval.studies.scale --out runs/scale --only memory

`overhead`: seconds of a build against the bare optimizer on the same chunks, in one process.
`throughput`: targets per second of one process and of two, with one thread each.
`memory`: peak memory of building 10 to 10,000 pairs with a simulated optimizer.
`plan`: operations counted for FFHQ pairs and a mapper's training, and their cost at some rates.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eval.sizes import Sizes
from targetclip import command
from targetclip.command import Precision, Stop, Stopwatch, choose_precision, start
from targetclip.recipes import RECIPES
from targetclip.seeds import DEFAULT_TARGETS
from targetclip.world import DEFAULT_WORLD, World, load_scene, load_world

Measure = Literal["overhead", "throughput", "memory", "plan"]


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json and the builds that are measured."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    only: Measure | None = None
    """Measure this alone. Default: all four."""
    targets: int = 16
    """Targets of each timed build, avatars."""
    batch_size: int = 8
    steps: int | None = None
    """Steps of the teacher where time is measured. Default: the recipe's."""
    precision: Precision | None = None
    """Of the teacher where time is measured. Default: accelerate's, or else fp32."""
    pairs: tuple[int, ...] = (10, 100, 1000, 10_000)
    """Sizes of the builds whose memory is measured."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.scale", Config, exclusive=True)

import numpy as np
import torch
from PIL import Image

from data.build import WORK, dataset_info, settings_of
from data.build import Config as Build
from data.plan import Plan, make_plan
from data.targets import SeededTargets, TargetSet, open_targets
from data.teacher import Teacher, make_teacher
from data.worker import Worker, merge_all
from eval.costs import alone, count_operations, machine, peak_bytes
from targetclip.optimize import Optimized
from targetclip.scene import Scene

# Config-f, as the checkpoints of FFHQ that people have, by the resolution.
FFHQ_CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)
WIDTHS = {256: FFHQ_CHANNELS[:7], 1024: FFHQ_CHANNELS}
RATES = (22, 45, 100, 247)  # TFLOP/s that one GPU may reach: see docs/scale.md
PRICE, SPOT_PRICE = 2.5, 1.25  # dollars an hour of one H100, assumed
MAPPER_STEPS, MAPPER_IMAGES = 4500, 48 * 2  # of an earlier mapper, and images a step


# Builds in this process


def build_here(
    work: Path, world: World, teacher: Teacher, targets: TargetSet, size: int, clock: Stopwatch
) -> tuple[Plan, dict[str, Any]]:
    """Build pairs in this process alone, as the command does, in phases plan, run and merge.

    Args:
        work: folder of the build, made anew; its pairs come into the folder `dataset` below.
        size: targets of a chunk.

    Returns:
        The plan, and the report of the dataset.
    """
    settings = settings_of(teacher, world, seed=0)
    with clock.phase("plan"):
        plan = make_plan(
            work, "scale", [targets], settings, size, teacher.prepare, lambda count, total: None
        )
    with clock.phase("run"):
        Worker(work=work, plan=plan, teacher=teacher, stop=Stop()).run(wait=True)
    with clock.phase("merge"):
        info = dataset_info(Build(out=work, world=world.argument), world, teacher.scene, plan)
        report = merge_all(work / "dataset", work, plan, info)
    return plan, report


class InstantScene(Scene):
    """A scene whose optimizer is simulated: it returns random directions at once."""

    def search(self, *arguments: Any, **options: Any) -> Optimized:
        """Return directions and scores that depend on the first seed alone."""
        _, recipe, initial, seeds = arguments
        batch, random = len(seeds), torch.Generator().manual_seed(seeds[0])
        scores = torch.rand(3, batch, generator=random)
        return Optimized(
            directions=0.1 * torch.randn(initial.shape, generator=random),
            coefficients=torch.ones(batch, recipe.sources),
            loss=scores[0],
            transfer=scores[1],
            consistency=scores[2],
            steps=torch.full((batch,), recipe.steps),
            failures=(None,) * batch,
        )


# The measures


def new_folder(config: Config, name: str) -> Path:
    """Name a new folder of a build below --out."""
    return config.out / f"{name}-{time.time_ns()}"


def measure_overhead(config: Config) -> dict[str, float]:
    """Time the bare optimizer, a build of the same chunks, and the stages of that build."""
    world, targets = load_world(config.world), open_targets(f"avataaars:{config.targets}")
    recipe = RECIPES[world.recipe]
    recipe = replace(recipe, steps=config.steps or recipe.steps)
    precision = choose_precision(config.precision)
    teacher, clock = (
        make_teacher(load_scene(world), world.recipe, recipe, 16, precision),
        Stopwatch(),
    )
    work = new_folder(config, "overhead")
    plan, _ = build_here(work, world, teacher, targets, config.batch_size, clock)
    with clock.phase("bare"):
        for chunk in range(plan.chunks):
            teacher.optimize_chunk(plan, chunk, lambda progress: None, None)
    embeddings = torch.from_numpy(np.array(plan.embeddings[plan.rows(0)]))
    directions = torch.zeros(len(embeddings), *teacher.bank.shape[1:])
    with clock.phase("scoring"):
        teacher.held_out_scores(embeddings, directions)
    seconds = clock.seconds
    whole, bare = seconds["plan"] + seconds["run"] + seconds["merge"], seconds["bare"]
    scoring = seconds["scoring"] * plan.chunks
    return {
        "targets": len(plan.targets),
        **{f"{phase}_seconds": seconds[phase] for phase in ("bare", "plan", "run", "merge")},
        "held_out_scoring_seconds": scoring,
        "overhead": whole / bare - 1,
        "overhead_without_scoring": (whole - scoring) / bare - 1,
    }


def build_rate(
    config: Config, processes: int, run: Callable[..., Any], start: Callable[..., Any]
) -> float:
    """Return the targets per second of so many workers on one plan, one thread each.

    The time is that from the first chunk published to the last, without starting up.

    Raises:
        ChildProcessError: a worker failed.
        ValueError: too few targets for the number of processes.
    """
    out = new_folder(config, f"throughput-{processes}")
    words = [sys.executable, "-m", "data.build", "--out", str(out), "--world", config.world]
    words += ["--batch-size", str(config.batch_size)]
    words += ["--precision", choose_precision(config.precision)]
    if config.steps is not None:
        words += ["--steps", str(config.steps)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    targets = ["--targets", f"avataaars:{config.targets * processes}"]
    run([*words, *targets, "--only", "plan"], env=one_thread, check=True)
    workers = [start([*words, "--only", "run"], env=one_thread) for _ in range(processes)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise ChildProcessError(f"a worker of {str(out)!r} failed: see its message above")
    chunks = (out / WORK / "chunks").glob("*.parquet")
    published = sorted(path.stat().st_mtime for path in chunks)
    # Each process publishes its first chunk at the beginning of what is timed.
    counted = (len(published) - processes) * config.batch_size
    if not counted:
        raise ValueError(
            f"--targets: expected more than one chunk of {config.batch_size} a process, found "
            f"{config.targets} targets"
        )
    return counted / (published[-1] - published[0])


def measure_throughput(
    config: Config,
    run: Callable[..., Any] = subprocess.run,
    start: Callable[..., Any] = subprocess.Popen,
) -> dict[str, float]:
    """Compare the targets per second of one process and of two.

    Args:
        run, start: as `subprocess.run` and `subprocess.Popen`.
    """
    one, two = (build_rate(config, processes, run, start) for processes in (1, 2))
    return {"targets_per_second_1": one, "targets_per_second_2": two, "ratio": two / one}


def blank_targets(count: int) -> SeededTargets:
    """Return so many black pictures, which take no time to make."""
    blank = Image.new("RGB", (64, 64))
    return SeededTargets(f"blank:{count}", count, DEFAULT_TARGETS, ("blank",), lambda index: blank)


def instant_build(config: Config, pairs: int) -> dict[str, Any]:
    """Build so many pairs with the simulated optimizer, and return the dataset's report."""
    world, work = load_world(config.world), new_folder(config, "memory")
    scene = InstantScene(**vars(load_scene(world)))
    teacher = make_teacher(scene, world.recipe, RECIPES[world.recipe], 2, "fp32")
    try:
        return build_here(work, world, teacher, blank_targets(pairs), 10, Stopwatch())[1]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def memory_of(config: Config, pairs: int) -> float:
    """Return the peak megabytes of this process after a build of so many pairs."""
    instant_build(config, pairs)
    return peak_bytes() / 1e6


def measure_memory(config: Config, alone: Callable[..., Any] = alone) -> dict[str, float]:
    """Measure the peak megabytes of builds of every size, each in a process of its own."""
    return {str(pairs): alone(memory_of, config, pairs) for pairs in config.pairs}


def cost_of(operations: float) -> dict[str, Any]:
    """Return the hours and dollars of one GPU for operations, by its rate in TFLOP/s."""
    hours = {str(rate): operations / (rate * 1e12) / 3600 for rate in RATES}
    return {
        "petaflop": operations / 1e15,
        "hours": hours,
        "dollars": {rate: PRICE * value for rate, value in hours.items()},
        "spot_dollars": {rate: SPOT_PRICE * value for rate, value in hours.items()},
    }


def measure_plan(
    config: Config, count: Callable[[Sizes], int] = count_operations
) -> dict[str, Any]:
    """Count the operations of a million FFHQ pairs and of a mapper's training, with their costs.

    Without identity losses: the cost of an identity model is not counted.
    """
    report: dict[str, Any] = {}
    for resolution, channels in WIDTHS.items():
        image = count(Sizes(resolution=resolution, channels=channels, sources=1))
        report[str(resolution)] = {
            name: cost_of(1e6 * image * recipe.sources * recipe.steps)
            for name, recipe in RECIPES.items()
            if not recipe.identity_weight
        } | {"mapper": cost_of(image * MAPPER_IMAGES * MAPPER_STEPS)}
    return report


MEASURES: dict[Measure, Callable[[Config], dict[str, Any]]] = {
    "overhead": measure_overhead,
    "throughput": measure_throughput,
    "memory": measure_memory,
    "plan": measure_plan,
}


def run(
    config: Config, measures: Mapping[Measure, Callable[[Config], dict[str, Any]]] = MEASURES
) -> dict[str, Any]:
    """Measure, and add to what report.json already holds.

    Raises:
        ValueError, OSError: bad input, files that cannot be read or written, a worker that failed.
    """
    choose_precision(config.precision)  # refuses what cannot be, before anything is measured
    command.make_folder(config.out)
    path = config.out / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, measure in measures.items():
        if config.only in (None, name):
            report[name] = {**measure(config), "machine": machine()}
            command.write_json(path, report)
            print(name, json.dumps(report[name], indent=2), flush=True)
    command.say_next(config.out, "report.json", "the same on another machine", error=True)
    return report
