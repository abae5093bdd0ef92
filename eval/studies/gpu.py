"""Measure an accelerator in a few minutes: parity, steps, images and pairs, at full size.

    python -m eval.studies.gpu --out runs/gpu            # at most eight minutes
    python -m eval.studies.gpu --out runs/gpu --small    # tiny networks: does every part run?

Networks have config-f's widths and ViT-B/32's sizes, with seeded weights. report.json and report.md
are written after every measurement. One that fails leaves its reason; one for which there was no
time stays "not measured". Needs torch, open_clip, tyro, jaxtyping and the checkout.

Seconds are medians of synchronized repeats after a warm-up. TFLOP/s are counted operations of a
step, forward and backward, over its seconds.
"""

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

from targetclip import command
from targetclip.command import Precision, in_precision, start
from targetclip.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json and report.md."""
    minutes: float = 8.0
    """What would end later is not begun."""
    small: bool = False
    """Tiny networks and few repeats. Always so where there is no accelerator."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.gpu", Config, exclusive=True)

import torch
from torch import Tensor
from torch.profiler import profile

from eval import bench as benches
from eval import costs
from eval.bench import COMPILED, EAGER, ENLARGE, EXIT, FULL, LAYOUT, TINY, TUNED, Bench
from eval.costs import CPU, NOT_MEASURED, median_seconds, peak_gib
from predictor.folded import FoldedMapper
from targetclip.optimize import draw_sources, losses_of
from targetclip.scene import Scene

Values = dict[str, Any]


# The measurements


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of a tensor, in the Euclidean norm."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


