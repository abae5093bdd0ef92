"""What follows from the scores of validation targets: a threshold, a refinement, how far to trust.

Pure functions of scores; knows nothing of mappers, pictures or files.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEAR = 0.002  # a shorter refinement that comes so near the best one is preferred
TOLERANCE = 0.005  # of the better score of mapper and teacher that passing answers may lose
RARE = 0.01  # part of the validation targets that are taken for unlike all others


def threshold_of(
    probe: Float[Tensor, " targets"],
    mapper: Float[Tensor, " targets"],
    teacher: Float[Tensor, " targets"],
    sets: Sequence[Bool[Tensor, " targets"]],
) -> float:
    """The lowest probe score that may pass.

    As low as the mean score of each set allows: with the optimizer's answer, where it is better,
    for every target below the threshold, it must reach the better mean of mapper and teacher but
    for TOLERANCE. And no lower than all but RARE of the targets reach: an answer that is worse than
    nearly every one here is to a target unlike them.
    """
    floor = float(torch.quantile(probe, RARE))
    best = torch.maximum(mapper, teacher)

    def holds(threshold: float) -> bool:
        answered = torch.where(probe >= threshold, mapper, best)
        return all(
            float(answered[each].mean())
            >= (1 - TOLERANCE) * max(float(mapper[each].mean()), float(teacher[each].mean()))
            for each in sets
        )

    # Just above every score nothing passes, and `holds` is true.
    candidates = [floor, *sorted(value for value in probe.tolist() if value > floor), 1.0]
    found: float = next(value for value in candidates if holds(value) or value == 1.0)
    return found


def choose_refinement(losses: dict[float, dict[int, float]]) -> tuple[float, int]:
    """Rate and steps: of the rate with the lowest loss, the shortest that is nearly as good.

    `losses[rate][steps]`; 0 steps, which are no refinement, do not count.
    """
    real = {rate: {s: loss for s, loss in by.items() if s > 0} for rate, by in losses.items()}
    rate = min(real, key=lambda each: min(real[each].values()))
    lowest = min(real[rate].values())
    return rate, min(steps for steps, loss in real[rate].items() if loss <= lowest + NEAR)


def steps_to_teacher(losses: dict[int, float], teacher: float) -> int | None:
    """Fewest steps from predictions that reach the teacher's mean loss; None if none does."""
    return min((steps for steps, loss in losses.items() if loss <= teacher), default=None)


def reliability(
    expected: Float[Tensor, " targets"], reached: Float[Tensor, " targets"]
) -> dict[str, float]:
    """How far expectations can be trusted: mean error, bias, and correlation."""
    both = torch.stack([expected, reached])
    return {
        "expected_error": float((expected - reached).abs().mean()),
        "expected_bias": float((expected - reached).mean()),
        "expected_correlation": float(torch.corrcoef(both)[0, 1]),
    }
