"""Judge the answers of methods on every set, and make the numbers and grids of the report.

Knows answers and judges; nothing of how answers were found, nor of how a report looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.judging import Goal, Judged, Judges, edited_images, goal_of, judge_edits, released_scores
from eval.methods import METHODS, Answer, Bench, right_answer
from eval.metrics import (
    essence_by_attribute,
    frechet_distance,
    identity_by_attribute,
    interval,
    kernel_distance,
)
from eval.sets import ADVERSARIAL, EvalSet, Sources
from predictor.editing import edits_sheet
from targetclip.losses import unit_cosines
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.scene import Scene
from targetclip.seeds import TEST_SOURCES, seed_of

RIGHT_ANSWER = "right-answer"
REFERENCE = "mapper"  # compared with the others, where it was run
RELEASED_SOURCES = 68
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
SHOWN = 8  # sources in a row of a grid


# Numbers of trials


def means(
    trials: Mapping[str, Judged],
    count: int,
    references: Float[Tensor, "images features"],
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return scores over the first `count` targets, of every method that has as many."""
    rows: dict[str, dict[str, Any]] = {}
    for name, trial in trials.items():
        if len(trial) < count:
            continue
        features = trial.after.features[:count].flatten(0, 1)
        rows[name] = {
            **{score: interval(v[:count], seed) for score, v in trial.scores.items()},
            "fid": frechet_distance(features, references),
            "kid": kernel_distance(features, references),
            "images": len(features),
        }
    return rows


def differences(
    trials: Mapping[str, Judged], reference: str, seed: int
) -> dict[str, dict[str, Any]]:
    """Return scores of the reference less those of each other method, over the targets of both."""
    rows: dict[str, dict[str, Any]] = {}
    own = trials[reference]
    for name, trial in trials.items():
        count = min(len(own), len(trial))
        if name != reference:
            rows[name] = {
                score: interval(own.scores[score][:count] - values[:count], seed)
                for score, values in trial.scores.items()
            }
    return rows


def by_attribute(trial: Judged) -> dict[str, dict[str, float]]:
    """Return essence acquired and identity kept of each attribute; empty without a reader."""
    readings, before, truth = trial.after.readings, trial.before.readings, trial.goal.truth
    if readings is None or before is None:
        return {}
    scores = {"identity": identity_by_attribute(readings, before)}
    if truth is not None:
        scores["essence"] = essence_by_attribute(readings, before, truth.readings, truth.seen)
    return scores


def by_rank(scores: Float[Tensor, " targets"]) -> dict[str, int]:
    """Return the places of the targets with the best, the median and the worst score."""
    order: Sequence[int] = scores.argsort(descending=True, stable=True).tolist()
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def reference_of(trials: Mapping[str, Judged]) -> str:
    return REFERENCE if REFERENCE in trials else next(iter(trials))


# The comparison


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that all methods are judged with, beside their answers."""

    bench: Bench
    judges: Judges
    references: Float[Tensor, "images features"]
    """Features of unedited images for FID and KID."""
    first: int
    """Targets of a set that every method has answered."""
    seed: int
    """Of the bootstrap."""

    def judge(self, edits: Tensor, goal: Goal, strength: float = 1.0) -> Judged:
        """Judge edits [targets, sources, num_ws, w_dim] of the test sources."""
        return judge_edits(self.judges, goal, self.bench.sources, edits, strength)

    def judge_right(self, targets: EvalSet) -> Judged | None:
        """Judge the right answer; None where the content of targets or sources is not known."""
        bench = self.bench
        if targets.truth is None or not bench.generated or bench.scene.inverter is None:
            return None
        edits = right_answer(bench.scene, targets.truth, bench.sources)
        return self.judge(edits, goal_of(self.judges, targets))

    def judge_all(
        self, targets: EvalSet, answers: Mapping[str, Answer], right: bool
    ) -> dict[str, Judged]:
        """Judge every method's answer to a set; the right answer too, if asked for and known."""
        trials: dict[str, Judged] = {}
        for name, answer in tqdm(answers.items(), f"judge {targets.name}", unit="method"):
            edits = answer.on(self.bench.sources)
            trials[name] = self.judge(edits, goal_of(self.judges, targets.part(0, len(edits))))
        known = self.judge_right(targets) if right else None
        return trials if known is None else {**trials, RIGHT_ANSWER: known}


def reference_features(judges: Judges, count: int) -> Float[Tensor, "images features"]:
    """Return the features of so many generated images."""
    scene = judges.scene
    latents = scene.latents([seed_of("reference", i) for i in range(count)])
    parts = latents.split(scene.at_once)
    bar = tqdm(parts, "references", unit="batch", leave=False)
    return torch.cat([judges.outputs(scene.render(part)).features for part in bar])


# Parts of report.json


def method_report(trial: Judged, answer: Answer | None) -> dict[str, Any]:
    """Return the report of one method on one set; the right answer has no seconds."""
    row: dict[str, Any] = {"count": len(trial)}
    if answer is not None:
        expected = None if answer.expected is None else answer.expected.tolist()
        row |= {"seconds": answer.seconds, "timing": answer.timing}
        row |= {"notes": list(answer.notes), "expected": expected}
    scores = {score: values.tolist() for score, values in trial.scores.items()}
    return row | {"scores": scores, "attributes": by_attribute(trial)}