class Study:
    """A run: what has been measured, and until when there is time."""

    def __init__(
        self, config: Config, device: torch.device, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock, self.end = clock, clock() + 60 * config.minutes
        self.out, self.device = config.out, device
        small = config.small or device.type == "cpu"
        self.sizes, self.budget, self.small = TINY if small else FULL, 0.0 if small else 1.0, small
        self.operations_of = cache(
            lambda size, sources: costs.count_operations(replace(self.sizes[size], sources=sources))
        )
        self.gigabytes_of = cache(
            lambda size, sources, each: (
                costs.least_bytes(replace(self.sizes[size], sources=sources), each) / 1e9
            )
        )
        self.bench = cache(lambda size: Bench(self.sizes[size], device, self.budget))

        self.report: dict[str, Any] = {"machine": {"device": device.type, **costs.machine()}}
        if device.type == "cuda":
            self.report["machine"]["device"] = torch.cuda.get_device_name(device)
        self.peak = self.copied = 0.0
        """Best bf16 rate in 10^12 operations, and of copies in 10^9 bytes a second; 0 until
        measured."""

    def ceilings(self) -> Values:
        sides, count = ((256,), 2**20) if self.small else ((8192, 16384), 2**30)
        self.peak = costs.matrix_rate(torch.bfloat16, sides, self.device) / 1e3
        self.copied = costs.copy_rate(count, self.device)
        with benches.cuda_settings(self.device, tf32=True):
            tf32 = costs.matrix_rate(torch.float32, sides, self.device) / 1e3
        values = {"bf16 TFLOP/s": self.peak, "TF32 TFLOP/s": tf32}
        return {**values, "copied GB/s, both ways": self.copied}

    def convolutions(self, size: int) -> Values:
        """Time each convolution of a step of `release` alone, and count the step's floors."""
        sizes = self.sizes[size]
        rate, seconds = costs.convolution_rate(sizes, torch.bfloat16, self.device)
        self.peak = max(self.peak, rate / 1e3)
        operations = self.operations_of(size, sizes.sources) / 1e9
        values = {"best TFLOP/s": rate / 1e3, "ms of all in a step": 1e3 * seconds}
        values["least ms of a step by operations"] = operations / self.peak
        if self.copied:
            moved = self.gigabytes_of(size, sizes.sources, 2)
            values["least ms of a step by memory"] = 1e3 * moved / self.copied
        return values

    def parity(self, precision: Precision, tf32: bool | None, steps: int = 3) -> Values:
        """Compare features of renderings, and directions after so many steps, with fp32 here.
        A step is replayed as a CUDA graph from the fourth on."""
        recipe = replace(RECIPES["consistent"], steps=steps)
        wider = replace(TINY[32], resolution=64, channels=(32,) * 5)
        bench = Bench(TINY[16] if self.small else wider, CPU, 0.0)
        targets = bench.targets(2)

        def found(scene: Scene, precision: Precision) -> list[Tensor]:
            bank, at = bench.bank.to(scene.device), targets.to(scene.device)
            with (
                in_precision(scene.device, precision),
                benches.cuda_settings(scene.device, tf32=tf32),
            ):
                start = torch.zeros_like(bank[:2])
                result = scene.search(at, recipe, start, [0, 1], bank=bank)
                return [scene.features(bank), result.directions]

        expected, here = found(bench.scene, "fp32"), found(bench.scene, precision)
        nets: Any = copy.deepcopy((bench.scene.generator, bench.scene.embedder))
        generator, embedder = (net.to(self.device) for net in nets)
        there = found(Scene(generator=generator, embedder=embedder), precision)
        errors = {}
        for i, name in enumerate(("features", "directions")):
            errors[name] = error_of(there[i], expected[i])
            errors[f"{name}, on the processor"] = error_of(here[i], expected[i])
        return errors

    def step(
        self,
        size: int,
        name: str,
        *levers: str,
        precision: Precision = "bf16",
        tf32: bool | None = None,
    ) -> Values:
        """Time a search of one target, as commands run it but for some levers."""
        recipe, bench = RECIPES[name], self.bench(size)
        if EXIT in levers:
            recipe = replace(recipe, render_size=size // 4)
        with benches.cuda_settings(self.device, tf32=tf32, tuned=TUNED in levers):
            bench = bench.pull(levers)
            costs.free_memory(self.device)
            held = peak_gib(self.device)
            seconds = median(bench.steps(recipe, precision))
            values: Values = {"steps/s": 1 / seconds, "peak GiB": peak_gib(self.device)}
            values["GiB a source"] = (values["peak GiB"] - held) / recipe.sources
        if EXIT not in levers:
            values["TFLOP/s"] = self.operations_of(size, recipe.sources) / seconds / 1e12
            values["of bf16 peak"] = values["TFLOP/s"] / self.peak if self.peak else NOT_MEASURED
            each = 2 if precision == "bf16" else 4
            moved = self.gigabytes_of(size, recipe.sources, each) / seconds
            values["of copied GB/s"] = moved / self.copied if self.copied else NOT_MEASURED
        return values

    def best(self, size: int, name: str, *more: str) -> Values:
        """Time the levers together that made `release` at least 3 % faster, and some more."""
        rows = self.report["steps"]

        def gain(lever: str) -> float:
            old, new = (rows[f"release {size} px{row}"] for row in ("", f", {lever}"))
            measured = isinstance(old, dict) and isinstance(new, dict)
            return float(new["steps/s"] / old["steps/s"]) if measured else 0.0

        names = [LAYOUT, TUNED, max(ENLARGE, key=gain)]
        levers = [*(lever for lever in names if gain(lever) > 1.03), *more]
        return {"levers": ", ".join(levers), **self.step(size, name, *levers)}

    def slowest(self, size: int) -> Values:
        """Return milliseconds of the slowest operations of a step of `release`, by shapes."""
        if self.device.type == "cpu":
            raise ValueError("expected an accelerator")
        bench = self.bench(size).pull([EAGER])  # a graph does not say who started a kernel
        bench.budget = 0.0
        os.environ.setdefault("TEARDOWN_CUPTI", "0")  # CUDA graphs can crash after that
        with profile(record_shapes=True) as found:  # of all kinds of devices
            steps = 1 + len(bench.steps(RECIPES["release"])) + bench.warm
        events: Any = found.key_averages(group_by_input_shape=True)
        spent = dict[str, float]()
        for event in events:
            if event.device_type.name != "CPU":
                continue  # a kernel: its time is counted for the operation that started it
            name = f"{event.key} {event.input_shapes[:2]}"
            spent[name] = spent.get(name, 0) + event.self_device_time_total / 1e3 / steps
        slowest = sorted(spent, key=lambda name: -spent[name])[:30]
        return {"all": sum(spent.values()), **{name: spent[name] for name in slowest}}

    def images(self, size: int, count: int) -> Values:
        bench = self.bench(size)
        sources = bench.bank[:1].repeat(count, 1, 1)
        edit = partial(bench.scene.edit, sources, bench.bank[1])
        with in_precision(self.device, "bf16"):
            seconds = median_seconds(edit, self.device, self.budget / 2)
        return {"images/s": count / seconds, "peak GiB": peak_gib(self.device)}

    @torch.no_grad()
    def answer(self, images: int, mapped: bool, precision: Precision) -> Values:
        """Time CLIP on images of its own size, the mapper on one embedding, or both in turn."""
        bench = self.bench(max(self.sizes))
        embedder, mapper = bench.scene.embedder, FoldedMapper(bench.mapper())
        side, embedding = embedder.image_size, bench.features[:1]
        random = torch.Generator(self.device).manual_seed(0)
        inputs = torch.rand(images, 3, side, side, generator=random, device=self.device)

        def work() -> object:
            found = embedder.embed_images(inputs) if images else embedding
            return mapper(found) if mapped else found

        with in_precision(self.device, precision):
            seconds = median_seconds(work, self.device, self.budget / 2)
        return {"ms": 1e3 * seconds} | ({} if mapped else {"images/s": images / seconds})

    def training(self, size: int, count: int) -> Values:
        """Time a step of the mapper's training by the transfer term, without the loop around it:
        32 fresh sources, some edited for each target, AdamW."""
        bench, recipe = self.bench(size), RECIPES["consistent"]
        scene, mapper, targets = bench.scene, bench.mapper(), bench.targets(count)
        adam, random = torch.optim.AdamW(mapper.parameters()), torch.Generator().manual_seed(0)

        def step() -> None:
            pool = scene.latents(torch.randint(2**31, (32,), generator=random).tolist())
            prediction = mapper(targets)
            chosen = draw_sources(32, recipe.sources, True, [random] * count).to(self.device)
            edited = pool[chosen] + prediction.directions[:, None]
            with in_precision(self.device, "bf16"):
                before = scene.features(pool)
                after = scene.features(edited.flatten(0, 1)).unflatten(0, chosen.shape)
                losses = losses_of(recipe, before[chosen], after, targets)
            (losses.loss.mean() + prediction.expected.square().mean()).backward()
            adam.step()
            adam.zero_grad()

        seconds = median_seconds(step, self.device, self.budget)
        return {"steps/s": 1 / seconds, "peak GiB": peak_gib(self.device)}

    def pairs(self, size: int, batch: int, processes: int = 1) -> Values:
        """Extrapolate pairs an hour of `consistent` from the seconds of its steps."""
        if processes == 1:
            seconds = [median(self.bench(size).steps(RECIPES["consistent"], batch=batch))]
        else:
            sizes, budget = self.sizes[size], 3 * self.budget
            seconds = benches.steps_beside(processes, sizes, self.device, budget, batch)
        rates = [3600 * batch / one / RECIPES["consistent"].steps for one in seconds]
        peak = {"peak GiB": peak_gib(self.device)} if processes == 1 else {}
        return {"pairs/hour": sum(rates), "ms a step": 1e3 * max(seconds), **peak}

    def cells(self) -> Iterator[tuple[str, str, float, Callable[[], Values]]]:
        """Yield part, row, most seconds and work of every measurement, by what it is worth."""
        low, high = self.sizes
        yield "ceilings", "matrix products, copies", 20, self.ceilings
        for size in (low, high):
            convolutions = partial(self.convolutions, size)
            yield "ceilings", f"convolutions of {size} px, bf16", 20, convolutions
        yield "parity", "fp32 without TF32", 30, partial(self.parity, "fp32", False)
        default = "fp32 as torch has it, TF32 in convolutions"
        yield "parity", default, 30, partial(self.parity, "fp32", None)
        yield "parity", "bf16", 30, partial(self.parity, "bf16", None)
        graphs = partial(self.parity, "fp32", False, 8)
        yield "parity", "fp32 without TF32, 8 steps, the last by a graph", 30, graphs
        for size in (low, high):
            for name in ("release", "consistent"):
                yield "steps", f"{name} {size} px", 40, partial(self.step, size, name)
        for size in (low, high):
            row, step = f"release {size} px", partial(self.step, size, "release")
            for lever in (EAGER, *ENLARGE, LAYOUT, TUNED):
                yield "steps", f"{row}, {lever}", 40, partial(step, lever)
            for kind, tf32 in (("fp32 without TF32", False), ("fp32 with TF32", True)):
                fp32 = partial(step, precision="fp32", tf32=tf32)
                yield "steps", f"{row}, {kind}", 20, fp32
            best = partial(self.best, size, "release")
            yield "steps", f"{row}, best together", 20, best
        for more in ((), (EAGER,)):
            exit_early = partial(self.step, high, "release", EXIT, *more)
            yield "steps", ", ".join((f"release {high} px", EXIT, *more)), 20, exit_early
        for size in (low, high):
            yield "ms of a step", f"release {size} px", 20, partial(self.slowest, size)
        for size in (low, high):
            for count in (1, 16, 256):
                yield "edits", f"{size} px, {count}", 20, partial(self.images, size, count)
        yield "answers", "mapper alone", 10, partial(self.answer, 0, True, "fp32")
        yield "answers", "CLIP and mapper, fp32", 10, partial(self.answer, 1, True, "fp32")
        yield "answers", "CLIP, 256 images, bf16", 10, partial(self.answer, 256, False, "bf16")
        yield "training", f"mapper, {low} px, 16 targets", 20, partial(self.training, low, 16)
        for size, batch in ((low, 1), (low, 4), (low, 16), (high, 1), (high, 4)):
            row = f"{size} px, {batch} targets at once"
            yield "pairs", row, 20, partial(self.pairs, size, batch)
        two = partial(self.pairs, low, 4, processes=2)
        yield "pairs", f"{low} px, 4 targets at once, two processes", 60, two
        for size in (low, high):
            compiled = partial(self.best, size, "release", COMPILED)
            yield "steps", f"release {size} px, best together, {COMPILED}", 90, compiled

    def take(self, seconds: float, work: Callable[[], Values]) -> Values | str:
        """Measure, or say why not."""
        left = self.end - (begun := self.clock())
        if left < seconds / 4:
            return f"{NOT_MEASURED}: no time was left"

        def within() -> Values:
            costs.free_memory(self.device)  # an error of the last measurement may show only here
            with costs.at_most(min(seconds, left)):
                return work()

        values = costs.tried(within)
        return values if isinstance(values, str) else {**values, "took s": self.clock() - begun}

    def run(self) -> dict[str, Any]:
        """Take all measurements, and write the report after each."""
        for part, row, _, _ in self.cells():
            self.report.setdefault(part, {})[row] = NOT_MEASURED
        for part, row, seconds, work in self.cells():
            self.report[part][row] = self.take(seconds, work)
            command.write_json(self.out / "report.json", self.report)
            command.write_file(self.out / "report.md", page(self.report))
            command.say(f"{part}: {row}: {shown(self.report[part][row])}", error=True)
        return self.report


def shown(value: Any) -> str:
    """Return a value of the report as a text."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {shown(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    found = report["machine"]
    lines = [f"# Measured on {found['device']}", "", shown(found)]
    for part in [part for part in report if part != "machine"]:
        lines += ["", f"## {part}", "", "| | |", "|---|---|"]
        lines += [f"| {row} | {shown(value)} |" for row, value in report[part].items()]
    return "\n".join(lines) + "\n"


def run(config: Config, clock: Callable[[], float] = time.monotonic) -> dict[str, Any]:
    """Measure what there is time for, write and print the report, and return it.

    Raises:
        ValueError: no time, or no such device.
        OSError: --out cannot be written into.
    """
    if not config.minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, found {config.minutes}")
    command.make_folder(config.out)
    report = Study(config, command.choose_device(config.device), clock).run()
    command.say(page(report))
    command.say_next(config.out, "report.json, report.md", "docs/scale.md", error=True)
    return report
