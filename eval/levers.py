"""Levers: other ways to compute a search, one of which may suit a device better.

Knows how networks compute; nothing of what is measured. All but the early exit give the same maps
but for rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from targetclip.command import in_precision
from targetclip.generators.stylegan2 import depthwise
from targetclip.recipes import Preprocess
from targetclip.scene import Scene


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


def pull(scene: Scene, levers: Sequence[str], sample: Tensor, preprocess: Preprocess) -> None:
    """Have the networks of a scene, a StyleGAN2 and CLIP, compute by some levers.

    Args:
        sample: as many latents as every step renders, for a CUDA graph in bf16.
    """
    net: Any = scene.generator
    model: Any = scene.embedder
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

        given = (sample.clone().requires_grad_(True),)
        graphed: Any = torch.cuda.make_graphed_callables(forward, given)
        net.synthesis, model.embed_images = lambda ws: ws, lambda ws, preprocess: graphed(ws)


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
