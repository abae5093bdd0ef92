"""The two losses of TargetCLIP and one for identity, as pure functions of image embeddings.

Knows embeddings only: no images, encoders or directions. All functions take raw embeddings of
`batch` targets at once and return one value for each target, so the caller decides how to sum.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from targetclip.recipes import Differences

# A difference shorter than this part of its source embedding is rounding noise: renderings of one
# picture in batches of different sizes differ by about 1e-6. Its unit vector would be random, and
# its gradient, which grows as one over the length, would be larger than all others.
SHORTEST_DIFFERENCE = 1e-3


def at_least_float32(embeddings: Tensor) -> Tensor:
    """Return float32 for half precision, which cannot hold the difference of near embeddings."""
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def unit_cosines(
    one: Float[Tensor, "*batch size"], other: Float[Tensor, "*others size"]
) -> Float[Tensor, "*both"]:
    """Return the cosines of vectors, in at least float32; leading axes broadcast."""
    one = F.normalize(at_least_float32(one), dim=-1)
    other = F.normalize(at_least_float32(other), dim=-1)
    return (one * other).sum(dim=-1)


def unit_differences(
    source: Float[Tensor, "*batch sources embed"],
    edited: Float[Tensor, "*batch sources embed"],
    differences: Differences,
) -> Float[Tensor, "*batch sources embed"]:
    """Return d_i, the direction in which each edit moved in embedding space, as unit vectors.

    An edit shorter than `SHORTEST_DIFFERENCE` of the source's length has d_i = 0 and no gradient.
    """
    if differences == "unit":
        source, edited = F.normalize(source, dim=-1), F.normalize(edited, dim=-1)
    elif differences != "raw":
        raise ValueError(f"differences must be 'unit' or 'raw', found {differences!r}")
    moved = source - edited
    length = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    shortest = SHORTEST_DIFFERENCE * torch.linalg.vector_norm(source, dim=-1, keepdim=True)
    real = length > shortest.detach()
    # Divided by 1 where it is noise: a division by nearly nothing would make the gradient NaN.
    return torch.where(real, moved, 0) / torch.where(real, length, 1)


def transfer_loss(
    edited: Float[Tensor, "batch sources embed"], target: Float[Tensor, "batch embed"]
) -> Float[Tensor, " batch"]:
    """Return the paper's transfer loss, in [0, 2]: 0 where every edit has the target's embedding.

        L_transfer = 1 - 1/N sum_i cos(e'_i, t)

    with e'_i the embedding of edited source i of N, and t that of the target.
    """
    return 1 - unit_cosines(edited, target[:, None]).mean(dim=-1)


def consistency_loss(
    source: Float[Tensor, "*batch sources embed"],
    edited: Float[Tensor, "*batch sources embed"],
    differences: Differences,
) -> Float[Tensor, "*batch"]:
    """Return the paper's consistency loss, in [0, 2]: 0 where every source moves the same way.

        L_consistency = 1/(N^2 - N) sum_{i != j} (1 - cos(d_i, d_j))
        "unit":  d_i = unit(unit(e_i) - unit(e'_i))     the released optimizer
        "raw":   d_i = unit(e_i - e'_i)                 the first version of the paper

    with e_i, e'_i the embeddings of source i before and after the edit. An edit that does nothing,
    as at the first step of a direction that starts at zero, has d_i = 0: its pairs count 1 and pass
    no gradient. The loss of a single source, which has no pairs, is 0.
    """
    d = unit_differences(at_least_float32(source), at_least_float32(edited), differences)
    pairs = d.shape[-2] * (d.shape[-2] - 1)
    # sum_{i != j} d_i . d_j without the matrix of products, which autocast would round to half
    agreement = d.sum(dim=-2).square().sum(dim=-1) - d.square().sum(dim=(-2, -1))
    return (pairs - agreement) / max(pairs, 1)


def identity_loss(
    source: Float[Tensor, "batch sources features"], edited: Float[Tensor, "batch sources features"]
) -> Float[Tensor, " batch"]:
    """Return the identity loss, in [0, 2]: 0 where every edited source is the same person.

        L_identity = 1 - 1/N sum_i cos(p_i, p'_i)

    with p_i, p'_i the identity features of source i before and after the edit. Not in the paper;
    StyleCLIP trains its mapper by it (Patashnik et al. 2021, equation 2).
    """
    source, edited = at_least_float32(source), at_least_float32(edited)
    return 1 - F.cosine_similarity(source, edited, dim=-1).mean(dim=-1)
