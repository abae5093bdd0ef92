"""Sources of the `targetclip` command: generated ones, squares, and faces in photos.

Knows what was asked and how a face is cut out of a photo, inverted, and put back edited; nothing of
how directions are found. Clips are sources of the same kind, in predictor.clips.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.options import Options, Transfer
from predictor.report import Wanted, write_pictures
from predictor.transfer import EssenceTransfer
from targetclip.encoders.inverter import InversionConfig, LatentInverter, OptimizingInverter
from targetclip.media.alignment import align, check_quad, paste_back, quad_of
from targetclip.media.faces import Face, FaceFinder
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.recipes import Recipe
from targetclip.world import World

AT_ONCE = 4  # images searched for together: gradients take several times what rendering does
STEPS_FROM_MEAN = 300  # of a search that no inverter starts
NUM_SOURCES = 6
PREDICTING = ("instant", "refine")  # modes that start at the mapper's answer

Rows = dict[str, Sequence[Image.Image]]
"""Rows of the grid by their labels."""
Edit = Callable[[Float[Tensor, "sources num_ws w_dim"]], Float[Tensor, "sources 3 height width"]]
"""From latents, wherever they are kept, to edited images."""


@runtime_checkable
class Sources(Protocol):
    """What is edited, wherever it comes from."""

    facts: dict[str, Any]
    """What report.json says of them."""

    def latents(
        self, essence: EssenceTransfer
    ) -> tuple[Float[Tensor, "sources num_ws w_dim"], Rows]:
        """Latents that the edit is scored on, and rows that show sources unedited."""

    def shown(self, edited: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """Those of the edited pictures that belong under the rows."""

    def write(self, out: Path, edited: Sequence[Image.Image], edit: Edit) -> dict[str, Any]:
        """Write what was edited; what report.json says of it."""


# What was asked


def is_aligning(options: Options, world: World) -> bool:
    """Whether faces are cut out of pictures before these are inverted."""
    return world.aligner is not None if options.align is None else options.align


def steps_of_inversion(options: Options, world: World) -> int:
    """Steps of the search for a picture's latents; 0: the inverter's answer is taken."""
    if options.invert_steps is not None:
        return options.invert_steps
    return STEPS_FROM_MEAN if world.inverter is None else 0


def inverting(options: Options, world: World) -> dict[str, Any]:
    """What records and reports say of how pictures were inverted."""
    return {
        "align": is_aligning(options, world),
        "invert_steps": steps_of_inversion(options, world),
    }


def has_sources(options: Options) -> bool:
    """Whether pictures or a clip are edited."""
    return isinstance(options, Transfer) and options.sources is not None


def may_invert_target(options: Options, recipe: Recipe) -> bool:
    """Whether a search could start at the inversion of a target."""
    if isinstance(options, Transfer) and (options.direction or options.mode in PREDICTING):
        return False
    return bool(options.target) and recipe.initial == "inversion"


def check_inverting(options: Options, world: World, recipe: Recipe) -> None:
    """Raise a ValueError for what is asked of an inversion that cannot be."""
    if options.invert_steps == 0 and world.inverter is None:
        raise ValueError(
            f"--invert-steps: world {world.name!r} has no inverter, so a search finds latents: "
            "expected 1 or more, found 0"
        )
    if not has_sources(options) and not may_invert_target(options, recipe):
        asked = {"--align": options.align, "--invert-steps": options.invert_steps is not None}
        for flag in (flag for flag, given in asked.items() if given):
            raise ValueError(
                f"{flag}: no picture is inverted here: drop it, or give --sources or "
                "--initial inversion"
            )
    face = options.face if isinstance(options, Transfer) else None
    if face is not None and not is_aligning(options, world):
        raise ValueError("--face: no face is looked for here: drop it, or give --align")


# Faces in pictures


def quad_in(face: Face, picture: Image.Image) -> Float[ndarray, "4 2"]:
    """Where a face's square lies in a picture; a ValueError if its middle is beyond the picture."""
    quad = quad_of(face.landmarks)
    check_quad(quad, picture)
    return quad


def face_quad(
    finder: FaceFinder, picture: Image.Image, index: int, origin: str
) -> Float[ndarray, "4 2"]:
    """Where a face lies in a photo; errors name the photo as `origin`.

    Raises:
        ValueError: no face, none of that number, or one whose middle is not in the photo.
    """
    face = finder.face_of(picture, index, origin)
    try:
        return quad_in(face, picture)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def find_faces(
    options: Options, world: World, recipe: Recipe, wanted: Sequence[Wanted]
) -> FaceFinder | None:
    """What finds faces, if any are wanted.

    Raises:
        ValueError: the extra is not installed, or a target that may be inverted has no face.
    """
    target = may_invert_target(options, recipe)
    if not is_aligning(options, world) or not (target or has_sources(options)):
        return None
    finder = FaceFinder()
    for one in wanted if target else ():
        if isinstance(one.target, Image.Image):
            face_quad(finder, one.target, 0, one.name)
    return finder


