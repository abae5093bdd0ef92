"""What a visitor of the studio works on: directions of targets, latents of sources, and edits.

Knows pictures, texts, directions and how results are said in words; nothing of the page. Directions
are found once for their targets and latents once for their sources, so that moving a slider only
renders.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from predictor import Mode
from predictor.direction import Direction, Gate, Interrupted, WatchSearch, layer_weights, mixed
from predictor.inputs import Text
from predictor.transfer import EssenceTransfer, essence_of
from targetclip.command import choose_device
from targetclip.media.alignment import FaceFinder, align, face_quad, paste_back
from targetclip.media.frames import write_morph
from targetclip.media.images import (
    center_square,
    labelled_grid,
    read_picture,
    tensor_to_pictures,
    write_picture,
)
from targetclip.scores import Scores, score_features
from targetclip.world import World, load_scene

MAX_TARGETS, MAX_SOURCES = 4, 12
MAX_TEXT = 300  # characters
MAX_FACTOR = 2.0  # of a slider
SMALL, LARGE = 256, 1024  # pixels a side, between which pictures are shown
LARGEST = 2048  # pixels a side of pictures that are kept for a visitor

METHODS = {
    "mapper": "the mapper, in one pass",
    "refined": "the mapper, refined by the optimizer",
    "optimizer": "the optimizer",
}


@dataclass(frozen=True, kw_only=True)
class OpenWorld:
    """A world with its networks loaded."""

    world: World
    essence: EssenceTransfer
    finder: FaceFinder | None
    """Finds the face in photos; None: pictures are used whole."""

    @cached_property
    def modes(self) -> tuple[Mode, ...]:
        """How directions can be found here; the first is the default."""
        if self.essence.mapper is None:
            return ("optimize",)
        try:
            Gate.of(self.essence.mapper)
        except ValueError:  # not calibrated: its answers cannot be checked
            return ("instant", "optimize")
        return ("auto", "instant", "refine", "optimize")

    @property
    def keep(self) -> float | None:
        """Default place on the trade-off between essence and identity; None: this world's mapper
        reads none."""
        mapper = self.essence.mapper
        return None if mapper is None else mapper.keep


@dataclass(frozen=True, kw_only=True)
class Found:
    """The directions of one target or of several."""

    names: tuple[str, ...]
    targets: tuple[Image.Image | Text, ...]
    parts: tuple[Direction, ...]
    """Of a text beside others twice what it names: half of each is where the page begins."""
    probes: tuple[float, ...]
    """Scores of answers that were checked."""
    embeddings: Float[Tensor, "targets embed"]
    threshold: float | None
    """Transfer score on the probe sources that is enough; None: the mapper is not calibrated."""
    seconds: float
    """From the first target's picture to the last one's direction."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Sources, ready to be edited."""

    names: tuple[str, ...]
    ws: Float[Tensor, "sources num_ws w_dim"]
    pictures: tuple[Image.Image, ...]
    """As given, or as rendered where they were generated."""
    features: Float[Tensor, "sources features"]
    """Of their unedited renderings; see `Scene.image_features`."""
    quads: tuple[Float[ndarray, "4 2"], ...] | None = None
    """Squares of the faces in photos; None: pictures are used whole."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How directions are applied.

    `weights` are those of the targets where there are several. `floor`, from 0 to 1, is the mean
    identity similarity below which the strength is lowered; at 0 it is not.

    ValueError: a number is out of range.
    """

    strength: float = 1.0
    weights: tuple[float, ...] = ()
    coarse: float = 1.0
    middle: float = 1.0
    fine: float = 1.0
    one_direction: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        factors = (self.strength, *self.weights, self.coarse, self.middle, self.fine)
        if not all(abs(factor) <= MAX_FACTOR for factor in factors):  # so that NaN fails too
            raise ValueError(f"expected numbers within {MAX_FACTOR:g} of 0, found {factors}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"expected an identity to keep from 0 to 1, found {self.floor}")


@dataclass(frozen=True, kw_only=True)
class Edited:
    """Edited sources."""

    pictures: tuple[Image.Image, ...]
    scores: tuple[Scores, ...]
    """With respect to each target."""
    strength: float
    """What `floor` left of the strength."""


def open_world(world: World, device: str | None = None, mapper: Path | None = None) -> OpenWorld:
    """Load a world. FileNotFoundError, ValueError: a file of it is missing or broken; its pictures
    are photos, and what finds faces is not installed."""
    finder = None if world.aligner is None else FaceFinder()
    scene, cut_out = load_scene(world, choose_device(device)), None
    if finder is not None:
        faces = finder

        def cut_out(picture: Image.Image) -> Image.Image:
            quad = face_quad(faces, picture, 0, "the target")
            return align(picture, quad, scene.generator.resolution)

    essence = essence_of(scene, world, mapper, cut_out)
    return OpenWorld(world=world, essence=essence, finder=finder)


def read_pictures(paths: Sequence[str], kind: str, most: int) -> list[tuple[str, Image.Image]]:
    """Return names and pictures of files, large pictures made smaller: `LARGEST` px a side.
    ValueError: too many, or as `read_picture`; the message has no folders of files."""
    if len(paths) > most:
        raise ValueError(f"expected at most {most} {kind}s, found {len(paths)}: remove some")
    named = []
    for path in map(Path, paths):
        try:
            picture = read_picture(path)
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(path), path.name)) from error
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        named.append((path.stem, picture))
    return named


