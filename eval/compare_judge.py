"""From answers to what the report says: every set judged, the released evaluation, strengths.

Knows methods' answers and the judges; nothing of how answers were found, nor of how a report looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from eval.answers import Run
from eval.grids import grids
from eval.judging import Judges, Look, edited_images, goal_of, judge, released_scores
from eval.methods import METHODS, Bench, drawn_answer
from eval.metrics import transfer_scores
from eval.sets import ADVERSARIAL, SOURCE_SEED, EvalSet
from eval.summary import Trial, by_attribute, differences, means
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.sources import generated_sources
from targetclip.scene import random_latents
from targetclip.seeds import seed_of

DRAWN_ANSWER = "drawn-answer"
REFERENCE = "mapper"  # what the others are compared with, where it was run
RELEASED_SOURCES = 68
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)


@dataclass(frozen=True)
class Stage:
    """What judging takes, beside the answers."""

    bench: Bench
    judges: Judges
    before: Float[Tensor, "sources 3 height width"]
    """The test sources, unedited."""
    look: Look
    """At them."""
    references: Float[Tensor, "images features"]
    """Of unedited images that FID and KID compare with."""
    first: int
    """Targets of a set that every method has answered."""
    seed: int

    @staticmethod
    def of(bench: Bench, judges: Judges, references: int, first: int, seed: int) -> "Stage":
        essence, before = bench.essence, judges.render(bench.sources)
        seeds = [seed_of("reference", i) for i in range(references)]
        latents = random_latents(essence.generator, seeds, essence.truncation)
        parts = tqdm(latents.split(judges.max_images), "references", unit="batch", leave=False)
        features = [judges.look(judges.render(part)).features for part in parts]
        return Stage(bench, judges, before, judges.look(before), torch.cat(features), first, seed)


def drawn_trial(stage: Stage, targets: EvalSet) -> Trial | None:
    """The drawn answer's scores; None where nothing is known of what targets show."""
    sources, z_dim = stage.bench.sources, stage.bench.essence.generator.z_dim
    if targets.truth is None:
        return None
    before, edited = drawn_answer(targets.truth.faces, z_dim, len(sources))
    before = before.to(sources.device)
    judged = judge(stage.judges, before, edited.to(sources.device))
    return Trial.of(judged, stage.judges.look(before), goal_of(stage.judges, targets))


def judged_trials(
    stage: Stage, targets: EvalSet, runs: Mapping[str, Run], drawn: bool
) -> dict[str, Trial]:
    """Every method's scores on a set; those of the drawn answer too, if wanted and there."""
    trials: dict[str, Trial] = {}
    for name, run in tqdm(runs.items(), f"judge {targets.name}", unit="method"):
        edits = run.answer.edits
        edited = edited_images(stage.judges, stage.bench.sources, edits)
        goal = goal_of(stage.judges, targets.part(0, len(edits)))
        trials[name] = Trial.of(judge(stage.judges, stage.before, edited), stage.look, goal)
    answer = drawn_trial(stage, targets) if drawn else None
    return trials if answer is None else {**trials, DRAWN_ANSWER: answer}


def reference_of(trials: Mapping[str, Trial]) -> str:
    return REFERENCE if REFERENCE in trials else next(iter(trials))


def method_report(trial: Trial, run: Run | None) -> dict[str, Any]:
    """All that is said of one method on one set; what was drawn and not run has no seconds."""
    row: dict[str, Any] = {"count": len(trial)}
    if run is not None:
        expected = run.answer.expected
        row |= {"seconds": run.seconds, "timing": run.timing, "notes": list(run.answer.notes)}
        row |= {"expected": None if expected is None else expected.tolist()}
    scores = {score: values.tolist() for score, values in trial.scores.items()}
    return row | {"scores": scores, "attributes": by_attribute(trial)}


