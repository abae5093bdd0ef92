"""Compare texts as targets with the pictures of the same faces.

    python -m eval.studies.texts --out runs/texts

Avatars that nothing was trained on are given to the mapper as pictures and as captions, single
phrases as texts alone. Texts are embedded twice: as the product does it (`predictor.text`), and
raw, which shows what the gap between texts and pictures costs. The attribute reader judges. Writes
report.json, report.md and grid.png, and prints the tables. Knows targets and how they are scored;
nothing of how a text becomes a target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.seeds import TEST_SOURCES, TEXT_TARGETS, seed_of
from targetclip.world import DEFAULT_WORLD, World, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and grid.png."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    count: int = 32
    """Faces."""
    sources: int = 8
    """Sources that are edited."""
    seed: int = 5
    """Decides the wording of captions and the draws of the bootstrap; faces are always the same."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.texts", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.avatars import draw
from data.illustrated.captions import caption
from data.illustrated.codes import ATTRIBUTES, HAIR_COLOURS, HAT_COLOURS, STYLE, options_of
from data.illustrated.shown import shown
from data.targets import draw_avatar, face_at
from eval.judging import Goal, Judges, face_judges, judge_edits
from eval.metrics import interval
from eval.reader import NAMES, OUTPUTS, PRESENT, SPANS
from eval.report import number, table, with_bounds
from eval.truth import Truth, truth_of
from predictor.editing import edits_sheet
from predictor.inputs import Text
from predictor.text import TextTargets
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.media.images import write_picture

SHOWN_FACES, SHOWN_SOURCES = 6, 6  # on the grid

PICTURE, TEXT, RAW = "picture", "text", "raw text"
FACE, COMPLETE, BRIEF, PHRASE = "face", "complete caption", "brief caption", "single phrase"
SCORES = {
    "essence": "essence acquired",
    "identity": "identity kept",
    "transfer": "transfer score",
    "cosine": "to the picture",
}

READING = """## How to read it

Means over targets, in brackets 95 % of bootstrap means. A text is embedded as the product
does it, measured from neutral texts; a raw text is its embedding alone, as if it were a picture's.

- essence acquired: the part of the way from source to target that edits went, by the attribute
  reader. Of pictures and captions all the essence of the face counts: a complete caption names what
  is there, but not which kind of it, and a brief one leaves some of it out. Of single phrases only
  what they name counts.
- identity kept: 1 is all of it, 0 as little as between two sources.
- transfer score: cosine of edited sources to the picture of the face.
- to the picture: cosine of the target's own embedding to that of the picture.
"""


GREEN, PINK, BLUE = (HAIR_COLOURS[name] for name in ("green", "pink", "blue"))
THERE = "there"
# What each phrase names: values of attributes, or kinds of things that are there.
PHRASES: dict[str, dict[str, str]] = {
    "green hair": {"hairColor": GREEN},
    "pink hair": {"hairColor": PINK},
    "short blue hair": {"hairColor": BLUE},
    "a hat": {"hat": THERE},
    "a red hat": {"hat": THERE, "hatColor": HAT_COLOURS["red"]},
    "a turban": {"top": "turban"},
    "a big afro": {"top": "fro"},
    "dreadlocks": {"top": "dreads"},
    "glasses": {"glasses": THERE},
    "round glasses": {"accessories": "round"},
    "a beard": {"beard": THERE},
    "a long beard": {"facialHair": "beardMajestic"},
    "an open mouth": {"mouth": "screamOpen"},
    "pink hair and glasses": {"hairColor": PINK, "glasses": THERE},
}


def check_config(config: Config, world: World) -> None:
    """Raise a ValueError for an option that cannot be."""
    command.check_least(config, count=1, sources=2)
    if (config.mapper or world.mapper) is None:
        raise ValueError(
            f"--mapper: expected a mapper's file, for world {world.name!r} names none; train one "
            "with python -m train.mapper"
        )


# Targets


