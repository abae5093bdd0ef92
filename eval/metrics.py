"""Scores of edits, as pure functions of embeddings and readings.

Knows numbers only: what made them and where they go is the callers'.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from data.readings import READINGS


def transfer_scores(
    edited: Float[Tensor, "targets sources embed"], target: Float[Tensor, "targets embed"]
) -> Float[Tensor, "targets sources"]:
    """Cosine of every edited source to its target, in [-1, 1]."""
    return (F.normalize(edited, dim=-1) * F.normalize(target, dim=-1)[:, None]).sum(dim=-1)


def reading_columns(essence: bool) -> Bool[Tensor, " outputs"]:
    """Which outputs of the attribute reader are essence, or identity."""
    columns = [reading.essence == essence for reading in READINGS for _ in range(reading.size)]
    return torch.tensor(columns)


def essence_acquired(
    edited: Float[Tensor, "targets sources outputs"],
    source: Float[Tensor, "sources outputs"],
    target: Float[Tensor, "targets outputs"],
    seen: Bool[Tensor, "targets outputs"],
) -> Float[Tensor, " targets"]:
    """How much of the way from source to target the essence went: 0 nothing, 1 all of it.

    1 - |edited - target| / |source - target|, both summed over sources and over the essence
    readings that the target shows (`seen`). Below 0 the edit led away from the target.
    """
    chosen = (seen & reading_columns(essence=True))[:, None, :]
    left = ((edited - target[:, None]).abs() * chosen).sum(dim=(1, 2))
    whole = ((source[None] - target[:, None]).abs() * chosen).sum(dim=(1, 2))
    return 1 - left / whole


def identity_kept(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> Float[Tensor, " targets"]:
    """How much of the sources' identity is left: 1 all of it, 0 as little as between two sources.

    1 - |edited - source| / |source - another source|, both averaged over the identity readings.
    """
    columns = reading_columns(essence=False)
    changed = (edited - source[None])[..., columns].abs().mean(dim=(1, 2))
    kept = source[:, columns]
    count = len(source)
    apart = (kept[:, None] - kept[None]).abs().mean(dim=2).sum() / (count * (count - 1))
    return 1 - changed / apart
