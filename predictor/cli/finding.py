"""Directions for the `targetclip` command: found or read, recorded, and written.

Knows which searches are shown and why each begins; nothing of sources.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from predictor.cli.console import Console
from predictor.cli.options import Request
from predictor.cli.output import DIRECTION, OutputFolder
from predictor.cli.report import (
    NamedTarget,
    Outcome,
    inversion_facts,
)
from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    Method,
    WatchSearch,
    WatchStep,
    mixed,
    read_direction,
)
from predictor.transfer import EssenceTransfer
from targetclip.command import (
    in_precision,
    write_file,
)
from targetclip.optimize import Progress
from targetclip.recipes import Recipe
from targetclip.scene import Scene

NO_EFFECT = "--one-direction has no effect: there is no correction for each source to leave out"


class Searches:
    """Shows the searches for one target: why each begins, and its steps."""

    def __init__(self, request: Request, console: Console, bars: ExitStack) -> None:
        self.request, self.console, self.bars = request, console, bars
        self.reason = ""

    def probed(self, score: float, threshold: float) -> None:
        """Remember a probe score, the reason of the next search."""
        self.reason = f"probe score {score:.2f}, {threshold:.2f} wanted: "

    def begun(self, method: Method, recipe: Recipe) -> WatchStep:
        """Open a bar for a search, and close that of the last."""
        self.bars.close()
        verb = "refine" if method == "refined" else "optimize"
        if self.reason:
            self.console.progress(self.reason + ("refining" if verb == "refine" else "optimizing"))
        name = self.request.recipe_name
        bar = self.console.bar(total=recipe.steps, desc=f"{verb} ({name})", unit="step")
        self.bars.enter_context(bar)

        def on_step(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.loss[0]:.4f}", refresh=False)
            bar.update()

        return on_step


def find_one(
    essence: EssenceTransfer, target: NamedTarget, request: Request, console: Console
) -> Direction:
    """Find the direction of one target, and warn of a target that is out of place."""
    assert request.mode is not None
    with ExitStack() as bars, in_precision(essence.scene.device, request.precision):
        searches = Searches(request, console, bars)
        watch: WatchSearch = searches.begun
        direction = essence.direction(
            target.content,
            request.mode,
            request.recipe,
            request.seed,
            watch,
            watch_probe=searches.probed,
            one_direction=request.one_direction,
        )
    if request.mode == "optimize":
        return direction
    try:
        gate = Gate.of(essence.asked_mapper())
    except ValueError:  # not calibrated, so nothing is known of what is usual
        return direction
    probe = direction.probe
    if probe is None:
        embedding = essence.embed_target(target.content)
        probe = essence.probe_score(embedding, direction, gate.probes)
    if not gate.passes(probe):
        more = "; --mode auto refines such answers" if request.mode == "instant" else ""
        console.warn(
            f"{target.name}: the target looks out of place: its probe score is {probe:.2f}, and "
            f"{gate.threshold:.2f} or more is usual for this mapper{more}"
        )
    return dataclasses.replace(direction, probe=probe)


def find_direction(
    essence: EssenceTransfer,
    targets: Sequence[NamedTarget],
    request: Request,
    console: Console,
) -> Outcome:
    """Find the direction of one target, after Ctrl-C the best so far; or the mixture of several."""
    if request.mode is None:
        assert request.direction is not None  # where there is no mode
        direction, record = read_direction(request.direction, essence.scene.generator)
        if request.one_direction:
            if direction.correction is None:
                console.warn(NO_EFFECT)
            direction = direction.uncorrected()
        return Outcome(direction, record, [])
    if request.one_direction and essence.asked_mapper().correction is None:
        console.warn(NO_EFFECT)
    parts, interrupted = list[Direction](), False
    try:
        for target in targets:
            parts.append(find_one(essence, target, request, console))
    except Interrupted as stopped:
        if len(targets) > 1:  # a mixture needs every direction
            raise
        console.progress("interrupted; going on with the direction so far")
        parts, interrupted = [stopped.direction], True
    weights = [target.weight for target in targets]
    direction = parts[0] if weights == [1] else mixed(parts, weights)
    record = record_of(essence, direction, targets, request)
    if interrupted:
        record["interrupted"] = True
    return Outcome(direction, record, parts, interrupted)


def record_of(
    essence: EssenceTransfer,
    direction: Direction,
    targets: Sequence[NamedTarget],
    request: Request,
) -> dict[str, Any]:
    """Return the record of a direction: what made it, and by which settings."""
    record: dict[str, Any] = {
        "method": direction.method,
        "mode": request.mode,
        "seed": request.seed,
        "steps": direction.steps,
        "embedder": essence.scene.embedder.fingerprint,
    }
    if request.precision != "fp32":
        record["precision"] = request.precision
    if request.mode != "instant":
        record["recipe"] = request.recipe_name
        record["settings"] = dataclasses.asdict(request.recipe)
        if request.inverts_target:
            record |= inversion_facts(request)
    if request.mode != "optimize":
        mapper = essence.asked_mapper()
        record["mapper"] = mapper.fingerprint
        if request.one_direction:
            record["one_direction"] = True
        if request.mode != "instant":
            record["gate"] = dataclasses.asdict(Gate.of(mapper))
    if [target.weight for target in targets] != [1]:
        record["targets"] = [{"target": t.name, "weight": t.weight} for t in targets]
    return record


def write_direction(out: OutputFolder, scene: Scene, outcome: Outcome) -> None:
    """Write direction.safetensors."""
    content = outcome.direction.content(outcome.record, scene.generator.fingerprint)
    write_file(out.take(DIRECTION), content)
