"""Make test sets: fixed targets and sources that nothing of this project learned from.

Targets have the ids of `data.targets`; those of the test split are taken, which every trainer
leaves out. Knows pictures, their ids and what avatars show; nothing of methods or scores.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.illustrated.avatars import HELD_OUT, TRAINED, check_dicebear, draw
from data.illustrated.codes import STYLE
from data.illustrated.shown import shown
from data.targets import (
    Target,
    avatar_at,
    digest_of,
    draw_avatar,
    face_at,
    open_folder,
    render_sample,
    split_of,
)
from eval.truth import Content, Truth, truth_of
from targetclip.generators import Generator
from targetclip.media.images import center_square
from targetclip.scene import Scene
from targetclip.seeds import (
    BANK,
    BANK_SEED,
    PAIR_SOURCES,
    STUDY_TARGETS,
    TEST_SOURCES,
    TEST_TARGETS,
    VALIDATION_SOURCES,
    probe_seeds,
    seed_of,
    source_seeds,
)

Sources = Float[Tensor, "sources num_ws w_dim"]
Embeddings = Float[Tensor, "targets embed"]
Directions = Float[Tensor, "targets num_ws w_dim"]

IN_RANGE, STYLES, HELD_OUT_STYLES = "in-range", "styles", "held-out"
ADVERSARIAL, FOLDER = "adversarial", "folder"
RESERVED = 4096  # sources of each kind that the test sources must not be
TEXTS = ("GREEN HAIR", "BIG HAT", "RED LIPS", "GLASSES", "A BEARD", "WHITE FACE")


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A named set of targets."""

    name: str
    ids: tuple[str, ...]
    origins: tuple[str, ...]
    """A description of each picture."""
    pictures: tuple[Image.Image, ...]
    truth: Truth | None = None
    """None where the content of the pictures is not known."""

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, stop: int) -> "EvalSet":
        """Return the targets from `start` up to `stop`."""
        span, fields = slice(start, stop), ("ids", "origins", "pictures")
        parts = {name: getattr(self, name)[span] for name in fields}
        return replace(self, **parts, truth=self.truth and self.truth.part(span))


def set_of(name: str, targets: Sequence[Target]) -> EvalSet:
    """Return a set of targets of unknown content."""
    return EvalSet(
        name=name,
        ids=tuple(target.id for target in targets),
        origins=tuple(target.origin for target in targets),
        pictures=tuple(target.picture for target in targets),
    )


# Avatars, and samples of a generator


def held_out(
    named_by: Sequence[str | int | float], indices: Iterable[int], count: int
) -> dict[int, str]:
    """Return the first `count` indices whose picture is of the test split, with their ids."""
    named = ((i, digest_of(*named_by, i)[:16]) for i in indices)
    return dict(itertools.islice((pair for pair in named if split_of(pair[1]) == "test"), count))


def content_of(kind: str, seed: int, index: int) -> Content:
    """Return what the avatar shows that a kind of targets has at an index."""
    if kind == "avataaars":
        return tuple(face_at(seed, index))
    style, options = avatar_at(kind, seed, index)
    return shown(style, draw(style, options)[1])


def avatar_set(name: str, named: Sequence[tuple[str, str, int]], seed: int) -> EvalSet:
    """Draw a set of avatars: the id, the kind of targets and the index of each.
    ValueError: the extra that draws avatars is missing."""
    check_dicebear(f"the set {name!r}")
    return EvalSet(
        name=name,
        ids=tuple(known for known, _, _ in named),
        origins=tuple(f"{kind}:{i}@{seed}" for _, kind, i in named),
        pictures=tuple(draw_avatar(kind, seed, i) for _, kind, i in named),
        truth=truth_of([content_of(kind, seed, i) for _, kind, i in named]),
    )


def other_styles(kind: str) -> Iterator[int]:
    """Yield the indices of a kind of targets whose style is not that of the generator."""
    styles = HELD_OUT if kind == "held-out" else TRAINED
    return (i for i in itertools.count() if styles[i % len(styles)] != STYLE)


def avatars_of_tests(name: str, kind: str, indices: Iterable[int], count: int) -> EvalSet:
    """Return the first avatars of a kind of targets that are of the test split."""
    ids = held_out((kind, TEST_TARGETS), indices, count)
    return avatar_set(name, [(known, kind, i) for i, known in ids.items()], TEST_TARGETS)


