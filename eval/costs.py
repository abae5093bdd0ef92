"""What studies of time and memory share: networks with random weights, and counted operations.

Knows sizes and processes; nothing of files.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from targetclip.embedder import ClipEmbedder, EncoderInput
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.scene import Scene


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a generator and an embedder. Default: StyleGAN2's config-f at 256 px, ViT-B/32."""

    resolution: int = 256
    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128)
    """Widths at 4, 8, ... `resolution` px."""
    w_dim: int = 512
    mapping_layers: int = 8
    clip: str = "ViT-B-32"
    """A model of open_clip, or local-dir:FOLDER; its sizes are used, never its weights."""
    sources: int = RECIPES["release"].sources
    """Sources that a step of the optimizer edits."""
    max_images: int | None = None
    """Images rendered at once; fewer than `sources` bounds memory and renders twice. Default: all
    of a step."""


def no_reader(thing: object) -> Tensor:
    """Stand in for what reads pictures and texts, which random weights never see."""
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


def count_operations(sizes: Sizes) -> int:
    """Count the operations of a step of `release`, forward and backward, from shapes alone.

    Convolutions, matrix products and attention count, a multiplication and an addition as two. What
    is done once a run, the embedding of the sources, does not.
    """
    with torch.device("meta"):
        generator, embedder = random_networks(sizes)
        scene = Scene(generator=generator, embedder=embedder, max_images=sizes.max_images)
        ws = torch.zeros(sizes.sources, generator.num_ws, generator.w_dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            scene.features(ws, RECIPES["release"].preprocess).sum().backward()
    return int(counter.get_total_flops())


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: the peak memory of one never falls again.

    Raises:
        ChildProcessError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ChildProcessError(f"{function.__name__}: its process was killed") from error
