"""From a picture back to a latent in W+: by a small convolutional encoder, and by a search.

The encoder plays e4e's part in worlds whose generator is small. An inverter file is one encoder and
belongs to one generator. The search is slow, but works for any generator: it starts at another
inverter's latent, or at the mean latent where there is none. Knows nothing of faces.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import ImageEmbedder
from targetclip.generators import Generator
from targetclip.weights import load_weights, read_tensors, save_half

FORMAT = "targetclip-inverter/1"
MAKE = "for the bundled world make one with python -m train.world.inverter"
COARSEST = 16  # px of the smallest pictures that the search compares

Config = TypeVar("Config")


@runtime_checkable
class LatentInverter(Protocol):
    """The interface of an inverter: images in [-1, 1] to W+ latents."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]: ...


# By an encoder


@dataclass(frozen=True, kw_only=True)
class InverterConfig:
    """Sizes of an inverter."""

    resolution: int
    num_ws: int
    w_dim: int
    generator: str
    """Fingerprint of the generator it inverts."""
    channels: tuple[int, ...] = (48, 96, 128, 128)
    """Widths after each halving of the resolution."""
    hidden: int = 384


class PictureEncoder(nn.Module):
    """Convolutions that halve the resolution, then two linear layers."""

    def __init__(self, resolution: int, channels: tuple[int, ...], hidden: int, out: int) -> None:
        super().__init__()
        widths = (3, *channels)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 4, stride=2, padding=1),
                nn.GroupNorm(8, b),
                nn.LeakyReLU(0.2),
                nn.Conv2d(b, b, 3, padding=1),
                nn.LeakyReLU(0.2),
            )
            for a, b in pairwise(widths)
        )
        side = resolution >> len(channels)
        self.hidden = nn.Linear(channels[-1] * side * side, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch out"]:
        x = images
        for conv in self.convs:
            x = conv(x)
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2)
        out: Tensor = self.out(x)
        return out


class Inverter(nn.Module):
    """Images [batch, 3, R, R] in [-1, 1] to W+ [batch, num_ws, w_dim], as offsets from mean w."""

    mean_w: Tensor

    def __init__(self, config: InverterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PictureEncoder(
            config.resolution, config.channels, config.hidden, config.num_ws * config.w_dim
        )
        self.register_buffer("mean_w", torch.zeros(config.w_dim))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        size = self.config.resolution
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"expected images of shape [batch, 3, {size}, {size}], found {list(images.shape)}"
            )
        offsets = self.encoder(images).unflatten(1, (self.config.num_ws, self.config.w_dim))
        ws: Tensor = self.mean_w + offsets
        return ws


def stored_config(kind: type[Config], metadata: Mapping[str, str], path: Path) -> Config:
    """Return the config of a network with a `PictureEncoder` from the metadata of its file.
    ValueError: it is missing or damaged."""
    try:
        stored = json.loads(metadata["config"])
        return kind(**{**stored, "channels": tuple(stored["channels"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the config is damaged ({error}): get the file again") from error


def save_inverter(inverter: Inverter, path: Path) -> None:
    """Write an inverter as one safetensors file, weights in half precision, config in metadata."""
    save_half(path, inverter, {"format": FORMAT, "config": json.dumps(asdict(inverter.config))})


def load_inverter(path: str | Path, generator: str) -> Inverter:
    """Read an inverter, frozen and in float32, for the generator with a fingerprint.
    FileNotFoundError: no such file. ValueError: not an inverter file, a damaged one, or one made
    for another generator."""
    path = Path(path)
    metadata, state = read_tensors(path, "inverter", [FORMAT], MAKE)
    config = stored_config(InverterConfig, metadata, path)
    if config.generator != generator:
        raise ValueError(
            f"{path} inverts generator {config.generator[:12]}, but the generator loaded is "
            f"{generator[:12]}: name one made for it, or none: pictures are then inverted by search"
        )
    inverter = Inverter(config)
    load_weights(inverter, state, path)
    return inverter.eval().requires_grad_(False)


# By a search


@dataclass(frozen=True, kw_only=True)
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
    images: Float[Tensor, "batch 3 size size"], targets: Float[Tensor, "batch 3 size size"]
) -> Float[Tensor, " batch"]:
    """Compute the mean squared error, averaged over sizes from the images' own down to 16 px.

    Small sizes compare where colours are, and guide a search that starts far off.
    """
    losses = [(images - targets).square().mean(dim=(1, 2, 3))]
    while images.shape[-1] >= 2 * COARSEST:
        images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
        losses.append((images - targets).square().mean(dim=(1, 2, 3)))
    return torch.stack(losses).mean(dim=0)


def invert_by_optimization(
    generator: Generator,
    embedder: ImageEmbedder,
    images: Float[Tensor, "batch 3 size size"],
    start: Float[Tensor, "batch num_ws w_dim"],
    config: InversionConfig,
    on_step: Callable[[float], None] | None = None,
) -> Float[Tensor, "batch num_ws w_dim"]:
    """Find latents whose renderings look like images in [-1, 1] of the generator's resolution.

    Minimises, for each image, the weighted sum of the pixel loss, the perceptual loss (1 - cosine
    of the embeddings) and the distance to the start. Returns the latents of its lowest value.

    Args:
        on_step: called with the mean loss of each step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    with torch.no_grad():
        embeddings = F.normalize(embedder.embed_images(images).float(), dim=1)
    ws = start.clone().requires_grad_()
    best, lowest = start.clone(), torch.full((len(start),), torch.inf, device=start.device)
    optimizer = torch.optim.Adam([ws], lr=config.learning_rate)
    for step in range(config.steps + 1):
        rendered = generator.synthesis(ws)
        rendered_embeddings = F.normalize(embedder.embed_images(rendered).float(), dim=1)
        # Summed, not averaged, so that the other images of a batch do not change a search.
        losses = (
            config.pixel_weight * pixel_loss(rendered, images)
            + config.perceptual_weight * (1 - (rendered_embeddings * embeddings).sum(dim=1))
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


@dataclass(frozen=True, kw_only=True)
class OptimizingInverter:
    """An inverter that searches, for images in [-1, 1] of the generator's resolution."""

    generator: Generator
    embedder: ImageEmbedder
    first: LatentInverter | None
    """Gives the start. None: the mean latent."""
    config: InversionConfig
    at_once: int = 4
    """Images searched for together; bounds memory."""
    on_step: Callable[[float], None] | None = None
    """As in `invert_by_optimization`."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        if self.first is None:
            starts = self.generator.mean_w.repeat(len(images), self.generator.num_ws, 1)
        else:
            starts = self.first(images)
        search = partial(invert_by_optimization, self.generator, self.embedder)
        parts = zip(images.split(self.at_once), starts.split(self.at_once), strict=True)
        with torch.enable_grad():
            return torch.cat([search(*part, self.config, self.on_step) for part in parts])
