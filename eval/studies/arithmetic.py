"""Measure whether directions add up: mixtures of two targets, and differences that take away.

    python -m eval.studies.arithmetic --out runs/arithmetic

Two targets are mixed of which each has one attribute and lacks that of the other; every beard has a
colour, so of hair colour and a beard the second has another colour. The second is in the
generator's style, so that its face is drawn without the attribute as well. An attribute arrives
where the attribute reader sees it on an edited source and did not before. What a mixture keeps is
the number of sources on which it arrives, as a part of those on which it arrives with its target
alone. One mixture takes features and colours from the first target and shapes from the second, by
factors of their layers. Another takes words for the attribute in place of the second picture. It
counts against the sources on which that picture brings it.

Subtraction takes the direction of a face with an attribute, less that of the same face without, and
subtracts it from sources that have it; or the direction of words. Targets are validation
targets; test targets are asked for by --test, once a mapper is final. Writes report.json and
report.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.world import DEFAULT_WORLD, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json and report.md."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    targets: int = 192
    """Targets to choose from; every second one is in the generator's style."""
    pairs: int = 16
    """Most pairs of each mixture, and faces of each difference."""
    sources: int = 32
    """Sources that are edited."""
    test: bool = False
    """Judge on test targets and test sources, instead of those of validation."""
    seed: int = 0
    """Of the bootstrap."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.arithmetic", Config, exclusive=True)

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.illustrated.codes import ATTRIBUTES, NONE, draw_face
from eval.judging import face_reader
from eval.metrics import identity_kept, interval, interval_kept
from eval.reader import NAMES, PRESENT, SPANS, AvatarReader
from eval.report import number, table, with_bounds
from eval.sets import EvalSet, Sources, targets_and_sources
from eval.truth import Content, Truth
from predictor.direction import Direction, layer_weights, mixed
from predictor.transfer import EssenceTransfer, load_essence

COLOUR = "hair colour"
MIXTURES = (("glasses", "hat"), ("glasses", "beard"), (COLOUR, "beard"))
HALF, SUM, LESS = "half of each", "sum", "sum, less the second without"
# Of coarse, middle and fine layers; chosen on validation targets
PARTS, FIRST, SECOND = "layers of their own", (0.85, 1.3, 1.0), (2.0, 0.4, 0.0)
WORDS, LOUDER = "sum with words", 2.0
SUBTRACTED, ADDED = "with less without, subtracted", "with less without, added"
WHOLE, THERE_AND_BACK = "with, subtracted", "with, added, then subtracted"
NAMED = "words, subtracted"
NAMES_OF = {"glasses": "glasses", "beard": "a beard", "hat": "a hat"}
BARE = {"glasses": NONE, "beard": NONE, "hat": "shortFlat"}  # what stands in its place

Readings = Float[Tensor, "sources outputs"]

READING = f"""## How to read it

Shares of sources, as means over pairs or faces; brackets hold 95 % of bootstrap means. `{HALF}`
is 0.5 a + 0.5 b, `{SUM}` is a + b, and `{LESS}` is a + b - c, with c the face of b
without the attribute. `{PARTS}` is the sum of a, its coarse, middle and fine layers times
{FIRST}, and b, times {SECOND}. `{WORDS}` is a + {LOUDER:g} d, with d the words for what b has, as
mixtures take them. All have their corrections, as the product mixes. Kept: sources on which the
attribute arrives with the mixture, as a part of those on which it arrives with its target alone;
targets that alone bring it to no source are left out.
"""


# Targets


def shows(truth: Truth, kind: str, there: bool) -> Bool[Tensor, " targets"]:
    """Return which targets are known to have an attribute or, if not `there`, to lack it."""
    if kind == COLOUR:
        return truth.seen[:, SPANS["hairColor"]].any(dim=1) == there
    # Of faces in the generator's style all is known, and presence is not counted beside the kinds.
    known = truth.seen[:, SPANS[kind]].any(dim=1) | truth.seen[:, SPANS["accessories"]].any(dim=1)
    return known & (truth.readings[:, SPANS[kind].start + there] == 1)


def column(truth: Truth, row: int, kind: str) -> int:
    """Return the reading that says that an attribute is there: of a colour, the target's own."""
    span = SPANS["hairColor" if kind == COLOUR else kind]
    value = int(truth.readings[row, span].argmax()) if kind == COLOUR else 1
    place: int = span.start + value
    return place