def truth_of_phrases() -> Truth:
    """Return what each of PHRASES names, and nothing else."""
    readings = torch.zeros(len(PHRASES), OUTPUTS)
    seen = torch.zeros(len(PHRASES), OUTPUTS, dtype=torch.bool)
    for row, named in enumerate(PHRASES.values()):
        for name, value in named.items():
            place = 1 if name in PRESENT else ATTRIBUTES[NAMES.index(name)].values.index(value)
            readings[row, SPANS[name].start + place] = 1
            seen[row, SPANS[name]] = True
    return Truth((), readings, seen)


@dataclass(frozen=True)
class DescribedFaces:
    """Faces that nothing was trained on, in pictures and in words."""

    pictures: list[Image.Image]
    captions: dict[str, list[str]]
    """By their kind."""
    truth: Truth


def describe_faces(count: int, seed: int) -> DescribedFaces:
    """Draw the first faces; the seed decides the wording of their captions."""
    faces = [face_at(TEXT_TARGETS, i) for i in range(count)]
    said = [shown(STYLE, draw(STYLE, options_of(face))[1]) for face in faces]

    def worded(kind: str, i: int) -> str:
        random = np.random.default_rng(seed_of("caption", seed, kind, i))
        return caption(said[i], random, complete=kind == COMPLETE)

    return DescribedFaces(
        pictures=[draw_avatar("avataaars", TEXT_TARGETS, i) for i in range(count)],
        captions={kind: [worded(kind, i) for i in range(count)] for kind in (COMPLETE, BRIEF)},
        truth=truth_of([tuple(face) for face in faces]),
    )


# Answers and scores


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The product with its mapper, the judges, and the sources that are edited."""

    essence: EssenceTransfer
    texts: TextTargets
    judges: Judges
    sources: Float[Tensor, "sources num_ws w_dim"]

    def embed(self, targets: Sequence[Image.Image | str]) -> Float[Tensor, "targets embed"]:
        """Embed targets as the product gives them to the mapper."""
        recipe = self.essence.trained
        given = [Text(target) if isinstance(target, str) else target for target in targets]
        return torch.stack([self.essence.embed_target(target, recipe) for target in given])

    def embed_raw(self, texts: Sequence[str]) -> Float[Tensor, "targets embed"]:
        """Embed texts as if they were pictures."""
        return self.texts.embedder.embed_texts(texts)


def make_setup(config: Config, world: World) -> Setup:
    """Load the product and the judges."""
    essence = load_essence(world, command.choose_device(), config.mapper)
    if essence.texts is None:
        raise ValueError(
            f"--world: expected a world with neutral texts, which others are measured from, found "
            f"none in {world.name!r}"
        )
    return Setup(
        essence=essence,
        texts=essence.texts,
        judges=face_judges(essence.scene),
        sources=essence.scene.sources(config.sources, TEST_SOURCES),
    )


@dataclass(frozen=True, kw_only=True)
class Result:
    """Targets given in one way, with the mapper's directions and their scores."""

    kind: str
    way: str
    names: list[str]
    """The texts, or the faces."""
    directions: Float[Tensor, "targets num_ws w_dim"]
    scores: dict[str, Tensor]
    """By the names of SCORES, each [targets]; not every target has all."""


def judge_targets(
    setup: Setup,
    kind: str,
    way: str,
    targets: Sequence[Image.Image | str],
    truth: Truth,
    pictures: Sequence[Image.Image] = (),
) -> Result:
    """Judge the mapper's answers to targets that are embedded in one way.

    Args:
        pictures: of the same faces, for the scores that need them.
    """
    judges, texts = setup.judges, [target for target in targets if isinstance(target, str)]
    embeddings = setup.embed_raw(texts) if way == RAW else setup.embed(targets)
    directions = setup.essence.asked_mapper()(embeddings).directions
    asked = embeddings.float().cpu()
    shown = judges.scene.embedder.embed_pictures(pictures).cpu() if pictures else asked
    goal = Goal(embeddings=shown, second=None, people=None, truth=truth)
    known = judge_edits(judges, goal, setup.sources, directions).scores
    scores = {name: known[name] for name in ("essence", "identity")}
    if pictures:
        scores["transfer"] = known["transfer"]
        scores["cosine"] = F.cosine_similarity(asked, shown, dim=1)
    names = texts or [f"face {i}" for i in range(len(targets))]
    return Result(kind=kind, way=way, names=names, directions=directions, scores=scores)


