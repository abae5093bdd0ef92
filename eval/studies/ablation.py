"""Judge mappers side by side, on the validation targets and sources of the study of teachers.

    python -m eval.studies.ablation --out runs/ablation --mappers runs/ablation/*/mapper.safetensors

A mapper is named by its folder. Writes report.json, report.md and a sheet of pictures a mapper, and
prints the table. A mapper that corrects its directions for each source is judged with corrections
and without; --inverted judges all on what the inverter sees of the sources as well. The same
command goes on after an interruption or with further mappers: one that has been judged is not
judged again. Knows the record of a mapper's training; nothing of how to train one.
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("eval.studies.ablation")

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data.publish import sha256_of
from eval.answers import earlier_report
from eval.judging import Goal, Judges, Look, edited_images, face_judges, goal_of, judge, scores_of
from eval.metrics import interval
from eval.reader import BUNDLED
from eval.report import number, table, with_bounds
from eval.sets import EvalSet, study_set
from eval.trials import sheet
from predictor.mapper import Mapper, Prediction, load_mapper
from predictor.mapper_file import MapperConfig, MapperRecord, trained_recipe
from targetclip import command
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.scene import Scene
from targetclip.seeds import VALIDATION_SOURCES
from targetclip.world import load_scene, load_world

SHOWN = 12  # targets on a sheet of pictures


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and one sheet of pictures a mapper."""
    mappers: tuple[Path, ...]
    """Mappers' files, each in a folder of its own, which names it."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    targets: int = 64
    """Every second one out of the generator's range."""
    held_out: int = 16
    """Sources that directions are judged on."""
    inverted: bool = False
    """Judge on the inverted renderings of the sources as well."""
    seed: int = 0
    """Decides what the bootstrap draws; targets and sources are always the same."""


def check_config(config: Config) -> None:
    """Raise a ValueError for an option that cannot be."""
    if not config.mappers:
        raise ValueError("--mappers: expected one mapper's file or more, found none")
    for name in ("targets", "held_out"):
        if getattr(config, name) < 2:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected 2 or more, found {getattr(config, name)}")


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


def record_of(mapper: Mapper) -> MapperRecord:
    """Return the record that every mapper's file has."""
    if mapper.record is None:
        raise ValueError("expected a mapper with a record, found none: load it from its file")
    return mapper.record


