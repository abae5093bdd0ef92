"""How much of a target a text brings, openly against the picture of the same face.

    python -m eval.studies.texts --out runs/texts

Faces that nothing was trained on are given to the mapper as pictures and as captions, single
phrases as texts alone. Texts are taken twice: as the product takes them (`predictor.text`), and by
their raw embeddings, which shows what the gap between texts and pictures costs. The attribute
reader judges. Writes report.json, report.md and grid.png, and prints the table. Knows targets and
how they are scored; nothing of how a text becomes a target.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.drawn.captions import caption
from data.drawn.faces import wide_face
from data.drawn.readings import READINGS, readings_of
from data.drawn.sketch import GLASSES_COLOURS, HAIR_COLOURS, HAT_COLOURS, NAMES, Colour, Face, draw
from eval.judging import Judges, edited_images, judge
from eval.metrics import essence_acquired, identity_kept, transfer_scores
from eval.report import number, table, with_bounds
from eval.sets import SOURCE_SEED
from eval.studies.ablation import face_judges
from eval.summary import interval
from predictor.cli import choose_device
from predictor.load import load_essence
from predictor.mapper_file import trained_recipe
from predictor.report import make_folder, versions, write_file
from predictor.text import TextTargets
from predictor.transfer import EssenceTransfer
from targetclip.media.images import labelled_grid, tensor_to_pictures, write_picture
from targetclip.seeds import seed_of
from targetclip.world import World, load_world

FACE_SEED = 6_000_011  # of this evaluation alone
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

Means over targets, in brackets 95 % of bootstrap means. A text is taken as the product takes it,
measured from neutral texts; a raw text is its embedding alone, as if texts were pictures.

- essence acquired: how much of the way from source to target went what the target names, by the
  attribute reader. Of pictures and captions it counts all the essence of the face: a complete
  caption names what is there, but not how much of it, and a brief one leaves some of it out. Of
  single phrases it counts what they name and nothing else.
- identity kept: 1 is all of it, 0 as little as between two sources.
- transfer score: cosine of edited sources to the picture of the face.
- to the picture: cosine of the target's own embedding to that of the picture.
"""


def middle(palette: dict[str, Colour], name: str) -> float:
    """The parameter that is a colour and no other."""
    return (list(palette).index(name) + 0.5) / len(palette)


# What each phrase names, as parameters of a face: the middle of what captions call so.
PHRASES: dict[str, dict[str, float]] = {
    "green hair": {"hair_colour": middle(HAIR_COLOURS, "green")},
    "long blonde hair": {"hair_length": 0.8, "hair_colour": middle(HAIR_COLOURS, "blonde")},
    "a red hat": {"hat": 1, "hat_colour": middle(HAT_COLOURS, "red")},
    "a blue top hat": {"hat": 1, "hat_shape": 0.75, "hat_colour": middle(HAT_COLOURS, "blue")},
    "round glasses": {"glasses": 1, "glasses_shape": 0.25},
    "square gold glasses": {
        "glasses": 1,
        "glasses_shape": 0.75,
        "glasses_colour": middle(GLASSES_COLOURS, "gold"),
    },
    "sunglasses": {"glasses": 1, "lens": 1},
    "a long beard": {"beard": 0.915},
    "a moustache": {"moustache": 1},
    "a big open smile": {"smile": 0.81, "mouth_open": 0.835},
    "white face paint": {"face_paint": 1},
    "pink hair and a smile": {"hair_colour": middle(HAIR_COLOURS, "pink"), "smile": 0.81},
}


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json, report.md and grid.png."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    count: int = 32
    """Faces."""
    sources: int = 8
    """Sources that are edited."""
    seed: int = 5
    """Decides the wording of captions and what the bootstrap draws; faces are always the same."""


def check_config(config: Config, world: World) -> None:
    """Raise a ValueError for what cannot be; here, for tyro prints a box for its own."""
    for name, least in {"count": 1, "sources": 2}.items():
        if getattr(config, name) < least:
            found = getattr(config, name)
            raise ValueError(f"--{name}: expected {least} or more, found {found}")
    if (config.mapper or world.mapper) is None:
        raise ValueError(
            f"--mapper: expected a mapper's file, for world {world.name!r} names none; train one "
            "with python -m train.mapper"
        )
    if not world.neutral:
        raise ValueError(
            f"--world: expected a world with neutral texts, which others are measured from, found "
            f"none in {world.name!r}"
        )


