"""What building pairs costs at scale: the builder's own overhead, processes, memory, a large plan.

Four measurements, each a ratio or a curve within one run, on the bundled world:

    python -m eval.studies.scale --out runs/scale  # half an hour on two idle cores
    python -m eval.studies.scale --out runs/scale --only memory

`overhead`: seconds of a build against the bare optimizer on the same chunks, in one process.
`throughput`: targets per second of one process and of two, with one thread each.
`memory`: peak memory of building 10 to 10,000 pairs with a simulated optimizer.
`plan`: operations counted for one FFHQ pair at 1024 px, and what a million cost.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from data.build import Config as Build
from data.build import dataset_info, make_teacher, settings_of
from data.dataset import merge
from data.pairs import features
from data.plan import Plan, make_plan
from data.targets import BadTarget, Target, TargetSet, open_targets
from data.worker import Stop, Teacher, Worker, chunk_name
from eval.studies.benchmark import Config as Benchmark
from eval.studies.benchmark import count_operations, machine
from targetclip.optimize import Optimized
from targetclip.recipes import RECIPES
from targetclip.targets import embed_targets
from targetclip.world import load_parts, load_world

Measure = Literal["overhead", "throughput", "memory", "plan"]

# FFHQ at 1024 px, config-f: the checkpoint people have.
FFHQ_CHANNELS = (512, 512, 512, 512, 512, 256, 128, 64, 32)
PEAK = {"H100 SXM, bf16 dense": 989e12, "H100 SXM, TF32 dense": 495e12}  # NVIDIA's data sheet
ASSUMED_FRACTION = 0.25  # of the peak: convolutions of 32 and 64 channels at 1024 px are narrow
ASSUMED_PRICE = 2.5  # dollars an hour of one H100


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json and the builds that are measured."""
    only: Measure | None = None
    """Measure this alone. Default: all four."""
    targets: int = 16
    """Targets of each timed build, drawn faces."""
    batch_size: int = 8
    steps: int | None = None
    """Steps of the teacher where time is measured. Default: the recipe's."""
    pairs: tuple[int, ...] = (10, 100, 1000, 10_000)
    """Sizes of the builds whose memory is measured."""


def peak_megabytes() -> float:
    """Largest memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def local_teacher(build: Build) -> tuple[Teacher, dict[str, Any], Any]:
    """The world's teacher on the default device, the settings of its plan, and the parts."""
    world = load_world(build.world)
    parts = load_parts(world, torch.get_default_device())
    recipe = RECIPES[world.recipe]
    recipe = dataclasses.replace(recipe, steps=build.steps or recipe.steps)
    teacher = make_teacher(build, world, parts, world.recipe, recipe, contextlib.nullcontext)
    settings = settings_of(build, world, parts, world.recipe, recipe, "no")
    return teacher, settings, parts


