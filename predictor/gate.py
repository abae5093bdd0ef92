"""The gate: is a mapper's answer good enough, and what is done where it is not.

Knows the calibration that a mapper's file holds; nothing of pictures or of how scores are made.
"""

import dataclasses
from dataclasses import dataclass

from predictor.mapper import Mapper
from targetclip.recipes import Recipe

CALIBRATE = "calibrate it: python -m eval.calibrate --help; or ask it unchecked: --mode instant"


@dataclass(frozen=True)
class Gate:
    """Figures found on validation targets, none of which anything was trained on."""

    threshold: float
    """Lowest transfer score on the probe sources that passes."""
    probes: int
    """Number of probe sources."""
    refine_steps: int
    refine_rate: float
    """Of Adam: a prediction is near its goal, and a cold start's rate would throw it far off."""

    @staticmethod
    def of(mapper: Mapper) -> "Gate":
        """The gate a mapper's file holds.

        Raises:
            ValueError: it holds none, or one that cannot be.
        """
        names = [field.name for field in dataclasses.fields(Gate)]
        found = {} if mapper.record is None else mapper.record.calibration
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"the mapper is not calibrated (no {', '.join(missing)}): {CALIBRATE}")
        gate = Gate(
            float(found["threshold"]),
            int(found["probes"]),
            int(found["refine_steps"]),
            float(found["refine_rate"]),
        )
        if min(gate.probes, gate.refine_steps) < 1 or not gate.refine_rate > 0:
            raise ValueError(f"the mapper's calibration cannot be ({gate}): {CALIBRATE}")
        return gate

    def passes(self, probe_score: float) -> bool:
        """Whether a direction is good enough; a score that is no number never is."""
        return probe_score >= self.threshold

    def refining(self, recipe: Recipe, trained: Recipe) -> Recipe:
        """A recipe's search, started at a prediction: shorter and in smaller steps.

        With the decay and the identity loss that the mapper was `trained` by: others would spend
        the few steps on making predictions shorter or longer, or on giving up who sources are.
        """
        return dataclasses.replace(
            recipe,
            steps=self.refine_steps,
            learning_rate=self.refine_rate,
            weight_decay=trained.weight_decay,
            identity_weight=trained.identity_weight,
            initial="zero",
        )
