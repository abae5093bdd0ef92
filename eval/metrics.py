"""Scores of edits, as pure functions of embeddings, readings, features and images.

Knows numbers only: what made them and where they go is the callers'.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from data.drawn.readings import READINGS
from targetclip.losses import SHORTEST_DIFFERENCE

KID_SUBSETS, KID_SUBSET = 10, 1000

# In embedding space


def transfer_scores(
    edited: Float[Tensor, "targets sources embed"], target: Float[Tensor, "targets embed"]
) -> Float[Tensor, "targets sources"]:
    """Cosine of every edited source to its target, in [-1, 1]."""
    return (F.normalize(edited, dim=-1) * F.normalize(target, dim=-1)[:, None]).sum(dim=-1)


def additivity(
    source: Float[Tensor, "sources embed"], edited: Float[Tensor, "targets sources embed"]
) -> Float[Tensor, " targets"]:
    """How much of the shift that an edit makes in embedding space is the same for every source.

    With s_i = unit(e'_i) - unit(e_i), the shift of source i,

        mean over i != j of s_i . s_j  /  mean over i of |s_i|^2,

    which is 1 - (spread of the shifts around their mean) / (their mean square), freed of its bias
    for few sources. 1: a direction that is added in latent space adds one vector in embedding
    space, as the paper asks. 0: shifts that know nothing of each other, or none at all. It is at
    most 1. Consistency is the same for shifts of length 1: it says nothing of how far each went.
    """
    shift = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    count = shift.shape[1]
    squares = shift.square().sum(dim=(1, 2))
    pairs = (shift.sum(dim=1).square().sum(dim=1) - squares) / max(count - 1, 1)
    real = squares > count * SHORTEST_DIFFERENCE**2
    return torch.where(real, pairs, 0) / torch.where(real, squares, 1)


# In the attribute reader's words


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


def essence_by_attribute(
    edited: Float[Tensor, "targets sources outputs"],
    source: Float[Tensor, "sources outputs"],
    target: Float[Tensor, "targets outputs"],
    seen: Bool[Tensor, "targets outputs"],
) -> dict[str, float]:
    """`essence_acquired` of each essence attribute, over all targets that show it.

    Sums go over targets as well, so that a target counts as much as its sources lack what it has.
    An attribute that no target shows is left out.
    """
    left = (edited - target[:, None]).abs().sum(dim=1) * seen
    whole = (source[None] - target[:, None]).abs().sum(dim=1) * seen
    return {
        reading.name: 1 - float(left[:, reading.span].sum() / whole[:, reading.span].sum())
        for reading in READINGS
        if reading.essence and seen[:, reading.span].any()
    }


def distance_apart(source: Float[Tensor, "sources readings"]) -> Float[Tensor, " readings"]:
    """Mean absolute difference of two different sources, for each reading."""
    count = len(source)
    return (source[:, None] - source[None]).abs().sum(dim=(0, 1)) / (count * (count - 1))


def identity_kept(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> Float[Tensor, " targets"]:
    """How much of the sources' identity is left: 1 all of it, 0 as little as between two sources.

    1 - |edited - source| / |source - another source|, both averaged over the identity readings.
    """
    columns = reading_columns(essence=False)
    changed = (edited - source[None])[..., columns].abs().mean(dim=(1, 2))
    return 1 - changed / distance_apart(source[:, columns]).mean()


def identity_by_attribute(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> dict[str, float]:
    """`identity_kept` of each identity attribute, over all targets."""
    changed = (edited - source[None]).abs().mean(dim=(0, 1))
    apart = distance_apart(source)
    return {
        reading.name: 1 - float(changed[reading.span].mean() / apart[reading.span].mean())
        for reading in READINGS
        if not reading.essence
    }


# In pixels


def outside_change(
    before: Float[Tensor, "images 3 height width"], after: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, " images"]:
    """Mean absolute change at the picture's left and right border, a sixteenth of its width each.

    In [0, 1], of the range of values. On drawn faces that is background, where no essence is ever
    drawn: the widest hat ends before it. On photographs long hair may reach it.
    """
    width = border_width(before)
    change = (after.clamp(-1, 1) - before.clamp(-1, 1)).abs() / 2
    return torch.cat([change[..., :width], change[..., -width:]], dim=-1).mean(dim=(1, 2, 3))


def border_width(images: Float[Tensor, "images 3 height width"]) -> int:
    """Columns at either side where no essence is ever drawn."""
    return max(1, images.shape[-1] // 16)


def outside_alone(
    before: Float[Tensor, "images 3 height width"], after: Float[Tensor, "images 3 height width"]
) -> Float[Tensor, "images 3 height width"]:
    """Unedited pictures that have taken on what an edit did to the outside, and nothing else."""
    width, mixed = border_width(before), before.clone()
    mixed[..., :width], mixed[..., -width:] = after[..., :width], after[..., -width:]
    return mixed


def perceptual_distance(
    a: Sequence[Float[Tensor, "images _ _ _"]], b: Sequence[Float[Tensor, "images _ _ _"]]
) -> Float[Tensor, " images"]:
    """How differently a network sees two pictures, from 0 on: LPIPS without its learned weights.

    The mean over levels of the mean over places of |unit(a) - unit(b)|^2, with a and b what a level
    of a convolutional network says of a place (Zhang et al. 2018, equation 1, with all weights 1
    and a mean over levels for its sum).
    """
    levels = [
        (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
        for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(levels).mean(dim=0)


# Of distributions


class Given(nn.Module):
    """Hands on what it is given: torchmetrics asks for a network, and the judges have looked."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(
        self, features: Float[Tensor, "images features"]
    ) -> Float[Tensor, "images features"]:
        return features