def judge_all(setup: Setup, faces: DescribedFaces) -> list[Result]:
    """Judge pictures, then every kind of text both ways."""
    given = (faces.truth, faces.pictures)
    results = [judge_targets(setup, FACE, PICTURE, faces.pictures, *given)]
    for kind, texts in faces.captions.items():
        results += [judge_targets(setup, kind, way, texts, *given) for way in (TEXT, RAW)]
    phrases, truth = list(PHRASES), truth_of_phrases()
    return results + [judge_targets(setup, PHRASE, way, phrases, truth) for way in (TEXT, RAW)]


# The report


def row_of(result: Result, seed: int) -> dict[str, Any]:
    """Return a row of report.json: means with their intervals, then each target."""
    return {
        "kind": result.kind,
        "way": result.way,
        "count": len(result.names),
        "scores": {name: interval(values, seed) for name, values in result.scores.items()},
        "length": float(result.directions.flatten(1).norm(dim=1).mean()),
        "targets": result.names,
        "each": {name: values.tolist() for name, values in result.scores.items()},
    }


def phrase_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of single phrases, both ways."""
    columns = {
        f"{SCORES[name]}, {row['way']}": row["each"][name]
        for row in rows
        if row["kind"] == PHRASE
        for name in ("essence", "identity")
    }
    lines = zip(PHRASES, *columns.values(), strict=True)
    return table(["phrase", *columns], [[name, *map(number, values)] for name, *values in lines])


def tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return all kinds and ways, then the phrases, in Markdown."""
    cells = [
        [
            row["kind"],
            row["way"],
            str(row["count"]),
            *(with_bounds(row["scores"].get(name)) for name in SCORES),
            number(row["length"], 2),
        ]
        for row in rows
    ]
    heads = ["target", "given as", "targets", *SCORES.values(), "length"]
    return "\n".join([*table(heads, cells), *phrase_table(rows)])


def grid(setup: Setup, results: Sequence[Result], faces: DescribedFaces) -> Image.Image:
    """Return the sources, then a row for each of the first faces' targets and for each phrase."""
    sources, scene = setup.sources[:SHOWN_SOURCES], setup.judges.scene
    blank = Image.new("RGB", (scene.generator.resolution,) * 2, "white")
    rows: dict[str, tuple[Image.Image, Tensor]] = {}

    def add(result: Result, place: int, first: Image.Image) -> None:
        label = result.names[place]
        if result.way == PICTURE:
            label = f"{label}, by its picture"
        elif result.kind != PHRASE:
            label = f"face {place}, {result.kind}: {label}"
        rows[label] = first, result.directions[place]

    shown = [result for result in results if result.way != RAW]
    for place, picture in enumerate(faces.pictures[:SHOWN_FACES]):
        for result in shown:
            if result.kind != PHRASE:
                add(result, place, picture)
    for result in shown:
        if result.kind == PHRASE:
            for place in range(len(result.names)):
                add(result, place, blank)
    return edits_sheet(scene, sources, rows)


def run(config: Config) -> list[dict[str, Any]]:
    """Judge texts and pictures, write the report, and print the tables; return the rows.

    Raises:
        FileNotFoundError: no such world or mapper.
        ValueError: an option that cannot be, or a world without mapper, neutral texts, or pictures
            that the attribute reader knows.
    """
    world = load_world(config.world)
    check_config(config, world)
    command.say(f"loading world {world.name}", error=True)
    setup = make_setup(config, world)
    command.make_folder(config.out)
    faces = describe_faces(config.count, config.seed)
    results = judge_all(setup, faces)
    rows = [row_of(result, config.seed) for result in results]
    report = {
        "world": world.name,
        "mapper": setup.essence.asked_mapper().fingerprint,
        **{name: getattr(config, name) for name in ("count", "sources", "seed")},
        "versions": command.versions(),
        "rows": rows,
    }
    command.write_json(config.out / "report.json", report)
    text = tables(rows)
    command.write_file(config.out / "report.md", f"# Texts as targets\n\n{text}\n{READING}")
    write_picture(grid(setup, results, faces), config.out / "grid.png")
    print(text)
    command.say_next(config.out, "report.md, grid.png", "read report.md", error=True)
    return rows
