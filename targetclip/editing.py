"""Apply a direction to sources, and score the result.

Knows latents, directions and renders; nothing of how a direction was found.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from targetclip.embedder import ImageEmbedder
from targetclip.generators import Generator
from targetclip.losses import consistency_loss
from targetclip.recipes import Preprocess


@dataclass(frozen=True)
class Scores:
    """How one direction did on some sources. All are cosines in the embedder's space."""

    target_before: Float[Tensor, " sources"]
    """Unedited sources to the target."""
    target_after: Float[Tensor, " sources"]
    """Edited sources to the target; its mean is the transfer score."""
    source_after: Float[Tensor, " sources"]
    """Edited sources to themselves before the edit."""
    consistency: float
    """1 - consistency loss: mean agreement of the shifts of two sources."""

    @property
    def transfer(self) -> float:
        """The transfer score: mean cosine of edited sources to the target."""
        return float(self.target_after.mean())


def apply_direction(
    ws: Float[Tensor, "sources num_ws w_dim"],
    direction: Float[Tensor, "num_ws w_dim"],
    strength: float = 1.0,
) -> Float[Tensor, "sources num_ws w_dim"]:
    """Move sources along a direction: w + strength b. Strength 0 changes nothing.

    Raises:
        ValueError: the direction is not of this generator's W+.
    """
    if direction.shape != ws.shape[1:]:
        raise ValueError(
            f"expected a direction of shape {list(ws.shape[1:])}, found {list(direction.shape)}: "
            "it belongs to another generator"
        )
    return ws + strength * direction


def layer_weights(
    num_ws: int, coarse: float = 1.0, middle: float = 1.0, fine: float = 1.0
) -> Float[Tensor, " {num_ws}"]:
    """A factor for each layer of W+: coarse for those of 4 and 8 px, middle for 16 and 32 px, fine
    from 64 px on (the StyleGAN paper's groups: layers 0 to 3, 4 to 7, and the rest).
    """
    rest = max(num_ws - 8, 0)
    return torch.tensor([coarse] * 4 + [middle] * 4 + [fine] * rest)[:num_ws]


def render(
    generator: Generator, ws: Float[Tensor, "sources num_ws w_dim"], max_images: int = 64
) -> Float[Tensor, "sources 3 height width"]:
    """Images in [-1, 1] of latents, `max_images` at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([generator.synthesis(part) for part in ws.split(max_images)])


def score_edit(
    embedder: ImageEmbedder,
    target: Float[Tensor, " embed"],
    sources: Float[Tensor, "sources 3 height width"],
    edited: Float[Tensor, "sources 3 height width"],
    preprocess: Preprocess = "consistent",
    max_images: int = 64,
) -> Scores:
    """Score edited against unedited images, `max_images` at a time.

    `target` is the target's embedding, raw or unit.
    """

    def embed(images: Float[Tensor, "sources 3 height width"]) -> Float[Tensor, "sources embed"]:
        parts = [embedder.embed_images(part, preprocess) for part in images.split(max_images)]
        return F.normalize(torch.cat(parts), dim=1)

    with torch.no_grad():
        before, after = embed(sources), embed(edited)
        unit = F.normalize(target, dim=0)
        return Scores(
            target_before=before @ unit,
            target_after=after @ unit,
            source_after=(before * after).sum(dim=1),
            consistency=1 - float(consistency_loss(before[None], after[None], "unit")),
        )
