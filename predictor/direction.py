"""Directions: how they were found, their files, sums, the better of two, and how far to go.

Knows results of the optimizer and the calibration in a mapper's record; nothing of targets or
images.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from predictor.correction import SourceCorrection, mixed_corrections
from predictor.mapper import Mapper
from targetclip.command import write_file
from targetclip.directions import (
    RELEASED_SUFFIXES,
    direction_bytes,
    load_direction,
    released_direction,
    warn_of_latent,
)
from targetclip.generators import Generator
from targetclip.optimize import Optimized, Progress
from targetclip.recipes import Recipe

if TYPE_CHECKING:
    from predictor.transfer import EssenceTransfer

Method = Literal["mapper", "refined", "optimizer"]
WatchStep = Callable[[Progress], None]
WatchSearch = Callable[[Method, Recipe], WatchStep]
"""Called as a search begins; its result is called after every step."""
WatchProbe = Callable[[float, float], None]
"""Called with a direction's score on the probe sources, and the threshold."""

RELEASED = "released"  # method of the directions of TargetCLIP's release
RECORDED = ("method", "expected", "probe", "transfer", "consistency", "steps", "keep_identity")
THRESHOLD_AT = "threshold_at_"  # begins the names of thresholds at places of the trade-off
CALIBRATE = 'calibrate it: python -m eval.calibrate --help; or ask it unchecked: mode "instant"'
STRENGTHS = 10  # tried by strength_at_floor, from 0 to the highest
HALVINGS = 4  # of the interval in which identity falls below the floor


