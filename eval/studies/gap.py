"""Place a mapper between no edit and the best edit that can be found, and say what the gap is.

    python -m eval.studies.gap --out runs/gap            # meant for a GPU

The objective is the one that the mapper was trained by, on sources that it has not seen: transfer,
consistency and identity terms, and half the weight decay times the squared length of the edits. Its
value is 0 at no edit and 1 at the best edit found: the best of --restarts searches of --times as
many steps as the teacher takes, for a direction and for an edit of each source on its own. Between
them stand the mapper, the teacher (with that weight decay, with its recipe's, with a fifth of it),
searches held to what the mapper's last matrices can say, and searches that start at its answer.

Targets and sources are those of validation; those of the evaluation are asked for by --test, once a
mapper is final. Writes report.json after each search, report.md, charts and a sheet of pictures.
The same command goes on after an interruption.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import Precision, choose_precision, in_precision, start
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import seed_of
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md, charts and the sheet."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """A mapper's file. Default: the world's."""
    targets: int = 64
    """Targets; every second one is in the generator's style."""
    sources: int = 4
    """Sources that edits are judged on. The edits of each source are searched on them."""
    restarts: int = 4
    """Searches for the best edit, from different starts."""
    times: int = 4
    """Their steps, in steps of the teacher."""
    max_steps: int | None = None
    """Cut the teacher to so many steps."""
    max_images: int | None = None
    """Images of a search at once. Default: all of a step."""
    precision: Precision | None = None
    """Of searches; scores are in float32. Default: accelerate's, or else fp32."""
    test: bool = False
    """Judge on test targets and test sources, instead of those of validation."""
    seed: int = 0
    """Of searches and bootstrap."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.gap", Config, exclusive=True)

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.publish import sha256_of
from eval.answers import earlier_report
from eval.costs import seconds_of
from eval.judging import Judges, face_judges, goal_of, judge_edits
from eval.metrics import interval, interval_kept
from eval.reader import BUNDLED
from eval.report import Series, check_charts, line_chart, table, with_bounds
from eval.sets import EvalSet, Sources, targets_and_sources
from predictor.editing import edits_sheet
from predictor.mapper import Mapper, load_mapper
from predictor.mapper_file import trained_recipe
from targetclip.graphs import Replayed
from targetclip.media.images import write_picture
from targetclip.optimize import Progress, draw_sources, learning_rate, losses_of
from targetclip.scene import Scene, random_latents
from targetclip.weights import read_tensors, save_tensors

FORMAT = "targetclip-gap/1"
REFINE_RATE = 0.03  # as the product refines
# Of searches for edits of each source. With the recipe's 0.2, 600 steps from none end higher than
# 150 at 0.03 from the mapper's answer; with 0.05, those from the mapper's answer end lower. In the
# coordinates of a span, 0.03 never gets below its start and 0.01 does.
EDIT_RATE, SPAN_RATE = 0.05, 0.01
LOW_DECAY = 0.2  # of the teacher whose transfer score is higher, as a part of the recipe's
MARKS = (0, 1, 2, 5, 10, 20, 40, 80, 150, 300, 600, 1200)  # steps at which curves have a point
REACHED = 0.99
SHORTEST = 1e-6  # way of a loss, of those that are divided by
SHOWN = 4  # targets of the sheet
SCORES = ("transfer", "consistency", "essence", "identity")

NOTHING, MAPPER, ALONE = "no edit", "mapper", "mapper, its direction alone"
TEACHER, SHIPPED, LOW = "teacher", "teacher, its recipe's decay", "teacher, a fifth of that decay"
DIRECTION, EDIT = "best direction", "best edit of each source"
DIRECTION_IN_SPAN, EDIT_IN_SPAN = f"{DIRECTION}, mapper's span", f"{EDIT}, mapper's span"
REFINED_DIRECTION, REFINED = "mapper, direction refined", "mapper, edit of each source refined"
REFINED_IN_SPAN, SECOND = f"{REFINED}, its span", "mapper, second pass"
PARTS = (0.0, 0.25, 0.5, 1.0)  # of a second pass's answer, the best of which is added

ALL = slice(None)
Edits = Float[Tensor, "rows #sources num_ws w_dim"]
"""An edit for each source, or one for all."""
Losses = Float[Tensor, " rows"]


# The objective and its descent


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The objective of a recipe for given sources."""

    scene: Scene
    recipe: Recipe
    sources: Sources
    before: Float[Tensor, "sources features"]
    """Of the unedited sources."""

    @staticmethod
    def of(scene: Scene, recipe: Recipe, sources: Sources) -> "Objective":
        with torch.no_grad():
            before = scene.features(sources, recipe.preprocess, recipe.identity_weight)
        return Objective(scene=scene, recipe=recipe, sources=sources, before=before)

    def __call__(
        self,
        edits: Edits,
        targets: Float[Tensor, "rows embed"],
        chosen: Int[Tensor, " some"] | None = None,
    ) -> Losses:
        """Return the loss of each row's edits of all sources, or of those `chosen`."""
        picked = slice(None) if chosen is None else chosen
        sources, before, recipe = self.sources[picked], self.before[picked], self.recipe
        edited = sources + edits
        after = self.scene.features(edited.flatten(0, 1), recipe.preprocess, recipe.identity_weight)
        after = after.unflatten(0, edited.shape[:2])
        losses = losses_of(recipe, before.expand_as(after), after, targets)
        squares = edits.square().sum(dim=(2, 3)).mean(dim=1)
        loss: Losses = losses.loss + recipe.weight_decay / 2 * squares
        return loss


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found for each row."""

    edits: Edits
    curve: Float[Tensor, "marks rows"]
    """Losses at `marks_of` its steps."""


def marks_of(steps: int) -> list[int]:
    """Return the steps at which a search of so many has a point on its curve."""
    return sorted({mark for mark in MARKS if mark < steps} | {steps})


def descend(
    objective: Callable[..., Losses],
    targets: Float[Tensor, "rows embed"],
    start: Tensor,
    edits_of: Callable[[Tensor], Edits],
    steps: int,
    rate: float,
    *,
    label: str,
    draw: Callable[[], Tensor] | None = None,
) -> Found:
    """Minimise an objective by Adam over what `edits_of` makes edits of, each row by itself.

    Args:
        start: parameters, a row for each target.
        draw: returns the places of the sources that a step edits. None: all, and the parameters of
            the lowest loss are returned, not the last ones.
    """

    def measure(parameters: Tensor, targets: Tensor, *chosen: Tensor) -> tuple[Tensor, ...]:
        leaf = parameters.detach().requires_grad_(True)
        loss = objective(edits_of(leaf), targets, *chosen)
        return loss.detach(), *torch.autograd.grad(loss.sum(), [leaf])

    parameters, replayed = start.detach().clone(), Replayed(measure)
    adam = torch.optim.Adam([parameters])
    best, lowest = parameters.detach().clone(), torch.full((len(start),), torch.inf)
    lowest, curve = lowest.to(start.device), []
    marks = marks_of(steps)
    for step in tqdm(range(steps + 1), label, unit="step", leave=False):
        loss, gradient = replayed(parameters, targets, *(() if draw is None else (draw(),)))
        if not loss.isfinite().all():
            raise FloatingPointError(f"{label}: the loss of step {step} is not finite")
        better = (loss < lowest) | (draw is not None)
        best[better], lowest = parameters[better], torch.where(better, loss, lowest)
        if step in marks:
            curve.append(lowest.cpu())
        if step < steps:
            parameters.grad = gradient
            adam.param_groups[0]["lr"] = learning_rate(step, steps, rate)
            adam.step()
    with torch.no_grad():
        return Found(edits=edits_of(best).detach(), curve=torch.stack(curve))


def span_of(weights: Sequence[Tensor], num_ws: int) -> Float[Tensor, "rank num_ws w_dim"]:
    """Return an orthonormal basis of what columns of matrices span."""
    columns = torch.cat(list(weights), dim=1).double()
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, sizes > 1e-6 * sizes[0]].T.unflatten(1, (num_ws, -1)).float()
    return basis


# The searches


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that searches and scores need."""

    config: Config
    judges: Judges
    mapper: Mapper
    recipe: Recipe
    """The teacher's, with the weights that the mapper was trained by."""
    decay: float
    """The teacher's own weight decay."""
    targets: EvalSet
    embeddings: Float[Tensor, "targets embed"]
    objective: Objective
    """On the sources that judge."""
    bank: Objective
    """On the bank."""
    precision: Precision

    @property
    def scene(self) -> Scene:
        return self.judges.scene

    @property
    def sources(self) -> Sources:
        return self.objective.sources

    @torch.no_grad()
    def losses(self, edits: Edits, part: slice = ALL) -> Losses:
        """Return the losses of edits of each target of a part, in float32."""
        with torch.autocast(self.scene.device.type, enabled=False):
            edits = edits.expand(-1, len(self.sources), -1, -1)
            losses: Losses = self.objective(edits, self.embeddings[part]).cpu()
        return losses

    def in_parts(self, search: Callable[[slice], Found], images: int) -> Found:
        """Search for a part of the targets at a time, by images of a target at once."""
        at_once = len(self.embeddings)
        if self.config.max_images is not None:
            at_once = max(1, self.config.max_images // images)
        found = []
        with in_precision(self.scene.device, self.precision):
            for first in range(0, len(self.embeddings), at_once):
                found.append(search(slice(first, first + at_once)))
        edits = torch.cat([part.edits for part in found])
        curve = torch.cat([part.curve for part in found], dim=1)
        curve[-1] = self.losses(edits)
        return Found(edits=edits, curve=curve)

    def starts(self, restart: int, mapped: Edits) -> Edits:
        """Return the starts of a restart: none, the mapper's, then halves of random latents."""
        if restart == 0:
            return torch.zeros_like(mapped)
        if restart == 1:
            return mapped
        seeds = [seed_of("gap", self.config.seed, restart, name) for name in self.targets.ids]
        random = random_latents(self.scene.generator, seeds) - self.scene.generator.mean_w
        return (random[:, None] / 2).expand_as(mapped)

    # Directions, searched on the bank by the product's optimizer

    def search_direction(
        self,
        start: Float[Tensor, "targets num_ws w_dim"],
        recipe: Recipe,
        label: str,
        corrected: bool = False,
    ) -> Found:
        """Search a direction of each target, with the mapper's corrections held if `corrected`."""
        scene, marks = self.scene, marks_of(recipe.steps)
        bank, count = self.bank.sources, recipe.sources

        def search(part: slice) -> Found:
            embeddings, marked = self.embeddings[part], [start[part]]
            held = self.mapper.correct(embeddings, bank) if corrected else None
            seeds = [seed_of("gap", self.config.seed, name) for name in self.targets.ids[part]]
            with tqdm(total=recipe.steps, desc=label, unit="step", leave=False) as bar:

                def on_step(progress: Progress) -> None:
                    bar.update()
                    if progress.step + 1 in marks:
                        marked.append(progress.directions.detach().clone())

                found = replace(scene, max_images=len(embeddings) * count).search(
                    embeddings,
                    recipe,
                    start[part],
                    seeds,
                    bank=bank,
                    bank_features=self.bank.before,
                    held=held,
                    on_step=on_step,
                )
            if failures := [failure for failure in found.failures if failure is not None]:
                raise FloatingPointError(f"{label}: {failures[0]}")
            own = self.mapper.correct(embeddings, self.sources) if corrected else 0
            edits = [directions[:, None] + own for directions in marked]
            return Found(
                edits=edits[-1], curve=torch.stack([self.losses(at, part) for at in edits])
            )

        return self.in_parts(search, count)

    # Edits of each source, searched on the sources that judge

    def search_edits(
        self,
        start: Edits,
        label: str,
        basis: Tensor | None = None,
        *,
        on_bank: bool = False,
        gently: bool = False,
    ) -> Found:
        """Search edits of the sources that judge, each on its own, or directions on the bank.

        Args:
            basis: what edits are held to the span of; None: all of W+.
            gently: as many steps as the teacher takes, in smaller ones.
        """
        recipe = self.recipe
        steps = recipe.steps * (1 if gently else self.config.times)
        rate = SPAN_RATE if basis is not None else REFINE_RATE if gently else EDIT_RATE
        flat = None if basis is None else basis.flatten(1)
        parameters = start if flat is None else start.flatten(2) @ flat.T

        def edits_of(parameters: Tensor) -> Edits:
            if flat is None:
                return parameters
            with torch.autocast(parameters.device.type, enabled=False):
                edits: Edits = (parameters @ flat).unflatten(-1, start.shape[-2:])
            return edits

        def search(part: slice) -> Found:
            draws = [torch.Generator().manual_seed(seed_of("gap", self.config.seed, label))]

            def draw() -> Tensor:
                count = len(objective.sources)
                return draw_sources(count, recipe.sources, True, draws)[0].to(start.device)

            rows, first, drawn = self.embeddings[part], parameters[part], draw if on_bank else None
            return descend(objective, rows, first, edits_of, steps, rate, label=label, draw=drawn)

        objective = self.bank if on_bank else self.objective
        return self.in_parts(search, recipe.sources if on_bank else len(self.sources))

    def spans(self) -> tuple[Tensor, Tensor]:
        """Return what the mapper's directions span, and its edits: all of W+ where a last layer is
        free."""
        mapper, num_ws = self.mapper, self.mapper.config.num_ws
        scale = mapper.scale.flatten()[:, None]
        last = mapper.direction if mapper.basis is None else mapper.basis
        weights = [scale * last.weight]
        if mapper.correction is not None:
            weights.append(scale * mapper.correction.basis.weight)
        return span_of(weights[:1], num_ws), span_of(weights, num_ws)

    @torch.no_grad()
    def second_pass(self, mapped: Edits) -> Edits:
        """Return edits with the mapper's answer to what is left: to the target's embedding less
        that of each edited source. As much of it is added as makes the loss lowest."""
        unit = torch.nn.functional.normalize
        left = unit(self.embeddings)[:, None] - unit(
            self.scene.features((self.sources + mapped).flatten(0, 1), self.recipe.preprocess)
        ).unflatten(0, mapped.shape[:2])
        answers = self.mapper.directions_of_differences(left.flatten(0, 1))
        tried = [mapped + part * answers.view_as(mapped) for part in PARTS]
        losses = torch.stack([self.losses(edits) for edits in tried])
        best: Edits = torch.stack(tried)[losses.argmin(dim=0), range(len(mapped))]
        return best

    # All of them

    def work(self) -> dict[str, Callable[[], Found]]:
        """Return what finds edits of the targets, the restarts of a search under numbered names."""
        recipe = self.recipe
        directions = self.mapper(self.embeddings).directions
        nothing = torch.zeros_like(directions)
        mapped = (directions[:, None] + self.mapper.correct(self.embeddings, self.sources)).clone()
        direction_span, edit_span = self.spans()
        longer = replace(recipe, steps=recipe.steps * self.config.times)
        shipped = replace(recipe, weight_decay=self.decay)
        low = replace(recipe, weight_decay=LOW_DECAY * self.decay)
        gentle = replace(recipe, learning_rate=REFINE_RATE)
        given, search, edits = self.given, self.search_direction, self.search_edits
        work: dict[str, Callable[[], Found]] = {
            NOTHING: partial(given, nothing[:, None]),
            ALONE: partial(given, directions[:, None]),
            MAPPER: partial(given, mapped),
            SECOND: lambda: given(self.second_pass(mapped)),
            TEACHER: partial(search, nothing, recipe, TEACHER),
            SHIPPED: partial(search, nothing, shipped, SHIPPED),
            LOW: partial(search, nothing, low, LOW),
            REFINED: partial(edits, mapped, REFINED, gently=True),
            REFINED_IN_SPAN: partial(edits, mapped, REFINED_IN_SPAN, edit_span, gently=True),
            REFINED_DIRECTION: partial(
                search, directions, gentle, REFINED_DIRECTION, corrected=True
            ),
        }
        work[EDIT_IN_SPAN] = partial(edits, mapped, EDIT_IN_SPAN, edit_span)
        work[DIRECTION_IN_SPAN] = partial(
            edits, directions[:, None], DIRECTION_IN_SPAN, direction_span, on_bank=True
        )
        for i in range(self.config.restarts):
            start = self.starts(i, mapped)
            work[f"{EDIT}/{i}"] = partial(edits, start, f"{EDIT}, restart {i}")
            start = self.starts(i, directions[:, None])[:, 0]
            work[f"{DIRECTION}/{i}"] = partial(search, start, longer, f"{DIRECTION}, restart {i}")
        return work

    def given(self, edits: Tensor) -> Found:
        return Found(edits=edits, curve=self.losses(edits)[None])

    def scores(self, edits: Edits) -> dict[str, list[float]]:
        """Return scores of edits: of each a number a target."""
        per_source = edits.float().expand(-1, len(self.sources), -1, -1)
        goal = goal_of(self.judges, self.targets)
        judged = judge_edits(self.judges, goal, self.sources, per_source).scores
        return {name: judged[name].tolist() for name in SCORES if name in judged}

    @torch.no_grad()
    def seconds_a_step(self) -> dict[str, float]:
        """Time a step for one target alone, and the mapper's edits of one."""
        device, recipe = self.scene.device, replace(self.recipe, steps=3)
        one, zero = self.embeddings[:1], torch.zeros_like(self.sources[:1])
        bank, before = self.bank.sources, self.bank.before

        def direction() -> object:
            return self.scene.search(one, recipe, zero, [0], bank=bank, bank_features=before)

        def edits() -> object:
            start = zero[None].expand(-1, len(self.sources), -1, -1)
            return descend(self.objective, one, start, lambda x: x, 3, 0.0, label="time")

        taken = {}
        with torch.enable_grad(), in_precision(device, self.precision):
            for name, work in (("direction", direction), ("edit", edits)):
                work()
                taken[name] = seconds_of(work, device) / recipe.steps
        answer = partial(self.mapper.edits, one, self.sources)
        answer()
        return taken | {"mapper": seconds_of(answer, device)}


# Values


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the report tells of one way to edit; of restarts, the best one of each target."""

    edits: Edits
    loss: Losses
    curve: Float[Tensor, "marks rows"]


def rows_of(entries: Mapping[str, Any], edits: Mapping[str, Edits]) -> dict[str, Row]:
    """Return a row of each name; searches NAME/0, NAME/1 are restarts of one."""
    restarts: dict[str, list[str]] = {}
    for key in entries:
        restarts.setdefault(key.split("/")[0], []).append(key)
    rows = {}
    for name, keys in restarts.items():
        losses = torch.tensor([entries[key]["loss"] for key in keys])
        chosen = losses.argmin(dim=0)
        best = torch.stack([edits[key] for key in keys])[chosen, range(len(chosen))]
        curve = torch.tensor([entries[key]["curve"] for key in keys]).amin(dim=0)
        rows[name] = Row(edits=best, loss=losses.amin(dim=0), curve=curve)
    return rows


def part_of(
    part: Float[Tensor, " targets"], whole: Float[Tensor, " targets"], seed: int
) -> dict[str, Any]:
    """Return the part of a way, both summed over targets, with an interval over targets."""
    whole = whole.clamp_min(SHORTEST)  # in a draw of the same target again and again
    return interval_kept(((whole - part)[:, None], whole[:, None]), seed)


def summed_up(rows: Mapping[str, Row], seed: int) -> dict[str, Any]:
    """Return the values of all rows with intervals, their differences and curves.
    ValueError: no search found an edit that is better than none."""
    losses = {name: row.loss for name, row in rows.items()}
    losses[DIRECTION] = torch.minimum(losses[DIRECTION], losses[NOTHING])  # a direction as well
    nothing = losses[NOTHING]
    whole, one = nothing - losses[EDIT], nothing - losses[DIRECTION]
    if not (whole.sum() > 0 and one.sum() > 0):
        raise ValueError(
            "expected searches to find better edits than none, found none that is: give more "
            "--times or --max-steps"
        )

    def apart(upper: str, lower: str) -> dict[str, Any]:
        return part_of(losses[lower] - losses[upper], whole, seed)

    decomposition = {
        "one direction for all sources": apart(EDIT, DIRECTION),
        "a direction of the mapper's span": apart(DIRECTION, DIRECTION_IN_SPAN),
        "amortization of the direction": apart(DIRECTION_IN_SPAN, ALONE),
        "gained by reading the source": apart(MAPPER, ALONE),
        "an edit of the mapper's span": apart(EDIT, EDIT_IN_SPAN),
        "amortization of the edits": apart(EDIT_IN_SPAN, MAPPER),
    }
    curves = {
        name: [float((nothing - at).sum() / whole.sum()) for at in rows[name].curve]
        for name in (TEACHER, DIRECTION, EDIT, REFINED_DIRECTION, REFINED, REFINED_IN_SPAN)
    }
    never_worse = {
        f"{after} than {before}": float((losses[after] <= losses[before] + 1e-4).double().mean())
        for after, before in (
            (MAPPER, NOTHING),
            (MAPPER, TEACHER),
            (REFINED_DIRECTION, MAPPER),
            (REFINED, MAPPER),
        )
    }
    return {
        "values": {name: part_of(nothing - x, whole, seed) for name, x in losses.items()},
        "values_of_directions": {
            name: part_of(nothing - x, one, seed) for name, x in losses.items()
        },
        "decomposition": decomposition,
        "curves": curves,
        "never_worse": never_worse,
    }


# The report


def steps_to(curve: Sequence[float], steps: int, level: float) -> str:
    """Return the first marked step at which a curve is at a level, or that it is never."""
    for mark, value in zip(marks_of(steps), curve, strict=True):
        if value >= level:
            return str(mark)
    return f"not in {steps}"


def steps_of(name: str, steps: int, times: int) -> int:
    """Return the steps of a search of a name, the teacher taking so many."""
    return steps * (times if name in (DIRECTION, EDIT) else 1)


def report_text(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    settings = report["comparison"]
    steps, times = settings["recipe"]["steps"], settings["times"]
    rows = [
        [
            name,
            with_bounds(value),
            with_bounds(report["values_of_directions"][name]),
            *(with_bounds(report["scores"][name].get(score)) for score in SCORES),
        ]
        for name, value in sorted(report["values"].items(), key=lambda row: row[1]["mean"])
    ]
    total = settings["targets"]
    lines = [
        f"# The gap of a mapper: {total} targets, {settings['sources']} sources",
        "",
        f"Value is 0 at no edit and 1 at the best of {settings['restarts']} searches of",
        f"{steps * times} steps: in the first column for an edit of each source, in the second for",
        "one direction. It is a part of sums over targets; brackets hold 95 % of draws of targets.",
        "",
    ]
    lines += table(["edit", "value", "value, directions", *SCORES], rows)
    lines += table(
        ["part of the gap", "value"],
        [[name, with_bounds(part)] for name, part in report["decomposition"].items()],
    )
    marks = marks_of(steps * times)
    curves = [
        [name, *(f"{value:.3f}" for value in curve), *[""] * (len(marks) - len(curve))]
        for name, curve in report["curves"].items()
    ]
    lines += table(["value after steps", *map(str, marks)], curves)
    goals = {f"{REACHED:.0%} of the best edit": REACHED}
    goals["the best direction"] = report["values"][DIRECTION]["mean"]
    reached = [
        [name, *(steps_to(c, steps_of(name, steps, times), level) for level in goals.values())]
        for name, c in report["curves"].items()
    ]
    lines += table(["steps until the mean value is that of", *goals], reached)
    lines += table(
        ["never worse", "part of the targets"],
        [[name, f"{part:.3f}"] for name, part in report["never_worse"].items()],
    )
    alone = report["seconds_a_step"]
    lines += [
        f"Of one target alone, on {report['device']}: a step of a search for a direction "
        f"{alone['direction']:.4f} s, of one for an edit of each source {alone['edit']:.4f} s, the "
        f"mapper's edits {alone['mapper']:.4f} s.",
        "",
    ]
    return "\n".join(lines)


def charts(report: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Draw the value against steps and against seconds of one target alone."""
    settings, alone = report["comparison"], report["seconds_a_step"]
    level = {MAPPER: report["values"][MAPPER]["mean"]}
    by_step, by_second = [], []
    for name, curve in report["curves"].items():
        marks = marks_of(steps_of(name, settings["recipe"]["steps"], settings["times"]))
        points = list(zip(marks, curve, strict=True))
        kind = "edit" if name in (EDIT, REFINED, REFINED_IN_SPAN) else "direction"
        begun = alone["mapper"] if name.startswith(MAPPER) else 0.0
        later = [(begun + alone[kind] * step, value) for step, value in points if step]
        # A logarithm has no place for 0.
        by_step.append(Series(name=name, points=[(max(x, 0.5), y) for x, y in points], joined=True))
        by_second.append(Series(name=name, points=later, joined=True))
    mapper = [(alone["mapper"], level[MAPPER])]
    by_second.append(Series(name=MAPPER, points=mapper))
    title = "Part of the way from no edit to the best one"
    return {
        "steps": line_chart(title, by_step, "steps", "value", log_x=True, levels=level),
        "seconds": line_chart(title, by_second, "seconds of one target", "value", log_x=True),
    }


def sheet(study: Study, rows: Mapping[str, Row]) -> Image.Image:
    """Return the sources, and as edited for each of a few targets by a few ways."""
    lines = {
        f"{i}, {name}": (picture, rows[name].edits[i].float().to(study.scene.device))
        for i, picture in enumerate(study.targets.pictures[:SHOWN])
        for name in (MAPPER, TEACHER, DIRECTION, EDIT)
    }
    return edits_sheet(study.scene, study.sources, lines)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor"


def run(config: Config) -> dict[str, Any]:
    """Search what the report lacks, write it after each search, and return it.

    Raises:
        FileNotFoundError, ValueError: options, a world or a mapper that cannot be; a report of
            other options.
        FloatingPointError: a search whose loss stopped being finite.
        OSError: --out cannot be written into.
    """
    command.check_least(
        config, targets=1, sources=2, restarts=1, times=1, max_steps=1, max_images=1
    )
    check_charts()
    world, precision = load_world(config.world), choose_precision(config.precision)
    path = config.mapper or world.mapper
    if path is None:
        raise ValueError(f"--mapper: expected a mapper's file, for world {world.name!r} names none")
    command.say(f"loading world {world.name}", error=True)
    scene = load_scene(world, command.choose_device())
    mapper = load_mapper(path, scene.generator.fingerprint, scene.embedder.fingerprint)[0]
    mapper = mapper.to(scene.device)
    trained, own = trained_recipe(mapper.record), RECIPES[world.recipe]
    if mapper.config.tradeoff is not None and mapper.keep is not None:
        trained = mapper.config.tradeoff.recipe_at(trained, mapper.keep)
    recipe = replace(trained, sources=own.sources, steps=own.steps)
    if config.max_steps is not None:
        recipe = replace(recipe, steps=min(recipe.steps, config.max_steps))
    targets, sources = targets_and_sources(scene, config.targets, config.sources, config.test)
    study = Study(
        config=config,
        judges=face_judges(scene),
        mapper=mapper,
        recipe=recipe,
        decay=own.weight_decay,
        targets=targets,
        embeddings=scene.embed_targets(targets.pictures, recipe),
        objective=Objective.of(scene, recipe, sources),
        bank=Objective.of(scene, recipe, scene.bank_of(recipe)),
        precision=precision,
    )
    names = ("world", "targets", "sources", "restarts", "times", "test", "seed")
    comparison = {name: getattr(config, name) for name in names} | {"precision": precision}
    comparison |= {
        "recipe": vars(recipe),
        "decay": own.weight_decay,
        "reader": sha256_of(BUNDLED)[:12],
    }
    comparison["mapper"] = mapper.fingerprint
    file, kept = config.out / "report.json", config.out / "edits.safetensors"
    report: dict[str, Any] = {"entries": {}} | earlier_report(file, comparison)
    command.make_folder(config.out)
    edits = read_tensors(kept, "edits", [FORMAT], "")[1] if kept.is_file() else {}
    if "seconds_a_step" not in report:
        report |= {"device": device_name(scene.device), "seconds_a_step": study.seconds_a_step()}
    for name, find in tqdm(study.work().items(), unit="search"):
        if name in report["entries"] and name in edits:
            continue
        begun = time.perf_counter()
        found = find()
        edits[name] = found.edits.half().cpu()
        save_tensors(kept, edits, {"format": FORMAT})
        report["entries"][name] = {
            "loss": found.curve[-1].tolist(),
            "curve": found.curve.tolist(),
            "seconds": time.perf_counter() - begun,
        }
        command.write_json(file, report)
    rows = rows_of(report["entries"], edits)
    report |= summed_up(rows, config.seed)
    report["scores"] = {
        name: {
            s: interval(torch.tensor(v), config.seed) for s, v in study.scores(row.edits).items()
        }
        for name, row in tqdm(rows.items(), "judge", unit="edit")
    }
    command.write_json(file, report)
    text = report_text(report)
    command.write_file(config.out / "report.md", text)
    for name, picture in charts(report).items():
        write_picture(picture, config.out / f"{name}.png")
    write_picture(sheet(study, rows), config.out / "sheet.png")
    print(text)
    command.say_next(config.out, "report.md, charts, sheet.png", "read report.md", error=True)
    return report