def set_report(
    stage: Stage, targets: EvalSet, runs: Mapping[str, Run], trials: Mapping[str, Trial]
) -> dict[str, Any]:
    """What report.json says of a set."""
    goal, count, reference = goal_of(stage.judges, targets), len(targets), reference_of(trials)
    unedited = stage.look.embeddings.expand(count, -1, -1)
    fewer = {len(trial) for trial in trials.values()} - {count}
    return {
        "targets": [list(pair) for pair in zip(targets.ids, targets.origins, strict=True)],
        "unedited": float(transfer_scores(unedited, goal.embeddings).mean()),
        "methods": {name: method_report(t, runs.get(name)) for name, t in trials.items()},
        # Over all targets, of methods that answered them all; over the first ones, of all methods.
        "all": means(trials, count, stage.references, stage.seed),
        "first": means(trials, min(fewer), stage.references, stage.seed) if fewer else {},
        "reference": reference,
        "differences": differences(trials, reference, stage.seed),
    }


def write_grids(
    out: Path,
    stage: Stage,
    targets: EvalSet,
    runs: Mapping[str, Run],
    trials: Mapping[str, Trial],
) -> None:
    """Pictures of a set's edits, into `out`/grids."""
    judges, sources = stage.judges, stage.bench.sources

    def edited(name: str, place: int) -> Float[Tensor, "sources 3 height width"]:
        if name in runs:
            edits = runs[name].answer.edits[place : place + 1]
            return next(iter(edited_images(judges, sources, edits)))
        truth = targets.part(place, place + 1).truth
        if truth is None:
            raise ValueError(f"expected edits of {name!r}, found none")
        return drawn_answer(truth.faces, stage.bench.essence.generator.z_dim, len(sources))[1][0]

    (out / "grids").mkdir(exist_ok=True)
    unedited = tensor_to_pictures(stage.before)
    found = grids(trials, reference_of(trials), stage.first, targets, unedited, edited)
    for name, picture in found.items():
        write_picture(picture, out / "grids" / f"{name}.png")


def released_report(
    stage: Stage, sets: Sequence[EvalSet], runs: Mapping[str, Mapping[str, Run]]
) -> dict[str, Any]:
    """The released evaluation, of every method that answers with directions.

    Targets are the first ones of each set but the adversarial one, the same for all methods.
    """
    essence = stage.bench.essence
    chosen = [t.part(0, stage.first) for t in sets if t.name != ADVERSARIAL]
    targets = EvalSet(
        "released",
        tuple(id_ for part in chosen for id_ in part.ids),
        tuple(origin for part in chosen for origin in part.origins),
        tuple(picture for part in chosen for picture in part.pictures),
    )
    sources = generated_sources(
        essence.generator, essence.truncation, RELEASED_SOURCES, SOURCE_SEED
    )
    names = [name for name in METHODS if all(name in runs[part.name] for part in chosen)]
    methods: dict[str, Any] = {}
    for name in tqdm([n for n in names if not METHODS[n].per_source], "released", unit="method"):
        edits = torch.cat([runs[part.name][name].answer.edits[: len(part)] for part in chosen])
        scores = released_scores(stage.judges, sources, edits, targets, stage.references)
        methods[name] = {score: asdict(spread) for score, spread in scores.items()}
    return {"targets": len(targets), "sources": len(sources), "methods": methods}


def sweep_report(
    stage: Stage, targets: EvalSet, runs: Mapping[str, Run]
) -> dict[str, list[dict[str, float]]]:
    """Mean scores by strength, over the first targets of a set, of every method."""
    few = targets.part(0, stage.first)
    goal = goal_of(stage.judges, few)
    rows: dict[str, list[dict[str, float]]] = {}
    for name, run in tqdm(runs.items(), "strengths", unit="method"):
        edits, rows[name] = run.answer.edits[: len(few)], []
        for strength in STRENGTHS:
            edited = edited_images(stage.judges, stage.bench.sources, edits, strength)
            trial = Trial.of(judge(stage.judges, stage.before, edited), stage.look, goal)
            scores = {score: float(values.mean()) for score, values in trial.scores.items()}
            rows[name].append({"strength": strength, **scores})
    return rows