def in_range(count: int) -> EvalSet:
    """Return faces that the bundled generator can show: those of avataaars:N@SEED."""
    return avatars_of_tests(IN_RANGE, "avataaars", itertools.count(), count)


def trained_styles(count: int) -> EvalSet:
    """Return avatars of the other styles that networks are trained on: those of styles:N@SEED."""
    return avatars_of_tests(STYLES, "styles", other_styles("styles"), count)


def held_out_styles(count: int) -> EvalSet:
    """Return avatars of the styles that no network has seen: those of held-out:N@SEED."""
    return avatars_of_tests(HELD_OUT_STYLES, "held-out", other_styles("held-out"), count)


def samples(generator: Generator, truncation: float, count: int) -> EvalSet:
    """Return a generator's own samples, in range by definition: those of generated:N@SEED."""
    named_by = ("generated", TEST_TARGETS, generator.fingerprint, float(truncation))
    ids = held_out(named_by, itertools.count(), count)
    targets = []
    for i, name in ids.items():
        picture = render_sample(generator, truncation, "generated", TEST_TARGETS, i)
        targets.append(Target(name, f"generated:{i}@{TEST_TARGETS}", picture))
    return set_of(IN_RANGE, targets)


def study_set(count: int) -> EvalSet:
    """Return validation targets for studies, of which every second one is in the generator's range.

    The others are of the other styles that networks are trained on.
    """
    others = itertools.islice(other_styles("styles"), count // 2)
    kinds = [("avataaars", i) for i in range((count + 1) // 2)], [("styles", i) for i in others]
    named = [kinds[i % 2][i // 2] for i in range(count)]
    ids = [digest_of(kind, STUDY_TARGETS, i)[:16] for kind, i in named]
    rows = [(known, *pair) for known, pair in zip(ids, named, strict=True)]
    return avatar_set("study", rows, STUDY_TARGETS)


# For studies


def joined(name: str, sets: Sequence[EvalSet]) -> EvalSet:
    """Return the targets of sets of known content in turn: the first of each, then the second."""
    count = min(map(len, sets))
    parts = [targets.part(i, i + 1) for i in range(count) for targets in sets]
    truths = [part.truth for part in parts if part.truth is not None]
    return EvalSet(
        name=name,
        ids=tuple(part.ids[0] for part in parts),
        origins=tuple(part.origins[0] for part in parts),
        pictures=tuple(part.pictures[0] for part in parts),
        truth=Truth(
            tuple(content for truth in truths for content in truth.contents),
            torch.cat([truth.readings for truth in truths]),
            torch.cat([truth.seen for truth in truths]),
        ),
    )


def targets_and_sources(
    scene: Scene, targets: int, sources: int, test: bool
) -> tuple[EvalSet, Sources]:
    """Return the targets of a study, of which every second one is in range, and the sources that
    judge: those of validation or, if `test`, of the evaluation."""
    if not test:
        return study_set(targets), scene.sources(sources, VALIDATION_SOURCES)
    check_sources(TEST_SOURCES, sources)
    half = -(-targets // 2)
    both = joined("test", [in_range(half), trained_styles(half)])
    return both.part(0, targets), scene.sources(sources, TEST_SOURCES)


# Pictures that have no essence, or none that sources lack

Random = np.random.Generator
Pictures = Sequence[Image.Image]
Paint = Callable[[Random, int, Pictures], Image.Image]


def noise(random: Random, side: int, sources: Pictures) -> Image.Image:
    return Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))


def blank(random: Random, side: int, sources: Pictures) -> Image.Image:
    red, green, blue = random.integers(0, 256, 3).tolist()
    return Image.new("RGB", (side, side), (red, green, blue))


def text(random: Random, side: int, sources: Pictures) -> Image.Image:
    """Draw words alone: an embedder that reads them may take the word for the thing."""
    words = TEXTS[int(random.integers(len(TEXTS)))].replace(" ", "\n")
    picture = Image.new("RGB", (side, side), "white")
    font = ImageFont.load_default(size=max(8, side // 5))
    draw = ImageDraw.Draw(picture)
    middle = (side / 2, side / 2)
    draw.multiline_text(middle, words, "black", font, anchor="mm", align="center")
    return picture


def source(random: Random, side: int, sources: Pictures) -> Image.Image:
    return center_square(sources[int(random.integers(len(sources)))])


def checkerboard(random: Random, side: int, sources: Pictures) -> Image.Image:
    colours = random.integers(0, 256, (2, 3), dtype=np.uint8)
    cells = int(random.integers(4, 9))
    at = np.arange(side) * cells // side
    return Image.fromarray(colours[(at[:, None] + at[None]) % 2])


def upside_down(random: Random, side: int, sources: Pictures) -> Image.Image:
    return source(random, side, sources).transpose(Image.Transpose.ROTATE_180)


ADVERSARIES: dict[str, Paint] = {
    "noise": noise,
    "blank": blank,
    "text": text,
    "source": source,
    "checkerboard": checkerboard,
    "upside down": upside_down,
}


def adversarial(count: int, side: int, sources: Pictures) -> EvalSet:
    """Return pictures without an essence, of each kind of ADVERSARIES in turn.

    Args:
        side: pixels.
        sources: pictures of the test sources; some of them are targets, as they are or turned
            upside down.
    """
    targets = []
    for number in range(count):
        kind = list(ADVERSARIES)[number % len(ADVERSARIES)]
        named_by = ("adversarial", TEST_TARGETS, kind, number)
        ((variant, name),) = held_out(named_by, itertools.count(), 1).items()
        random = np.random.default_rng(seed_of(*named_by, variant))
        targets.append(Target(name, kind, ADVERSARIES[kind](random, side, sources)))
    return set_of(ADVERSARIAL, targets)


def folder_set(path: Path, count: int, trusted: bool) -> EvalSet:
    """Return the first `count` pictures of a folder that are of the test split, or any `trusted`.
    ValueError: no folder, or no picture of it can be used. OSError: a folder may not be read."""
    if not path.is_dir():
        raise ValueError(f"--folder: expected a folder of pictures, found none at {str(path)!r}")
    opened = open_folder(str(path))
    readable = {target.id: target for target in opened if isinstance(target, Target)}
    chosen = [t for t in readable.values() if trusted or split_of(t.id) == "test"][:count]
    if not chosen:
        raise ValueError(
            f"--folder: expected pictures of the test split in {str(path)!r}, found none among "
            f"{len(readable)} that can be read; give more, or --trust-folder if nothing was ever "
            "trained on them"
        )
    return set_of(FOLDER, chosen)


# Checks


def check_unseen(sets: Sequence[EvalSet], trained: Collection[str], trusted: bool) -> None:
    """Raise a ValueError for a target that something may have been trained on.

    Args:
        trained: ids of the pairs of the train split.
        trusted: whether the user vouches for a folder; ids in `trained` are refused anyway.
    """
    for targets in sets:
        for name, origin in zip(targets.ids, targets.origins, strict=True):
            if name in trained:
                raise ValueError(
                    f"test target {name} ({targets.name}, {origin}) is among the training pairs: "
                    "leave it out of the one or of the other"
                )
            if split_of(name) != "test" and not (trusted and targets.name == FOLDER):
                raise ValueError(
                    f"expected test targets of the test split alone, found {name} of "
                    f"{split_of(name)} ({targets.name}, {origin})"
                )


def check_sources(seed: int, count: int) -> None:
    """Raise a ValueError where a test source is one that directions are found or chosen by.

    Those are the optimizer's bank, the probe sources of the gate, the sources trainings validate
    on and those that score pairs. Sources that trainings draw have other names.
    """
    others = {
        "the optimizer's bank": range(BANK_SEED, BANK_SEED + BANK),
        "the probe sources": probe_seeds(RESERVED),
        "sources that trainings validate on": source_seeds(VALIDATION_SOURCES, RESERVED),
        "sources that score pairs": source_seeds(PAIR_SOURCES, RESERVED),
    }
    test_sources = set(source_seeds(seed, count))
    for name, seeds in others.items():
        if common := test_sources.intersection(seeds):
            raise ValueError(
                f"expected test sources of their own, found {len(common)} of {name}: "
                f"choose another seed than {seed}"
            )