def set_report(
    comparison: Comparison,
    targets: EvalSet,
    answers: Mapping[str, Answer],
    trials: Mapping[str, Judged],
) -> dict[str, Any]:
    """Return the report of a set."""
    goal, count, reference = goal_of(comparison.judges, targets), len(targets), reference_of(trials)
    references, seed = comparison.references, comparison.seed
    fewer = {len(trial) for trial in trials.values()} - {count}
    bench, judges = comparison.bench, comparison.judges
    before = judges.outputs(bench.scene.render(bench.sources)).embeddings
    unedited = unit_cosines(before, goal.embeddings[:, None])
    return {
        "targets": [list(pair) for pair in zip(targets.ids, targets.origins, strict=True)],
        "unedited": float(unedited.mean()),
        "methods": {name: method_report(t, answers.get(name)) for name, t in trials.items()},
        # Over all targets, of methods that answered them all; over the first ones, of all methods.
        "all": means(trials, count, references, seed),
        "first": means(trials, min(fewer), references, seed) if fewer else {},
        "reference": reference,
        "differences": differences(trials, reference, seed),
    }


def released_report(
    comparison: Comparison, sets: Sequence[EvalSet], answers: Mapping[str, Mapping[str, Answer]]
) -> dict[str, Any]:
    """Return the released evaluation of every method whose edits reach any source.

    Targets are the first ones of each set but the adversarial one, the same for all methods.
    Sources are 68 generated ones, or those of a file, if the test sources are.
    """
    parts = [t.part(0, comparison.first) for t in sets if t.name != ADVERSARIAL]
    targets = EvalSet(
        name="released",
        ids=tuple(name for part in parts for name in part.ids),
        origins=tuple(origin for part in parts for origin in part.origins),
        pictures=tuple(picture for part in parts for picture in part.pictures),
    )
    bench = comparison.bench
    sources = bench.sources
    if bench.generated:
        sources = bench.scene.sources(RELEASED_SOURCES, TEST_SOURCES)
    names = [
        name
        for name, method in METHODS.items()
        if not method.per_source and all(name in answers[part.name] for part in parts)
    ]
    methods: dict[str, Any] = {}
    for name in tqdm(names, "released", unit="method"):
        edits = [answers[part.name][name].on(sources)[: len(part)] for part in parts]
        methods[name] = released_scores(
            comparison.judges, sources, torch.cat(edits), targets, comparison.references
        )
    return {"targets": len(targets), "sources": len(sources), "methods": methods}


def sweep_report(
    comparison: Comparison, targets: EvalSet, answers: Mapping[str, Answer]
) -> dict[str, list[dict[str, float]]]:
    """Return mean scores by strength, over the first targets of a set, of every method."""
    few = targets.part(0, comparison.first)
    goal = goal_of(comparison.judges, few)
    rows: dict[str, list[dict[str, float]]] = {}
    for name, answer in tqdm(answers.items(), "strengths", unit="method"):
        rows[name], edits = [], answer.on(comparison.bench.sources)[: len(few)]
        for strength in STRENGTHS:
            judged = comparison.judge(edits, goal, strength)
            scores = {score: float(values.mean()) for score, values in judged.scores.items()}
            rows[name].append({"strength": strength, **scores})
    return rows


# Grids of pictures


def sheet(
    scene: Scene,
    targets: EvalSet,
    sources: Sources,
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
) -> Image.Image:
    """Return the first nine sources, then for each target a row: its picture, and them edited.

    Edits are a direction for each target, or an offset for each of its sources.
    """
    rows = {
        f"target {i} and sources with its essence": (picture, edit if edit.ndim == 2 else edit[:9])
        for i, (picture, edit) in enumerate(zip(targets.pictures, edits, strict=True))
    }
    return edits_sheet(scene, sources[:9], rows)


def grids(
    comparison: Comparison,
    targets: EvalSet,
    answers: Mapping[str, Answer],
    trials: Mapping[str, Judged],
) -> dict[str, Image.Image]:
    """Return a grid of each method, and one of all on the same target, by their files' names.

    Targets are chosen by rank. A method's grid shows its best, median and worst target. The grid of
    all shows the reference's median among the first ones, which every method has answered.
    """
    sources, scene = comparison.bench.sources, comparison.bench.scene
    unedited = tensor_to_pictures(scene.render(sources[:SHOWN]))

    def edited(name: str, place: int) -> list[Image.Image]:
        if name in answers:
            edit = answers[name].on(sources)[place : place + 1]
        else:
            truth = targets.part(place, place + 1).truth
            if truth is None:
                raise ValueError(f"expected edits of {name!r}, found none")
            edit = right_answer(scene, truth, sources)
        (images,) = edited_images(scene, sources, edit)
        return tensor_to_pictures(images[:SHOWN])

    pictures = {}
    for name, trial in trials.items():
        scores = trial.scores["transfer"]
        rows = {"sources": [Image.new("RGB", unedited[0].size, "white"), *unedited]}
        for rank, i in by_rank(scores).items():
            label = f"{name}, {rank} of {len(scores)}: {targets.origins[i]}, {float(scores[i]):.3f}"
            rows[label] = [targets.pictures[i], *edited(name, i)]
        pictures[f"{targets.name} {name}"] = labelled_grid(None, rows)
    first = trials[reference_of(trials)].scores["transfer"][: comparison.first]
    place = by_rank(first)["median"]
    rows = {"sources": unedited}
    for name, trial in trials.items():
        if place < len(trial):
            score = float(trial.scores["transfer"][place])
            rows[f"{name}: transfer score {score:.3f}"] = edited(name, place)
    pictures[f"{targets.name} all"] = labelled_grid(
        targets.pictures[place], rows, targets.origins[place]
    )
    return pictures
