"""Texts as targets: what a text says more than neutral ones, added to the mean source.

CLIP keeps texts and pictures apart: every text is nearer to any other text than to the picture it
describes. A text's embedding is thus no target, for sources would be pushed towards what all texts
share. What two texts differ in, though, is roughly what two pictures differ in, where pictures
differ at all; elsewhere it is nothing that a picture can have. So a target is

    m + C (C + NOISE c I)^-1 (text - neutral),

of unit length: m and C are mean and covariance of sources' embeddings, c is C's mean eigenvalue,
and `neutral` the mean of texts that sources could have. It is the best linear estimate of the
picture's difference if texts add noise of the variance NOISE c to it in every direction. Knows
embeddings; nothing of directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

NOISE = 0.3  # 0.1 and 1 do as well on drawn faces; none at all brings half of the essence


@runtime_checkable
class TextEmbedder(Protocol):
    """What texts need of an embedder, beside what pictures do."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch embed"]:
        """Raw embeddings in the space of the pictures'."""


@dataclass(frozen=True)
class TextTargets:
    """How texts become targets."""

    embedder: TextEmbedder
    neutral: tuple[str, ...]
    """Texts such as sources could have, or that fit all of them: others are measured from their
    mean."""

    def __post_init__(self) -> None:
        if not self.neutral:
            raise ValueError("expected one neutral text or more to measure others from, found none")

    def embed(self, text: str, sources: Float[Tensor, "sources embed"]) -> Float[Tensor, " embed"]:
        """Unit embedding of a text as a target.

        Args:
            sources: embeddings of pictures of sources, raw or unit.

        Raises:
            ValueError: the text is empty, or says what a single neutral one does.
        """
        if not text.strip():
            raise ValueError("expected a text that describes the target, found an empty one")
        with torch.no_grad():
            found = F.normalize(self.embedder.embed_texts([text, *self.neutral]).float(), dim=1)
        said = found[0] - found[1:].mean(dim=0)
        if float(said.norm()) < 1e-3:
            raise ValueError(f"{text!r} says no more than {self.neutral[0]!r}: describe an essence")
        pictures = F.normalize(sources.float(), dim=1)
        return F.normalize(pictures.mean(dim=0) + seen_in(pictures, said), dim=0)


def seen_in(
    pictures: Float[Tensor, "pictures embed"], said: Float[Tensor, " embed"]
) -> Float[Tensor, " embed"]:
    """What is left of a difference where pictures differ: C (C + NOISE c I)^-1 said."""
    # On the processor and in double precision: eigenvalues span ten powers of ten.
    values, vectors = torch.linalg.eigh(pictures.double().cpu().T.cov())
    values = values.clamp_min(0)
    kept = values / (values + NOISE * values.mean())
    filtered: Tensor = vectors @ (kept * (said.double().cpu() @ vectors))
    return filtered.to(said)
