"""A bench: networks of seeded weights on a device, timed as they are and pulled by levers.

A lever is another way to compute the same maps, which may suit a device better; the early exit
alone, a setting of a recipe, gives other ones. Knows how a search computes; nothing of what is
reported.
"""

import copy
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.costs import random_networks, wait_for
from eval.sizes import Sizes
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig
from targetclip import command
from targetclip.command import Precision, in_precision
from targetclip.generators.stylegan2 import depthwise, enlarged, enlarged_by_one, folded_weight
from targetclip.graphs import WARM
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import Scene
from targetclip.world import BUNDLED

BANK = 16  # sources that fresh ones are drawn from here
WIDE = (512, 512, 512, 512, 512, 256, 128, 64, 32)
FULL = {256: Sizes(), 1024: Sizes(resolution=1024, channels=WIDE)}
TINY_CLIP = f"local-dir:{BUNDLED / 'avatars' / 'clip'}"
TINY = {
    size: Sizes(
        resolution=size, channels=(16,) * levels, w_dim=32, mapping_layers=2, clip=TINY_CLIP
    )
    for size, levels in ((16, 3), (32, 4))
}


def one_convolution(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Use one transposed convolution of stride 2."""
    return depthwise(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), blur, padding=1)


def sums(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Filter by sums of shifted maps, which a compiler fuses with what follows."""
    x = F.pad(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), (1, 1, 1, 1))
    for axis in (2, 3):
        a, b, c, d = (x.narrow(axis, shift, x.shape[axis] - 3) for shift in range(4))
        x = 0.25 * (a + d) + 0.75 * (b + c)
    return x


def folded(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Use one convolution of stride 1, as the network itself does on CUDA devices."""
    return enlarged_by_one(x, folded_weight(weight, blur))


ENLARGE = {
    "as a processor enlarges": enlarged,
    "one transposed convolution": one_convolution,
    "sums": sums,
    "folded filter": folded,
}
LAYOUT, TUNED, EXIT = "weights channels_last", "cudnn.benchmark", "early exit"
COMPILED, EAGER = "compiled", "without CUDA graphs"


@contextmanager
def cuda_settings(
    device: torch.device, *, tf32: bool | None = None, tuned: bool = False
) -> Iterator[None]:
    """Choose how CUDA computes: TF32 where fp32 is asked, convolutions chosen by trial.

    `tf32` None is torch's default: in convolutions alone. Does nothing on other devices.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = tuned
    if tf32 is not None:  # set as rarely as can be: torch warns
        cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.benchmark = False
        if tf32 is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = before


class Enough(Exception):
    """Ends a search whose steps have been timed."""


class Bench:
    """Networks of one size on a device, and a bank of sources."""

    def __init__(self, sizes: Sizes, device: torch.device, budget: float) -> None:
        """`budget`: seconds of repeats a measurement."""
        torch.manual_seed(0)
        with device:
            generator, embedder = random_networks(sizes)
        self.sizes, self.device, self.budget = sizes, device, budget
        self.scene = Scene(generator=generator, embedder=embedder)
        self.bank = self.scene.latents(range(BANK))
        with in_precision(device, "bf16"):
            self.features = self.scene.features(self.bank).float()

    @property
    def warm(self) -> int:
        """Number of steps that are not timed."""
        return 3 + WARM * (self.device.type == "cuda")

    def targets(self, count: int) -> Tensor:
        random = torch.Generator(self.device).manual_seed(0)
        return torch.randn(count, len(self.features[0]), generator=random, device=self.device)

    def steps(
        self,
        recipe: Recipe,
        precision: Precision = "bf16",
        batch: int = 1,
    ) -> list[float]:
        """Search for so many targets, and return the seconds of each step after the first ones:
        one of them captures a CUDA graph, where there are such."""
        ends, warm = list[float](), self.warm

        def on_step(progress: Progress) -> None:
            wait_for(self.device)
            ends.append(time.perf_counter())
            if len(ends) > warm + 3 and ends[-1] - ends[warm] > self.budget:
                raise Enough

        start = torch.zeros(batch, *self.bank.shape[1:], device=self.device)
        with suppress(Enough), in_precision(self.device, precision):
            self.scene.search(
                self.targets(batch), recipe, start, range(batch),
                bank=self.bank, bank_features=self.features, on_step=on_step,
            )  # fmt: skip
        return [end - begin for begin, end in zip(ends[warm:], ends[warm + 1 :], strict=False)]

    def pull(self, levers: Sequence[str]) -> "Bench":
        """Return a copy that computes by some levers; the early exit is the recipe's."""
        other = (
            copy.deepcopy(self) if set(levers) & {LAYOUT, COMPILED, *ENLARGE} else copy.copy(self)
        )
        net: Any = other.scene.generator
        model: Any = other.scene.embedder
        if EAGER in levers:
            other.scene = replace(other.scene, graphs=False)
        if LAYOUT in levers:
            net.to(memory_format=torch.channels_last)
            model.to(memory_format=torch.channels_last)
        for lever in ENLARGE.keys() & set(levers):
            for conv in net.convs:
                conv.enlarge = ENLARGE[lever]
        if COMPILED in levers:
            torch.compiler.reset()
            net.synthesis = torch.compile(net.synthesis)
            model.clip.visual.compile()
        return other

    def mapper(self) -> Mapper:
        """Make a mapper of the sizes of the one that is shipped."""
        num_ws, w_dim = self.bank.shape[1:]
        sizes = MapperConfig(
            embed_dim=len(self.features[0]), num_ws=num_ws, w_dim=w_dim,
            width=128, depth=1, rank=96, generator="random", embedder="random",
        )  # fmt: skip
        torch.manual_seed(0)
        return Mapper(sizes).to(self.device)


def beside_another(
    sizes: Sizes, device: str, budget: float, batch: int, barrier: Any, answers: Any
) -> None:
    """Time steps of `consistent` when another process is ready too; answer seconds or an error."""
    try:
        bench = Bench(sizes, torch.device(device), 0.0)
        bench.steps(RECIPES["consistent"], batch=batch)
        bench.budget = budget
        barrier.wait(60)
        answers.put(median(bench.steps(RECIPES["consistent"], batch=batch)))
    except Exception as error:
        answers.put(command.one_line(error))


def steps_beside(
    processes: int, sizes: Sizes, device: torch.device, budget: float, batch: int
) -> list[float]:
    """Return the seconds of a step of `consistent` in each of several processes at once.

    Raises:
        RuntimeError: one failed.
        queue.Empty: one did not answer within a minute.
    """
    context = multiprocessing.get_context("spawn")
    given = (sizes, str(device), budget, batch, context.Barrier(processes), context.Queue())
    workers = [context.Process(target=beside_another, args=given) for _ in range(processes)]
    try:
        for worker in workers:
            worker.start()
        seconds = [given[-1].get(timeout=60) for _ in workers]
    finally:
        for worker in workers:
            worker.kill()
    if errors := [one for one in seconds if isinstance(one, str)]:
        raise RuntimeError(errors[0])
    return seconds
