"""Draw essence against identity: mappers along the trade-off, and the teacher tuned at each place.

    python -m eval.studies.tradeoff --out runs/tradeoff
    python -m eval.studies.tradeoff --out runs/tradeoff --mapper a.safetensors b.safetensors

A mapper that reads the trade-off answers the same targets at each of --keeps. Every mapper goes
further or less far along its directions, by --strengths; one that reads the trade-off does so at
its default place. The teacher searches a few targets anew at the identity weight and the weight
decay of each of --keeps, of the first mapper that reads them. The attribute reader judges sources
that none of them edited. Targets are validation targets; test targets are asked for by --test, once
a mapper is final.

The area under a curve is the mean essence over all of identity kept, from 0 to 1: where no point
keeps so much identity, the line to the unedited source (identity 1, essence 0) counts; where all
keep more, the highest essence. Writes report.json, report.md and chart.png. The same command goes
on after an interruption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import Precision, choose_precision, start
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import seed_of
from targetclip.world import DEFAULT_WORLD, World, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and chart.png."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: tuple[Path, ...] = ()
    """Mapper files. Default: the world's."""
    keeps: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Places on the trade-off, for mappers that read it and for the teacher."""
    strengths: tuple[float, ...] = (0.5, 0.7, 0.9, 1.1, 1.3, 1.5)
    """Strengths of the answers at a mapper's default place."""
    targets: int = 24
    """Targets of mappers; every second one is in the generator's style."""
    teachers: int = 4
    """Targets of the teacher, the first ones; 0 leaves it out."""
    sources: int = 16
    """Sources that judge."""
    recipe: str | None = None
    """The teacher's recipe, but for the two weights. Default: the world's."""
    max_steps: int | None = None
    """Cut every search to so many steps."""
    max_images: int | None = None
    """Images at once. Default: 64."""
    precision: Precision | None = None
    """Of searches; scores are in float32. Default: accelerate's, or else fp32."""
    test: bool = False
    """Judge on test targets and test sources, instead of those of validation."""
    seed: int = 0
    """Of searches and bootstrap."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.tradeoff", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from data.publish import sha256_of
from data.teacher import search_in_batches
from eval.answers import earlier_report
from eval.judging import Judges, face_judges, goal_of, judge_edits
from eval.methods import mapped
from eval.metrics import interval
from eval.reader import BUNDLED
from eval.report import Series, check_charts, line_chart, number, table, with_bounds
from eval.sets import EvalSet, Sources, targets_and_sources
from predictor.mapper import Mapper, load_mapper
from predictor.tradeoff import TradeoffConfig, check_keep
from targetclip.media.images import write_picture
from targetclip.scene import Scene

TEACHER, BY_STRENGTH = "teacher", ", by strength"
SCORES = ("essence", "identity", "transfer", "person")  # of a point, those that there are
RESAMPLES = 2000

Points = Mapping[str, Mapping[str, Sequence[float]]]
"""The points of a curve by their labels: of each score a number a target."""
Values = Float64[ndarray, "points targets"]


def check_config(config: Config) -> None:
    """Raise a ValueError for options that are out of range."""
    command.check_least(config, targets=1, teachers=0, sources=2, max_steps=1, max_images=1)
    if len(config.keeps) < 2 or len(config.strengths) < 2:
        raise ValueError("--keeps, --strengths: expected two or more to draw a line through")
    for keep in config.keeps:
        check_keep(keep, "--keeps")
    for strength in config.strengths:
        if not 0 < strength <= 10:
            raise ValueError(f"--strengths: expected numbers above 0, up to 10, found {strength}")
    if len(set(config.mapper)) < len(config.mapper):
        raise ValueError("--mapper: expected different files, found one twice")


# What is judged


def open_mappers(config: Config, world: World, scene: Scene) -> dict[str, Mapper]:
    """Return the mappers by the paths of their files.
    FileNotFoundError, ValueError: see `load_mapper`; there is none."""
    paths = config.mapper or (() if world.mapper is None else (world.mapper,))
    if not paths:
        raise ValueError(
            f"--mapper: expected mapper files, for world {world.name!r} names none; train one "
            "with python -m train.mapper"
        )
    prints = scene.generator.fingerprint, scene.embedder.fingerprint
    loaded = {path: load_mapper(path, *prints)[0].to(scene.device) for path in paths}
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, loaded.values(), strict=True))


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that points are made and judged with."""

    config: Config
    judges: Judges
    targets: EvalSet
    sources: Sources
    recipe: Recipe
    """The teacher's, but for the two weights."""
    precision: Precision

    def judged(self, edits: torch.Tensor, strength: float = 1.0) -> dict[str, list[float]]:
        """Judge edits of the first targets: of each score a number a target."""
        goal = goal_of(self.judges, self.targets.part(0, len(edits)))
        scores = judge_edits(self.judges, goal, self.sources, edits, strength).scores
        return {name: scores[name].tolist() for name in SCORES if name in scores}

    def mapper_point(self, mapper: Mapper, at: float, by_strength: bool) -> dict[str, list[float]]:
        """Judge a mapper's answers at a place or, at its default place, at a strength."""
        scene, pictures = self.judges.scene, self.targets.pictures
        answer = mapped(scene, mapper, pictures, keep=None if by_strength else at)
        return self.judged(answer.on(self.sources), at if by_strength else 1.0)

    def teacher_point(self, tradeoff: TradeoffConfig, keep: float) -> dict[str, list[float]]:
        """Search the first targets at a place, and judge the directions.
        FloatingPointError: a search failed."""
        scene, few = self.judges.scene, self.targets.part(0, self.config.teachers)
        recipe = tradeoff.recipe_at(self.recipe, keep)
        seeds = [seed_of("trade-off", self.config.seed, name) for name in few.ids]
        directions, failures = search_in_batches(
            scene,
            scene.embed_targets(few.pictures, recipe),
            recipe,
            scene.initial(few.pictures, recipe.initial, seeds),
            seeds,
            label=f"teacher, keep {keep:g}",
            precision=self.precision,
        )
        for failure in failures:
            if failure is not None:
                raise FloatingPointError(f"teacher, keep {keep:g}: {failure}")
        offsets = directions[:, None].expand(-1, len(self.sources), -1, -1)
        return self.judged(offsets)


