"""Directions and how they were found: one method's, the better of two, mixtures of several.

Knows what the optimizer tells; nothing of mappers, targets or files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from targetclip.optimize import Optimized, Progress

Method = Literal["mapper", "refined", "optimizer"]


@dataclass(frozen=True)
class Direction:
    """A direction and how it was found."""

    vector: Float[Tensor, "num_ws w_dim"]
    method: str
    """What made it: "mapper", "refined" (the optimizer from the mapper's answer), "optimizer",
    what its file says, or several of these joined by " + "."""
    expected: float | None = None
    """Transfer score the mapper expected; None where it was not asked."""
    probe: float | None = None
    """Transfer score on the probe sources, which no method edits on its way; None where it was
    not measured."""
    transfer: float | None = None
    """Transfer score on the optimizer's own sources at the end: mean cosine to the target."""
    consistency: float | None = None
    """1 - consistency loss there."""
    steps: int = 0
    """Of the optimizer, in all that was tried."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search; `direction` is the best so far."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.direction = direction


def reached(direction: Direction) -> float:
    """The probe score; less than any where it was not measured or is no number."""
    score = direction.probe
    return -math.inf if score is None or math.isnan(score) else score


def better(first: Direction, second: Direction) -> Direction:
    """The one of the higher probe score; the first if they tie."""
    return second if reached(second) > reached(first) else first


def direction_so_far(progress: Progress, method: Method) -> Direction:
    """What an optimization would return if it ended after a step."""
    return Direction(
        vector=progress.kept_directions[0],
        method=method,
        transfer=1 - float(progress.kept_transfer[0]),
        consistency=1 - float(progress.kept_consistency[0]),
        steps=progress.step + 1,
    )


def optimized_direction(found: Optimized, method: Method) -> Direction:
    """The only target's row of an optimization."""
    return Direction(
        vector=found.directions[0],
        method=method,
        transfer=1 - float(found.transfer[0]),
        consistency=1 - float(found.consistency[0]),
        steps=int(found.steps[0]),
    )


def mixed(directions: Sequence[Direction], weights: Sequence[float]) -> Direction:
    """The weighted sum of directions; a negative weight takes an essence away.

    Raises:
        ValueError: no direction, or not one weight for each.
    """
    if not directions or len(directions) != len(weights):
        raise ValueError(
            f"expected one weight for each direction, found {len(weights)} for {len(directions)}"
        )
    vectors = torch.stack([direction.vector for direction in directions])
    factors = vectors.new_tensor(weights)[:, None, None]
    methods = dict.fromkeys(direction.method for direction in directions)
    return Direction(
        vector=(factors * vectors).sum(dim=0),
        method=" + ".join(methods),
        steps=sum(direction.steps for direction in directions),
    )
