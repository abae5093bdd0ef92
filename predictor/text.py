"""Texts as targets: what a text says more than a neutral one, added to the mean source.

CLIP keeps texts and pictures apart: every text is nearer to any other text than to the picture it
describes. A text's embedding is thus no target, for sources would be pushed towards what all texts
share. What two texts differ in, though, is roughly what two pictures differ in, so a target is

    centre + gain (text - neutral),

of unit length, with the mean embedding of sources as `centre` and that of texts which say nothing
(`neutral`) as where the text is measured from. Knows embeddings; nothing of directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


@runtime_checkable
class TextEmbedder(Protocol):
    """What texts need of an embedder, beside what pictures do."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch embed"]:
        """Raw embeddings in the space of the pictures'."""


@dataclass(frozen=True)
class TextTargets:
    """How texts become targets.

    Raises:
        ValueError: no neutral text.
    """

    embedder: TextEmbedder
    neutral: tuple[str, ...]
    """Texts that fit any source; their mean is where others are measured from."""
    gain: float = 1.0
    """How far pictures differ, for each unit by which texts do."""

    def __post_init__(self) -> None:
        if not self.neutral:
            raise ValueError("expected neutral texts to measure others from, found none")

    def embed(self, text: str, centre: Float[Tensor, " embed"]) -> Float[Tensor, " embed"]:
        """Unit embedding of a text as a target.

        Args:
            centre: mean unit embedding of sources.

        Raises:
            ValueError: the text is empty, or says what the neutral ones do.
        """
        if not text.strip():
            raise ValueError("expected a text that describes the target, found an empty one")
        with torch.no_grad():
            found = F.normalize(self.embedder.embed_texts([text, *self.neutral]).float(), dim=1)
        said = found[0] - found[1:].mean(dim=0)
        if float(said.norm()) < 1e-3:
            raise ValueError(f"{text!r} says no more than {self.neutral[0]!r}: describe an essence")
        return F.normalize(centre + self.gain * said, dim=0)