def open_mappers(paths: Sequence[Path], scene: Scene) -> dict[str, Mapper]:
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
    mappers: dict[str, Mapper] = {}
    for name, path in named.items():
        mapper, record = load_mapper(path, scene.generator.fingerprint, scene.embedder.fingerprint)
        try:
            training_of(record)
            trained_recipe(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        mappers[name] = mapper.to(scene.device)
    return mappers


# Judging


@dataclass(frozen=True, kw_only=True)
class Task:
    """The judges, and what every mapper is judged on."""

    judges: Judges
    targets: EvalSet
    goal: Goal
    sources: Float[Tensor, "sources num_ws w_dim"]
    before: Float[Tensor, "sources 3 height width"]
    look: Look
    """At the sources, unedited."""


def make_task(scene: Scene, targets: EvalSet, held_out: int, sources: Tensor | None = None) -> Task:
    """Render the sources that are edited, and look at them and at the targets.

    Args:
        sources: None: `held_out` generated ones.

    Raises:
        ValueError: as `face_judges`.
    """
    judges = face_judges(scene)
    sources = scene.sources(held_out, VALIDATION_SOURCES) if sources is None else sources
    before = scene.render(sources)
    return Task(
        judges=judges,
        targets=targets,
        goal=goal_of(judges, targets),
        sources=sources,
        before=before,
        look=judges.look(before),
    )


def make_tasks(scene: Scene, targets: EvalSet, config: Config) -> dict[str, Task]:
    """Return the task of each kind of sources; "" is that of generated ones.

    Raises:
        ValueError: as `make_task`; there is no inverter.
    """
    tasks = {"": make_task(scene, targets, config.held_out)}
    if config.inverted:
        inverted = scene.invert(tensor_to_pictures(tasks[""].before))
        tasks["inverted"] = make_task(scene, targets, config.held_out, inverted)
    return tasks


def answer(scene: Scene, mapper: Mapper, targets: EvalSet) -> Prediction:
    """Return a mapper's answer to targets, preprocessed as those that it was trained on."""
    embeddings = scene.embed_targets(targets.pictures, trained_recipe(mapper.record))
    with torch.no_grad():
        prediction: Prediction = mapper(embeddings)
    return prediction


@torch.no_grad()
def corrected(
    scene: Scene,
    mapper: Mapper,
    targets: EvalSet,
    sources: Float[Tensor, "sources num_ws w_dim"],
) -> Float[Tensor, "targets *sources num_ws w_dim"]:
    """Return a mapper's edits: directions, or an offset for each source where it corrects them."""
    directions = answer(scene, mapper, targets).directions
    if mapper.correction is None:
        return directions
    embeddings = scene.embed_targets(targets.pictures, trained_recipe(mapper.record))
    return directions[:, None] + mapper.correct(embeddings, sources)


def target_scores(
    task: Task,
    prediction: Prediction,
    edits: Float[Tensor, "targets *sources num_ws w_dim"] | None = None,
) -> dict[str, Float[Tensor, " targets"]]:
    """Score the edits of every target; None: those of its direction alone."""
    edits = prediction.directions if edits is None else edits
    edited = edited_images(task.judges, task.sources, edits)
    scores = scores_of(judge(task.judges, task.before, edited), task.look, task.goal)
    return {
        **{name: scores[name] for name in ("transfer", "consistency", "essence", "identity")},
        "norm": prediction.directions.flatten(1).norm(dim=1).cpu(),
        "expected": prediction.expected.cpu(),
    }


def figures_of(scores: Mapping[str, Tensor], expects: bool, seed: int) -> dict[str, Any]:
    """Compute means over the targets, and the transfer score's interval.

    `expected_error` is None for a mapper that was never taught what to expect.
    """
    transfer, essence = scores["transfer"], scores["essence"]
    error = float((scores["expected"] - transfer).abs().mean())
    return {
        "transfer": interval(transfer, seed),
        "transfer_in_range": float(transfer[::2].mean()),  # as study_set has them
        "transfer_out_of_range": float(transfer[1::2].mean()),
        "consistency": float(scores["consistency"].mean()),
        "essence_in_range": float(essence[::2].mean()),
        "essence_out_of_range": float(essence[1::2].mean()),
        "identity": float(scores["identity"].mean()),
        "identity_in_range": float(scores["identity"][::2].mean()),
        "identity_out_of_range": float(scores["identity"][1::2].mean()),
        "norm": float(scores["norm"].mean()),
        "expected_error": error if expects else None,
        "each": {name: values.tolist() for name, values in scores.items()},
    }


def row_of(tasks: Mapping[str, Task], mapper: Mapper, seed: int) -> dict[str, Any]:
    """Judge a mapper, and return its row of the report: network, training and scores.

    The scores are those of its edits of generated sources, as they are made. `ways` holds those of
    other sources, and of its directions without their corrections, by their names.
    """
    record, task = record_of(mapper), tasks[""]
    # Older records do not say whether the transfer term, which teaches it, was used.
    expects = bool(record.recipe.get("expects", True))
    scene = task.judges.scene
    prediction = answer(scene, mapper, task.targets)
    ways: dict[str, dict[str, Any]] = {}
    for kind, judged in tasks.items():
        edits = corrected(scene, mapper, judged.targets, judged.sources)
        ways[kind] = figures_of(target_scores(judged, prediction, edits), expects, seed)
        if mapper.correction is not None:
            name = ", ".join([*([kind] if kind else []), "one direction"])
            # What is expected is what corrected edits reach.
            ways[name] = figures_of(target_scores(judged, prediction), False, seed)
    return {
        "fingerprint": mapper.fingerprint,
        "recipe": record.recipe,
        "network": network_of(mapper.config),
        "trained": training_of(record),
        **ways.pop(""),
        "ways": ways,
    }


# The report


def report_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row a mapper and way, in Markdown."""
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
        "identity_in_range": "identity in range",
        "identity_out_of_range": "identity out of range",
        "identity": "identity kept",
        "norm": "length",
        "expected_error": "expected score off by",
    }
    cells = []
    for name, row in rows.items():
        trained = row["trained"]
        facts = [name, row["network"], ", ".join(trained["stages"] or [])]
        facts += ["" if trained[key] is None else str(trained[key]) for key in training]
        for way, figures in {"": row, **row.get("ways", {})}.items():
            facts[0] = f"{name}: {way}" if way else name
            scores = [number(figures.get(key)) for key in columns]
            cells.append([*facts, with_bounds(figures["transfer"]), *scores])
    heads = ["mapper", "network", "stages", *training.values()]
    return "\n".join(table([*heads, "transfer score", *columns.values()], cells))


def open_report(path: Path, config: Config, scene: Scene) -> dict[str, Any]:
    """Return the report of an earlier run of the same comparison, or an empty one.

    Raises:
        ValueError: it is of another comparison, or damaged.
    """
    comparison = {name: getattr(config, name) for name in ("world", "targets", "held_out", "seed")}
    comparison["truncation"] = scene.truncation
    comparison["generator"] = scene.generator.fingerprint[:12]
    comparison["embedder"] = scene.embedder.fingerprint[:12]
    comparison["reader"] = sha256_of(BUNDLED)[:12]
    if config.inverted:
        comparison["inverted"] = True
    return {"mappers": {}} | earlier_report(path, comparison)


def is_row_of(row: Mapping[str, Any], mapper: Mapper) -> bool:
    """Tell whether a row is of these weights and this record."""
    same = row["fingerprint"] == mapper.fingerprint and row["recipe"] == record_of(mapper).recipe
    return bool(same)


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Judge what the report lacks, write it after every mapper, and print the table.

    Rows of mappers that are not named stay in report.json. Returns those of the named ones.

    Raises:
        FileNotFoundError, ValueError: see `open_mappers`; an option that cannot be, or a report of
            other options.
    """
    check_config(config)
    scene = load_scene(load_world(config.world), command.choose_device())
    mappers = open_mappers(config.mappers, scene)
    path = config.out / "report.json"
    report = open_report(path, config, scene)
    tasks = make_tasks(scene, study_set(config.targets), config)
    command.make_folder(config.out)
    rows: dict[str, dict[str, Any]] = {}
    for name, mapper in tqdm(mappers.items(), unit="mapper"):
        known, path_of_sheet = report["mappers"], config.out / f"{name}.png"
        judged = next((row for row in known.values() if is_row_of(row, mapper)), None)
        rows[name] = judged or row_of(tasks, mapper, config.seed)
        if not path_of_sheet.exists() or name not in known or not is_row_of(known[name], mapper):
            few, shown = tasks[""].targets.part(0, SHOWN), scene.sources(9, VALIDATION_SOURCES)
            edits = corrected(scene, mapper, few, shown)
            write_picture(sheet(scene, few, edits, shown), path_of_sheet)
        report["mappers"] = {**rows, **{n: row for n, row in known.items() if n not in rows}}
        command.write_json(path, report)
    text = report_table(rows)
    command.write_file(config.out / "report.md", text)
    print(text)
    return rows


def main() -> None:
    command.main(run, Config, __doc__, "python -m eval.studies.ablation")
