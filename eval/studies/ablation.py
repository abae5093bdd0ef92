"""Judge mappers side by side, on the validation targets and sources of the recipe study.

    python -m eval.studies.ablation --out runs/ablation --mappers runs/ablation/*/mapper.safetensors

A mapper is named by its folder. Writes report.json, report.md and a sheet of pictures a mapper, and
prints the table. The same command goes on after an interruption or with further mappers: one that
has been judged is not judged again. Knows what a mapper's record says of its training; nothing of
how to train one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data.drawn.sketch import SIZE
from data.publish import sha256_of
from eval.judging import Goal, Judges, Look, edited_images, judge, scores_of
from eval.reader import BUNDLED, load_reader
from eval.report import number, table, with_bounds
from eval.sets import Truth
from eval.studies.teachers import HELD_OUT_SEED, Targets, draw_targets, save_sheet
from eval.summary import interval
from predictor.cli import choose_device
from predictor.mapper import Mapper, Prediction, load_mapper
from predictor.mapper_file import MapperConfig, MapperRecord, trained_recipe
from predictor.report import make_folder, write_file
from predictor.transfer import EssenceTransfer
from targetclip.targets import embed_targets
from targetclip.world import load_parts, load_world

SHOWN = 12  # targets on a sheet of pictures


@dataclass(frozen=True)
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
    seed: int = 0
    """Decides what the bootstrap draws; targets and sources are always the same."""


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be; here, for tyro prints a box for its own."""
    if not config.mappers:
        raise ValueError("--mappers: expected one mapper's file or more, found none")
    for name in ("targets", "held_out"):
        if getattr(config, name) < 2:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected 2 or more, found {getattr(config, name)}")


# What is compared


def trained_by(record: MapperRecord) -> dict[str, Any]:
    """What a record of `train.mapper` says of the training; None where another one says nothing.

    Keys: `stages` and their `steps` in all, `pairs` (a number, or "all"; None without pairs),
    `noise`, and of the transfer term `decay` and `identity_weight`.

    Raises:
        ValueError: the schedule is not one of stages NAME:STEPS.
    """
    said = record.recipe
    stages = said.get("schedule")
    pairs = None if said.get("pairs") is None else said.get("num_pairs") or "all"
    try:
        steps = None if stages is None else sum(int(s.rpartition(":")[2]) for s in stages)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a record with a schedule of stages NAME:STEPS, found {stages!r}"
        ) from error
    recipe = trained_recipe(record) if said.get("recipe") else None
    return {
        "stages": stages,
        "steps": steps,
        "pairs": pairs,
        "noise": said.get("noise"),
        "decay": None if recipe is None else recipe.weight_decay,
        "identity_weight": None if recipe is None else recipe.identity_weight,
    }


def network_of(config: MapperConfig) -> str:
    """Width and depth of a mapper, and its rank if it has one."""
    rank = "" if config.rank is None else f", rank {config.rank}"
    return f"{config.width} x {config.depth}{rank}"


def record_of(mapper: Mapper) -> MapperRecord:
    """The record that every mapper's file has."""
    if mapper.record is None:
        raise ValueError("expected a mapper with a record, found none: load it from its file")
    return mapper.record


def open_mappers(paths: Sequence[Path], essence: EssenceTransfer) -> dict[str, Mapper]:
    """Mappers by the names of their folders, in the order given, on the generator's device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: two of one name, a mapper of other networks, or a record not understood here.
    """
    found: dict[str, Path] = {}
    for path in paths:
        name = path.resolve().parent.name
        if name in found:
            raise ValueError(
                f"--mappers: expected folders of different names, for they name the mappers, found "
                f"{str(found[name])!r} and {str(path)!r}: rename one of them"
            )
        found[name] = path
    mappers: dict[str, Mapper] = {}
    for name, path in found.items():
        prints = (essence.generator.fingerprint, essence.embedder.fingerprint)
        mapper, record = load_mapper(path, *prints)
        try:
            trained_by(record)
            trained_recipe(record)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        mappers[name] = mapper.to(essence.generator.mean_w.device)
    return mappers


