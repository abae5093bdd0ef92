"""Sources of the `targetclip` command: generated ones, squares, and faces in photos.

Knows how a face is cut out of a photo, inverted, and put back edited; nothing of how directions are
found. Clips are sources of the same kind, in predictor.cli.clips.
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

from predictor.cli.console import Console
from predictor.cli.options import Request
from predictor.cli.output import OutputFolder, unique_names
from predictor.cli.report import NamedTarget
from targetclip.encoders.inverter import InversionConfig, LatentInverter, OptimizingInverter
from targetclip.media.alignment import Face, FaceFinder, align, check_quad, paste_back, quad_of
from targetclip.media.images import read_picture, tensor_to_pictures, write_picture
from targetclip.scene import MAX_IMAGES, Scene

MAX_SHOWN = 64  # sources in a sheet
SMALL = 32  # pixels a side, below which a picture shows no face
AT_ONCE = 4  # images searched for together: gradients take several times the memory of rendering

Edits = Callable[[Float[Tensor, "sources num_ws w_dim"]], Iterator[Image.Image]]
"""From latents on any device to edited pictures."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Latents of sources, and how they are shown."""

    scored: Float[Tensor, "sources num_ws w_dim"]
    """Those that the edit is scored on."""
    shown: Sequence[int]
    """Places of those among them that the sheet shows."""
    rows: Mapping[str, Sequence[Image.Image]]
    """Rows of the sheet of unedited sources, by their labels."""
    whole: Float[Tensor, "frames num_ws w_dim"] | None = None
    """Those of every frame of a clip, on the processor."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of report.json."""


class Sources:
    """What is edited, wherever it comes from."""

    facts: dict[str, Any]
    """Entries of report.json."""
    names: list[str]
    """Name of each source, in the names of its results."""

    def latents(self, scene: Scene) -> Latents:
        """Return the latents, inverted or generated."""
        raise NotImplementedError

    def write(
        self, out: OutputFolder, edited: Iterable[Image.Image], latents: Latents, edits: Edits
    ) -> dict[str, Any]:
        """Write the scored edits as edited_NAME.png; return entries of report.json.

        Args:
            edits: makes more edits than the scored ones.
        """
        names = [f"edited_{name}.png" for name in self.names]
        for name, picture in zip(names, edited, strict=True):
            write_picture(picture, out.take(name))
        return {"edited": names}


def check_shows(picture: Image.Image, name: str, console: Console) -> None:
    """Warn of a picture that shows nothing: a few pixels, or a single colour."""
    if min(picture.size) < SMALL:
        size = f"{picture.width} x {picture.height} px"
        console.warn(f"{name}: {size} are too few to show a face; give {SMALL} px a side or more")
    elif len(picture.getcolors(maxcolors=1) or ()) == 1:
        console.warn(f"{name}: the picture is of a single colour; check the file")


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
    ValueError: no face, none of that number, or one whose middle is not in the photo."""
    face = finder.face_of(picture, index, origin)
    try:
        return quad_in(face, picture)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def find_faces(request: Request, targets: Sequence[NamedTarget]) -> FaceFinder | None:
    """Return a finder of faces if faces are cut out, after finding those of inverted targets.
    ValueError: the extra is not installed, or a target that may be inverted has no face."""
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


def searching_inverter(scene: Scene, steps: int, console: Console) -> LatentInverter:
    """Return an inverter that searches, with a progress bar for each call.

    It starts at the answer of the scene's inverter or, without one, at the mean latent.
    """
    at_once = min(AT_ONCE, scene.max_images or AT_ONCE)

    def invert(
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        total = steps * math.ceil(len(images) / at_once)
        # None: beside the bar of a clip's frames it goes away when it is full.
        with console.bar(total=total, desc="search latents", unit="step", leave=None) as bar:

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
        self.names = [f"{i:03d}" for i in range(count)]
        self.facts = {"sources": {"count": count, "seed": seed}}

    def latents(self, scene: Scene) -> Latents:
        ws = scene.sources(self.count, self.seed)
        shown = range(min(len(ws), MAX_SHOWN))
        rows = {"sources": tensor_to_pictures(scene.render(ws[: len(shown)]))}
        return Latents(scored=ws, shown=shown, rows=rows)


class Photos(Sources):
    """Pictures, checked and their faces found at construction.

    They are read again where they are needed, so that a thousand photos need no more memory than
    one. Results have the names of their files.

    Args:
        finder: None: the pictures are aligned already.
        face: which one of each photo, 0 being the largest.

    Raises:
        FileNotFoundError, ValueError: as `read_picture` and `face_quad`.
    """

    def __init__(
        self, paths: Sequence[Path], finder: FaceFinder | None, face: int, console: Console
    ) -> None:
        self.paths = list(paths)
        self.names = unique_names(path.stem for path in paths)
        self.facts = {"sources": [str(path) for path in paths]}
        self.quads: list[Float[ndarray, "4 2"]] = []
        self.aligns = finder is not None
        for path in paths:
            picture = read_picture(path)
            check_shows(picture, str(path), console)
            if finder is not None:
                self.quads.append(face_quad(finder, picture, face, str(path)))
                self.facts["face"] = face

    def squares(self, size: int, count: int | None = None) -> Iterator[Image.Image]:
        """Return the pictures to invert, or the first so many."""
        for i, path in enumerate(self.paths[:count]):
            picture = read_picture(path)
            yield align(picture, self.quads[i], size) if self.aligns else picture

    def latents(self, scene: Scene) -> Latents:
        size, shown = scene.generator.resolution, range(min(len(self.paths), MAX_SHOWN))
        ws = torch.cat([*inverted(scene, self.squares(size))])
        rows = {
            "sources": [*self.squares(size, len(shown))],
            "sources, inverted": tensor_to_pictures(scene.render(ws[: len(shown)])),
        }
        return Latents(scored=ws, shown=shown, rows=rows)

    def write(
        self, out: OutputFolder, edited: Iterable[Image.Image], latents: Latents, edits: Edits
    ) -> dict[str, Any]:
        """Write edited_NAME.png and, of photos, photo_NAME.png."""
        if not self.aligns:
            return super().write(out, edited, latents, edits)
        photos = [f"photo_{name}.png" for name in self.names]

        def pasted() -> Iterator[Image.Image]:
            given = zip(edited, self.paths, self.quads, photos, strict=True)
            for face, path, quad, photo in given:
                write_picture(paste_back(read_picture(path), face, quad), out.take(photo))
                yield face

        return {**super().write(out, pasted(), latents, edits), "photos": photos}