@dataclass(frozen=True, kw_only=True, repr=False)
class Direction:
    """A direction and how it was found.

    Directions of one generator are added, subtracted and multiplied by numbers: `0.5 * a - b`.
    """

    vector: Float[Tensor, "num_ws w_dim"]
    method: str
    """"mapper", "refined" (the optimizer, started at the mapper's answer), "optimizer", the method
    that a file names, or several of these joined by " + "."""
    generator: str | None = None
    """Fingerprint of the generator it belongs to; None: not known."""
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
    keep_identity: float | None = None
    """Place on the trade-off between essence and identity, from 0 to 1, that it was found for;
    None: that of one recipe, or several places."""
    correction: SourceCorrection | None = None
    """What a mapper adds to the vector for each source; None: nothing. Scores are then those of
    corrected edits."""

    def __repr__(self) -> str:
        rows, columns = self.vector.shape
        norm = float(self.vector.norm())
        facts = [f"{rows} x {columns}", f"norm {norm:.3g}", f"method {self.method!r}"]
        scores = {"expected": self.expected, "probe": self.probe, "transfer": self.transfer}
        facts += [f"{name} {score:.3f}" for name, score in scores.items() if score is not None]
        if self.keep_identity is not None:
            facts.append(f"keep_identity {self.keep_identity:g}")
        facts += [] if self.correction is None else ["corrected for each source"]
        return f"Direction({', '.join(facts)})"

    def __mul__(self, factor: float) -> "Direction":
        if not isinstance(factor, Real):
            return NotImplemented
        return mixed([self], [float(factor)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Direction":
        return self * (1 / divisor)

    def __neg__(self) -> "Direction":
        return mixed([self], [-1.0])

    def __add__(self, other: "Direction") -> "Direction":
        return mixed([self, other], [1.0, 1.0]) if isinstance(other, Direction) else NotImplemented

    def __sub__(self, other: "Direction") -> "Direction":
        return mixed([self, other], [1.0, -1.0]) if isinstance(other, Direction) else NotImplemented

    def check_made_for(self, generator: Generator) -> None:
        """Raise a ValueError for a direction of another generator."""
        if self.generator not in (None, generator.fingerprint):
            raise ValueError(f"{self} belongs to another generator: find one for this world")

    def offsets(
        self, ws: Float[Tensor, "sources num_ws w_dim"]
    ) -> Float[Tensor, "*sources num_ws w_dim"]:
        """Return what is added to latents at strength 1: the vector, with its correction for each
        source if there is one."""
        vector = self.vector.to(ws.device)
        return vector if self.correction is None else vector + self.correction.to(ws.device)(ws)

    def weighted(self, layers: Float[Tensor, " num_ws"]) -> "Direction":
        """Return this direction with each layer multiplied by its factor: see `layer_weights`."""
        correction = self.correction and self.correction.weighted(layers)
        return self.changed(self.vector * layers.to(self.vector)[:, None], correction)

    def uncorrected(self) -> "Direction":
        """Return one direction for all sources: the vector alone."""
        return self if self.correction is None else self.changed(self.vector)

    def for_clip(self, ws: Float[Tensor, "frames num_ws w_dim"]) -> "Direction":
        """Return one direction for all frames of a clip: its correction is that of their mean."""
        if self.correction is None:
            return self
        return self.changed(self.offsets(ws.mean(dim=0, keepdim=True).to(self.vector))[0])

    def changed(
        self, vector: Float[Tensor, "num_ws w_dim"], correction: SourceCorrection | None = None
    ) -> "Direction":
        """Return a direction of the same origin, whose scores nobody has measured."""
        scores: dict[str, Any] = dict.fromkeys(("expected", "probe", "transfer", "consistency"))
        return dataclasses.replace(self, vector=vector, correction=correction, **scores)

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file, which `load` and the command (--direction) read.

        Its tensor `direction` [num_ws, w_dim] is the vector alone, for any other program; those
        named `correction.*` are the correction's.

        FileNotFoundError, OSError: it cannot be written. ValueError: another suffix, or `generator`
        is None.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"expected a file name ending in .safetensors, found {str(path)!r}")
        if self.generator is None:
            raise ValueError(
                "expected a direction that knows its generator, found none: give it "
                "generator=essence.scene.generator.fingerprint"
            )
        record = {name: getattr(self, name) for name in RECORDED}
        record = {name: value for name, value in record.items() if value is not None}
        write_file(path, self.content(record, self.generator))

    def content(self, record: dict[str, Any], generator: str) -> bytes:
        """Return the content of a file of this direction, with a record, for a generator."""
        correction = None if self.correction is None else self.correction.tensors()
        return direction_bytes(self.vector, generator, record, correction)

    @classmethod
    def load(cls, path: str | Path, owner: "Generator | EssenceTransfer") -> "Direction":
        """Read a direction file: ours, or a .npy or .pt of TargetCLIP's release.

        Args:
            owner: the generator that the direction belongs to, or what holds it.

        Raises:
            FileNotFoundError, ValueError: as `load_direction` and `released_direction`.
        """
        generator = owner if isinstance(owner, Generator) else owner.scene.generator
        direction, record = read_direction(path, generator)
        facts = {name: record[name] for name in RECORDED if name in record}
        return dataclasses.replace(direction, **facts)


def read_direction(path: str | Path, generator: Generator) -> tuple[Direction, dict[str, Any]]:
    """Read a direction file, ours or one of TargetCLIP's release, to a generator's device.

    Returns:
        The direction, without its scores, and its record.

    Raises:
        FileNotFoundError, ValueError: as `load_direction` and `released_direction`; a damaged
            correction.
    """
    correction, device = None, generator.mean_w.device
    if Path(path).suffix in RELEASED_SUFFIXES:
        vector = released_direction(path, generator.num_ws, generator.w_dim)
        record: dict[str, Any] = {"method": RELEASED}
    else:
        stored = load_direction(path, generator)
        vector, record = stored.direction, stored.record
        if stored.correction:
            try:
                correction = SourceCorrection.of_tensors(stored.correction, *vector.shape)
            except ValueError as error:
                raise ValueError(f"{path}: {error}: find the direction again") from error
    warn_of_latent(path, vector, generator)
    return Direction(
        vector=vector.to(device),
        method=str(record.get("method", "file")),
        generator=generator.fingerprint,
        correction=correction and correction.to(device),
    ), record


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search; `direction` is the best so far."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self.direction = direction


def searched_direction(
    search: Callable[..., Optimized],
    method: Method,
    generator: str,
    on_step: WatchStep | None = None,
    correction: SourceCorrection | None = None,
) -> Direction:
    """Run a search for the direction of one target, and return the direction.

    Args:
        search: runs it; calls its argument `on_step` after every step.
        generator: fingerprint of the generator that the direction belongs to.
        on_step: called after every step as well.
        correction: what the search held beside the direction.

    Raises:
        FloatingPointError: the loss was not finite.
        Interrupted: Ctrl-C after the first step; with the best direction so far.
    """
    latest: Progress | None = None

    def remember(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        if on_step is not None:
            on_step(progress)

    def direction_of(result: Optimized) -> Direction:
        return Direction(
            vector=result.directions[0],
            method=method,
            generator=generator,
            transfer=1 - float(result.transfer[0]),
            consistency=1 - float(result.consistency[0]),
            steps=int(result.steps[0]),
            correction=correction,
        )

    try:
        result = search(on_step=remember)
    except KeyboardInterrupt:
        if latest is None:
            raise
        raise Interrupted(direction_of(latest.kept)) from None
    if result.failures[0] is not None:
        raise FloatingPointError(f"no direction found: {result.failures[0]}")
    return direction_of(result)


def better(first: Direction, second: Direction) -> Direction:
    """Return the direction of the higher probe score, the first where they tie.

    A probe score that is missing or NaN is lower than any other.
    """

    def rank(direction: Direction) -> float:
        score = direction.probe
        return -math.inf if score is None or math.isnan(score) else score

    return second if rank(second) > rank(first) else first


def layer_weights(
    num_ws: int, coarse: float = 1.0, middle: float = 1.0, fine: float = 1.0
) -> Float[Tensor, " {num_ws}"]:
    """Return a factor for each layer of W+: coarse for layers of 4 and 8 px, middle for 16 and
    32 px, fine from 64 px on (the groups of the StyleGAN paper: layers 0 to 3, 4 to 7, the rest).
    """
    rest = max(num_ws - 8, 0)
    return torch.tensor([coarse] * 4 + [middle] * 4 + [fine] * rest)[:num_ws]


def mixed(directions: Sequence[Direction], weights: Sequence[float]) -> Direction:
    """Return the weighted sum of directions; a negative weight takes an essence away.

    Corrections are summed as well; directions without one bring none.

    ValueError: no directions, another number of weights, directions of several generators, or
    corrections of several mappers.
    """
    if not directions or len(directions) != len(weights):
        raise ValueError(
            f"expected one weight for each direction, found {len(weights)} for {len(directions)}"
        )
    generators = {each.generator for each in directions if each.generator is not None}
    if len(generators) > 1 or len({each.vector.shape for each in directions}) > 1:
        raise ValueError("expected directions of one generator, found several generators' ones")
    first = directions[0].vector
    vectors = torch.stack([each.vector.to(first) for each in directions])
    factors = first.new_tensor(weights)[:, None, None]
    places = {each.keep_identity for each in directions}
    methods = dict.fromkeys(m for each in directions for m in each.method.split(" + "))
    parts = [
        (each.correction.to(first.device), weight)
        for each, weight in zip(directions, weights, strict=True)
        if each.correction is not None
    ]
    return Direction(
        vector=(factors * vectors).sum(dim=0),
        method=" + ".join(methods),
        generator=min(generators, default=None),
        steps=sum(each.steps for each in directions),
        keep_identity=places.pop() if len(places) == 1 else None,
        correction=mixed_corrections(*zip(*parts, strict=True)) if parts else None,
    )


def threshold_at(figures: Mapping[str, float], default: float | None, keep: float | None) -> float:
    """Return the threshold of a calibration at a place on the trade-off: linear between the places
    that were calibrated, of which the default place is one.

    Args:
        default: the place of `threshold`; None: the mapper reads none.
        keep: None: the default.
    """
    if default is None or keep is None:
        return float(figures["threshold"])
    known = {
        float(name.removeprefix(THRESHOLD_AT)): figure
        for name, figure in figures.items()
        if name.startswith(THRESHOLD_AT)
    }
    points = sorted((known | {default: figures["threshold"]}).items())
    places, thresholds = ([point[i] for point in points] for i in (0, 1))
    return float(np.interp(keep, places, thresholds))


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
    def of(mapper: Mapper, keep: float | None = None) -> "Gate":
        """Return the gate that a mapper was calibrated to.

        Args:
            keep: place on the trade-off, where the mapper reads one; None: its default.

        Raises:
            ValueError: the mapper is not calibrated, or a figure is out of range.
        """
        names = [field.name for field in dataclasses.fields(Gate)]
        figures = {} if mapper.record is None else mapper.record.calibration
        if missing := [name for name in names if name not in figures]:
            raise ValueError(f"the mapper is not calibrated (no {', '.join(missing)}): {CALIBRATE}")
        gate = Gate(
            threshold=threshold_at(figures, mapper.keep, keep),
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
        probe: Callable[[Direction], float],
    ) -> Direction:
        """Return the first of a prediction and the results of searches that passes, or the best.

        Args:
            searches: run in turn, while nothing passes.
            probe: from a direction to its transfer score on the probe sources.

        Raises:
            Interrupted: Ctrl-C during a search; with the best direction so far.
        """

        def probed(direction: Direction) -> Direction:
            score = probe(direction)
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