# Areas


def area(identity: Float64[ndarray, " points"], essence: Float64[ndarray, " points"]) -> float:
    """Return the area under a curve of essence acquired against identity kept, over [0, 1].

    A point counts for all less identity as well. The right end is the unedited source.
    """
    order = np.argsort(identity, kind="stable")
    x = np.append(identity[order].clip(0, 1), 1.0)
    y = np.append(essence[order], 0.0)
    best = np.maximum.accumulate(y[::-1])[::-1]
    places = np.linspace(0, 1, 201)
    return float(np.trapezoid(np.interp(places, x, best), places))


def values_of(points: Points, name: str, count: int) -> Values:
    """Return a score of the first so many targets at each point."""
    return np.array([list(point[name])[:count] for point in points.values()], dtype=np.float64)


def resampled_areas(points: Points, count: int, seed: int) -> Float64[ndarray, " resamples"]:
    """Return the area of mean scores over the first so many targets, then over RESAMPLES draws of
    them with replacement. The seed and their number alone decide the draws, so that those of two
    curves are paired."""
    identity, essence = (values_of(points, name, count) for name in ("identity", "essence"))
    random = np.random.default_rng(seed_of("bootstrap", seed, count))
    draws = [np.arange(count), *random.integers(count, size=(RESAMPLES, count))]
    return np.array([area(identity[:, d].mean(axis=1), essence[:, d].mean(axis=1)) for d in draws])


def with_interval(areas: Float64[ndarray, " resamples"], count: int) -> dict[str, Any]:
    """Return the first area, and the bounds of 95 % of the others; None for a single target."""
    low, high = np.quantile(areas[1:], (0.025, 0.975))
    bounds = {"low": float(low), "high": float(high)} if count > 1 else {"low": None, "high": None}
    return {"mean": float(areas[0]), **bounds, "count": count}


def count_of(points: Points) -> int:
    """Return the number of targets of a curve."""
    return len(next(iter(points.values()))["essence"])


def areas_of(curves: Mapping[str, Points], seed: int) -> dict[str, Any]:
    """Return the area of every curve, and their differences over the targets of both."""
    alone = {
        name: with_interval(resampled_areas(points, count, seed), count)
        for name, points in curves.items()
        if (count := count_of(points))
    }
    differences = {}
    for one, other in combinations(curves, 2):
        count = min(count_of(curves[one]), count_of(curves[other]))
        pair = [resampled_areas(curves[name], count, seed) for name in (one, other)]
        differences[f"{one} less {other}"] = with_interval(pair[0] - pair[1], count)
    return {"areas": alone, "differences": differences}


# The report


def point_rows(report: Mapping[str, Any], seed: int) -> list[list[str]]:
    """Return a row of the table for each point of each curve."""
    rows = []
    for name, points in report["curves"].items():
        for label, point in points.items():
            scores = [
                with_bounds(interval(torch.tensor(point[score]), seed) if score in point else None)
                for score in SCORES
            ]
            rows.append(
                [name, label, *report["weights"].get(name, {}).get(label, ["", ""]), *scores]
            )
    return rows


