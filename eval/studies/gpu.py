"""Measure an accelerator in a few minutes: parity, steps, images and pairs, at full size.

    python -m eval.studies.gpu --out runs/gpu            # about five minutes on one H100
    python -m eval.studies.gpu --out runs/gpu --small    # tiny networks: does every part run?

Networks have config-f's widths and ViT-B/32's sizes, with seeded weights. report.json and report.md
are written after every measurement. One that fails leaves the reason; one for which there was no
time stays "not measured". Needs torch, open_clip, tyro, jaxtyping and the checkout.

Seconds are medians of synchronized repeats after a warm-up. TFLOP/s are counted operations of a
step, forward and backward, over its seconds.
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("eval.studies.gpu")

import copy
import gc
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from eval.costs import (
    CPU,
    Sizes,
    count_operations,
    machine,
    matrix_rate,
    peak_bytes,
    random_networks,
    seconds_of,
    wait_for,
)
from predictor.mapper import FoldedMapper, Mapper
from predictor.mapper_file import MapperConfig
from targetclip import command
from targetclip.command import Precision, in_precision
from targetclip.generators.stylegan2 import depthwise
from targetclip.optimize import Progress, draw_sources, losses_of
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import Scene
from targetclip.world import BUNDLED

NOT_MEASURED = "not measured"
BANK = 16  # sources that fresh ones are drawn from here
GIB = 2**30
FULL = {
    256: Sizes(),
    1024: Sizes(resolution=1024, channels=(512, 512, 512, 512, 512, 256, 128, 64, 32)),
}
TINY = {
    size: Sizes(
        resolution=size,
        channels=(16,) * (size.bit_length() - 2),
        w_dim=32,
        mapping_layers=2,
        clip=f"local-dir:{BUNDLED / 'sketch64' / 'clip'}",
    )
    for size in (16, 32)
}
Values = dict[str, Any]


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


# Ways to render at twice the size; all give the same maps but for rounding


def one_convolution(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Use one transposed convolution of stride 2."""
    return depthwise(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), blur, padding=1)


