"""What a batch of the mapper's training is drawn from: sources, noise, places and mixtures.

Knows tensors and seeds; nothing of losses. Each draw depends on its seed or its generator alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from data.targets import layer_thirds
from targetclip.scene import Scene
from train.mapper_settings import SourceKind

ENDS = 0.1  # part of the targets at each end of the trade-off


@dataclass(frozen=True, kw_only=True)
class SourceReading:
    """How the transfer term learns from sources."""

    kinds: tuple[SourceKind, ...] = ("generated",)
    """Of sources, in equal parts."""
    uncorrected: float = 0.25
    """Part of the targets whose sources are moved along the direction alone, so that it stays an
    answer of its own where there is a correction."""
    decay: float = 0.0
    """Weight decay of corrections."""


# Sources


@torch.no_grad()
def inverted(
    scene: Scene, ws: Float[Tensor, "sources num_ws w_dim"]
) -> Float[Tensor, "sources num_ws w_dim"]:
    """Return the inverter's latents of renderings, in full precision.
    ValueError: there is no inverter."""
    if scene.inverter is None:
        raise ValueError("--source-kinds: inverted sources need a world with an inverter")
    images = scene.render(ws).float().clamp(-1, 1)
    with torch.autocast(scene.device.type, enabled=False):
        parts = images.split(scene.at_once)
        return torch.cat([scene.inverter(part) for part in parts])


def training_sources(
    scene: Scene, seeds: Sequence[int], kinds: Sequence[SourceKind]
) -> Float[Tensor, "sources num_ws w_dim"]:
    """Return one source for each seed, whose kinds take turns.

    Inverted ones are made anew as well: rendering a few without gradients is a small part of a
    step, and a step then depends on its seeds alone, whatever was drawn before it.

    ValueError: as `inverted`.
    """
    ws = scene.latents(seeds)
    sources, layers = ws.clone(), list(range(ws.shape[1]))
    for turn, kind in enumerate(kinds):
        rows = torch.arange(turn, len(ws), len(kinds))
        if kind == "mixed":
            others = (rows[:, None] + torch.tensor(layer_thirds(len(layers)))) % len(ws)
            sources[rows] = ws[others, layers]
        elif kind == "inverted" and len(rows):
            sources[rows] = inverted(scene, ws[rows])
    return sources


# Targets


def noisy(
    embeddings: Float[Tensor, "batch embed"], noise: float, random: torch.Generator
) -> Float[Tensor, "batch embed"]:
    """Add Gaussian noise of an expected length to unit embeddings, and make them unit again."""
    if noise == 0:
        return embeddings
    drawn = torch.randn(embeddings.shape, generator=random).to(embeddings.device)
    return F.normalize(embeddings + noise / embeddings.shape[1] ** 0.5 * drawn, dim=1)


def drawn_places(count: int, random: torch.Generator) -> Float[Tensor, " {count}"]:
    """Return a place on the trade-off for each of so many targets: of ENDS at 0, of as many at 1,
    of the others evenly between.

    Each target draws from a part of the range of its own, so that a batch has all of it: losses
    differ more by their place than by their target.
    """
    parts = torch.randperm(count, generator=random) + torch.rand(count, generator=random)
    return ((parts / count - ENDS) / (1 - 2 * ENDS)).clamp(0, 1)


@dataclass(frozen=True)
class Mixtures:
    """The last targets of a batch, as mixtures of two or three of its targets."""

    mates: Int[Tensor, "mixtures 3"]
    """Rows of the targets that are mixed; the first is the row itself."""
    weights: Float[Tensor, "mixtures 3"]
    """They sum to 1."""

    def to(self, device: torch.device) -> "Mixtures":
        """Return these mixtures on a device."""
        return Mixtures(self.mates.to(device), self.weights.to(device))

    def mixed(self, parts: Float[Tensor, "parts ..."]) -> Float[Tensor, "mixtures ..."]:
        """Return weighted sums of what belongs to the rows `mates.flatten()`."""
        rows = parts.unflatten(0, self.mates.shape)
        weighted: Tensor = rows * self.weights.view(*self.mates.shape, *[1] * (rows.ndim - 2))
        return weighted.sum(dim=1)


def drawn_mixtures(count: int, batch: int, random: torch.Generator) -> Mixtures:
    """Return mixtures of so many last targets of a batch with the next ones, by weights that are
    evenly distributed: of three targets, and of two in every second one."""
    rows = torch.arange(batch - count, batch)
    shares = -(1 - torch.rand(count, 3, generator=random)).log()  # in proportion: Dirichlet's
    shares[::2, 2] = 0
    return Mixtures(
        (rows[:, None] + torch.arange(3)) % batch, F.normalize(shares + 1e-12, p=1, dim=1)
    )