# How it is judged


def face_judges(essence: EssenceTransfer) -> Judges:
    """The embedder and the attribute reader.

    Raises:
        ValueError: the generator's pictures are not of the size that the reader knows.
    """
    size = essence.generator.resolution
    if size != SIZE:
        raise ValueError(
            f"--world: expected a world of drawn faces of {SIZE} px, which the attribute reader "
            f"knows, found one of {size} px"
        )
    reader = load_reader().to(essence.generator.mean_w.device)
    return Judges(essence.generator, essence.embedder, reader, None, None, essence.max_images)


@dataclass(frozen=True)
class Course:
    """What every mapper is judged on, and by whom."""

    essence: EssenceTransfer
    judges: Judges
    targets: Targets
    goal: Goal
    sources: Float[Tensor, "sources num_ws w_dim"]
    before: Float[Tensor, "sources 3 height width"]
    look: Look
    """At the sources, unedited."""

    @staticmethod
    def of(essence: EssenceTransfer, targets: Targets, held_out: int) -> "Course":
        judges = face_judges(essence)
        truth = Truth(tuple(targets.faces), targets.readings, targets.seen)
        goal = Goal(essence.embedder.embed_pictures(targets.pictures).cpu(), None, truth)
        sources = essence.generated_sources(held_out, HELD_OUT_SEED)
        before = judges.render(sources)
        return Course(essence, judges, targets, goal, sources, before, judges.look(before))


def answer(course: Course, mapper: Mapper) -> Prediction:
    """What a mapper says of the targets, seen as those that it was trained on."""
    essence, recipe = course.essence, trained_recipe(mapper.record)
    pictures = course.targets.pictures
    embeddings = embed_targets(essence.generator, essence.embedder, pictures, recipe)
    with torch.no_grad():
        prediction: Prediction = mapper(embeddings)
    return prediction


def scores_of_each(course: Course, answered: Prediction) -> dict[str, Tensor]:
    """Scores of every target, each [targets]; edits are made a target at a time."""
    edited = edited_images(course.judges, course.sources, answered.directions)
    judged = judge(course.judges, course.before, edited)
    found = scores_of(judged, course.look, course.goal)
    return {
        **{name: found[name] for name in ("transfer", "consistency", "essence", "identity")},
        "norm": answered.directions.flatten(1).norm(dim=1).cpu(),
        "expected": answered.expected.cpu(),
    }


def figures_of(each: dict[str, Tensor], expects: bool, seed: int) -> dict[str, Any]:
    """What a row says: means over the targets, and the transfer score's interval.

    `expected_error` is None for a mapper that was never taught what to expect.
    """
    transfer, essence = each["transfer"], each["essence"]
    plain = torch.arange(len(transfer)) % 2 == 0  # as draw_targets has them
    return {
        "transfer": interval(transfer, seed),
        "transfer_in_range": float(transfer[plain].mean()),
        "transfer_out_of_range": float(transfer[~plain].mean()),
        "consistency": float(each["consistency"].mean()),
        "essence_in_range": float(essence[plain].mean()),
        "essence_out_of_range": float(essence[~plain].mean()),
        "identity": float(each["identity"].mean()),
        "norm": float(each["norm"].mean()),
        "expected_error": float((each["expected"] - transfer).abs().mean()) if expects else None,
        "each": {name: values.tolist() for name, values in each.items()},
    }


def row_of(course: Course, mapper: Mapper, seed: int) -> dict[str, Any]:
    """A mapper's row: what it is, how it was trained and how it does."""
    record = record_of(mapper)
    # Older records do not say whether the transfer term, which teaches it, was used.
    expects = bool(record.recipe.get("expects", True))
    each = scores_of_each(course, answer(course, mapper))
    return {
        "fingerprint": mapper.fingerprint,
        "recipe": record.recipe,
        "network": network_of(mapper.config),
        "trained": trained_by(record),
        **figures_of(each, expects, seed),
    }


