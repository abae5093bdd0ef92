"""Judge mappers side by side, on the validation targets and sources of the study of teachers.

    python -m eval.studies.ablation --out runs/ablation --mappers runs/ablation/*/mapper.safetensors

A mapper is named by its folder. Writes report.json, report.md and a sheet of pictures a mapper, and
prints the table. The same command goes on after an interruption or with further mappers: one that
has been judged is not judged again. Knows the record of a mapper's training; nothing of how to
train one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.seeds import VALIDATION_SOURCES
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and one sheet of pictures a mapper."""
    mappers: tuple[Path, ...]
    """Mappers' files, each in a folder of its own, which names it."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    targets: int = 64
    """Every second one out of the generator's range."""
    held_out: int = 16
    """Sources that directions are judged on."""
    one_direction: bool = False
    """Leave out the corrections of mappers that read their source."""
    inverted: bool = False
    """Judge on inversions of the sources' pictures, as photographs are edited."""
    seed: int = 0
    """Decides what the bootstrap draws; targets and sources are always the same."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.ablation", Config, exclusive=True)

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.publish import sha256_of
from eval.answers import earlier_report
from eval.judging import Goal, Judges, face_judges, goal_of, judge_edits, study_means
from eval.methods import predict
from eval.metrics import interval
from eval.reader import BUNDLED
from eval.report import number, table, with_bounds
from eval.sets import study_set
from eval.trials import sheet
from predictor.mapper import Mapper, Prediction, load_mapper
from predictor.mapper_file import MapperConfig, MapperRecord, trained_recipe
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.scene import Scene

SHOWN = 12  # targets on a sheet of pictures


# The mappers


def training_of(record: MapperRecord) -> dict[str, Any]:
    """Return what a record of `train.mapper` says of the training; None where it says nothing.

    Keys: `stages` and their `steps` in all, `pairs` (a number, or "all"; None without pairs),
    `noise`, and of the transfer term `decay` and `identity_weight`.

    Raises:
        ValueError: the schedule is not one of stages NAME:STEPS, or the recipe is unknown here.
    """
    training = record.recipe
    stages = training.get("schedule")
    pairs = None if training.get("pairs") is None else training.get("num_pairs") or "all"
    try:
        steps = None if stages is None else sum(int(s.rpartition(":")[2]) for s in stages)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a record with a schedule of stages NAME:STEPS, found {stages!r}"
        ) from error
    recipe = trained_recipe(record) if training.get("recipe") else None
    return {
        "stages": stages,
        "steps": steps,
        "pairs": pairs,
        "noise": training.get("noise"),
        "decay": None if recipe is None else recipe.weight_decay,
        "identity_weight": None if recipe is None else recipe.identity_weight,
    }


def network_of(config: MapperConfig) -> str:
    """Return the width and depth of a mapper, its rank, and what its correction reads."""
    rank = "" if config.rank is None else f", rank {config.rank}"
    correction = config.correction
    reads = "" if correction is None else f", reads {correction.layers} by {correction.rank}"
    return f"{config.width} x {config.depth}{rank}{reads}"


def open_mappers(paths: Sequence[Path], scene: Scene) -> dict[str, tuple[Mapper, MapperRecord]]:
    """Read mappers, in the order given, to the scene's device; their folders name them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: two of one name, a mapper of other networks, or a record not understood here.
    """
    named: dict[str, Path] = {}
    for path in paths:
        name = path.resolve().parent.name
        if name in named:
            raise ValueError(
                f"--mappers: expected folders of different names, for they name the mappers, found "
                f"{str(named[name])!r} and {str(path)!r}: rename one of them"
            )
        named[name] = path
    mappers: dict[str, tuple[Mapper, MapperRecord]] = {}
    for name, path in named.items():
        mapper, record = load_mapper(path, scene.generator.fingerprint, scene.embedder.fingerprint)
        try:
            training_of(record)
            trained_recipe(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        mappers[name] = mapper.to(scene.device), record
    return mappers


# Judging


def target_scores(
    judges: Judges,
    goal: Goal,
    sources: Float[Tensor, "sources num_ws w_dim"],
    prediction: Prediction,
    edits: Float[Tensor, "targets *sources num_ws w_dim"] | None = None,
) -> dict[str, Float[Tensor, " targets"]]:
    """Score the edits of every target: offsets for each source or, by default, its direction."""
    edits = prediction.directions if edits is None else edits
    scores = judge_edits(judges, goal, sources, edits).scores
    return {
        **{name: scores[name] for name in ("transfer", "consistency", "essence", "identity")},
        "norm": prediction.directions.flatten(1).norm(dim=1).cpu(),
        "expected": prediction.expected.cpu(),
    }


def figures_of(scores: Mapping[str, Tensor], expects: bool, seed: int) -> dict[str, Any]:
    """Compute means over the targets, and the transfer score's interval.

    `expected_error` is None for a mapper that was never taught what to expect.
    """
    error = float((scores["expected"] - scores["transfer"]).abs().mean())
    return {
        **study_means(scores),
        "transfer": interval(scores["transfer"], seed),
        "norm": float(scores["norm"].mean()),
        "expected_error": error if expects else None,
        "each": {name: values.tolist() for name, values in scores.items()},
    }


def row_of(
    mapper: Mapper, record: MapperRecord, scores: Mapping[str, Tensor], seed: int
) -> dict[str, Any]:
    """Return a mapper's row of the report: network, training and scores."""
    return {
        "fingerprint": mapper.fingerprint,
        "recipe": record.recipe,
        "network": network_of(mapper.config),
        "trained": training_of(record),
        # Older records do not say whether the transfer term, which teaches it, was used.
        **figures_of(scores, bool(record.recipe.get("expects", True)), seed),
    }


