"""Editing: sources moved along a direction, as images.

Knows that sources are pictures or latents, and what a direction does to them; nothing of how
directions are found.
"""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from predictor.direction import Direction, strength_at_floor
from predictor.inputs import Pictures, as_pictures
from targetclip.encoders.identity import identity_similarity
from targetclip.media.images import tensor_to_pictures
from targetclip.scene import Scene

Moves = Direction | Float[Tensor, "*sources num_ws w_dim"]
"""A direction, its vector, or an offset for each source."""


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