def find_targets(
    opened: OpenWorld,
    pictures: Sequence[str],
    text: str = "",
    mode: Mode | None = None,
    keep_identity: float | None = None,
    watch: WatchSearch | None = None,
) -> Found:
    """Find the direction of each target.

    Args:
        pictures: paths of target pictures.
        text: one more target, in words; empty: none.
        mode: None: the first of `OpenWorld.modes`.
        keep_identity: see `EssenceTransfer.direction`.
        watch: called as a search of the optimizer begins. A KeyboardInterrupt of the function that
            it returns ends that search; the direction so far is taken.

    Raises:
        ValueError: no target, too many, a picture that cannot be read, a text that is too long, a
            mode that this world has not.
        FloatingPointError: no direction was found.
    """
    essence, text = opened.essence, " ".join(text.split())
    mode = mode or opened.modes[0]
    if mode not in opened.modes:
        raise ValueError(f"expected one of {', '.join(opened.modes)}, found {mode!r}")
    if len(text) > MAX_TEXT:
        raise ValueError(f"expected a text of at most {MAX_TEXT} characters, found {len(text)}")
    named: list[tuple[str, Image.Image | Text]] = []
    named += read_pictures(pictures, "target", MAX_TARGETS - bool(text))
    if text:
        named.append((text, Text(text)))
    if not named:
        raise ValueError("expected a target: add a picture, or describe one in words")
    start, parts = time.perf_counter(), list[Direction]()
    for _, target in named:
        try:
            parts.append(essence.direction(target, mode, watch=watch, keep_identity=keep_identity))
        except Interrupted as stopped:
            parts.append(stopped.direction)
    probes = tuple(part.probe for part in parts if part.probe is not None)
    if len(named) > 1 and text:
        parts[-1] = 2 * essence.only_named(parts[-1], keep_identity)
    seconds = time.perf_counter() - start
    threshold = None
    if mode in ("auto", "refine"):
        threshold = Gate.of(essence.asked_mapper(), essence.place(keep_identity)).threshold
    return Found(
        names=tuple(name for name, _ in named),
        targets=tuple(target for _, target in named),
        parts=tuple(parts),
        probes=probes,
        embeddings=torch.stack([essence.embed_target(target) for _, target in named]),
        threshold=threshold,
        seconds=seconds,
    )


def read_sources(opened: OpenWorld, paths: Sequence[str]) -> Sources:
    """Read and invert source pictures; of photos, the largest face.
    ValueError: none or too many, one that cannot be read or shows no face, or no inverter."""
    named, scene = read_pictures(paths, "source", MAX_SOURCES), opened.essence.scene
    if not named:
        raise ValueError("expected a source: add a picture, or take generated sources")
    names = tuple(name for name, _ in named)
    pictures = squares = tuple(picture for _, picture in named)
    quads = None
    if opened.finder is not None:
        quads = tuple(face_quad(opened.finder, one, 0, name) for name, one in named)
        size = scene.generator.resolution
        squares = tuple(align(*pair, size) for pair in zip(pictures, quads, strict=True))
    ws = scene.invert(squares)
    features = scene.image_features(scene.render(ws))
    if quads is None:
        pictures = tuple(center_square(picture) for picture in pictures)
    return Sources(names=names, ws=ws, pictures=pictures, features=features, quads=quads)


def generate_sources(opened: OpenWorld, count: int, seed: int) -> Sources:
    """Return the generator's own samples. ValueError: a number is out of range."""
    if not 1 <= count <= MAX_SOURCES or not 0 <= seed < 2**31:
        raise ValueError(
            f"expected 1 to {MAX_SOURCES} sources and a seed from 0 on, found {count} and {seed}"
        )
    scene = opened.essence.scene
    ws = scene.sources(count, seed)
    images = scene.render(ws)
    return Sources(
        names=tuple(f"{seed}-{i}" for i in range(count)),
        ws=ws,
        pictures=tuple(tensor_to_pictures(images)),
        features=scene.image_features(images),
    )


def direction_of(opened: OpenWorld, found: Found, settings: Settings) -> Direction:
    """Return the direction that settings make of what was found. ValueError: too few weights."""
    parts = [part.uncorrected() if settings.one_direction else part for part in found.parts]
    direction = parts[0]
    if len(parts) > 1:
        direction = mixed(parts, settings.weights[: len(parts)])
    layers = {name: getattr(settings, name) for name in ("coarse", "middle", "fine")}
    num_ws = opened.essence.scene.generator.num_ws
    return direction.weighted(layer_weights(num_ws, **layers))


