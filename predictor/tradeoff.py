"""The trade-off between essence and identity: its two ends, and how networks read a place between.

A place is a number `keep` in [0, 1]: 0 brings the most essence, 1 keeps the most identity. It
stands for an identity weight and a weight decay of directions. A mapper that reads it has the whole
curve in one set of weights, as LATTE3D has the blend of its two objectives (Xie et al. 2024).
"""

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from targetclip.recipes import Recipe

DEGREES = 4
# Factors of the polynomials of a fresh mapper. Adam moves all weights alike, so they say what is
# learned first: an answer that is linear in the place, then its bends.
UNITS = (8.0, 4.0, 2.0, 1.0)
KEEP_RANK = 64  # of the matrices that a place adds to a mapper's heads
MIDDLE = 0.5  # the place of a mapper that nobody has calibrated
NO_TRADEOFF = (
    "keep_identity, --keep-identity: this mapper was trained at one identity weight and reads no "
    "other: drop it, or train one that does: python -m train.mapper --help"
)

Number = TypeVar("Number", float, Tensor)
Keep = float | Float[Tensor, " targets"]
"""One place for all targets, or one for each."""


def check_keep(keep: float, name: str = "keep_identity") -> None:
    """Raise a ValueError for a place that is not from 0 to 1; NaN is not."""
    if not 0 <= keep <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, found {keep}")


def between(ends: tuple[float, float], keep: Number) -> Number:
    """Return the number between two ends whose logarithm is so far along, from 0 to 1."""
    number: Number = ends[0] * (ends[1] / ends[0]) ** keep
    return number


@dataclass(frozen=True, kw_only=True)
class TradeoffConfig:
    """The ends of the trade-off; between them the logarithms of both weights are linear.
    ValueError: ends that are not positive and finite, that fall, or that do not differ at all."""

    identity_weights: tuple[float, float]
    """Of the identity loss, at 0 and at 1."""
    decays: tuple[float, float]
    """Weight decay of directions, at 0 and at 1."""
    origin: float | None = None
    """The place nearest to the weights of a mapper's first training, at one identity weight. What
    reads places adds zeros there. None: it was trained at all places from the start."""

    def __post_init__(self) -> None:
        if self.origin is not None:
            check_keep(self.origin, "origin")
        for name in ("identity_weights", "decays"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise ValueError(
                    f"{name}: expected two finite numbers above 0, the lower one first, found "
                    f"{low} and {high}"
                )
        if self.spans == (0, 0):
            raise ValueError("expected ends of the trade-off that differ, found the same twice")

    @property
    def spans(self) -> tuple[float, float]:
        """Length of the curve in the logarithms of both weights."""
        return math.log(self.identity_weights[1] / self.identity_weights[0]), math.log(
            self.decays[1] / self.decays[0]
        )

    def identity_weight(self, keep: Number) -> Number:
        """Return the weight of the identity loss at a place, or at each of several."""
        return between(self.identity_weights, keep)

    def decay(self, keep: Number) -> Number:
        """Return the weight decay of directions at a place, or at each of several."""
        return between(self.decays, keep)

    def recipe_at(self, recipe: Recipe, keep: float) -> Recipe:
        """Return a mapper's recipe with the identity weight and the weight decay of a place. At the
        origin it is as it is: that is the place of the curve nearest to it."""
        if keep == self.origin:
            return recipe
        return replace(
            recipe, identity_weight=self.identity_weight(keep), weight_decay=self.decay(keep)
        )

    def nearest(self, recipe: Recipe) -> float:
        """Return the place whose two weights are nearest to a recipe's, in their logarithms.

        A weight beyond an end counts as that end, so an identity weight of 0 counts as the lowest.
        """
        weights = (recipe.identity_weight, recipe.weight_decay)
        along = 0.0
        for weight, (low, high), span in zip(
            weights, (self.identity_weights, self.decays), self.spans, strict=True
        ):
            along += math.log(min(max(weight, low), high) / low) * span
        return min(max(along / sum(span**2 for span in self.spans), 0.0), 1.0)


def keep_features(
    keep: Float[Tensor, " targets"], origin: float | None = None
) -> Float[Tensor, "targets degrees"]:
    """Return what networks read of places: the Chebyshev polynomials of 2 keep - 1 of degrees 1 to
    DEGREES, which are in [-1, 1]; less those of an origin, so that they are zeros there."""
    degrees = torch.arange(1, DEGREES + 1, device=keep.device)
    rows = keep if origin is None else torch.cat([keep, keep.new_tensor([origin])])
    polynomials = torch.cos(torch.arccos(2 * rows - 1)[:, None] * degrees)
    if origin is None:
        return polynomials
    # Zeros to the bit, which a difference of two roundings need not be.
    return torch.where((keep == rows[-1])[:, None], 0.0, polynomials[:-1] - polynomials[-1])


def keep_layer(size: int, inputs: int = 1) -> nn.Linear:
    """Return a layer that reads `keep_features`, or products of each of them with so many inputs. A
    fresh one answers zero, whatever it reads."""
    layer = nn.Linear(DEGREES * inputs, size, bias=False)
    nn.init.zeros_(layer.weight)
    return layer
