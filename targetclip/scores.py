"""How well edits did: cosines by which the product, trainings and the proof judge them.

Knows features of images; nothing of networks.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from targetclip.losses import consistency_loss, unit_cosines
from targetclip.recipes import Differences


@dataclass(frozen=True)
class Scores:
    """How edits did, by the embedder and the identity model. Cosines of unedited and edited images.

    Leading axes are those of the targets: none for a single target.
    """

    target_before: Float[Tensor, "*targets sources"]
    """Unedited sources to the target."""
    target_after: Float[Tensor, "*targets sources"]
    """Edited sources to the target."""
    source_after: Float[Tensor, "*targets sources"]
    """Edited sources to themselves before the edit."""
    consistency: Float[Tensor, "*targets"]
    """1 - consistency loss: mean agreement of the shifts of two sources."""
    identity: Float[Tensor, "*targets sources"] | None = None
    """Edited sources to themselves by the identity model; None where it was not asked."""

    @property
    def transfer(self) -> Float[Tensor, "*targets"]:
        """The transfer score: the mean cosine of edited sources to the target."""
        return self.target_after.mean(dim=-1)


def score_features(
    targets: Float[Tensor, "*targets embed"],
    before: Float[Tensor, "*targets sources features"],
    after: Float[Tensor, "*targets sources features"],
    differences: Differences = "unit",
) -> Scores:
    """Score edits by the features of unedited and of edited images: an embedding, then identity
    features if there are any. Embeddings of targets may be raw or unit."""
    embed, wanted = targets.shape[-1], targets[..., None, :]
    old, new = before[..., :embed], after[..., :embed]
    people = before[..., embed:], after[..., embed:]
    return Scores(
        target_before=unit_cosines(old, wanted),
        target_after=unit_cosines(new, wanted),
        source_after=unit_cosines(old, new),
        consistency=1 - consistency_loss(old, new, differences),
        identity=unit_cosines(*people) if people[0].shape[-1] else None,
    )
