"""The gate: what passes, and what a refinement is."""

import dataclasses
import math

import pytest
import torch

from predictor.gate import Gate
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from targetclip.recipes import RECIPES

CALIBRATION = {"threshold": 0.8, "probes": 6.0, "refine_steps": 30.0, "refine_rate": 0.02}
GATE = Gate(0.8, 6, 30, 0.02)


def mapper_with(calibration: dict[str, float] | None) -> Mapper:
    with torch.random.fork_rng(devices=[]):
        mapper = Mapper(MapperConfig(4, 2, 3, "g", "e", width=4, depth=1))
    if calibration is not None:
        mapper.record = MapperRecord({}, calibration, "MIT", "nothing", "1")
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