def planned(
    work: Path, sets: list[TargetSet], settings: dict[str, Any], teacher: Teacher, size: int
) -> Plan:
    """A plan of some targets, made in this process."""

    def prepare(targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        pictures = [target.picture for target in targets]
        return embed_targets(teacher.generator, teacher.embedder, pictures, teacher.recipe), None

    return make_plan(work, "scale", sets, settings, size, prepare, lambda count, total: None)


def worker(work: Path, plan: Plan, teacher: Teacher) -> Worker:
    """A worker with the command's own settings."""
    columns = features(plan.embeddings.shape[1], *teacher.bank.shape[1:])
    return Worker(work, plan, teacher, columns, Stop(), 120.0, 60.0, 5, lambda chunk, step: None)


def measure_overhead(config: Config) -> dict[str, float]:
    """Seconds of the bare optimizer, of a build of the same chunks, and of its stages."""
    build = Build(out=config.out / "overhead", steps=config.steps)
    teacher, settings, parts = local_teacher(build)
    work = build.out / f"work-{time.time_ns()}"
    start = time.perf_counter()
    plan = planned(
        work, [open_targets(f"drawn:{config.targets}")], settings, teacher, config.batch_size
    )
    after_plan = time.perf_counter()
    worker(work, plan, teacher).run(wait=True)
    after_run = time.perf_counter()
    chunks = [work / "chunks" / f"{chunk_name(i)}.parquet" for i in range(plan.chunks)]
    columns = features(plan.embeddings.shape[1], *teacher.bank.shape[1:])
    info = dataset_info(build, load_world(build.world), parts, plan)
    merge(chunks, work / "dataset", columns, info, plan.failures)
    merged = time.perf_counter()
    for chunk in range(plan.chunks):
        teacher.optimize_chunk(plan, chunk, lambda progress: None, None)
    bare = time.perf_counter() - merged
    found = np.array(plan.embeddings[plan.rows(0)])
    directions = torch.zeros(len(found), *teacher.bank.shape[1:])
    before = time.perf_counter()
    teacher.held_out_scores(torch.from_numpy(found), directions)
    scoring = (time.perf_counter() - before) * plan.chunks
    return {
        "targets": len(plan.targets),
        "bare_seconds": bare,
        "plan_seconds": after_plan - start,
        "run_seconds": after_run - after_plan,
        "merge_seconds": merged - after_run,
        "held_out_scoring_seconds": scoring,
        "overhead": (merged - start) / bare - 1,
        "overhead_without_scoring": (merged - start - scoring) / bare - 1,
    }


def timed_build(config: Config, processes: int) -> float:
    """Targets per second of so many workers on one plan, one thread each.

    Counted between the first chunk published and the last, so that starting up is left out.
    """
    out = config.out / f"throughput-{processes}-{time.time_ns()}"
    command = [sys.executable, "-m", "data.build", "--out", str(out)]
    command += ["--batch-size", str(config.batch_size)]
    if config.steps is not None:
        command += ["--steps", str(config.steps)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    targets = ["--targets", f"drawn:{config.targets * processes}"]
    subprocess.run([*command, *targets, "--only", "plan"], env=one_thread, check=True)
    workers = [
        subprocess.Popen([*command, "--only", "run"], env=one_thread) for _ in range(processes)
    ]
    if any(process.wait() for process in workers):
        raise RuntimeError(f"a worker of {str(out)!r} failed: see its message above")
    chunks = (out / ".build" / "chunks").glob("*.parquet")
    published = sorted(path.stat().st_mtime for path in chunks)
    # Each process publishes its first chunk at the beginning of what is timed.
    counted = (len(published) - processes) * config.batch_size
    if not counted:
        raise ValueError(
            f"--targets: expected more than one chunk of {config.batch_size} a process, found "
            f"{config.targets} targets"
        )
    return counted / (published[-1] - published[0])


def measure_throughput(config: Config) -> dict[str, float]:
    """One process and two."""
    one, two = timed_build(config, 1), timed_build(config, 2)
    return {"targets_per_second_1": one, "targets_per_second_2": two, "ratio": two / one}


def simulated(
    generator: Any,
    embedder: Any,
    embeddings: Tensor,
    bank: Tensor,
    recipe: Any,
    initial: Tensor,
    seeds: list[int],
    **options: Any,
) -> Optimized:
    """Stands in for the optimizer: random directions, at once."""
    batch, random = len(seeds), torch.Generator().manual_seed(seeds[0])
    scores = torch.rand(3, batch, generator=random)
    return Optimized(
        0.1 * torch.randn(initial.shape, generator=random),
        torch.ones(batch, recipe.sources),
        loss=scores[0],
        transfer=scores[1],
        consistency=scores[2],
        steps=torch.full((batch,), recipe.steps),
        failures=(None,) * batch,
    )


@dataclass(frozen=True)
class NumberedTargets:
    """Blank targets, as many as wanted: what is measured is the builder and not the drawing."""

    count: int

    @property
    def spec(self) -> str:
        return f"blank:{self.count}"

    def identity(self) -> str:
        return self.spec

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Target | BadTarget]:
        return self.starting_at(0)

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        blank = Image.new("RGB", (64, 64))
        for index in range(start, self.count):
            yield Target(f"{index:016x}", f"blank:{index}", blank)


def memory_of(config: Config, pairs: int) -> float:
    """Peak megabytes of this process after building so many pairs with the simulated optimizer."""
    build = Build(out=config.out / "memory", held_out=2)
    teacher, settings, parts = local_teacher(build)
    teacher = dataclasses.replace(teacher, optimize=simulated)
    work = build.out / f"work-{time.time_ns()}"
    plan = planned(work, [NumberedTargets(pairs)], settings, teacher, 10)
    worker(work, plan, teacher).run(wait=True)
    chunks = [work / "chunks" / f"{chunk_name(i)}.parquet" for i in range(plan.chunks)]
    columns = features(plan.embeddings.shape[1], *teacher.bank.shape[1:])
    info = dataset_info(build, load_world(build.world), parts, plan)
    merge(chunks, work / "dataset", columns, info, plan.failures)
    shutil.rmtree(work)
    return peak_megabytes()


def measure_memory(config: Config) -> dict[str, float]:
    """Of each size, in a process of its own: peak memory does not go down again."""
    found: dict[str, float] = {}
    for pairs in config.pairs:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[str(pairs)] = pool.apply(memory_of, (config, pairs))
    return found


def measure_plan(config: Config) -> dict[str, Any]:
    """Operations of FFHQ pairs at 1024 px, and hours and dollars of a million of them; of recipes
    that look through the embedder alone."""
    found: dict[str, Any] = {"assumed_fraction": ASSUMED_FRACTION, "assumed_price": ASSUMED_PRICE}
    for name, recipe in RECIPES.items():
        if recipe.identity_weight:  # what an identity model costs is not counted
            continue
        sizes = Benchmark(resolution=1024, channels=FFHQ_CHANNELS, sources=recipe.sources)
        pair = count_operations(sizes) * recipe.steps
        row: dict[str, float] = {"petaflop_a_pair": pair / 1e15, "steps": recipe.steps}
        for device, peak in PEAK.items():
            hours = 1e6 * pair / (ASSUMED_FRACTION * peak) / 3600
            row[f"hours for a million, {device}"] = hours
            row[f"dollars for a million, {device}"] = hours * ASSUMED_PRICE
        found[name] = row
    return found


MEASURES: dict[Measure, Callable[[Config], dict[str, Any]]] = {
    "overhead": measure_overhead,
    "throughput": measure_throughput,
    "memory": measure_memory,
    "plan": measure_plan,
}


def run(config: Config) -> dict[str, Any]:
    """Measure, and add to what report.json already holds."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "report.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, measure in MEASURES.items():
        if config.only in (None, name):
            report[name] = {**measure(config), "machine": machine()}
            path.write_text(json.dumps(report, indent=2) + "\n")
            print(name, json.dumps(report[name], indent=2), flush=True)
    return report


def main() -> None:
    """Errors of input and of files are one line."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
