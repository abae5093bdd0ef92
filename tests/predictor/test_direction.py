"""Directions: mixtures of several, and the better of two."""

import math

import pytest
import torch
from torch import Tensor

from predictor.direction import Direction, better, mixed


def vector(seed: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def test_a_mixture_is_the_weighted_sum() -> None:
    found = mixed([Direction(vector(0), "mapper"), Direction(vector(1), "mapper")], [2.0, -0.5])
    torch.testing.assert_close(found.vector, 2 * vector(0) - 0.5 * vector(1))


def test_one_direction_of_weight_one_is_itself_and_a_negative_weight_takes_it_away() -> None:
    one = Direction(vector(0), "mapper")
    assert torch.equal(mixed([one], [1.0]).vector, one.vector)
    assert torch.equal(mixed([one], [-1.0]).vector, -one.vector)
    assert not mixed([one, one], [0.3, -0.3]).vector.any()


def test_a_mixture_names_each_method_once_and_all_steps() -> None:
    methods = {"mapper": 0, "refined": 30, "optimizer": 180}
    each = [Direction(vector(0), name, steps=steps) for name, steps in methods.items()]
    found = mixed([*each, *each[:2]], [0.2] * 5)
    assert found.method == "mapper + refined + optimizer" and found.steps == 240
    assert found.probe is found.transfer is found.expected is None  # nobody measured the mixture


@pytest.mark.parametrize(("directions", "weights"), [(0, 0), (2, 1), (1, 2)])
def test_a_mixture_needs_a_weight_for_each(directions: int, weights: int) -> None:
    with pytest.raises(ValueError, match=f"found {weights} for {directions}"):
        mixed([Direction(vector(0), "mapper")] * directions, [1.0] * weights)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [(0.4, 0.5), (-0.1, 0.0), (-0.9, -0.1), (None, -0.5), (math.nan, -0.5), (math.nan, 0.9)],
)
def test_the_better_one_has_the_higher_probe_score(lower: float | None, higher: float) -> None:
    worse, best = (Direction(vector(0), "mapper", probe=probe) for probe in (lower, higher))
    assert better(worse, best) is best and better(best, worse) is best


def test_of_two_that_tie_the_first_is_kept() -> None:
    first, second = (Direction(vector(i), "mapper", probe=0.5) for i in range(2))
    assert better(first, second) is first
