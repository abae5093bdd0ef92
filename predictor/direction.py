"""Directions: how they were found, which of two is better, mixtures, and how far to go along one.

Knows results of the optimizer and the calibration in a mapper's record; nothing of targets, files
or images.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from predictor.mapper import Mapper
from targetclip.optimize import Optimized, Progress
from targetclip.recipes import Recipe

Method = Literal["mapper", "refined", "optimizer"]
WatchStep = Callable[[Progress], None]
WatchSearch = Callable[[Method, Recipe], WatchStep]
"""Called as a search begins; its result is called after every step."""

CALIBRATE = "calibrate it: python -m eval.calibrate --help; or ask it unchecked: --mode instant"
STRENGTHS = 10  # tried by strength_at_floor, from 0 to the highest
HALVINGS = 4  # of the interval in which identity falls below the floor


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A direction and how it was found."""

    vector: Float[Tensor, "num_ws w_dim"]
    method: str
    """"mapper", "refined" (the optimizer, started at the mapper's answer), "optimizer", the method
    that a file names, or several of these joined by " + "."""
    expected: float | None = None
    """Transfer score that the mapper expected; None: no mapper was asked."""
    probe: float | None = None
    """Transfer score on the probe sources, which no method edits; None: not measured."""
    transfer: float | None = None
    """Transfer score on the optimizer's own sources at its end."""
    consistency: float | None = None
    """1 - consistency loss on the same sources."""
    steps: int = 0
    """Steps of the optimizer, in all searches that were tried."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search; `direction` is the best so far."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.direction = direction


def direction_so_far(progress: Progress, method: Method) -> Direction:
    """Return the direction that an optimization of one target would give if it ended now."""
    return Direction(
        vector=progress.kept_directions[0],
        method=method,
        transfer=1 - float(progress.kept_transfer[0]),
        consistency=1 - float(progress.kept_consistency[0]),
        steps=progress.step + 1,
    )


def optimized_direction(result: Optimized, method: Method) -> Direction:
    """Return the direction of an optimization of one target."""
    return Direction(
        vector=result.directions[0],
        method=method,
        transfer=1 - float(result.transfer[0]),
        consistency=1 - float(result.consistency[0]),
        steps=int(result.steps[0]),
    )


def better(first: Direction, second: Direction) -> Direction:
    """Return the direction of the higher probe score, the first where they tie.

    A probe score that is missing or NaN is lower than any other.
    """

    def rank(direction: Direction) -> float:
        score = direction.probe
        return -math.inf if score is None or math.isnan(score) else score

    return second if rank(second) > rank(first) else first


def mixed(directions: Sequence[Direction], weights: Sequence[float]) -> Direction:
    """Return the weighted sum of directions; a negative weight takes an essence away.

    Raises:
        ValueError: no directions, or another number of weights.
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


@dataclass(frozen=True)
class Gate:
    """Decides whether a mapper's answer is good enough, and how it is refined where it is not.

    The figures come from calibration on validation targets.
    """

    threshold: float
    """Lowest transfer score on the probe sources that passes."""
    probes: int
    """Number of probe sources."""
    refine_steps: int
    refine_rate: float
    """Learning rate of a refinement; at that of a cold start the prediction would be lost."""

    @staticmethod
    def of(mapper: Mapper) -> "Gate":
        """Return the gate that a mapper was calibrated to.

        Raises:
            ValueError: the mapper is not calibrated, or a figure is out of range.
        """
        names = [field.name for field in dataclasses.fields(Gate)]
        figures = {} if mapper.record is None else mapper.record.calibration
        if missing := [name for name in names if name not in figures]:
            raise ValueError(f"the mapper is not calibrated (no {', '.join(missing)}): {CALIBRATE}")
        gate = Gate(
            threshold=float(figures["threshold"]),
            probes=int(figures["probes"]),
            refine_steps=int(figures["refine_steps"]),
            refine_rate=float(figures["refine_rate"]),
        )
        if min(gate.probes, gate.refine_steps) < 1 or not gate.refine_rate > 0:
            raise ValueError(f"the mapper's calibration is out of range ({gate}): {CALIBRATE}")
        return gate

    def passes(self, probe_score: float) -> bool:
        """Tell whether a direction is good enough; NaN is not."""
        return probe_score >= self.threshold

    def refining(self, recipe: Recipe, trained: Recipe) -> Recipe:
        """Return the recipe of a refinement: a shorter search in smaller steps.

        Weight decay and identity weight are those that the mapper was `trained` by. Others would
        spend the few steps on the length of the direction, or on giving up identity.
        """
        return dataclasses.replace(
            recipe,
            steps=self.refine_steps,
            learning_rate=self.refine_rate,
            weight_decay=trained.weight_decay,
            identity_weight=trained.identity_weight,
            initial="zero",
        )

    def first_that_passes(
        self,
        predicted: Direction,
        searches: Sequence[Callable[[], Direction]],
        probe: Callable[[Tensor], float],
    ) -> Direction:
        """Return the first of a prediction and the results of searches that passes, or the best.

        Args:
            searches: run in turn, while nothing passes.
            probe: from a vector to its transfer score on the probe sources.

        Raises:
            Interrupted: Ctrl-C during a search; with the best direction so far.
        """

        def probed(direction: Direction) -> Direction:
            score = probe(direction.vector)
            return dataclasses.replace(direction, expected=predicted.expected, probe=score)

        def better_of(best: Direction, result: Direction) -> Direction:
            steps = best.steps + result.steps  # of all searches, whichever is kept
            return dataclasses.replace(better(best, probed(result)), steps=steps)

        best = probed(predicted)
        for search in searches:
            if best.probe is not None and self.passes(best.probe):
                break
            try:
                best = better_of(best, search())
            except Interrupted as interrupted:
                raise Interrupted(better_of(best, interrupted.direction)) from None
            except KeyboardInterrupt:  # before the search's first step
                raise Interrupted(best) from None
            except FloatingPointError:  # the best so far is still there, and its score is known
                continue
        return best


def strength_at_floor(identity_at: Callable[[float], float], highest: float, floor: float) -> float:
    """Return the largest strength between 0 and `highest` that keeps identity at `floor` or above.

    Identity need not fall evenly. Strengths are tried in equal steps from 0 on. The first one below
    the floor, or NaN, ends the search, and the interval before it is halved. `highest` may be
    negative.
    """
    kept = 0.0
    for step in range(1, STRENGTHS + 1):
        strength = highest * step / STRENGTHS
        if not identity_at(strength) >= floor:
            break
        kept = strength
    else:
        return kept
    lost = strength
    for _ in range(HALVINGS):
        middle = (kept + lost) / 2
        if identity_at(middle) >= floor:
            kept = middle
        else:
            lost = middle
    return kept
