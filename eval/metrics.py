"""Score edits by pure functions of embeddings, readings, features and images.

Knows numbers only: nothing of judges, nor of how edits were made.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from eval.reader import READINGS, seen_identity
from targetclip.losses import SHORTEST_DIFFERENCE, unit_cosines
from targetclip.scores import score_features
from targetclip.seeds import seed_of

Images = Float[Tensor, "images 3 height width"]
KID_SUBSETS, KID_SUBSET = 10, 1000

# In embedding space


def additivity(
    source: Float[Tensor, "sources embed"], edited: Float[Tensor, "targets sources embed"]
) -> Float[Tensor, " targets"]:
    """Return the part of the shift in embedding space that is the same for every source.

    With s_i = unit(e'_i) - unit(e_i), the shift of source i:

        mean over i != j of s_i . s_j  /  mean over i of |s_i|^2

    At most 1, where all sources are shifted by one vector, as the paper asks. 0 for unrelated
    shifts, or for none. Consistency is the same for shifts of length 1.
    """
    shift = F.normalize(edited, dim=-1) - F.normalize(source, dim=-1)
    count = shift.shape[1]
    squares = shift.square().sum(dim=(1, 2))
    pairs = (shift.sum(dim=1).square().sum(dim=1) - squares) / max(count - 1, 1)
    real = squares > count * SHORTEST_DIFFERENCE**2
    return torch.where(real, pairs, 0) / torch.where(real, squares, 1)


def edit_scores(
    targets: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Float[Tensor, " targets"]]:
    """Score edits by the outputs of judges for pictures; every score is a mean over sources.

    Args:
        targets: of the targets: `embeddings`, and `people` (identity features) and `second` (the
            second judge's embeddings) where there is such a judge, each [targets, features].
        before: of the unedited sources, each [sources, features].
        after: of the edited ones, each [targets, sources, features].

    Returns:
        Cosines: `transfer` to the target, `person` to the source and `target_person` to the
        target by identity features, `second` to the target by the second judge. `consistency` of
        the shifts of two sources, and `additivity`.
    """
    new = after["embeddings"]
    edits = score_features(targets["embeddings"], before["embeddings"].expand_as(new), new)
    scores = {
        "transfer": edits.transfer,
        "consistency": edits.consistency,
        "additivity": additivity(before["embeddings"], new),
    }
    if after.get("people") is not None:
        scores["person"] = unit_cosines(after["people"], before["people"]).mean(dim=1)
    for name, judge in (("target_person", "people"), ("second", "second")):
        if after.get(judge) is not None and targets.get(judge) is not None:
            scores[name] = unit_cosines(after[judge], targets[judge][:, None]).mean(dim=1)
    return scores


# In the attribute reader's words


def essence_columns() -> Bool[Tensor, " outputs"]:
    """Return a mask of the attribute reader's outputs that are essence."""
    columns = [reading.essence for reading in READINGS for _ in range(reading.size)]
    return torch.tensor(columns)


def essence_acquired(
    edited: Float[Tensor, "targets sources outputs"],
    source: Float[Tensor, "sources outputs"],
    target: Float[Tensor, "targets outputs"],
    seen: Bool[Tensor, "targets outputs"],
) -> Float[Tensor, " targets"]:
    """Return the part of the way from sources to their target that the essence readings went.

    1 - |edited - target| / |source - target|, both summed over sources and over the essence
    readings that the target shows (`seen`). 1 is all of the way. Below 0 the edit led away.
    """
    chosen = (seen & essence_columns())[:, None, :]
    left = ((edited - target[:, None]).abs() * chosen).sum(dim=(1, 2))
    whole = ((source[None] - target[:, None]).abs() * chosen).sum(dim=(1, 2))
    return 1 - left / whole


Parts = tuple[Float[Tensor, "targets values"], Float[Tensor, "targets values"]]
"""Of an attribute, for each of its values: what an edit left or changed, and the whole."""


def essence_parts(
    edited: Float[Tensor, "targets sources outputs"],
    source: Float[Tensor, "sources outputs"],
    target: Float[Tensor, "targets outputs"],
    seen: Bool[Tensor, "targets outputs"],
) -> dict[str, Parts]:
    """Return what `essence_acquired` divides, of each essence attribute that a target shows."""
    left = (edited - target[:, None]).abs().sum(dim=1) * seen
    whole = (source[None] - target[:, None]).abs().sum(dim=1) * seen
    return {
        reading.name: (left[:, reading.span], whole[:, reading.span])
        for reading in READINGS
        if reading.essence and seen[:, reading.span].any()
    }


def part_kept(parts: Parts) -> float:
    """Return 1 less the part of the whole that was left or changed, over all targets."""
    left, whole = parts
    return 1 - float(left.sum() / whole.sum())


def essence_by_attribute(
    edited: Float[Tensor, "targets sources outputs"],
    source: Float[Tensor, "sources outputs"],
    target: Float[Tensor, "targets outputs"],
    seen: Bool[Tensor, "targets outputs"],
) -> dict[str, float]:
    """Return `essence_acquired` of each essence attribute, over all targets that show it.

    Sums go over targets as well. An attribute that no target shows is left out.
    """
    parts = essence_parts(edited, source, target, seen)
    return {name: part_kept(of) for name, of in parts.items()}


def distance_apart(source: Float[Tensor, "sources readings"]) -> Float[Tensor, " readings"]:
    """Return the mean absolute difference of two sources that both show a reading; 0 if none do."""
    seen = seen_identity(source)
    others = ~torch.eye(len(source), dtype=torch.bool, device=source.device)[..., None]
    both = seen[:, None] & seen[None] & others
    differences = (source[:, None] - source[None]).abs() * both
    return differences.sum(dim=(0, 1)) / both.sum(dim=(0, 1)).clamp(min=1)


def identity_kept(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> Float[Tensor, " targets"]:
    """Return the part of the sources' identity that was kept: 1 all, 0 as between two sources.

    1 - |edited - source| / |source - another source|, both summed over sources and over the
    identity readings that a source shows before and after its edit (`seen_identity`).
    """
    seen = seen_identity(edited) & seen_identity(source)
    changed = ((edited - source).abs() * seen).sum(dim=(1, 2))
    return 1 - changed / (distance_apart(source) * seen).sum(dim=(1, 2))


def identity_parts(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> dict[str, Parts]:
    """Return what `identity_kept` divides, of each identity attribute that shows."""
    seen = seen_identity(edited) & seen_identity(source)
    changed = ((edited - source).abs() * seen).sum(dim=1)
    apart = (distance_apart(source) * seen).sum(dim=1)
    return {
        reading.name: (changed[:, reading.span], apart[:, reading.span])
        for reading in READINGS
        if not reading.essence and apart[:, reading.span].any()
    }


def identity_by_attribute(
    edited: Float[Tensor, "targets sources outputs"], source: Float[Tensor, "sources outputs"]
) -> dict[str, float]:
    """Return `identity_kept` of each identity attribute that shows, over all targets."""
    return {name: part_kept(parts) for name, parts in identity_parts(edited, source).items()}


# In pixels


def outside_change(before: Images, after: Images) -> Float[Tensor, " images"]:
    """Return the mean absolute change of the left and right border, a sixteenth of the width each.

    A fraction of the range of values, in [0, 1]. On avatars the border is background; on
    photographs long hair may reach it.
    """
    width = border_width(before)
    change = (after.clamp(-1, 1) - before.clamp(-1, 1)).abs() / 2
    return torch.cat([change[..., :width], change[..., -width:]], dim=-1).mean(dim=(1, 2, 3))


def border_width(images: Images) -> int:
    """Return the columns at either side where no essence is drawn."""
    return max(1, images.shape[-1] // 16)


def outside_alone(before: Images, after: Images) -> Images:
    """Return the unedited images with the borders of the edited ones."""
    width, mixed = border_width(before), before.clone()
    mixed[..., :width], mixed[..., -width:] = after[..., :width], after[..., -width:]
    return mixed


def sharpness(images: Images) -> Float[Tensor, " images"]:
    """Return how fine the edges of grey images are, whatever their contrast and number.

    The root mean square of the Laplacian, divided by that of the steps from pixel to pixel. 0 where
    there is no edge. Images are of 3 px a side or more.
    """
    grey = images.clamp(-1, 1).mean(dim=1)
    across, down = grey.diff(dim=2), grey.diff(dim=1)
    bends = (across.diff(dim=2)[:, 1:-1] + down.diff(dim=1)[:, :, 1:-1]).square().mean(dim=(1, 2))
    steps = across.square().mean(dim=(1, 2)) + down.square().mean(dim=(1, 2))
    return torch.where(steps > 1e-8, bends / steps.clamp_min(1e-8), 0).sqrt()


def sharpness_kept(before: Images, after: Images) -> Float[Tensor, " images"]:
    """Return the sharpness of edited images as a part of the unedited ones'; NaN if that is 0."""
    sharp = sharpness(before)
    return torch.where(sharp > 0, sharpness(after) / sharp, torch.nan)


def perceptual_distance(
    a: Sequence[Float[Tensor, "images _ _ _"]], b: Sequence[Float[Tensor, "images _ _ _"]]
) -> Float[Tensor, " images"]:
    """Return the LPIPS distance of two images without its learned weights, from 0 on.

    The mean over levels of the mean over places of |unit(a) - unit(b)|^2, where a and b are the
    channels of a level of a convolutional network at a place (Zhang et al. 2018, equation 1, with
    all weights 1 and a mean over levels in place of the sum).
    """
    levels = [
        (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
        for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(levels).mean(dim=0)


# Of distributions


class PassThrough(nn.Module):
    """Return features as they are, in place of the network that torchmetrics expects."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def check_samples(name: str, *samples: Float[Tensor, "_ _"]) -> None:
    """Raise a ValueError for fewer than two images in a sample."""
    if min(map(len, samples)) < 2:
        sizes = " and ".join(str(len(sample)) for sample in samples)
        raise ValueError(f"{name} needs two images or more of each kind, found {sizes}")


def frechet_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """Return the FID: the Frechet distance of two Gaussians fitted to two samples.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), by torchmetrics in float64. Small
    samples make it too large: compare values of equally many images only.

    ValueError: fewer than two rows in a sample.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes two seconds

    check_samples("FID", a, b)
    fid = FrechetInceptionDistance(feature=PassThrough(a.shape[1]))
    fid.update(a.double(), real=True)
    fid.update(b.double(), real=False)
    return float(fid.compute())


def kernel_distance(a: Float[Tensor, "n features"], b: Float[Tensor, "m features"]) -> float:
    """Return the KID: the unbiased squared maximum mean discrepancy of two samples.

    By torchmetrics in float64, with the kernel (x . y / features + 1)^3. The mean over 10 draws,
    always the same, of as many rows of each sample as the smaller one has, at most 1,000. The
    expected value for one distribution is 0, whatever the size; a single value may be below.

    ValueError: fewer than two rows in a sample.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_samples("KID", a, b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        size = min(len(a), len(b), KID_SUBSET)
        kid = KernelInceptionDistance(
            PassThrough(a.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
    kid.update(a.double(), real=True)
    kid.update(b.double(), real=False)
    # torchmetrics draws from torch's global generator, whose state is the caller's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(kid.compute()[0])


# Over targets


def bootstrap(
    statistic: Callable[[Any], Any], count: int, seed: int, resamples: int
) -> dict[str, Any]:
    """Return a statistic of so many targets as its `mean`, with what `interval` returns beside it.

    Args:
        statistic: of targets by their numbers, over the last axis.
    """
    mean = float(statistic(np.arange(count)))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "count": count}
    random = np.random.default_rng(seed_of("bootstrap", seed, count))
    chosen = random.integers(count, size=(resamples, count))
    low, high = np.quantile(statistic(chosen), (0.025, 0.975))
    return {"mean": mean, "low": float(low), "high": float(high), "count": count}


def interval(
    values: Float[Tensor, " targets"], seed: int, resamples: int = 10_000
) -> dict[str, Any]:
    """Return the mean over targets with a 95 % percentile bootstrap interval.

    Targets are drawn with replacement. The seed and their number alone decide the draws. For a
    paired comparison give the differences of two methods' scores, target by target.

    Returns:
        `mean`; `low` and `high`, the bounds of 95 % of the resampled means, None for a single
        target; `count` of targets.
    """
    numbers = values.double().numpy()
    return bootstrap(lambda rows: numbers[rows].mean(axis=-1), len(numbers), seed, resamples)


def interval_kept(parts: Parts, seed: int, resamples: int = 10_000) -> dict[str, Any]:
    """Return `part_kept` with a 95 % percentile bootstrap interval over targets, as `interval`.

    Left and whole are summed over the targets of a draw before they are divided.
    """
    left, whole = (part.double().sum(dim=1).numpy() for part in parts)

    def kept(rows: Any) -> Any:
        return 1 - left[rows].sum(axis=-1) / whole[rows].sum(axis=-1)

    return bootstrap(kept, len(left), seed, resamples)


def spread(values: Float[Tensor, " targets"]) -> dict[str, float]:
    """Return the `mean` over targets and their standard `deviation`."""
    return {"mean": float(values.mean()), "deviation": float(values.std(correction=0))}


def released_score(
    results: Float[Tensor, "targets sources features"],
    references: Float[Tensor, "#targets #sources features"],
) -> dict[str, float]:
    """Return a score of the released evaluation: 100 times the cosines of results to references.

    The mean over sources, then mean and deviation over targets. The semantic score compares
    embeddings of results with those of targets [targets, 1, features], the identity score identity
    features of results with those of sources [1, sources, features].
    """
    return spread(100 * F.cosine_similarity(results, references, dim=-1).mean(dim=1))