# What is asked for


@dataclass(frozen=True)
class Wanted:
    """What targets should bring, in the attribute reader's words."""

    readings: Float[Tensor, "targets outputs"]
    counted: Bool[Tensor, "targets outputs"]
    """Which of the readings the targets are about."""

    @staticmethod
    def of(pairs: Sequence[tuple[Any, Any]]) -> "Wanted":
        """From readings and mask of each target."""
        values, counted = (np.stack(column) for column in zip(*pairs, strict=True))
        return Wanted(torch.from_numpy(values).float(), torch.from_numpy(counted))


@dataclass(frozen=True)
class Faces:
    """Plain faces that nothing was trained on, in pictures and in words."""

    pictures: list[Image.Image]
    captions: dict[str, list[str]]
    """By their kind."""
    wanted: Wanted

    @staticmethod
    def draw(count: int, seed: int) -> "Faces":
        """The first faces, with captions worded as the seed says."""
        triples = [wide_face(FACE_SEED, i, styled=0, extra=0) for i in range(count)]

        def worded(kind: str, i: int) -> str:
            random = np.random.default_rng(seed_of("caption", seed, kind, i))
            return caption(*triples[i][:2], random, complete=kind == COMPLETE)

        return Faces(
            [draw(*triple) for triple in triples],
            {kind: [worded(kind, i) for i in range(count)] for kind in (COMPLETE, BRIEF)},
            Wanted.of([readings_of(face) for face, _, _ in triples]),
        )


def wanted_by_phrases() -> Wanted:
    """What each of PHRASES names, and nothing else."""
    pairs = []
    for named in PHRASES.values():
        values, _ = readings_of(Face(**{**dict.fromkeys(NAMES, 0.5), **named}))
        counted = [reading.name in named for reading in READINGS for _ in range(reading.size)]
        pairs.append((values, np.array(counted)))
    return Wanted.of(pairs)


# Who answers and who judges


@dataclass(frozen=True)
class Stage:
    """The mapper and the judges, and the sources that are edited."""

    essence: EssenceTransfer
    texts: TextTargets
    judges: Judges
    sources: Float[Tensor, "sources num_ws w_dim"]
    before: Float[Tensor, "sources 3 height width"]

    @staticmethod
    def of(config: Config, world: World) -> "Stage":
        essence = load_essence(world, choose_device(None), config.mapper)
        if essence.texts is None:
            raise ValueError(f"{world.name!r} is a world without neutral texts")
        judges = face_judges(essence)
        sources = essence.generated_sources(config.sources, SOURCE_SEED)
        return Stage(essence, essence.texts, judges, sources, judges.render(sources))

    def embed(self, targets: Sequence[Image.Image | str]) -> Float[Tensor, "targets embed"]:
        """Targets as the product gives them to the mapper."""
        recipe = trained_recipe(self.essence.asked_mapper().record)
        return torch.stack([self.essence.embed_target(target, recipe) for target in targets])

    def embed_raw(self, texts: Sequence[str]) -> Float[Tensor, "targets embed"]:
        """Texts as if they were pictures."""
        return self.texts.embedder.embed_texts(texts)


@dataclass(frozen=True)
class Trial:
    """Targets given in one way, and what came of each."""

    kind: str
    way: str
    names: list[str]
    """The texts, or the faces."""
    directions: Float[Tensor, "targets num_ws w_dim"]
    scores: dict[str, Tensor]
    """Those of SCORES that there are, each [targets]."""


def tried(
    stage: Stage,
    embeddings: Float[Tensor, "targets embed"],
    wanted: Wanted,
    pictures: Sequence[Image.Image],
) -> tuple[Float[Tensor, "targets num_ws w_dim"], dict[str, Tensor]]:
    """The mapper's directions, and their scores; edits are made a target at a time."""
    judges = stage.judges
    directions = stage.essence.predict_embeddings(embeddings).directions
    look = judge(judges, stage.before, edited_images(judges, stage.sources, directions)).look
    unedited = judges.look(stage.before)
    if look.readings is None or unedited.readings is None:
        raise ValueError("expected an attribute reader among the judges, found none")
    goal = (wanted.readings, wanted.counted)
    scores = {
        "essence": essence_acquired(look.readings, unedited.readings, *goal),
        "identity": identity_kept(look.readings, unedited.readings),
    }
    if pictures:
        seen = judges.embedder.embed_pictures(pictures).cpu()
        scores["transfer"] = transfer_scores(look.embeddings, seen).mean(dim=1)
        scores["cosine"] = F.cosine_similarity(embeddings.float().cpu(), seen, dim=1)
    return directions, scores