# The report


def report_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row a mapper, in Markdown."""
    training = {
        "steps": "steps",
        "pairs": "pairs",
        "noise": "noise",
        "decay": "decay",
        "identity_weight": "identity weight",
    }
    columns = {
        "transfer_in_range": "in range",
        "transfer_out_of_range": "out of range",
        "consistency": "consistency",
        "essence_in_range": "essence in range",
        "essence_out_of_range": "essence out of range",
        "identity": "identity kept",
        "norm": "length",
        "expected_error": "expected score off by",
    }
    cells = []
    for name, row in rows.items():
        trained = row["trained"]
        facts = [name, row["network"], ", ".join(trained["stages"] or [])]
        facts += ["" if trained[key] is None else str(trained[key]) for key in training]
        cells.append([*facts, with_bounds(row["transfer"]), *(number(row[key]) for key in columns)])
    heads = ["mapper", "network", "stages", *training.values()]
    return "\n".join(table([*heads, "transfer score", *columns.values()], cells))


def open_report(path: Path, config: Config, scene: Scene) -> dict[str, Any]:
    """Return the report of an earlier run of the same comparison, or an empty one."""
    comparison = {name: getattr(config, name) for name in ("world", "targets", "held_out", "seed")}
    comparison |= {name: True for name in ("one_direction", "inverted") if getattr(config, name)}
    comparison["truncation"] = scene.truncation
    comparison["generator"] = scene.generator.fingerprint[:12]
    comparison["embedder"] = scene.embedder.fingerprint[:12]
    comparison["reader"] = sha256_of(BUNDLED)[:12]
    return {"mappers": {}} | earlier_report(path, comparison)


def is_row_of(row: Mapping[str, Any], mapper: Mapper, record: MapperRecord) -> bool:
    """Tell whether a row is of these weights and this record."""
    same: bool = (row["fingerprint"], row["recipe"]) == (mapper.fingerprint, record.recipe)
    return same


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Judge what the report lacks, write it after every mapper, and print the table.

    Rows of mappers that are not named stay in report.json. Returns those of the named ones.

    Raises:
        FileNotFoundError, ValueError: bad options, files or records; a report of other options.
    """
    if not config.mappers:
        raise ValueError("--mappers: expected one mapper's file or more, found none")
    command.check_least(config, targets=2, held_out=2)
    command.say(f"loading world {config.world}", error=True)
    scene = load_scene(load_world(config.world), command.choose_device())
    mappers = open_mappers(config.mappers, scene)
    path = config.out / "report.json"
    report = open_report(path, config, scene)
    judges, targets = face_judges(scene), study_set(config.targets)
    goal, sources = goal_of(judges, targets), scene.sources(config.held_out, VALIDATION_SOURCES)
    if config.inverted:
        sources = scene.invert(tensor_to_pictures(scene.render(sources)))

    def edits_of(mapper: Mapper, pictures: Sequence[Image.Image]) -> Tensor:
        if config.one_direction:
            return predict(scene, mapper, pictures).directions
        with torch.no_grad():
            recipe = trained_recipe(mapper.record)
            return mapper.edits(scene.embed_targets(pictures, recipe), sources)

    command.make_folder(config.out)
    rows: dict[str, dict[str, Any]] = {}
    for name, (mapper, record) in tqdm(mappers.items(), unit="mapper"):
        known, path_of_sheet = report["mappers"], config.out / f"{name}.png"
        judged = next((row for row in known.values() if is_row_of(row, mapper, record)), None)
        if judged is None:
            prediction = predict(scene, mapper, targets.pictures)
            edits = edits_of(mapper, targets.pictures)
            scores = target_scores(judges, goal, sources, prediction, edits)
            judged = row_of(mapper, record, scores, config.seed)
        rows[name] = judged
        if not path_of_sheet.exists() or known.get(name) != judged:
            few = targets.part(0, SHOWN)
            edits = edits_of(mapper, few.pictures)
            write_picture(sheet(scene, few, sources, edits), path_of_sheet)
        report["mappers"] = {**rows, **{n: row for n, row in known.items() if n not in rows}}
        command.write_json(path, report)
    text = report_table(rows)
    command.write_file(config.out / "report.md", text)
    print(text)
    command.say_next(config.out, "report.md, a sheet a mapper", "read report.md", error=True)
    return rows