def strength_within(opened: OpenWorld, found: Found, sources: Sources, settings: Settings) -> float:
    """Return the largest strength, up to `MAX_FACTOR`, that keeps the identity of `settings.floor`.
    ValueError: as `direction_of`; there is no identity model."""
    if settings.floor == 0:
        return MAX_FACTOR
    direction = direction_of(opened, found, settings)
    return opened.essence.strength_at_identity(sources.ws, direction, settings.floor, MAX_FACTOR)


def render(
    opened: OpenWorld,
    sources: Sources,
    direction: Direction,
    strength: float,
    only: int | None = None,
) -> tuple[list[Image.Image], Float[Tensor, "sources 3 height width"]]:
    """Edit the sources, or one of them.

    Returns:
        Pictures, with faces put back into their photos; images in [-1, 1] as the generator renders
        them.
    """
    chosen = slice(None) if only is None else slice(only, only + 1)
    images = opened.essence.edit(sources.ws[chosen], direction, strength)
    faces = tensor_to_pictures(images)
    if sources.quads is None:
        return faces, images
    places = zip(sources.pictures[chosen], faces, sources.quads[chosen], strict=True)
    return [paste_back(*place) for place in places], images


def edit(
    opened: OpenWorld, found: Found, sources: Sources, settings: Settings, most: float = MAX_FACTOR
) -> Edited:
    """Edit all sources, and score them.

    Args:
        most: the largest strength that is taken; see `strength_within`.
    """
    direction = direction_of(opened, found, settings)
    strength = min(settings.strength, most)
    pictures, images = render(opened, sources, direction, strength)
    after = opened.essence.scene.image_features(images)
    scores = tuple(score_features(one, sources.features, after) for one in found.embeddings)
    return Edited(pictures=tuple(pictures), scores=scores, strength=strength)


def for_people(picture: Image.Image) -> Image.Image:
    """Return a picture at a size that people can see, and that travels quickly."""
    side = max(picture.size)
    if SMALL <= side <= LARGE:
        return picture
    factor = (SMALL if side < SMALL else LARGE) / side
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def write_files(
    folder: Path, opened: OpenWorld, found: Found, sources: Sources, settings: Settings, most: float
) -> list[Path]:
    """Write edited pictures, a sheet, the direction and a GIF into a folder; return their paths.
    Names of files are numbers: what visitors call theirs names nothing here."""
    direction = direction_of(opened, found, settings)
    edited = edit(opened, found, sources, settings, most)
    paths = [folder / f"edited_{i + 1}.png" for i in range(len(edited.pictures))]
    for picture, path in zip(edited.pictures, paths, strict=True):
        write_picture(picture, path)
    targets = [target for target in found.targets if isinstance(target, Image.Image)]
    rows: dict[str, Sequence[Image.Image]] = {
        "sources": sources.pictures,
        f"results, strength {edited.strength:.3g}": edited.pictures,
    }
    if len(targets) > 1:
        rows = {"targets": targets, **rows}
    sheet = labelled_grid(targets[0] if len(targets) == 1 else None, rows)
    paths += [folder / name for name in ("sheet.png", "direction.safetensors", "morph.gif")]
    write_picture(sheet, paths[-3])
    direction.save(paths[-2])
    write_morph(paths[-1], opened.essence.morph(sources.ws, direction, edited.strength))
    return paths


def check_in_words(found: Found) -> str | None:
    """Return what the check of the mapper's answers said; None where there was none."""
    if found.threshold is None or not found.probes:
        return None
    lowest, usual = min(found.probes), f"{found.threshold:.2f} or more is usual"
    if lowest >= found.threshold:
        return f"passed: {lowest:.2f} on sources kept for it, where {usual}"
    return f"the target looks out of place: {lowest:.2f} on sources kept for it, where {usual}"


def in_words(found: Found, edited: Edited, settings: Settings) -> dict[str, str]:
    """Return what was done and how well it went, as names and short sentences without markup."""
    methods = dict.fromkeys(METHODS.get(part.method, part.method) for part in found.parts)
    took = f"{1000 * found.seconds:.0f} ms" if found.seconds < 1 else f"{found.seconds:.1f} s"
    facts = {"Direction": f"found by {' and '.join(methods)}, in {took}"}
    if (check := check_in_words(found)) is not None:
        facts["Check"] = check
    for number, (name, scores) in enumerate(zip(found.names, edited.scores, strict=True), 1):
        # Numbered, for two files may have one name.
        one = len(found.names) == 1
        label = "Transfer score" if one else f"Transfer score, target {number} ({name})"
        before, after = float(scores.target_before.mean()), float(scores.transfer)
        facts[label] = f"{after:.2f}, and {before:.2f} before; 1 is the target itself"
    kept = edited.scores[0].identity
    if kept is not None:
        facts["Identity kept"] = f"{float(kept.mean()):.2f}; 1 is the same person"
    facts["Strength"] = f"{edited.strength:.2f}"
    if edited.strength != settings.strength:
        facts["Strength"] += f", lowered to keep an identity of {settings.floor:.2f}"
    return facts