def pairs_of(truth: Truth, one: str, other: str, count: int) -> list[tuple[int, int]]:
    """Return rows of targets: the first has `one` and lacks `other`, the second, which is in the
    generator's style, the other way round. No target is in two pairs."""
    drawn = torch.tensor([isinstance(content, tuple) for content in truth.contents])
    has = shows(truth, other, True) & drawn
    firsts = (shows(truth, one, True) & shows(truth, other, False)).nonzero()[:, 0].tolist()
    seconds = (has if one == COLOUR else has & shows(truth, one, False)).nonzero()[:, 0].tolist()
    pairs = []
    for first in firsts:
        for second in seconds:
            if one != COLOUR or column(truth, first, one) != column(truth, second, one):
                pairs.append((first, second))
                seconds.remove(second)
                break
    return pairs[:count]


def without(face: Content, kind: str) -> tuple[int, ...]:
    """Return a face in the generator's style without glasses, beard or hat."""
    assert isinstance(face, tuple), "of another style, faces are not drawn by values"
    place = NAMES.index(PRESENT[kind][0])
    bare = ATTRIBUTES[place].values.index(BARE[kind])
    return tuple(bare if i == place else value for i, value in enumerate(face))


# Edits


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The product with its mapper, the reader, the targets, and the sources that are edited."""

    essence: EssenceTransfer
    reader: AvatarReader
    targets: EvalSet
    truth: Truth
    sources: Sources
    before: Readings

    def read(self, ws: Sources) -> Readings:
        """Return readings of latents."""
        return readings_of(self.essence, self.reader, ws)

    def direction(self, picture: Image.Image) -> Direction:
        """Return the mapper's answer."""
        return self.essence.direction(picture, "instant")

    def words(self, kind: str) -> Direction:
        """Return what words for an attribute bring or take away in a mixture."""
        found = self.essence.direction(text=NAMES_OF[kind], mode="instant")
        return self.essence.only_named(found)

    def bare(self, face: Content, kind: str) -> Direction:
        """Return the answer to a face in the generator's style, drawn without an attribute."""
        return self.direction(Image.fromarray(draw_face(without(face, kind))[0]))


@torch.no_grad()
def readings_of(essence: EssenceTransfer, reader: AvatarReader, ws: Sources) -> Readings:
    """Return readings of renderings of latents."""
    return reader.read(essence.scene.render(ws))[1].cpu()


def in_layers(direction: Direction, factors: tuple[float, float, float]) -> Direction:
    """Return a direction with its coarse, middle and fine layers multiplied by factors."""
    return direction.weighted(layer_weights(len(direction.vector), *factors))


def mixtures(
    one: Direction, other: Direction, bare: Direction, words: Direction
) -> dict[str, Direction]:
    """Return each way to mix two directions; `bare` is that of the second without what it has, and
    `words` name it."""
    return {
        HALF: mixed([one, other], [0.5, 0.5]),
        SUM: mixed([one, other], [1.0, 1.0]),
        LESS: mixed([one, other, bare], [1.0, 1.0, -1.0]),
        PARTS: mixed([in_layers(one, FIRST), in_layers(other, SECOND)], [1.0, 1.0]),
        WORDS: mixed([one, words], [1.0, LOUDER]),
    }


def order_matters(one: Direction, other: Direction, ws: Sources) -> float:
    """Return how far two orders of a sum are apart, as a part of its length."""
    sums = [mixed(pair, [1.0, 1.0]).offsets(ws) for pair in ([one, other], [other, one])]
    return float((sums[0] - sums[1]).norm() / sums[0].norm())


