"""Directions: mixtures, the better of two, the gate, and how far to go along one."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    better,
    mixed,
    strength_at_floor,
)
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from targetclip.recipes import RECIPES

CALIBRATION = {"threshold": 0.8, "probes": 6.0, "refine_steps": 30.0, "refine_rate": 0.02}
GATE = Gate(threshold=0.8, probes=6, refine_steps=30, refine_rate=0.02)
CONFIG = MapperConfig(embed_dim=4, num_ws=2, w_dim=3, generator="g", embedder="e", width=4, depth=1)
RECORD = MapperRecord(recipe={}, calibration={}, licence="MIT", trained_on="nothing", version="1")


def vector(seed: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def made(seed: int, method: str = "mapper", **facts: Any) -> Direction:
    return Direction(vector=vector(seed), method=method, **facts)


def test_a_mixture_is_the_weighted_sum() -> None:
    found = mixed([made(0), made(1)], [2.0, -0.5])
    torch.testing.assert_close(found.vector, 2 * vector(0) - 0.5 * vector(1))


def test_one_direction_of_weight_one_is_itself_and_a_negative_weight_takes_it_away() -> None:
    one = made(0)
    assert torch.equal(mixed([one], [1.0]).vector, one.vector)
    assert torch.equal(mixed([one], [-1.0]).vector, -one.vector)
    assert not mixed([one, one], [0.3, -0.3]).vector.any()


def test_a_mixture_names_each_method_once_and_all_steps() -> None:
    methods = {"mapper": 0, "refined": 30, "optimizer": 180}
    each = [made(0, name, steps=steps) for name, steps in methods.items()]
    found = mixed([*each, *each[:2]], [0.2] * 5)
    assert found.method == "mapper + refined + optimizer" and found.steps == 240
    assert found.probe is found.transfer is found.expected is None  # nobody measured the mixture


@pytest.mark.parametrize(("directions", "weights"), [(0, 0), (2, 1), (1, 2)])
def test_a_mixture_needs_a_weight_for_each(directions: int, weights: int) -> None:
    with pytest.raises(ValueError, match=f"found {weights} for {directions}"):
        mixed([made(0)] * directions, [1.0] * weights)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [(0.4, 0.5), (-0.1, 0.0), (-0.9, -0.1), (None, -0.5), (math.nan, -0.5), (math.nan, 0.9)],
)
def test_the_better_one_has_the_higher_probe_score(lower: float | None, higher: float) -> None:
    worse, best = (made(0, probe=probe) for probe in (lower, higher))
    assert better(worse, best) is best and better(best, worse) is best


def test_of_two_that_tie_the_first_is_kept() -> None:
    first, second = (made(i, probe=0.5) for i in range(2))
    assert better(first, second) is first


# The gate


def mapper_with(calibration: dict[str, float] | None) -> Mapper:
    with torch.random.fork_rng(devices=[]):
        mapper = Mapper(CONFIG)
    if calibration is not None:
        mapper.record = dataclasses.replace(RECORD, calibration=calibration)
    return mapper


def test_a_gate_is_what_the_mapper_was_calibrated_to() -> None:
    assert Gate.of(mapper_with({**CALIBRATION, "coverage": 0.9})) == GATE


@pytest.mark.parametrize("name", list(CALIBRATION))
def test_a_figure_that_is_missing_is_named(name: str) -> None:
    others = {key: value for key, value in CALIBRATION.items() if key != name}
    with pytest.raises(ValueError, match=rf"^the mapper is not calibrated \(no {name}\): [^\n]+$"):
        Gate.of(mapper_with(others))


@pytest.mark.parametrize("calibration", [{}, None])
def test_a_mapper_without_calibration_or_record_lacks_all(
    calibration: dict[str, float] | None,
) -> None:
    with pytest.raises(ValueError, match="no threshold, probes, refine_steps, refine_rate"):
        Gate.of(mapper_with(calibration))


def test_the_threshold_itself_passes_and_no_number_never_does() -> None:
    assert GATE.passes(0.8) and GATE.passes(0.81)
    assert not GATE.passes(math.nextafter(0.8, 0)) and not GATE.passes(math.nan)
    assert not dataclasses.replace(GATE, threshold=-1.0).passes(math.nan)


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_refinement_is_the_recipe_but_for_its_search_and_what_the_mapper_was_taught(
    name: str,
) -> None:
    recipe = dataclasses.replace(RECIPES[name], patience=7)
    taught = {"weight_decay": 0.5, "identity_weight": 0.3}
    trained = dataclasses.replace(RECIPES["consistent"], **taught)
    changes = {"steps": 30, "learning_rate": 0.02, "initial": "zero", **taught}
    found = dataclasses.asdict(GATE.refining(recipe, trained))
    assert found == dataclasses.asdict(recipe) | changes


def at(value: float, steps: int) -> Direction:
    """A direction whose every number is its score on the probe sources."""
    return Direction(vector=torch.full((6, 8), value), method="refined", steps=steps)


def probe(vector: Tensor) -> float:
    return float(vector[0, 0])


def failing() -> Direction:
    raise FloatingPointError("the loss is not finite")


def test_searches_end_at_the_first_result_that_passes() -> None:
    predicted = dataclasses.replace(at(0.5, 0), method="mapper", expected=0.7)
    kept = GATE.first_that_passes(predicted, [lambda: at(0.9, 6), failing], probe)
    assert kept == dataclasses.replace(
        at(0.9, 6), vector=kept.vector, expected=0.7, probe=kept.probe
    )
    assert kept.probe == pytest.approx(0.9)


def test_the_best_is_kept_where_nothing_passes_and_its_steps_are_those_of_all_searches() -> None:
    predicted = dataclasses.replace(at(0.5, 0), method="mapper")
    searches = [lambda: at(0.6, 6), failing, lambda: at(0.4, 8)]
    kept = GATE.first_that_passes(predicted, searches, probe)
    assert kept.probe == pytest.approx(0.6) and kept.steps == 14


def test_ctrl_c_carries_the_best_so_far() -> None:
    def interrupted() -> Direction:
        raise Interrupted(at(0.7, 2))

    with pytest.raises(Interrupted) as caught:
        GATE.first_that_passes(at(0.5, 0), [lambda: at(0.6, 6), interrupted], probe)
    best = caught.value.direction
    assert best.probe == pytest.approx(0.7) and best.steps == 8


# How far to go along a direction


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
