"""Metrics: their ends, what they are blind to, and the definitions they follow."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.metrics import (
    additivity,
    edit_scores,
    essence_acquired,
    essence_by_attribute,
    essence_columns,
    frechet_distance,
    identity_by_attribute,
    identity_kept,
    interval,
    interval_kept,
    kernel_distance,
    outside_alone,
    outside_change,
    part_kept,
    perceptual_distance,
    released_score,
    sharpness,
    sharpness_kept,
)
from eval.reader import OUTPUTS, READINGS, SPANS, among
from targetclip.losses import consistency_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def unshaded(count: int, seed: int = 0) -> Tensor:
    """Readings of people without shades, so that all of them is seen."""
    readings = uniform(count, OUTPUTS, seed=seed)
    readings[:, SPANS["accessories"]] /= 10
    return readings


# Additivity


def climbers(lengths: list[float]) -> tuple[Tensor, Tensor]:
    """Unit vectors all over a sphere, and where each gets by going straight up so far."""
    angles = torch.arange(len(lengths)).double()
    half = torch.tensor(lengths).double() / 2
    level = (1 - half.square()).sqrt()
    ring = torch.stack([level * angles.cos(), level * angles.sin()], dim=1)
    source = torch.cat([ring, -half[:, None]], dim=1)
    return source, torch.cat([ring, half[:, None]], dim=1)


def test_one_shift_for_all_sources_is_wholly_additive() -> None:
    source, edited = climbers([0.6] * 5)
    assert float(additivity(3 * source, 7 * edited[None])) == pytest.approx(1)


def test_shifts_of_different_lengths_are_consistent_but_not_additive() -> None:
    source, edited = climbers([0.2, 0.2, 1.4, 1.4])
    loss = consistency_loss(source[None], edited[None], "unit")
    assert float(loss) == pytest.approx(0, abs=1e-6)
    # Pairs: (.04 + 1.96 + 4 x .28) / 6; squares: (2 x .04 + 2 x 1.96) / 4.
    assert float(additivity(source, edited[None])) == pytest.approx(0.52 / 1.0)


def test_unrelated_shifts_and_none_at_all_are_not_additive() -> None:
    source = random(3, 64).double()
    unrelated = random(400, 3, 64, seed=1).double()
    # Less the sources' own part, which all the shifts of a source share.
    basis = torch.linalg.qr(source.T)[0]
    unrelated = unrelated - unrelated @ basis @ basis.T
    origin = torch.zeros_like(source)
    assert float(additivity(origin, unrelated).mean()) == pytest.approx(0, abs=0.02)
    assert float(additivity(source, source[None])) == 0


# All scores of edits


def test_scores_are_cosines_to_the_target_and_to_the_source() -> None:
    targets = {"embeddings": random(2, 8), "people": random(2, 5, seed=1)}
    before = {"embeddings": random(3, 8, seed=2), "people": random(3, 5, seed=3)}
    after = {"embeddings": random(2, 3, 8, seed=4), "people": random(2, 3, 5, seed=5)}
    found = edit_scores(targets, before, after)
    assert set(found) == {"transfer", "consistency", "additivity", "person", "target_person"}
    for score, key, other in [
        ("transfer", "embeddings", targets["embeddings"][:, None]),
        ("person", "people", before["people"][None]),
        ("target_person", "people", targets["people"][:, None]),
    ]:
        expected = F.cosine_similarity(after[key], other, dim=-1).mean(dim=1)
        torch.testing.assert_close(found[score], expected)
    both = edit_scores(*({**of, "second": of["embeddings"]} for of in (targets, before, after)))
    torch.testing.assert_close(both["second"], found["transfer"])
    nobody = edit_scores({**targets, "people": None}, before, after)
    assert "person" in nobody and "target_person" not in nobody


# Readings


@pytest.fixture
def read() -> tuple[Tensor, Tensor, Tensor]:
    """Readings of sources and of targets, and all of them seen; nobody wears shades."""
    return unshaded(4), unshaded(2, seed=1), torch.ones(2, OUTPUTS).bool()


def test_an_essence_brought_wholly_is_one_and_none_is_nothing(
    read: tuple[Tensor, Tensor, Tensor],
) -> None:
    source, target, seen = read
    untouched = source.expand(2, -1, -1)
    essence = torch.where(essence_columns(), target[:, None], source)
    assert essence_acquired(untouched, source, target, seen).abs().max() < 1e-6
    torch.testing.assert_close(essence_acquired(essence, source, target, seen), torch.ones(2))
    assert set(essence_by_attribute(essence, source, target, seen).values()) == {1.0}
    torch.testing.assert_close(identity_kept(essence, source), torch.ones(2))


def test_each_attribute_is_judged_apart(read: tuple[Tensor, Tensor, Tensor]) -> None:
    source, target, seen = read
    edited = source.repeat(2, 1, 1)
    edited[:, :, SPANS["hairColor"]] = target[:, None, SPANS["hairColor"]]
    half = (source[:, SPANS["beard"]] + target[:, None, SPANS["beard"]]) / 2
    edited[:, :, SPANS["beard"]] = half
    edited[:, :, SPANS["skinColor"]] += 0.1
    seen[:, SPANS["hat"]] = False
    found = essence_by_attribute(edited, source, target, seen)
    assert set(found) == {r.name for r in READINGS if r.essence and r.name != "hat"}
    assert found.pop("hairColor") == pytest.approx(1)
    assert found.pop("beard") == pytest.approx(0.5)
    assert all(value == pytest.approx(0) for value in found.values())
    kept = identity_by_attribute(edited, source)
    assert set(kept) == {reading.name for reading in READINGS if not reading.essence}
    assert kept.pop("skinColor") < 0.9
    assert set(kept.values()) == {1.0}


def test_the_identity_of_somebody_else_is_worth_nothing() -> None:
    source = unshaded(2)
    swapped = source.flip(0)[None]
    assert float(identity_kept(swapped, source)) == pytest.approx(0, abs=1e-6)
    found = identity_by_attribute(swapped, source)
    assert all(value == pytest.approx(0, abs=1e-6) for value in found.values())


def test_what_shades_hide_is_no_loss_of_identity() -> None:
    source = unshaded(3)
    edited = source[None].clone()
    edited[..., SPANS["eyes"]] += 0.3
    assert float(identity_kept(edited, source)) < 0.95
    edited[..., among("accessories", ("sunglasses",))] = 1.0
    torch.testing.assert_close(identity_kept(edited, source), torch.ones(1))
    assert identity_by_attribute(edited, source)["skinColor"] == 1


def test_the_interval_of_an_attribute_is_of_sums_over_targets() -> None:
    left, whole = uniform(6, 3), uniform(6, 3) + 1
    found = interval_kept((left, whole), 0)
    assert found["mean"] == pytest.approx(part_kept((left, whole)), abs=1e-6)
    assert found["low"] < found["mean"] < found["high"] and found["count"] == 6
    # Where the whole is the same for all targets, it is the interval of their own parts.
    even = interval_kept((left, torch.ones(6, 3)), 0)
    expected = interval(1 - left.sum(dim=1) / 3, 0)
    assert even == pytest.approx(expected, abs=1e-6)
    # A target counts by what was to be changed.
    left[0], whole[0] = 0, 1000
    assert interval_kept((left, whole), 0)["mean"] > 0.98
    alone = interval_kept((left[:1], whole[:1]), 0)
    assert alone == {"mean": 1, "low": None, "high": None, "count": 1}


# Pixels


def test_change_counts_at_the_border_alone() -> None:
    before = uniform(2, 3, 32, 32) * 2 - 1
    inside = before.clone()
    inside[..., 2:-2] = 0
    assert torch.equal(outside_change(before, inside), torch.zeros(2))
    after = -torch.ones_like(before)
    after[1, ..., 16:] = 1
    found = outside_change(torch.ones_like(before), after)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5]))
    # Values beyond the range show no further.
    assert torch.equal(outside_change(5 * torch.ones_like(before), after), found)


def test_a_blurred_image_is_less_sharp_and_a_flat_one_has_no_measure() -> None:
    before = uniform(3, 3, 16, 16) * 2 - 1
    before[2] = 0.3
    after = F.avg_pool2d(before, 3, stride=1, padding=1)
    after[0] = before[0]
    found = sharpness_kept(before, after)
    assert found[0] == 1 and 0 < found[1] < 0.8 and found[2].isnan()
    assert sharpness_kept(before, torch.zeros_like(before))[0] == 0


def test_sharpness_is_that_of_an_edge_whatever_its_contrast_and_its_length() -> None:
    short, long = -torch.ones(1, 3, 32, 32), -torch.ones(1, 3, 32, 32)
    short[..., 8:16, 8:] = 1
    long[..., 4:28, 8:] = 0.5
    assert float(sharpness(short)) == pytest.approx(float(sharpness(long)), rel=0.1)
    torch.testing.assert_close(sharpness(short / 2), sharpness(short))


def test_only_the_border_of_an_edit_comes_along() -> None:
    before, after = uniform(2, 3, 32, 32), uniform(2, 3, 32, 32, seed=1)
    found = outside_alone(before, after)
    assert torch.equal(found[..., 2:-2], before[..., 2:-2])
    assert torch.equal(found[..., :2], after[..., :2])
    assert torch.equal(found[..., -2:], after[..., -2:])


def test_perceptual_distance_is_of_what_a_place_says_whatever_its_length() -> None:
    one, other = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    one[:, 0], other[:, 0] = 1, 5
    assert torch.equal(perceptual_distance([one], [other]), torch.zeros(2))
    other[1, :, 0] = torch.tensor([0.0, 1, 0, 0])[:, None]  # one row of three says the opposite
    torch.testing.assert_close(perceptual_distance([one], [other]), torch.tensor([0, 2 / 3]))
    level = perceptual_distance([one, one], [other, one])
    torch.testing.assert_close(level, torch.tensor([0, 1 / 3]))


# Distributions


def test_fid_is_the_distance_of_two_gaussians() -> None:
    a, b = random(40, 6).double(), 2 * random(25, 6, seed=1).double() @ random(6, 6).double() + 1
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().sum().real
    between = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    expected = between + cov_a.trace() + cov_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected))
    assert frechet_distance(b, a) == pytest.approx(float(expected))
    line_a, line_b = a[:, :1], b[:, :1]
    one = float((line_a.mean() - line_b.mean()) ** 2 + (line_a.std() - line_b.std()) ** 2)
    assert frechet_distance(line_a, line_b) == pytest.approx(one)


def test_fid_is_nothing_of_a_sample_to_itself_even_with_fewer_rows_than_features() -> None:
    # Roots of eigenvalues that are 0 but for rounding.
    a = random(5, 40)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, a + 1) == pytest.approx(40)


def test_kid_is_the_unbiased_discrepancy() -> None:
    a, b = random(5, 3).double(), random(5, 3, seed=1).double() + 1

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 3 + 1) ** 3)

    def within(rows: Tensor) -> float:
        pairs = [kernel(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(x, y) for x in a for y in b) / 25
    assert kernel_distance(a, b) == pytest.approx(within(a) + within(b) - 2 * across)


def test_kid_of_samples_of_two_sizes_draws_the_same_and_leaves_the_callers_numbers_alone() -> None:
    a, b = random(40, 3), random(10, 3, seed=1) + 1
    torch.manual_seed(5)
    found = kernel_distance(a, b)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert kernel_distance(a, b) == found
    assert found == pytest.approx(kernel_distance(a[:10], b), rel=0.5)


def test_kid_does_not_grow_where_samples_are_small() -> None:
    found = [
        kernel_distance(random(8, 4, seed=2 * i), random(8, 4, seed=2 * i + 1)) for i in range(300)
    ]
    assert abs(sum(found)) / 300 < 0.1 < max(found)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_a_single_image_has_no_distribution(distance) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="found 1 and 3"):
        distance(random(1, 4), random(3, 4))


# Over targets


def test_the_interval_is_that_of_the_mean() -> None:
    values = random(50).double()
    found = interval(values, seed=3)
    assert found == interval(values, seed=3) != interval(values, seed=4)
    assert found["mean"] == pytest.approx(float(values.mean())) and found["count"] == 50
    # Near enough to the interval of a normal distribution.
    reach = 1.96 * float(values.std()) / math.sqrt(50)
    assert found["low"] == pytest.approx(found["mean"] - reach, abs=0.15 * reach)
    assert found["high"] == pytest.approx(found["mean"] + reach, abs=0.15 * reach)


def test_one_target_has_a_mean_and_no_interval() -> None:
    found = interval(torch.tensor([0.5]), seed=0)
    assert found == {"mean": 0.5, "low": None, "high": None, "count": 1}


def test_the_released_score_is_a_mean_over_sources_and_then_over_targets() -> None:
    results, targets, sources = random(3, 4, 8), random(3, 8, seed=1), random(4, 8, seed=2)
    cosines = [
        [float(F.cosine_similarity(results[t, s], targets[t], dim=0)) for s in range(4)]
        for t in range(3)
    ]
    means = [100 * sum(row) / 4 for row in cosines]
    mean = sum(means) / 3
    deviation = math.sqrt(sum((value - mean) ** 2 for value in means) / 3)
    found = released_score(results, targets[:, None])
    assert (found["mean"], found["deviation"]) == pytest.approx((mean, deviation), rel=1e-4)
    same = released_score(sources.expand(3, -1, -1), sources[None])
    assert (same["mean"], same["deviation"]) == pytest.approx((100, 0), abs=1e-3)