def report_text(report: Mapping[str, Any], seed: int) -> str:
    """Return report.md."""
    columns = ["curve", "point", "identity weight", "decay", "essence acquired", "identity kept"]
    columns += ["transfer score", "same person"]
    lines = ["# Essence against identity", ""]
    lines += table(columns, point_rows(report, seed))
    for title, part in (("area under the curve", "areas"), ("difference of areas", "differences")):
        rows = [
            [name, with_bounds(found), str(found["count"])] for name, found in report[part].items()
        ]
        lines += table([title, "mean [95 %]", "targets"], rows) if rows else []
    lines += [
        "Scores are means over sources, then over targets; brackets hold 95 % of bootstrap means",
        "over targets. Differences of areas are paired by target, over the targets of both curves.",
        "",
    ]
    return "\n".join(lines)


def chart(curves: Mapping[str, Points]) -> Image.Image:
    """Draw a line for each curve."""
    series = []
    for name, points in curves.items():
        means = [
            tuple(float(np.mean(p[s])) for s in ("identity", "essence")) for p in points.values()
        ]
        series.append(Series(name=name, points=[(x, y) for x, y in means], joined=True))
    return line_chart("Essence and identity", series, "identity kept", "essence acquired")


def run(config: Config) -> dict[str, Any]:
    """Make the points that the report lacks, write it after each, and return it.

    Raises:
        FileNotFoundError, ValueError: options, a world or mappers that cannot be; a report of other
            options.
        FloatingPointError: a search whose loss stopped being finite.
        OSError: --out cannot be written into.
    """
    check_config(config)
    check_charts()
    world, precision = load_world(config.world), choose_precision(config.precision)
    command.say(f"loading world {world.name}", error=True)
    scene = load_scene(world, command.choose_device(), max_images=config.max_images)
    mappers = open_mappers(config, world, scene)
    recipe = RECIPES[config.recipe or world.recipe]
    if config.max_steps is not None:
        recipe = replace(recipe, steps=min(recipe.steps, config.max_steps))
    targets, sources = targets_and_sources(scene, config.targets, config.sources, config.test)
    judges = face_judges(scene)
    study = Study(
        config=config,
        judges=judges,
        targets=targets,
        sources=sources,
        recipe=recipe,
        precision=precision,
    )
    names = ("world", "keeps", "strengths", "targets", "teachers", "sources", "test", "seed")
    comparison = {name: getattr(config, name) for name in names} | {"precision": precision}
    comparison |= {"recipe": vars(recipe), "reader": sha256_of(BUNDLED)[:12]}
    comparison["mappers"] = {name: mapper.fingerprint for name, mapper in mappers.items()}
    path = config.out / "report.json"
    report: dict[str, Any] = {"curves": {}, "weights": {}} | earlier_report(path, comparison)
    command.make_folder(config.out)
    curves = [m.config.tradeoff for m in mappers.values() if m.config.tradeoff is not None]
    # The teacher is tuned at the curve's own weights everywhere.
    ends = [replace(curve, origin=None) for curve in curves]
    work: list[tuple[str, float, Mapper | None]] = []
    for name, mapper in mappers.items():
        if mapper.config.tradeoff is not None:
            work += [(name, at, mapper) for at in config.keeps]
        work += [(name + BY_STRENGTH, at, mapper) for at in config.strengths]
    if config.teachers and ends:
        work += [(TEACHER, keep, None) for keep in config.keeps]
        scene.feature_model(ends[0].identity_weight(0.0))  # before minutes are spent
    elif config.teachers:
        command.say("left out: the teacher: no mapper here reads the trade-off", error=True)
    drawn = {name for name, _, _ in work}  # none of an earlier version's
    report["curves"] = {name: c for name, c in report["curves"].items() if name in drawn}
    for name, at, mapper in tqdm(work, unit="point"):
        by_strength = name.endswith(BY_STRENGTH)
        label = f"{'strength' if by_strength else 'keep'} {at:g}"
        points = report["curves"].setdefault(name, {})
        if label in points:
            continue
        if mapper is not None:
            points[label] = study.mapper_point(mapper, at, by_strength)
        else:
            points[label] = study.teacher_point(ends[0], at)
        if not by_strength:
            tradeoff = ends[0] if mapper is None else mapper.config.tradeoff
            weights = tradeoff.identity_weight(at), tradeoff.decay(at)
            report["weights"].setdefault(name, {})[label] = [number(w, 4) for w in weights]
        command.write_json(path, report)
    report |= areas_of(report["curves"], config.seed)
    command.write_json(path, report)
    text = report_text(report, config.seed)
    command.write_file(config.out / "report.md", text)
    write_picture(chart(report["curves"]), config.out / "chart.png")
    print(text)
    command.say_next(config.out, "report.md, chart.png", "read report.md", error=True)
    return report
