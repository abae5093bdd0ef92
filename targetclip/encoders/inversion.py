"""From a picture back to a latent by optimization: slow, but for any generator.

Where there is an encoder it gives the start, and a few steps bring the picture closer; where there
is none the search starts at the mean latent. Knows images, a generator and an embedder; nothing of
files or faces.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from targetclip.embedder import ImageEmbedder
from targetclip.encoders.inverter import LatentInverter
from targetclip.generators import Generator

COARSEST = 16  # px of the smallest picture compared


@dataclass(frozen=True)
class InversionConfig:
    """Settings of the search."""

    steps: int = 200
    learning_rate: float = 0.05
    """Of Adam at the start; it falls as a straight line to a twentieth."""
    pixel_weight: float = 1.0
    perceptual_weight: float = 0.3
    prior_weight: float = 1e-2
    """Of the squared distance to the start: far from it latents are hard to edit."""


def pixel_loss(
    images: Float[Tensor, "batch 3 size size"], wanted: Float[Tensor, "batch 3 size size"]
) -> Float[Tensor, " batch"]:
    """Mean squared error, averaged over sizes from the images' own down to 16 px.

    Small sizes say where colours are, and guide a search that starts far off.
    """
    losses = [(images - wanted).square().mean(dim=(1, 2, 3))]
    while images.shape[-1] >= 2 * COARSEST:
        images, wanted = F.avg_pool2d(images, 2), F.avg_pool2d(wanted, 2)
        losses.append((images - wanted).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0)


def invert_by_optimization(
    generator: Generator,
    embedder: ImageEmbedder,
    images: Float[Tensor, "batch 3 size size"],
    start: Float[Tensor, "batch num_ws w_dim"],
    config: InversionConfig,
    on_step: Callable[[float], None] | None = None,
) -> Float[Tensor, "batch num_ws w_dim"]:
    """Latents whose renderings look like images in [-1, 1] of the generator's resolution.

    Minimises, for every image for itself, the pixel loss, the perceptual one (1 - cosine of the
    embedder) and the distance to the start, and returns the latents of the smallest sum met.
    `on_step` is told the mean loss.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    with torch.no_grad():
        embedded = F.normalize(embedder.embed_images(images).float(), dim=1)
    ws = start.clone().requires_grad_()
    best, lowest = start.clone(), torch.full((len(start),), torch.inf, device=start.device)
    optimizer = torch.optim.Adam([ws], lr=config.learning_rate)
    for step in range(config.steps + 1):
        rendered = generator.synthesis(ws)
        found = F.normalize(embedder.embed_images(rendered).float(), dim=1)
        # A sum, so that an image's search is the same whatever others are beside it.
        losses = (
            config.pixel_weight * pixel_loss(rendered, images)
            + config.perceptual_weight * (1 - (found * embedded).sum(dim=1))
            + config.prior_weight * (ws - start).square().mean(dim=(1, 2))
        )
        if not bool(losses.isfinite().all()):
            raise FloatingPointError(f"the inversion's loss is not finite at step {step}")
        better = losses.detach() < lowest
        lowest = torch.where(better, losses.detach(), lowest)
        best[better] = ws.detach()[better]
        if step == config.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - 0.95 * step / config.steps)
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        if on_step is not None:
            on_step(float(losses.detach().mean()))
    return best


class OptimizingInverter:
    """An inverter that searches: from another inverter's answer, or from the mean latent.

    Args:
        first: gives the start; None: the mean latent.
        at_once: images searched for together; bounds memory.
    """

    def __init__(
        self,
        generator: Generator,
        embedder: ImageEmbedder,
        first: LatentInverter | None,
        config: InversionConfig,
        at_once: int = 4,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self.generator = generator
        self.embedder = embedder
        self.first = first
        self.config = config
        self.at_once = at_once
        self.on_step = on_step

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Latents of images in [-1, 1] of the generator's resolution."""
        if self.first is None:
            start = self.generator.mean_w.repeat(len(images), self.generator.num_ws, 1)
        else:
            start = self.first(images)
        parts = zip(images.split(self.at_once), start.split(self.at_once), strict=True)
        with torch.enable_grad():
            return torch.cat(
                [
                    invert_by_optimization(
                        self.generator, self.embedder, part, begin, self.config, self.on_step
                    )
                    for part, begin in parts
                ]
            )