def check_samples(name: str, *samples: Float[Tensor, "_ _"]) -> None:
    """Raise a ValueError for fewer than two images in a sample."""
    if min(map(len, samples)) < 2:
        found = " and ".join(str(len(sample)) for sample in samples)
        raise ValueError(f"{name} needs two images or more of each kind, found {found}")


def frechet_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """FID: the Frechet distance of two Gaussians with the means and covariances of two samples.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), by torchmetrics in float64, for any
    features. Small samples make it too large, by an amount that depends on their size: compare
    only what was computed from as many images.

    Raises:
        ValueError: fewer than two rows in a sample.
    """
    check_samples("FID", a, b)
    fid = FrechetInceptionDistance(feature=Given(a.shape[1]))
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return float(fid.compute())


def kernel_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """KID: the squared maximum mean discrepancy of two samples, unbiased, by torchmetrics.

    With the kernel (x . y / features + 1)^3, in float64; the mean over 10 draws of as many of each
    sample as the smaller one has, at most 1,000, always the same. 0 is expected of two samples of
    one distribution, whatever their size; a single value may fall below it.

    Raises:
        ValueError: fewer than two rows in a sample.
    """
    check_samples("KID", a, b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        size = min(len(a), len(b), KID_SUBSET)
        kid = KernelInceptionDistance(Given(a.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    kid.update(a.double(), real=True)
    kid.update(b.double(), real=False)
    # It draws from torch's own numbers, which are the caller's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(kid.compute()[0])


# Over targets


@dataclass(frozen=True)
class Interval:
    """A mean over targets and how sure it is."""

    mean: float
    low: float | None
    high: float | None
    """Bounds that hold 95 % of resampled means; None of a single target."""
    count: int
    """Targets."""


def bootstrap_interval(
    values: Float[Tensor, " targets"], seed: int, resamples: int = 10_000
) -> Interval:
    """Mean over targets with a 95 % percentile bootstrap interval.

    Targets are drawn anew, with replacement; their sources stay with them. For a paired comparison
    give the differences of two methods' scores, target by target. The seed alone decides the draws.
    """
    found = values.double().numpy()
    count = len(found)
    if count < 2:
        return Interval(float(found.mean()), None, None, count)
    chosen = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.quantile(found[chosen].mean(axis=1), (0.025, 0.975))
    return Interval(float(found.mean()), float(low), float(high), count)


@dataclass(frozen=True)
class Spread:
    """A score as the released evaluation gives it."""

    mean: float
    """Over sources, then over targets, times 100."""
    deviation: float
    """Of the targets' means, times 100."""


def released_score(
    results: Float[Tensor, "targets sources features"],
    wanted: Float[Tensor, "#targets #sources features"],
) -> Spread:
    """A score of the released evaluation: 100 times the cosine of results to what is wanted.

    Mean over sources, then mean and deviation over targets. Its semantic score compares embeddings
    of results with those of targets [targets, 1, features]; its identity score compares what an
    identity model makes of results and of sources [1, sources, features]. The fault it has there
    is in what that model is shown, which is the caller's.
    """
    cosine = F.cosine_similarity(results, wanted, dim=-1)
    means = 100 * cosine.mean(dim=1)
    return Spread(float(means.mean()), float(means.std(correction=0)))