def sums(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Filter by sums of shifted maps, which a compiler fuses with what follows."""
    x = F.pad(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1, 1, 1))
    for axis in (2, 3):
        size = x.shape[axis] - 3
        a, b, c, d = (x.narrow(axis, shift, size) for shift in range(4))
        x = 0.25 * (a + d) + 0.75 * (b + c)
    return x


@lru_cache(maxsize=16)
def folded_weight(weight: Tensor, blur: Tensor) -> Float[Tensor, "four_out channels 3 3"]:
    """Return a convolution whose four outputs are the even and odd rows and columns."""
    out, channels = weight.shape[:2]
    with torch.autocast(weight.device.type, enabled=False):
        whole = F.conv2d(weight.reshape(-1, 1, 3, 3), blur[None, None], padding=3)
    whole = whole.unflatten(0, (out, channels)).flip(2, 3)
    phases = [whole[:, :, 1 - row :: 2, 1 - column :: 2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(phases).contiguous(memory_format=torch.channels_last)


def folded(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Use one convolution of stride 1, four times the operations and no filter."""
    x = F.conv2d(x, folded_weight(weight, blur), padding=1)
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, channels // 4)
    rows = rows.permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, channels // 4)
    return rows.permute(0, 3, 1, 2)


ENLARGE = {"one transposed convolution": one_convolution, "sums": sums, "folded filter": folded}


# Timing


class Enough(Exception):
    """Ends a search whose steps have been timed."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in a block that takes longer; again, where one is swallowed."""

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
    """Return the median seconds of a call within a budget, after two to warm up."""
    work()
    taken, begun = [seconds_of(work, device)], time.perf_counter()
    while len(taken) < 200 and (time.perf_counter() - begun < budget or len(taken) < 3):
        taken.append(seconds_of(work, device))
    return statistics.median(taken[1:])


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Networks of one size on a device, and what every search of them shares."""

    sizes: Sizes
    scene: Scene
    bank: Float[Tensor, "bank num_ws w_dim"]
    bank_features: Float[Tensor, "bank features"]
    budget: float
    """Seconds of repeats a measurement."""

    @staticmethod
    def new(sizes: Sizes, device: torch.device, budget: float) -> "Bench":
        torch.manual_seed(0)
        with device:
            generator, embedder = random_networks(sizes)
        scene = Scene(generator=generator, embedder=embedder)
        bank = scene.latents(range(BANK))
        with in_precision(device, "bf16"):
            features = scene.features(bank).float()
        return Bench(sizes=sizes, scene=scene, bank=bank, bank_features=features, budget=budget)

    @property
    def device(self) -> torch.device:
        return self.scene.device

    def targets(self, count: int) -> Float[Tensor, "count embed"]:
        random = torch.Generator().manual_seed(0)
        size = self.bank_features.shape[1]
        return torch.randn(count, size, generator=random).to(self.device)

    def steps(
        self, recipe: str, precision: Precision = "bf16", batch: int = 1, warm: int = 3
    ) -> list[float]:
        """Run a search of so many targets, and return the seconds of its steps after `warm`."""
        ends: list[float] = []

        def on_step(progress: Progress) -> None:
            wait_for(self.device)
            ends.append(time.perf_counter())
            if len(ends) > warm + 3 and ends[-1] - ends[warm] > self.budget:
                raise Enough

        targets, initial = self.targets(batch), torch.zeros(batch, *self.bank.shape[1:])
        try:
            with in_precision(self.device, precision):
                self.scene.search(
                    targets,
                    RECIPES[recipe],
                    initial.to(self.device),
                    range(batch),
                    bank=self.bank,
                    bank_features=self.bank_features,
                    on_step=on_step,
                )
        except Enough:
            pass
        return [end - begin for begin, end in zip(ends[warm:], ends[warm + 1 :], strict=False)]

    def whole_step(self, recipe: Recipe) -> Callable[[], None]:
        """Return a step of a search of one target with fixed sources, and with Adam on the device:
        what of a step a CUDA graph can hold."""
        vectors = torch.zeros_like(self.bank[:1]).requires_grad_(True)
        targets, sources = self.targets(1), self.bank[: recipe.sources]
        before = self.bank_features[None, : recipe.sources]
        adam = torch.optim.Adam(
            [vectors], lr=0.2, weight_decay=recipe.weight_decay, capturable=True
        )

        def step() -> None:
            with in_precision(self.device, "bf16"):
                after = self.scene.features(sources + vectors, recipe.preprocess)
                losses = losses_of(recipe, before, after[None], targets)
            [vectors.grad] = torch.autograd.grad(losses.loss.sum(), [vectors])
            adam.step()

        return step

    def with_levers(self, levers: Iterable[str], recipe: Recipe, batch: int = 1) -> "Bench":
        """Return copies of the networks, changed; the search is as it was."""
        generator, embedder = copy.deepcopy((self.scene.generator, self.scene.embedder))
        other = replace(self, scene=Scene(generator=generator, embedder=embedder))
        net: Any = generator
        model: Any = embedder
        if "weights channels_last" in levers:
            net.to(memory_format=torch.channels_last)
            model.to(memory_format=torch.channels_last)
        for name in ENLARGE.keys() & set(levers):
            for conv in net.convs:
                conv.enlarge = ENLARGE[name]
        if "early exit" in levers:
            whole = net.synthesis
            net.synthesis = lambda ws: whole(ws, self.sizes.resolution // 4)
        if "compiled" in levers:
            net.synthesis = torch.compile(net.synthesis)
            model.clip.visual.compile()
        if "CUDA graph" in levers:
            synthesis, embed = net.synthesis, model.embed_images

            def forward(ws: Tensor) -> Tensor:
                with in_precision(self.device, "bf16"):
                    features: Tensor = embed(synthesis(ws), recipe.preprocess)
                return features

            sample = self.bank[:1].repeat(batch * recipe.sources, 1, 1).requires_grad_(True)
            graphed = torch.cuda.make_graphed_callables(forward, (sample,))
            net.synthesis = lambda ws: ws
            model.embed_images = lambda ws, preprocess: graphed(ws)
        return other


def graph_of(step: Callable[[], None]) -> Callable[[], None]:
    """Return a call that replays a step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds, and begin a new peak."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peak_gib(device: torch.device) -> float:
    """Return the peak memory since `free_memory`; on a processor, of the process."""
    taken = peak_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated()
    return taken / GIB


@contextmanager
def settings(device: torch.device, *, tf32: bool = True, tuned: bool = False) -> Iterator[None]:
    """Choose CUDA's convolutions: with or without TF32 where fp32 is asked, timed or guessed."""
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    before = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark
    backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = tf32
    backends.cudnn.benchmark = tuned
    try:
        yield
    finally:
        (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark) = (
            before
        )


# The measurements


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement, and the seconds that it may take."""

    part: str
    row: str
    measure: Callable[[], Values]
    seconds: float = 12.0
    needs: str | None = None
    """Type of the device that it is for. None: any."""


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the relative error of a tensor, in the Euclidean norm."""
    return float((found.cpu().double() - expected.double()).norm() / expected.double().norm())


def two_processes(
    sizes: Sizes, device: str, budget: float, batch: int, barrier: Any, answers: Any
) -> None:
    """Time steps of `consistent` beside another process, and answer with seconds or an error."""
    try:
        bench = Bench.new(sizes, torch.device(device), budget)
        replace(bench, budget=0.0).steps("consistent", batch=batch)
        barrier.wait(60)
        answers.put(statistics.median(bench.steps("consistent", batch=batch)))
    except Exception as error:
        answers.put(command.one_line(error))


@dataclass(kw_only=True)
class Study:
    """A run: what has been measured, and until when there is time."""

    config: Config
    device: torch.device
    end: float
    """By `time.monotonic`."""
    small: bool
    report: dict[str, Any] = field(default_factory=dict)
    benches: dict[int, Bench] = field(default_factory=dict)
    peak: float = 0.0
    """Measured bf16 matrix products, in 10^12 operations a second."""

    @property
    def budget(self) -> float:
        return 0.05 if self.small else 2.0

    @property
    def sizes(self) -> dict[int, Sizes]:
        return TINY if self.small else FULL

    def bench(self, size: int) -> Bench:
        if size not in self.benches:
            self.benches[size] = Bench.new(self.sizes[size], self.device, self.budget)
        return self.benches[size]

    def rate_of(self, values: Mapping[str, Any], operations: float | None) -> Values:
        if operations is None:
            return dict(values)
        reached = operations * values["steps/s"] / 1e12
        share = {"of bf16 peak": reached / self.peak} if self.peak else {}
        return {**values, "TFLOP/s": reached, **share}

    def operations(self, size: int, recipe: str) -> int:
        return count_operations(replace(self.sizes[size], sources=RECIPES[recipe].sources))

    # Cells

    def ceilings(self) -> Values:
        side, count = (256, 2**20) if self.small else (8192, 2**28)
        self.peak = matrix_rate(torch.bfloat16, (side,), self.device) / 1e3
        source, target = torch.empty(2, count, device=self.device)
        seconds = median_seconds(lambda: target.copy_(source), self.device, 0.2)
        with settings(self.device, tf32=True):
            tf32 = matrix_rate(torch.float32, (side,), self.device) / 1e3
        return {
            "bf16 TFLOP/s": self.peak,
            "TF32 TFLOP/s": tf32,
            "copy GB/s, read and written": 8 * count / seconds / 1e9,
        }

    def parity(self, precision: Precision, tf32: bool) -> Values:
        """Compare features of 8 renderings and directions after 3 steps with the processor's."""
        recipe = replace(RECIPES["consistent"], steps=3)
        sizes = replace(TINY[32], resolution=64, channels=(32,) * 5, w_dim=64)
        scene = Bench.new(sizes, CPU, 0).scene
        bank, targets = scene.latents(range(BANK)), torch.ones(2, scene.embedder.embed_dim)
        targets[1, ::2] = -1

        def found(scene: Scene, precision: Precision) -> tuple[Tensor, Tensor]:
            device = scene.device
            with in_precision(device, precision), settings(device, tf32=tf32):
                features = scene.features(bank.to(device))
                start = torch.zeros(2, *bank.shape[1:], device=device)
                result = scene.search(
                    targets.to(device), recipe, start, [0, 1], bank=bank.to(device)
                )
            return features.float(), result.directions

        expected, here = found(scene, "fp32"), found(scene, precision)
        networks: Any = copy.deepcopy((scene.generator, scene.embedder))
        generator, embedder = (network.to(self.device) for network in networks)
        there = found(Scene(generator=generator, embedder=embedder), precision)
        return {
            "features": error_of(there[0], expected[0]),
            "features, processor": error_of(here[0], expected[0]),
            "directions": error_of(there[1], expected[1]),
            "directions, processor": error_of(here[1], expected[1]),
        }

    def step(
        self,
        size: int,
        recipe: str,
        levers: Sequence[str] = (),
        precision: Precision = "bf16",
        tf32: bool = True,
    ) -> Values:
        """Time a search of one target."""
        bench = self.bench(size)
        free_memory(self.device)
        held = peak_gib(self.device)
        with settings(self.device, tf32=tf32, tuned="cudnn.benchmark" in levers):
            if set(levers) - {"cudnn.benchmark", "whole step"}:
                bench = bench.with_levers(levers, RECIPES[recipe])
            if "whole step" in levers:
                replay = graph_of(bench.whole_step(RECIPES[recipe]))
                seconds = median_seconds(replay, self.device, self.budget)
            else:
                seconds = statistics.median(bench.steps(recipe, precision))
        peak = peak_gib(self.device)
        values = {"steps/s": 1 / seconds, "ms": 1e3 * seconds, "peak GiB": peak}
        if self.device.type != "cpu" and "CUDA graph" not in levers:  # which holds its own memory
            values["GiB a source"] = (peak - held) / RECIPES[recipe].sources
        operations = None if "early exit" in levers else self.operations(size, recipe)
        return self.rate_of(values, operations)

    def paying(self, size: int, extra: Sequence[str]) -> list[str]:
        """Return the levers that made `release` at least 3 % faster, the best of those that exclude
        each other, and more."""
        rows = self.report["steps"]

        def gain(lever: str) -> float:
            values = rows.get(f"release {size} px, {lever}")
            eager = rows[f"release {size} px, eager"]
            both = isinstance(values, dict) and isinstance(eager, dict)
            return values["steps/s"] / eager["steps/s"] if both else 0.0

        best = max(ENLARGE, key=gain)
        names = [best, "weights channels_last", "cudnn.benchmark"]
        if "compiled" in extra:
            names = ["weights channels_last"]
        return [name for name in names if gain(name) > 1.03] + list(extra)

    def best(self, size: int, recipe: str, extra: Sequence[str]) -> Values:
        levers = self.paying(size, extra)
        return {**self.step(size, recipe, levers), "levers": ", ".join(levers)}

    def profiled(self, size: int) -> Values:
        """Return the milliseconds of the slowest kernels of a step of `release`."""
        bench = replace(self.bench(size), budget=0.0)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            count = len(bench.steps("release")) + 4
        events = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
        return {
            event.key[:70].replace("|", "/"): event.self_device_time_total / 1e3 / count
            for event in events[:24]
        }

    def images(self, size: int, count: int) -> Values:
        bench = self.bench(size)
        sources = bench.bank[:1].repeat(count, 1, 1)
        free_memory(self.device)
        with in_precision(self.device, "bf16"):
            seconds = median_seconds(
                lambda: bench.scene.edit(sources, bench.bank[1]), self.device, self.budget / 2
            )
        return {"images/s": count / seconds, "ms": 1e3 * seconds, "peak GiB": peak_gib(self.device)}

    def mapper(self, bench: Bench) -> Mapper:
        """Make a mapper of the sizes of the one that is shipped."""
        embed, (num_ws, w_dim) = bench.bank_features.shape[1], bench.bank.shape[1:]
        config = MapperConfig(
            embed_dim=embed,
            num_ws=num_ws,
            w_dim=w_dim,
            generator="random",
            embedder="random",
            width=128,
            depth=1,
            rank=96,
        )
        torch.manual_seed(0)
        return Mapper(config).to(self.device)

    @torch.no_grad()
    def directions(self, embedded: bool) -> Values:
        bench = self.bench(max(self.sizes))
        mapper, target = FoldedMapper(self.mapper(bench)), self.bank_image(bench, 1)
        embedding = bench.bank_features[:1]

        def direction() -> object:
            return mapper(bench.scene.embedder.embed_images(target) if embedded else embedding)

        return {"ms": 1e3 * median_seconds(direction, self.device, self.budget / 2)}

    def bank_image(self, bench: Bench, count: int) -> Tensor:
        side = bench.scene.embedder.image_size
        return torch.rand(count, 3, side, side, device=self.device) * 2 - 1

    @torch.no_grad()
    def clip(self, count: int) -> Values:
        bench = self.bench(min(self.sizes))
        images, embed = self.bank_image(bench, count), bench.scene.embedder.embed_images
        with in_precision(self.device, "bf16"):
            seconds = median_seconds(lambda: embed(images), self.device, self.budget / 2)
        return {"images/s": count / seconds}

    def training(self, size: int, targets: int) -> Values:
        """Time a step of the mapper's training by the transfer term: 32 fresh sources, six of them
        edited for each target, AdamW. Without the loop's average of weights."""
        bench, recipe = self.bench(size), RECIPES["consistent"]
        scene, mapper = bench.scene, self.mapper(bench)
        nn.init.normal_(mapper.direction.weight, std=0.01)
        adam, random = torch.optim.AdamW(mapper.parameters()), torch.Generator().manual_seed(0)
        embeddings = bench.targets(targets)
        free_memory(self.device)

        def step() -> None:
            seeds = torch.randint(2**31, (32,), generator=random).tolist()
            pool = scene.latents(seeds)
            prediction = mapper(embeddings)
            with in_precision(self.device, "bf16"):
                with torch.no_grad():
                    before = scene.features(pool)
                chosen = draw_sources(32, recipe.sources, True, [random] * targets)
                chosen = chosen.to(self.device)
                edited = pool[chosen] + prediction.directions[:, None]
                after = scene.features(edited.flatten(0, 1)).unflatten(0, chosen.shape)
                losses = losses_of(recipe, before[chosen], after, embeddings)
            (losses.loss.mean() + prediction.expected.square().mean()).backward()
            adam.step()
            adam.zero_grad(set_to_none=True)

        seconds = median_seconds(step, self.device, self.budget)
        return {
            "steps/s": 1 / seconds,
            "targets/s": targets / seconds,
            "peak GiB": peak_gib(self.device),
        }

    def pairs(self, size: int, batch: int) -> Values:
        """Extrapolate pairs an hour of `consistent` from the seconds of a step."""
        free_memory(self.device)
        seconds = statistics.median(self.bench(size).steps("consistent", batch=batch))
        rate = 3600 * batch / seconds / RECIPES["consistent"].steps
        return {"pairs/hour": rate, "step ms": 1e3 * seconds, "peak GiB": peak_gib(self.device)}

    def pairs_of_two(self, size: int, batch: int) -> Values:
        self.benches.clear()
        free_memory(self.device)
        context = multiprocessing.get_context("spawn")
        barrier, answers = context.Barrier(2), context.Queue()
        arguments = (self.sizes[size], str(self.device), 2 * self.budget, batch, barrier, answers)
        processes = [context.Process(target=two_processes, args=arguments) for _ in range(2)]
        try:
            for process in processes:
                process.start()
            seconds = [answers.get(timeout=90) for _ in processes]
        finally:
            for process in processes:
                process.kill()
        if errors := [answer for answer in seconds if isinstance(answer, str)]:
            raise RuntimeError(errors[0])
        steps = RECIPES["consistent"].steps
        return {
            "pairs/hour": sum(3600 * batch / second / steps for second in seconds),
            "step ms": 1e3 * statistics.mean(seconds),
        }

    # The run

    def cells(self) -> list[Cell]:
        """Return all measurements, those of most worth first."""
        small, large = self.sizes
        cells = [Cell(part="ceilings", row="matrix products, copies", measure=self.ceilings)]

        def add(part: str, row: str, work: Callable[..., Values], *args: Any, **more: Any) -> None:
            cells.append(Cell(part=part, row=row, measure=lambda: work(*args), **more))

        for name, precision, tf32 in (("fp32", "fp32", False), ("fp32 with TF32", "fp32", True)):
            add("parity", name, self.parity, precision, tf32, seconds=20)
        add("parity", "bf16", self.parity, "bf16", True, seconds=20)
        for size in (small, large):
            for recipe in ("release", "consistent"):
                add("steps", f"{recipe} {size} px, eager", self.step, size, recipe)
        for size in (small, large):
            row = f"release {size} px"
            for lever in (*ENLARGE, "weights channels_last", "cudnn.benchmark"):
                add("steps", f"{row}, {lever}", self.step, size, "release", (lever,))
            for lever in ("CUDA graph", "whole step"):
                add("steps", f"{row}, {lever}", self.step, size, "release", (lever,), needs="cuda")
        exit_at = f"release {large} px, early exit"
        add("steps", exit_at, self.step, large, "release", ("early exit",))
        for size in (small, large):
            for name, tf32 in (("fp32", False), ("fp32 with TF32", True)):
                row = f"release {size} px, {name}"
                add("steps", row, self.step, size, "release", (), "fp32", tf32)
            row = f"release {size} px, best and whole step"
            add("steps", row, self.best, size, "release", ("whole step",), needs="cuda")
        extra = ("early exit", "whole step")
        row = f"{exit_at}, best and whole step"
        add("steps", row, self.best, large, "release", extra, needs="cuda")
        for size in (small, large):
            add("kernels of a step, ms", f"release {size} px", self.profiled, size, needs="cuda")
        for size in (small, large):
            for count in (1, 16, 256):
                add("edited images", f"{size} px, {count}", self.images, size, count)
        add("directions", "mapper alone", self.directions, False)
        add("directions", "CLIP, fp32, and mapper", self.directions, True)
        add("CLIP", "256 images, bf16", self.clip, 256)
        add("mapper training", f"{small} px, 16 targets", self.training, small, 16)
        for size, batches in ((small, (1, 4, 16)), (large, (1, 4))):
            for batch in batches:
                add("pairs", f"{size} px, {batch} at once", self.pairs, size, batch)
        for size in (small, large):
            for levers in (("compiled",), ("sums", "compiled"), ("sums", "compiled", "whole step")):
                row = f"release {size} px, {' and '.join(levers)}"
                more = {"needs": "cuda"} if "whole step" in levers else {}
                add("steps", row, self.best, size, "release", levers, seconds=75, **more)
        add(
            "pairs",
            f"{small} px, 4 at once, two processes",
            self.pairs_of_two,
            small,
            4,
            seconds=60,
        )
        return cells

    def take(self, cell: Cell) -> Values | str:
        """Measure, or say why not."""
        left = self.end - time.monotonic()
        if cell.needs not in (None, self.device.type):
            return f"{NOT_MEASURED}: needs {cell.needs}"
        if left < min(cell.seconds, 20) / 2:
            return f"{NOT_MEASURED}: no time was left"
        try:
            with at_most(min(cell.seconds, left)):
                return cell.measure()
        except Exception as error:
            name = type(error).__name__
            return f"{NOT_MEASURED}: {name}: {command.one_line(error)[:300]}"

    def run(self) -> dict[str, Any]:
        cells = self.cells()
        for cell in cells:
            self.report.setdefault(cell.part, {})[cell.row] = NOT_MEASURED
        for cell in cells:
            begun = time.monotonic()
            value = self.take(cell)
            if isinstance(value, dict):
                value["took s"] = time.monotonic() - begun
            self.report[cell.part][cell.row] = value
            self.write()
            command.say(f"{cell.part} | {cell.row} | {shown(value)}", error=True)
            free_memory(self.device)
        return self.report

    def write(self) -> None:
        command.write_json(self.config.out / "report.json", self.report)
        command.write_file(self.config.out / "report.md", page(self.report))


def shown(value: Any) -> str:
    """Return a value of the report as a text."""
    if isinstance(value, dict):
        return "; ".join(f"{name} {shown(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def page(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = ["# Measured on " + report["machine"]["accelerator"], "", shown(report["machine"])]
    for part, rows in report.items():
        if part != "machine":
            lines += ["", f"## {part}", "", "| | |", "|---|---|"]
            lines += [f"| {row} | {shown(value)} |" for row, value in rows.items()]
    return "\n".join(lines) + "\n"


def accelerator_name(device: torch.device) -> str:
    """Return the name of a card, or of a kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def run(config: Config) -> dict[str, Any]:
    """Measure what there is time for, write and print the report, and return it.

    Raises:
        ValueError: no time, or no such device.
        OSError: --out cannot be written into.
    """
    end = time.monotonic() + 60 * config.minutes
    if config.minutes <= 0:
        raise ValueError(f"--minutes: expected more than 0, found {config.minutes}")
    command.make_folder(config.out)
    device = command.choose_device(config.device)
    study = Study(config=config, device=device, end=end, small=config.small or device.type == "cpu")
    study.report["machine"] = {"accelerator": accelerator_name(device), **machine()}
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        study.report["machine"]["GiB"] = memory / GIB
    report = study.run()
    command.say(page(report))
    command.say_next(config.out, "report.json, report.md", "docs/scale.md", error=True)
    return report


def main() -> None:
    command.main(run, Config, __doc__, "python -m eval.studies.gpu", exclusive=True)