def mixture_rows(setup: Setup, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each mixture, way and attribute."""
    for kinds in MIXTURES:
        pairs = pairs_of(setup.truth, *kinds, count)
        found: dict[tuple[str, str], list[list[float]]] = {}
        apart, words = 0.0, setup.words(kinds[1])
        for pair in tqdm(pairs, " + ".join(kinds), unit="pair", leave=False):
            one, other = (setup.direction(setup.targets.pictures[row]) for row in pair)
            alone = [setup.read(setup.sources + d.offsets(setup.sources)) for d in (one, other)]
            apart = max(apart, order_matters(one, other, setup.sources))
            bare = setup.bare(setup.truth.contents[pair[1]], kinds[1])
            for way, direction in mixtures(one, other, bare, words).items():
                after = setup.read(setup.sources + direction.offsets(setup.sources))
                kept = float(identity_kept(after[None], setup.before))
                for kind, row, its in zip(kinds, pair, alone, strict=True):
                    place = column(setup.truth, row, kind)
                    lacks = setup.before[:, place] <= 0.5
                    counts = [float((r[lacks, place] > 0.5).sum()) for r in (its, after)]
                    found.setdefault((way, kind), []).append([*counts, float(lacks.sum()), kept])
        for (way, kind), values in found.items():
            arrived, both, lacking, identity = torch.tensor(values).T
            some = arrived > 0
            parts = (arrived - both)[some, None], arrived[some, None]
            yield {
                "mixture": " + ".join(kinds),
                "way": way,
                "attribute": kind,
                "pairs": len(pairs),
                "alone": interval(arrived / lacking.clamp(min=1), seed),
                "mixed": interval(both / lacking.clamp(min=1), seed),
                "kept": interval_kept(parts, seed) if some.any() else None,
                "identity": interval(identity, seed),
                "order": apart,
            }


def difference_rows(setup: Setup, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each attribute and way to take away, or to add."""
    sources = setup.sources
    for kind in BARE:
        place, shown = SPANS[kind].start + 1, shows(setup.truth, kind, True)
        faces = [
            content
            for content, has in zip(setup.truth.contents, shown, strict=True)
            if isinstance(content, tuple) and has
        ][:count]
        has = setup.before[:, place] > 0.5
        found: dict[str, list[list[float]]] = {}
        words = setup.words(kind)
        for face in tqdm(faces, kind, unit="face", leave=False):
            one = setup.direction(Image.fromarray(draw_face(face)[0]))
            bare = setup.bare(face, kind)
            forth = sources + one.offsets(sources)
            there = setup.read(forth)[:, place] > 0.5
            # Words are the same for every face.
            ways = {NAMED: (-1.0 * words.offsets(sources), has, False)} if face == faces[0] else {}
            ways |= {
                SUBTRACTED: (mixed([one, bare], [-1.0, 1.0]).offsets(sources), has, False),
                WHOLE: (mixed([one], [-1.0]).offsets(sources), has, False),
                THERE_AND_BACK: (forth - one.offsets(forth) - sources, there & ~has, False),
                ADDED: (mixed([one, bare], [1.0, -1.0]).offsets(sources), ~has, True),
            }
            for way, (offsets, chosen, wanted) in ways.items():
                after = setup.read(sources + offsets)
                reached = ((after[:, place] > 0.5) == wanted)[chosen]
                if len(reached):
                    kept = float(identity_kept(after[None], setup.before))
                    found.setdefault(way, []).append([float(reached.float().mean()), kept])
        for way, values in found.items():
            share, identity = torch.tensor(values).T
            yield {
                "attribute": kind,
                "way": way,
                "faces": len(values),
                "share": interval(share, seed),
                "identity": interval(identity, seed),
            }


# The report


def report_text(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    heads = ["mixture", "mixed as", "attribute", "pairs", "alone", "mixed", "kept", "identity"]
    scores = ("alone", "mixed", "kept", "identity")
    rows = [
        [row["mixture"], row["way"], row["attribute"], str(row["pairs"])]
        + [with_bounds(row[score]) for score in scores]
        for row in report["mixtures"]
    ]
    order = max((row["order"] for row in report["mixtures"]), default=None)
    lines = ["# Arithmetic of directions", "", *table(heads, rows)]
    lines += [f"Two orders of a sum differ by {number(order, 9)} of its length at most.", ""]
    rows = [
        [row["attribute"], row["way"], str(row["faces"])]
        + [with_bounds(row[score]) for score in ("share", "identity")]
        for row in report["differences"]
    ]
    heads = ["attribute", "direction", "faces", "sources that it leaves, or arrives on", "identity"]
    return "\n".join([*lines, *table(heads, rows), READING])


def run(config: Config) -> dict[str, Any]:
    """Edit, read, write the report, and return it.

    Raises:
        FileNotFoundError, ValueError: an option, a world or a mapper that cannot be.
        OSError: --out cannot be written into.
    """
    command.check_least(config, targets=2, pairs=1, sources=2)
    world = load_world(config.world)
    command.say(f"loading world {world.name}", error=True)
    essence = load_essence(world, command.choose_device(), config.mapper)
    mapper, reader = essence.asked_mapper(), face_reader(essence.scene)
    if essence.texts is None:
        raise ValueError(
            f"--world: expected a world with neutral texts, found none in {world.name!r}"
        )
    command.make_folder(config.out)
    targets, sources = targets_and_sources(
        essence.scene, config.targets, config.sources, config.test
    )
    assert targets.truth is not None, "avatars are of known content"
    setup = Setup(
        essence=essence,
        reader=reader,
        targets=targets,
        truth=targets.truth,
        sources=sources,
        before=readings_of(essence, reader, sources),
    )
    report = {
        "world": world.name,
        "mapper": mapper.fingerprint,
        **{name: getattr(config, name) for name in ("targets", "sources", "test", "seed")},
        "versions": command.versions(),
        "mixtures": list(mixture_rows(setup, config.pairs, config.seed)),
        "differences": list(difference_rows(setup, config.pairs, config.seed)),
    }
    command.write_json(config.out / "report.json", report)
    text = report_text(report)
    command.write_file(config.out / "report.md", text)
    print(text)
    command.say_next(config.out, "report.md", "read report.md", error=True)
    return report