def trials_of(stage: Stage, faces: Faces) -> list[Trial]:
    """Pictures, then every kind of text both ways."""
    pictures = faces.pictures
    found = tried(stage, stage.embed(pictures), faces.wanted, pictures)
    trials = [Trial(FACE, PICTURE, [f"face {i}" for i in range(len(pictures))], *found)]
    for kind, texts in {**faces.captions, PHRASE: list(PHRASES)}.items():
        known = (wanted_by_phrases(), []) if kind == PHRASE else (faces.wanted, pictures)
        for way, embed in {TEXT: stage.embed, RAW: stage.embed_raw}.items():
            trials.append(Trial(kind, way, texts, *tried(stage, embed(texts), *known)))
    return trials


# The report


def row_of(trial: Trial, seed: int) -> dict[str, Any]:
    """A trial as report.json holds it: means with their intervals, then each target."""
    return {
        "kind": trial.kind,
        "way": trial.way,
        "count": len(trial.names),
        "scores": {name: interval(values, seed) for name, values in trial.scores.items()},
        "length": float(trial.directions.flatten(1).norm(dim=1).mean()),
        "targets": trial.names,
        "each": {name: values.tolist() for name, values in trial.scores.items()},
    }


def phrase_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each phrase on its own, both ways."""
    ways = {row["way"]: row["each"] for row in rows if row["kind"] == PHRASE}
    columns = {
        f"{SCORES[name]}, {way}": each[name]
        for way, each in ways.items()
        for name in ("essence", "identity")
    }
    lines = zip(PHRASES, *columns.values(), strict=True)
    return table(["phrase", *columns], [[name, *map(number, found)] for name, *found in lines])


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """All kinds and ways, then the phrases, in Markdown."""
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


def grid(stage: Stage, trials: Sequence[Trial], faces: Faces) -> Image.Image:
    """The sources, then the first faces by picture and by captions, then phrases, a row each."""
    sources = stage.sources[:SHOWN_SOURCES]
    unedited = tensor_to_pictures(stage.before[:SHOWN_SOURCES])
    blank = Image.new("RGB", unedited[0].size, "white")
    rows = {"sources": [blank, *unedited]}

    def add(trial: Trial, place: int, first: Image.Image) -> None:
        label = trial.names[place]
        if trial.way == PICTURE:
            label = f"{label}, by its picture"
        elif trial.kind != PHRASE:
            label = f"face {place}, {trial.kind}: {label}"
        edited = stage.judges.render(sources + trial.directions[place])
        rows[label] = [first, *tensor_to_pictures(edited)]

    shown = [trial for trial in trials if trial.way != RAW]
    for place, picture in enumerate(faces.pictures[:SHOWN_FACES]):
        for trial in shown:
            if trial.kind != PHRASE:
                add(trial, place, picture)
    for trial in shown:
        if trial.kind == PHRASE:
            for place in range(len(trial.names)):
                add(trial, place, blank)
    return labelled_grid(None, rows)


def run(config: Config) -> list[dict[str, Any]]:
    """Judge texts and pictures, write the report, and print the tables; returns the rows.

    Raises:
        FileNotFoundError: no such world or mapper.
        ValueError: an option that cannot be, or a world without mapper, neutral texts, or pictures
            that the attribute reader knows.
    """
    world = load_world(config.world)
    check_config(config, world)
    stage = Stage.of(config, world)
    make_folder(config.out)
    faces = Faces.draw(config.count, config.seed)
    trials = trials_of(stage, faces)
    rows = [row_of(trial, config.seed) for trial in trials]
    report = {
        "world": world.name,
        "mapper": stage.essence.asked_mapper().fingerprint,
        **{name: getattr(config, name) for name in ("count", "sources", "seed")},
        "versions": versions(),
        "rows": rows,
    }
    write_file(config.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    text = tables(rows)
    write_file(config.out / "report.md", f"# Texts as targets\n\n{text}\n{READING}".encode())
    write_picture(grid(stage, trials, faces), config.out / "grid.png")
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