def save_pictures(course: Course, mapper: Mapper, path: Path) -> None:
    """The sheet of the first targets."""
    targets = course.targets
    few = Targets(
        targets.pictures[:SHOWN],
        targets.faces[:SHOWN],
        targets.readings[:SHOWN],
        targets.seen[:SHOWN],
    )
    directions = answer(replace(course, targets=few), mapper).directions
    save_sheet(course.essence, few, directions, path)


# The report


def report_table(rows: dict[str, dict[str, Any]]) -> str:
    """A row a mapper, in Markdown."""
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
        said = (trained[key] for key in ("steps", "pairs", "noise", "decay", "identity_weight"))
        stages = ", ".join(trained["stages"] or [])
        told = [name, row["network"], stages, *("" if v is None else str(v) for v in said)]
        scores = [with_bounds(row["transfer"]), *(number(row[key]) for key in columns)]
        cells.append([*told, *scores])
    heads = ["mapper", "network", "stages", "steps", "pairs", "noise", "decay", "identity weight"]
    heads += ["transfer score", *columns.values()]
    return "\n".join(table(heads, cells))


def open_report(path: Path, config: Config, essence: EssenceTransfer) -> dict[str, Any]:
    """What an earlier run of the same comparison found.

    Raises:
        ValueError: it was of another comparison, or cannot be read.
    """
    same = {name: getattr(config, name) for name in ("world", "targets", "held_out", "seed")}
    same["truncation"] = essence.truncation
    same["generator"] = essence.generator.fingerprint[:12]
    same["embedder"] = essence.embedder.fingerprint[:12]
    same["reader"] = sha256_of(BUNDLED)[:12]
    if not path.exists():
        return {"comparison": same, "mappers": {}}
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--out: {str(path)!r} is damaged ({error}): delete it") from error
    if report.get("comparison") != same:
        raise ValueError(
            f"--out: {str(path)!r} is of another comparison: expected {same}, found "
            f"{report.get('comparison')}; give the same options, or another folder"
        )
    return report


def same_mapper(row: dict[str, Any] | None, mapper: Mapper) -> bool:
    """Whether a row is of these weights and this record."""
    if row is None or row["fingerprint"] != mapper.fingerprint:
        return False
    return bool(row["recipe"] == record_of(mapper).recipe)


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Judge what is missing in the report, write it after every mapper, and print the table.

    Rows of mappers that are not named stay in report.json. Returns those of the named ones.

    Raises:
        FileNotFoundError, ValueError: see `open_mappers`; an option that cannot be, or a report of
            other options.
    """
    check_config(config)
    world = load_world(config.world)
    parts = load_parts(world, choose_device(None))
    essence = EssenceTransfer(parts.generator, parts.embedder, truncation=world.truncation)
    mappers = open_mappers(config.mappers, essence)
    path = config.out / "report.json"
    report = open_report(path, config, essence)
    make_folder(config.out)
    course = Course.of(essence, draw_targets(config.targets), config.held_out)
    rows: dict[str, dict[str, Any]] = {}
    for name, mapper in tqdm(mappers.items(), unit="mapper"):
        known, sheet = report["mappers"], config.out / f"{name}.png"
        judged = next((row for row in known.values() if same_mapper(row, mapper)), None)
        rows[name] = judged or row_of(course, mapper, config.seed)
        if not sheet.exists() or not same_mapper(known.get(name), mapper):
            save_pictures(course, mapper, sheet)
        report["mappers"] = {**rows, **{n: row for n, row in known.items() if n not in rows}}
        write_file(path, (json.dumps(report, indent=2) + "\n").encode())
    text = report_table(rows)
    write_file(config.out / "report.md", text.encode())
    print(text)
    return rows


def main() -> None:
    """Errors of input and of files are one line."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
