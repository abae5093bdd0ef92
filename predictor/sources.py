"""Sources of the `targetclip` command: generated ones, squares, and faces in photos.

Knows how a face is cut out of a photo, inverted, and put back edited; nothing of how directions are
found. Clips are sources of the same kind, in predictor.clips.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.options import Request
from predictor.report import NamedTarget, write_pictures
from targetclip.encoders.inverter import InversionConfig, LatentInverter, OptimizingInverter
from targetclip.media.alignment import Face, FaceFinder, align, check_quad, paste_back, quad_of
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.scene import MAX_IMAGES, Scene

AT_ONCE = 4  # images searched for together: gradients take several times the memory of rendering

Edit = Callable[[Float[Tensor, "sources num_ws w_dim"]], Iterator[Image.Image]]
"""From latents on any device to edited pictures."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Latents of sources, and how they are shown."""

    scored: Float[Tensor, "sources num_ws w_dim"]
    """Those that the edit is scored on."""
    shown: Sequence[int]
    """Places of those among them that the grid shows."""
    rows: Mapping[str, Sequence[Image.Image]]
    """Rows of the grid of unedited sources, by their labels."""
    whole: Float[Tensor, "frames num_ws w_dim"] | None = None
    """Those of every frame of a clip, on the processor."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of report.json."""


class Sources:
    """What is edited, wherever it comes from."""

    facts: dict[str, Any]
    """Entries of report.json."""

    def latents(self, scene: Scene) -> Latents:
        """Return the latents, inverted or generated."""
        raise NotImplementedError

    def write(
        self, out: Path, edited: Sequence[Image.Image], latents: Latents, edit: Edit
    ) -> dict[str, Any]:
        """Write the scored edits as edited_000.png and so on; return entries of report.json.

        Args:
            edit: makes more edits than the scored ones.
        """
        return {"edited": write_pictures(out, "edited", edited)}


# Faces in pictures


def quad_in(face: Face, picture: Image.Image) -> Float[ndarray, "4 2"]:
    """Return a face's square in a picture; ValueError if its middle is beyond the picture."""
    quad = quad_of(face.landmarks)
    check_quad(quad, picture)
    return quad


def face_quad(
    finder: FaceFinder, picture: Image.Image, index: int, origin: str
) -> Float[ndarray, "4 2"]:
    """Return the square of a face in a photo; errors name the photo as `origin`.

    Raises:
        ValueError: no face, none of that number, or one whose middle is not in the photo.
    """
    face = finder.face_of(picture, index, origin)
    try:
        return quad_in(face, picture)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def find_faces(request: Request, targets: Sequence[NamedTarget]) -> FaceFinder | None:
    """Return a finder of faces if faces are cut out, after finding those of inverted targets.

    Raises:
        ValueError: the extra is not installed, or a target that may be inverted has no face.
    """
    if not request.align or not request.inverts:
        return None
    finder = FaceFinder()
    for target in targets if request.inverts_target else ():
        if isinstance(target.content, Image.Image):
            face_quad(finder, target.content, 0, target.name)
    return finder


def target_aligner(finder: FaceFinder, size: int) -> Callable[[Image.Image], Image.Image]:
    """Return a function that cuts the largest face out of a target."""

    def cut_out(picture: Image.Image) -> Image.Image:
        return align(picture, face_quad(finder, picture, 0, "--target"), size)

    return cut_out


# From pictures to latents and back


def searching_inverter(scene: Scene, steps: int) -> LatentInverter:
    """Return an inverter that searches, with a progress bar for each call.

    It starts at the answer of the scene's inverter or, without one, at the mean latent.
    """
    at_once = min(AT_ONCE, scene.max_images or AT_ONCE)

    def invert(
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        total = steps * math.ceil(len(images) / at_once)
        # None: beside the bar of a clip's frames it goes away when it is full.
        with tqdm(total=total, desc="search latents", unit="step", leave=None) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()

            search = OptimizingInverter(
                generator=scene.generator,
                embedder=scene.embedder,
                first=scene.inverter,
                config=InversionConfig(steps=steps),
                at_once=at_once,
                on_step=on_step,
            )
            return search(images)

    return invert


def inverted(
    scene: Scene, pictures: Iterable[Image.Image]
) -> Iterator[Float[Tensor, "batch num_ws w_dim"]]:
    """Return latents of pictures, batch by batch."""
    pictures = iter(pictures)
    while batch := list(islice(pictures, scene.max_images or MAX_IMAGES)):
        yield scene.invert(batch)


class Generated(Sources):
    """The generator's own samples."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.facts: dict[str, Any] = {"sources": {"count": count, "seed": seed}}

    def latents(self, scene: Scene) -> Latents:
        ws = scene.sources(self.count, self.seed)
        rows = {"sources": tensor_to_pictures(scene.render(ws))}
        return Latents(scored=ws, shown=range(len(ws)), rows=rows)


class Photos(Sources):
    """Pictures, read and their faces found at construction.

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

    def latents(self, scene: Scene) -> Latents:
        squares, size = self.pictures, scene.generator.resolution
        if self.quads is not None:
            faces = zip(self.pictures, self.quads, strict=True)
            squares = [align(photo, quad, size) for photo, quad in faces]
        ws = torch.cat([*inverted(scene, squares)])
        rows = {"sources": squares, "sources, inverted": tensor_to_pictures(scene.render(ws))}
        return Latents(scored=ws, shown=range(len(ws)), rows=rows)

    def write(
        self, out: Path, edited: Sequence[Image.Image], latents: Latents, edit: Edit
    ) -> dict[str, Any]:
        """Write edited_000.png and so on and, of photos, photo_000.png and so on."""
        facts = super().write(out, edited, latents, edit)
        if self.quads is not None:
            faces = zip(self.pictures, edited, self.quads, strict=True)
            facts["photos"] = write_pictures(out, "photo", (paste_back(*face) for face in faces))
        return facts