def target_aligner(finder: FaceFinder, size: int) -> Callable[[Image.Image], Image.Image]:
    """Cuts out the largest face of a target, to be inverted."""

    def cut_out(picture: Image.Image) -> Image.Image:
        return align(picture, face_quad(finder, picture, 0, "--target"), size)

    return cut_out


# From pictures to latents and back


def searching_inverter(essence: EssenceTransfer, steps: int) -> LatentInverter:
    """An inverter that searches from the answer of the one there is, or from the mean latent, with
    a progress bar for every call."""
    first, at_once = essence.inverter, min(AT_ONCE, essence.max_images)

    def invert(
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        total = steps * math.ceil(len(images) / at_once)
        # None: beside the bar of a clip's frames it goes away when it is full.
        with tqdm(total=total, desc="search latents", unit="step", leave=None) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()

            config = InversionConfig(steps=steps)
            search = OptimizingInverter(
                generator=essence.generator,
                embedder=essence.embedder,
                first=first,
                config=config,
                at_once=at_once,
                on_step=on_step,
            )
            return search(images)

    return invert


def prepare_inversion(
    essence: EssenceTransfer, options: Options, world: World, finder: FaceFinder | None
) -> None:
    """Make `essence` invert as asked."""
    if steps := steps_of_inversion(options, world):
        essence.inverter = searching_inverter(essence, steps)
    if finder is not None:
        essence.aligner = target_aligner(finder, essence.generator.resolution)


def inverted(
    essence: EssenceTransfer, pictures: Iterable[Image.Image]
) -> Iterator[Float[Tensor, "batch num_ws w_dim"]]:
    """Latents of pictures, `max_images` at a time."""
    pictures = iter(pictures)
    while batch := list(islice(pictures, essence.max_images)):
        yield essence.invert(batch)


def rendered(
    essence: EssenceTransfer, ws: Float[Tensor, "sources num_ws w_dim"]
) -> list[Image.Image]:
    """Pictures of unedited latents."""
    return tensor_to_pictures(essence.edit(ws, torch.zeros_like(ws[0])))


class Generated:
    """The generator's own samples."""

    def __init__(self, count: int | None, seed: int) -> None:
        self.count = NUM_SOURCES if count is None else count
        self.seed = seed
        self.facts: dict[str, Any] = {"sources": {"count": self.count, "seed": seed}}

    def latents(
        self, essence: EssenceTransfer
    ) -> tuple[Float[Tensor, "sources num_ws w_dim"], Rows]:
        ws = essence.generated_sources(self.count, self.seed)
        return ws, {"sources": rendered(essence, ws)}

    def shown(self, edited: Sequence[Image.Image]) -> Sequence[Image.Image]:
        return edited

    def write(self, out: Path, edited: Sequence[Image.Image], edit: Edit) -> dict[str, Any]:
        return {"edited": write_pictures(out, "edited", edited)}


class Photos:
    """Pictures, read and their faces found when this is made.

    Args:
        finder: None: the pictures are aligned already.
        face: which one of each photo, 0 being the largest.

    Raises:
        FileNotFoundError, ValueError: as `read_picture` and `face_quad`.
    """

    def __init__(self, paths: Sequence[Path], finder: FaceFinder | None, face: int = 0) -> None:
        self.pictures = [read_picture(path) for path in paths]
        self.quads: list[Float[ndarray, "4 2"]] | None = None
        self.facts: dict[str, Any] = {"sources": [str(path) for path in paths]}
        if finder is not None:
            photos = zip(self.pictures, paths, strict=True)
            self.quads = [face_quad(finder, photo, face, str(path)) for photo, path in photos]
            self.facts["face"] = face

    def latents(
        self, essence: EssenceTransfer
    ) -> tuple[Float[Tensor, "sources num_ws w_dim"], Rows]:
        squares, size = self.pictures, essence.generator.resolution
        if self.quads is not None:
            faces = zip(self.pictures, self.quads, strict=True)
            squares = [align(photo, quad, size) for photo, quad in faces]
        ws = torch.cat([*inverted(essence, squares)])
        return ws, {"sources": squares, "sources, inverted": rendered(essence, ws)}

    def shown(self, edited: Sequence[Image.Image]) -> Sequence[Image.Image]:
        return edited

    def write(self, out: Path, edited: Sequence[Image.Image], edit: Edit) -> dict[str, Any]:
        """edited_000.png and so on, and, of photos, photo_000.png and so on."""
        facts = {"edited": write_pictures(out, "edited", edited)}
        if self.quads is not None:
            faces = zip(self.pictures, edited, self.quads, strict=True)
            facts["photos"] = write_pictures(out, "photo", (paste_back(*face) for face in faces))
        return facts
