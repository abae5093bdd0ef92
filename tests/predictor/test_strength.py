"""The search for the strength at which an identity floor is met."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from predictor.strength import strength_at_floor

Identity = Callable[[float], float]


def falling(strength: float) -> float:
    """Identity that falls to nothing at 2, on either side of 0."""
    return 1 - abs(strength) / 2


@pytest.mark.parametrize("highest", [1.6, -1.6, 0.01])
@pytest.mark.parametrize("floor", [0.995, 0.77, 0.5, 0.21])
def test_the_floor_is_met_to_a_160th_of_the_highest(highest: float, floor: float) -> None:
    meets = math.copysign(min(2 * (1 - floor), abs(highest)), highest)
    found = strength_at_floor(falling, highest, floor)
    assert falling(found) >= floor
    assert abs(found - meets) <= abs(highest) / 160 + 1e-9


@pytest.mark.parametrize("bad", [0.2, math.nan])
def test_a_dip_ends_the_search(bad: float) -> None:
    found = strength_at_floor(lambda s: bad if 0.45 < s < 0.55 else 1.0, 1.0, 0.5)
    assert 0.44 < found <= 0.45


@pytest.mark.parametrize("seed", range(5))
def test_every_strength_tried_up_to_the_result_keeps_the_floor(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tried: dict[float, float] = {}

    def uneven(strength: float) -> float:
        tried[strength] = falling(strength) + draw.normal(0, 0.2)
        return tried[strength]

    found = strength_at_floor(uneven, 2.0, 0.5)
    kept = {strength: identity >= 0.5 for strength, identity in tried.items()}
    assert all(kept[strength] == (strength <= found) for strength in kept)
    assert found == 0 or kept[found]


def test_a_floor_that_anything_keeps_gives_the_highest() -> None:
    for highest in (0.7, -3.0):
        assert strength_at_floor(lambda s: -1.0, highest, -1.0) == highest


def test_identity_that_is_lost_at_once_gives_nothing() -> None:
    assert strength_at_floor(lambda s: 1.0 if s == 0 else 0.4, 1.0, 0.5) == 0
