"""A bench: networks of seeded weights on a device, timed as they are and pulled by levers.

A lever is another way to compute the same maps, which may suit a device better; the early exit
alone gives other ones. Knows how a search computes; nothing of what is reported.
"""

import copy
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.costs import Sizes, random_networks, wait_for
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig
from targetclip import command
from targetclip.command import Precision, in_precision
from targetclip.generators.stylegan2 import depthwise
from targetclip.optimize import Progress, losses_of
from targetclip.recipes import RECIPES
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


@lru_cache(maxsize=16)
def folded_weight(weight: Tensor, blur: Tensor) -> Tensor:
    """Return a convolution [4 out, in, 3, 3] whose outputs are the even and odd rows and columns,
    filtered."""
    with torch.autocast(weight.device.type, enabled=False):
        whole = F.conv2d(weight.reshape(-1, 1, 3, 3), blur[None, None], padding=3)
    whole = whole.flip(2, 3).view(*weight.shape[:2], 6, 6)
    phases = [whole[:, :, 1 - row :: 2, 1 - column :: 2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(phases).contiguous(memory_format=torch.channels_last)


def folded(x: Tensor, weight: Tensor, blur: Tensor) -> Tensor:
    """Use one convolution of stride 1: four times the operations, and no filter."""
    x = F.conv2d(x, folded_weight(weight, blur), padding=1)
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, -1).transpose(2, 3)
    return rows.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


ENLARGE = {"one transposed convolution": one_convolution, "sums": sums, "folded filter": folded}
LAYOUT, TUNED, EXIT = "weights channels_last", "cudnn.benchmark", "early exit"
COMPILED, GRAPH, WHOLE = "compiled", "CUDA graph", "whole step as a CUDA graph"


@contextmanager
def cuda_settings(
    device: torch.device, *, tf32: bool | None = None, tuned: bool = False
) -> Iterator[None]:
    """Choose how CUDA computes: TF32 where fp32 is asked, convolutions chosen by trial.

    `tf32` None is torch's default: in convolutions alone. Does nothing on other devices. The stream
    is afterwards what it was, also where a CUDA graph could not be captured.
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
        with torch.cuda.stream(torch.cuda.current_stream(device)):
            yield
    finally:
        cudnn.benchmark = False
        if tf32 is not None:
            cudnn.allow_tf32, matmul.allow_tf32 = before


def replayed(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step in a CUDA graph, and return what replays it."""
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

    def targets(self, count: int) -> Tensor:
        random = torch.Generator(self.device).manual_seed(0)
        return torch.randn(count, len(self.features[0]), generator=random, device=self.device)

    def steps(
        self, recipe: str, precision: Precision = "bf16", batch: int = 1, warm: int = 3
    ) -> list[float]:
        """Search for so many targets, and return the seconds of each step after `warm`."""
        ends: list[float] = []

        def on_step(progress: Progress) -> None:
            wait_for(self.device)
            ends.append(time.perf_counter())
            if len(ends) > warm + 3 and ends[-1] - ends[warm] > self.budget:
                raise Enough

        start = torch.zeros(batch, *self.bank.shape[1:], device=self.device)
        with suppress(Enough), in_precision(self.device, precision):
            self.scene.search(
                self.targets(batch), RECIPES[recipe], start, range(batch),
                bank=self.bank, bank_features=self.features, on_step=on_step,
            )  # fmt: skip
        return [end - begin for begin, end in zip(ends[warm:], ends[warm + 1 :], strict=False)]

    def whole_step(self, name: str) -> Callable[[], None]:
        """Return a step of a search of one target as a CUDA graph can hold it: with fixed sources,
        Adam on the device, and no look at the loss."""
        recipe, vectors = RECIPES[name], torch.zeros_like(self.bank[:1]).requires_grad_(True)
        sources, before = self.bank[: recipe.sources], self.features[None, : recipe.sources]
        targets, decay = self.targets(1), recipe.weight_decay
        on_device = self.device.type != "cpu"
        adam = torch.optim.Adam([vectors], lr=0.2, weight_decay=decay, capturable=on_device)

        def step() -> None:
            with in_precision(self.device, "bf16"):
                after = self.scene.features(sources + vectors, recipe.preprocess)
                losses = losses_of(recipe, before, after[None], targets)
            [vectors.grad] = torch.autograd.grad(losses.loss.sum(), [vectors])
            adam.step()

        return step

    def pull(self, levers: Sequence[str], recipe: str) -> "Bench":
        """Return a copy whose networks compute by some levers; the search stays as it is."""
        other, preprocess = copy.deepcopy(self), RECIPES[recipe].preprocess
        net: Any = other.scene.generator
        model: Any = other.scene.embedder
        if LAYOUT in levers:
            net.to(memory_format=torch.channels_last)
            model.to(memory_format=torch.channels_last)
        for lever in ENLARGE.keys() & set(levers):
            for conv in net.convs:
                conv.enlarge = ENLARGE[lever]
        if EXIT in levers:
            net.synthesis = partial(net.synthesis, resolution=net.resolution // 4)
        if COMPILED in levers:
            torch.compiler.reset()
            net.synthesis = torch.compile(net.synthesis)
            model.clip.visual.compile()
        if GRAPH in levers:
            synthesis, embed = net.synthesis, model.embed_images

            def forward(ws: Tensor) -> Tensor:
                with in_precision(ws.device, "bf16"):
                    features: Tensor = embed(synthesis(ws), preprocess)
                return features

            given = (self.bank[: RECIPES[recipe].sources].clone().requires_grad_(True),)
            graphed: Any = torch.cuda.make_graphed_callables(forward, given)
            net.synthesis, model.embed_images = lambda ws: ws, lambda ws, preprocess: graphed(ws)
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
        bench.steps("consistent", batch=batch)
        bench.budget = budget
        barrier.wait(60)
        answers.put(median(bench.steps("consistent", batch=batch)))
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
