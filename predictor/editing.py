"""Editing: sources moved along a direction, as images, and shown at several strengths.

Knows that sources are pictures or latents, and what a direction does to them; nothing of how
directions are found.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from predictor.direction import Direction, strength_at_floor
from predictor.inputs import Picture, Pictures, as_pictures
from targetclip.encoders.identity import identity_similarity
from targetclip.media.images import labelled_grid, tensor_to_pictures, tile_of, tile_side
from targetclip.scene import Scene

Moves = Direction | Float[Tensor, "*sources num_ws w_dim"]
"""A direction, its vector, or an offset for each source."""

STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # columns of a strip, in strengths of the edit
MORPH = 24  # steps of a morph from unedited to edited
WIDEST = 1024  # pixels of a morph, if its pictures then keep SMALLEST
SMALLEST = 256


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Return pictures as squares of one picture, in as many rows as columns or one row fewer."""
    columns = math.ceil(math.sqrt(len(pictures)))
    side = min(tile_side(pictures), max(WIDEST // columns, SMALLEST))
    canvas = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), "white")
    for place, picture in enumerate(pictures):
        canvas.paste(tile_of(picture, side), (place % columns * side, place // columns * side))
    return canvas


def edits_sheet(
    scene: Scene,
    sources: Float[Tensor, "sources num_ws w_dim"],
    rows: Mapping[str, tuple[Image.Image, Float[Tensor, "*sources num_ws w_dim"]]],
) -> Image.Image:
    """Return one picture: the sources, then under each name a row of a picture and the sources
    moved along a direction, one for all or an offset for each."""
    unedited = tensor_to_pictures(scene.render(sources))
    shown = {"sources": [Image.new("RGB", unedited[0].size, "white"), *unedited]}
    for name, (picture, edit) in rows.items():
        shown[name] = [picture, *tensor_to_pictures(scene.edit(sources, edit))]
    return labelled_grid(None, shown)


class Editing:
    """Edits sources of a scene.

    Args:
        aligner: cuts the face out of a picture before the picture is inverted; None: pictures are
            inverted whole.
    """

    def __init__(
        self, scene: Scene, aligner: Callable[[Image.Image], Image.Image] | None = None
    ) -> None:
        self.scene = scene
        self.aligner = aligner

    def latents_of(self, sources: Pictures) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return the latents of pictures, inverted.

        Latents, which are a tensor whose last axes are num_ws and w_dim, are returned as they are.

        FileNotFoundError, TypeError, ValueError: as `as_pictures`; there is no inverter.
        """
        shape = (self.scene.generator.num_ws, self.scene.generator.w_dim)
        if isinstance(sources, Tensor) and sources.shape[-2:] == shape:
            return sources.reshape(-1, *shape).to(self.scene.device)
        pictures = as_pictures(sources)
        if self.aligner is not None:
            pictures = [self.aligner(picture) for picture in pictures]
        return self.scene.invert(pictures)

    def offsets(
        self, ws: Float[Tensor, "sources num_ws w_dim"], direction: Moves
    ) -> Float[Tensor, "*sources num_ws w_dim"]:
        """Return what is added to latents at strength 1; ValueError: a direction of another
        generator."""
        if isinstance(direction, Direction):
            direction.check_made_for(self.scene.generator)
            return direction.offsets(ws)
        return direction.to(ws.device)

    def edit(
        self, sources: Pictures, direction: Moves, strength: float | Iterable[float] = 1.0
    ) -> Float[Tensor, "*strengths sources 3 height width"]:
        """Return images in [-1, 1] of sources moved along a direction: w + strength (b + c(w)).

        c is the direction's correction for each source, 0 where it has none.

        Args:
            sources: pictures, which are inverted, or latents: see `latents_of`.
            direction: a direction, its vector, or an offset for each source.
            strength: how far; 0 changes nothing. Several give the result an axis in front.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `latents_of`; a direction of another
                generator.
        """
        ws = self.latents_of(sources)
        offsets = self.offsets(ws, direction)
        if not isinstance(strength, Iterable):
            return self.scene.edit(ws, offsets, strength)
        return torch.stack([self.scene.edit(ws, offsets, factor) for factor in strength])

    def edit_pictures(
        self, sources: Pictures, direction: Moves, strength: float | Iterable[float] = 1.0
    ) -> list[Image.Image]:
        """Return the images of `edit` as RGB pictures: all sources at the first strength, then at
        the next."""
        return tensor_to_pictures(self.edit(sources, direction, strength).flatten(0, -4))

    def strip(
        self,
        sources: Pictures,
        direction: Moves,
        strength: float = 1.0,
        *,
        target: Picture | None = None,
        names: Sequence[str] | None = None,
    ) -> Image.Image:
        """Return one picture with a row for each source, from unedited to beyond the edit: at 0,
        1/4, 1/2, 3/4, 1 and 5/4 of the strength, which stands above.

        Args:
            target: a picture that is shown on the left.
            names: of the sources, each another. None: numbers.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `edit`; names that are too few or the same.
        """
        ws = self.latents_of(sources)
        offsets = self.offsets(ws, direction)
        if names is None:
            names = [f"source {number}" for number in range(1, len(ws) + 1)]
        if len({*names}) != len(ws):
            raise ValueError(f"expected {len(ws)} different names of sources, found {[*names]}")
        steps = [factor * strength or 0.0 for factor in STRIP]  # no -0
        columns = [self.edit_pictures(ws, offsets, step) for step in steps]
        rows = dict(zip(names, zip(*columns, strict=True), strict=True))
        notes = {0.0: ", unedited", 1.0: ", the result"}
        headings = [
            f"strength {step:.3g}{notes.get(factor, '')}"
            for step, factor in zip(steps, STRIP, strict=True)
        ]
        shown = None if target is None else as_pictures(target)[0]
        return labelled_grid(shown, rows, headings=headings)

    def morph(
        self, sources: Pictures, direction: Moves, strength: float = 1.0
    ) -> Iterator[Image.Image]:
        """Return the pictures of a morph of sources beside each other, from unedited to edited:
        each is rendered at its strength, which grows slowly at either end.

        `write_morph("morph.gif", essence.morph(sources, direction))`, of targetclip.media.frames.

        FileNotFoundError, TypeError, ValueError: as `edit`.
        """
        ws = self.latents_of(sources)
        offsets = self.offsets(ws, direction)
        for step in range(MORPH + 1):
            eased = (1 - math.cos(math.pi * step / MORPH)) / 2
            yield beside(self.edit_pictures(ws, offsets, eased * strength))

    def strength_at_identity(
        self, sources: Pictures, direction: Moves, floor: float, highest: float = 1.0
    ) -> float:
        """Return the largest strength up to which sources keep a mean identity similarity of
        `floor`, in [-1, 1]. ValueError: as `edit`; there is no identity model."""
        if (model := self.scene.identity) is None:
            raise ValueError("there is no identity model to hold a floor by: choose a strength")
        ws = self.latents_of(sources)
        offsets = self.offsets(ws, direction)
        before = self.edit(ws, offsets, 0.0)

        def identity_at(strength: float) -> float:
            edited = self.edit(ws, offsets, strength)
            return float(identity_similarity(model, before, edited).mean())

        return strength_at_floor(identity_at, highest, floor)
