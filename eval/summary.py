"""From scores of every target to what a report says of a method: means, intervals, differences.

Knows numbers by name; nothing of how they were measured or how they are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from eval.judging import Goal, Judged, Look, scores_of
from eval.metrics import (
    bootstrap_interval,
    essence_by_attribute,
    frechet_distance,
    identity_by_attribute,
    kernel_distance,
)
from targetclip.seeds import seed_of


@dataclass(frozen=True)
class Trial:
    """A method on the targets of a set, or on the first of them."""

    judged: Judged
    before: Look
    """At the sources, unedited."""
    goal: Goal
    scores: Mapping[str, Float[Tensor, " targets"]]

    @staticmethod
    def of(judged: Judged, before: Look, goal: Goal) -> "Trial":
        return Trial(judged, before, goal, scores_of(judged, before, goal))

    def __len__(self) -> int:
        return len(self.judged.outside)


def interval(values: Float[Tensor, " targets"], seed: int) -> dict[str, Any]:
    """Mean and bootstrap interval; as many targets are always resampled in the same way."""
    return asdict(bootstrap_interval(values, seed_of("bootstrap", seed, len(values))))


def means(
    trials: Mapping[str, Trial],
    count: int,
    references: Float[Tensor, "images features"],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Scores over the first `count` targets, of every method that has as many."""
    rows: dict[str, dict[str, Any]] = {}
    for name, trial in trials.items():
        if len(trial) < count:
            continue
        features = trial.judged.look.features[:count].flatten(0, 1)
        rows[name] = {
            **{score: interval(v[:count], seed) for score, v in trial.scores.items()},
            "fid": frechet_distance(features, references),
            "kid": kernel_distance(features, references),
            "images": len(features),
        }
    return rows


def differences(
    trials: Mapping[str, Trial], reference: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Scores of one method less those of each other, target by target, over those both have."""
    rows: dict[str, dict[str, Any]] = {}
    mine = trials[reference]
    for name, trial in trials.items():
        count = min(len(mine), len(trial))
        if name != reference:
            rows[name] = {
                score: interval(mine.scores[score][:count] - values[:count], seed)
                for score, values in trial.scores.items()
            }
    return rows


def by_attribute(trial: Trial) -> dict[str, dict[str, float]]:
    """Essence acquired and identity kept of each attribute; empty where no reader looked."""
    readings, before, truth = trial.judged.look.readings, trial.before.readings, trial.goal.truth
    if readings is None or before is None:
        return {}
    found = {"identity": identity_by_attribute(readings, before)}
    if truth is not None:
        found["essence"] = essence_by_attribute(readings, before, truth.readings, truth.seen)
    return found


def by_rank(scores: Float[Tensor, " targets"]) -> dict[str, int]:
    """The targets of the best, the median and the worst score."""
    order: Sequence[int] = scores.argsort(descending=True, stable=True).tolist()
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
