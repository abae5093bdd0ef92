"""Corrections of a direction for each source: the network that learns them, and that of one target.

One direction for all sources cannot take away what a source has. The mapper gives a target's
direction b; a correction c(w) is added for a source of latent w, so that its edit is w + b + c(w).
Knows tensors only; nothing of targets' pictures, files or images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.mapper_file import CorrectionConfig
from predictor.tradeoff import keep_layer


def joined_layers(
    ws: Float[Tensor, "*sources num_ws w_dim"], size: int
) -> Float[Tensor, "*sources {size}"]:
    """Return the layers that are read as one row a source: the first numbers of its latent."""
    return ws.flatten(-2)[..., :size]


class Correction(nn.Module):
    """Whitened targets and latents of sources to corrections, in units of the mapper's scale.

    A multilayer perceptron of two hidden layers whose answer mixes learned directions. A fresh one
    answers zero, so a mapper that gets one edits as before.

    Buffers, which bring latents to about unit variance:

    - `mean` [num_ws, w_dim]: the mean latent; zeros until set.
    - `deviation` [num_ws, w_dim]: of latents; ones until set.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        config: CorrectionConfig,
        embed_dim: int,
        num_ws: int,
        w_dim: int,
        tradeoff: bool = False,
    ) -> None:
        super().__init__()
        self.shape = (num_ws, w_dim)
        self.reads = w_dim * (1 if config.layers == "first" else num_ws)
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("deviation", torch.ones(self.shape))
        # The first layer, in two parts: that of the target is the same for all of its sources.
        self.target = nn.Linear(embed_dim, config.width)
        self.source = nn.Linear(self.reads, config.width, bias=False)
        self.hidden = nn.Linear(config.width, config.width)
        self.mix = nn.Linear(config.width, config.rank)
        self.basis = nn.Linear(config.rank, num_ws * w_dim, bias=False)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)
        nn.init.normal_(self.basis.weight, std=1 / math.sqrt(config.rank))
        # Both are a target's own in `SourceCorrection`, so that corrections of several places mix.
        self.keep_enter = keep_layer(config.width) if tradeoff else None
        self.keep_gain = keep_layer(num_ws) if tradeoff else None

    def forward(
        self,
        white: Float[Tensor, "targets embed"],
        ws: Float[Tensor, "*targets sources num_ws w_dim"],
        places: Float[Tensor, "targets degrees"] | None = None,
    ) -> Float[Tensor, "targets sources num_ws w_dim"]:
        """Return corrections of sources, the same for all targets or some for each.

        Args:
            places: `keep_features` of the trade-off, where it is read.
        """
        rows = joined_layers((ws - self.mean) / self.deviation, self.reads)
        entered = self.target(white)
        if self.keep_enter is not None:
            entered = entered + self.keep_enter(places)
        x = F.silu(entered[:, None] + self.source(rows))
        x = F.silu(self.hidden(x))
        corrections: Tensor = self.basis(self.mix(x)).unflatten(-1, self.shape)
        if self.keep_gain is not None:
            corrections = corrections * (1 + self.keep_gain(places))[:, None, :, None]
        return corrections


@dataclass(frozen=True, kw_only=True)
class SourceCorrection:
    """The correction for one target, or for a mixture of targets, of any source.

    What is known of a target is folded into a bias, and all units into the matrices, so a source
    costs four products. `weights` hold strengths, mixtures, negative weights and layer weights.
    """

    first: Float[Tensor, "reads width"]
    hidden: Float[Tensor, "width width"]
    hidden_bias: Float[Tensor, " width"]
    mix: Float[Tensor, "width rank"]
    mix_bias: Float[Tensor, " rank"]
    basis: Float[Tensor, "rank numbers"]
    """`numbers` is num_ws * w_dim."""
    biases: Float[Tensor, "targets width"]
    """Of the first layer, for each target."""
    weights: Float[Tensor, "targets num_ws"]
    """Factor of each target's correction in each layer."""

    @property
    def shape(self) -> tuple[int, int]:
        """num_ws and w_dim."""
        num_ws = self.weights.shape[1]
        return num_ws, self.basis.shape[1] // num_ws

    def __call__(
        self, ws: Float[Tensor, "sources num_ws w_dim"]
    ) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return what is added to the direction of each source. For a clip, give its mean latent.
        ValueError: latents of another size."""
        return self.each(ws).sum(dim=0)

    @torch.no_grad()
    def each(
        self, ws: Float[Tensor, "sources num_ws w_dim"]
    ) -> Float[Tensor, "targets sources num_ws w_dim"]:
        """Return the part of each target, whose sum `__call__` returns; raises as it does."""
        if tuple(ws.shape[1:]) != self.shape:
            raise ValueError(
                f"expected latents of shape {['sources', *self.shape]}, found {list(ws.shape)}: "
                "the correction belongs to another generator"
            )
        rows = joined_layers(ws.float(), len(self.first))
        x = F.silu(rows @ self.first + self.biases[:, None])
        x = F.silu(x @ self.hidden + self.hidden_bias)
        parts = ((x @ self.mix + self.mix_bias) @ self.basis).unflatten(-1, self.shape)
        weighted: Tensor = parts.float() * self.weights[:, None, :, None]
        return weighted

    def to(self, device: torch.device) -> "SourceCorrection":
        """Return this correction on a device."""
        return SourceCorrection(**{name: t.to(device) for name, t in self.tensors().items()})

    def weighted(self, layers: Float[Tensor, " num_ws"]) -> "SourceCorrection":
        """Return this correction with each layer multiplied by its factor."""
        return replace(self, weights=self.weights * layers.to(self.weights))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its name, for a file that `of_tensors` reads."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], num_ws: int, w_dim: int
    ) -> "SourceCorrection":
        """Return the correction of a file's tensors.
        ValueError: other names, types or shapes; values that are not finite."""
        names = [field.name for field in fields(cls)]
        if sorted(tensors) != sorted(names):
            raise ValueError(f"expected a correction of {names}, found {list(tensors)}")
        sizes = {name: list(tensors[name].shape) for name in names}
        width, rank = sizes["hidden_bias"], sizes["mix_bias"]
        reads, targets = sizes["first"][:1], sizes["biases"][:1]
        shapes = (reads + width, 2 * width, width, width + rank, rank, [*rank, num_ws * w_dim])
        expected = dict(zip(names, (*shapes, targets + width, [*targets, num_ws]), strict=True))
        if sizes != expected or reads not in ([w_dim], [num_ws * w_dim]):
            raise ValueError(f"expected a correction of shapes {expected}, found {sizes}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise ValueError(f"expected finite float32 values, found others in {name}")
        return cls(**tensors)


SHARED = ("first", "hidden", "hidden_bias", "mix", "mix_bias", "basis")  # by all targets


def mixed_corrections(
    corrections: Sequence[SourceCorrection], weights: Sequence[float]
) -> SourceCorrection:
    """Return the weighted sum of corrections of one mapper.
    ValueError: no corrections, another number of weights, or corrections of several mappers."""
    if not corrections or len(corrections) != len(weights):
        raise ValueError(
            f"expected one weight for each correction, found {len(weights)} for {len(corrections)}"
        )
    first = corrections[0]
    for other in corrections[1:]:
        if not all(torch.equal(getattr(first, name), getattr(other, name)) for name in SHARED):
            raise ValueError(
                "expected corrections of one mapper, found some of two: find the directions with "
                "one mapper, or mix them without corrections"
            )
    return replace(
        first,
        biases=torch.cat([one.biases for one in corrections]),
        weights=torch.cat([f * one.weights for f, one in zip(weights, corrections, strict=True)]),
    )
