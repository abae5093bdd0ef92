"""The trade-off between essence and identity: its curve, and mappers that read a place on it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from predictor.correction import mixed_corrections
from predictor.folded import FoldedMapper
from predictor.mapper import Mapper, load_mapper, save_mapper
from predictor.mapper_file import (
    PLACES_FORMAT,
    TRADEOFF_FORMAT,
    CorrectionConfig,
    MapperConfig,
    MapperRecord,
    model_card,
)
from predictor.tradeoff import TradeoffConfig, keep_features
from targetclip.recipes import RECIPES

CURVE = TradeoffConfig(identity_weights=(0.05, 1.0), decays=(1e-3, 3e-2))
PLAIN = MapperConfig(
    embed_dim=12, num_ws=6, w_dim=8, generator="a" * 64, embedder="e" * 64, width=16, depth=2
)
READING = replace(PLAIN, tradeoff=CURVE)
CORRECTED = replace(READING, correction=CorrectionConfig(rank=5, width=7))
RECORD = MapperRecord(
    recipe={}, calibration={"keep_identity": 0.25}, licence="MIT", trained_on="nothing", version="0"
)
PLACES = (0.0, 0.3, 0.5, 1.0)


def fresh(config: MapperConfig) -> Mapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mapper(config).requires_grad_(False)


def taught(config: MapperConfig = CORRECTED) -> Mapper:
    """A mapper whose every weight and buffer is far from its start."""
    mapper, numbers = fresh(config), torch.Generator().manual_seed(1)
    for name, tensor in mapper.state_dict().items():
        drawn = 0.3 * torch.randn(tensor.shape, generator=numbers)
        tensor.add_(drawn.abs() if name == "correction.deviation" else drawn)
    return mapper


def embeddings(count: int = 4) -> Tensor:
    return 5 * torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


def sources(count: int = 3) -> Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(3))


# The curve


def test_the_ends_of_the_curve_are_those_given_and_logarithms_are_linear_between() -> None:
    assert CURVE.identity_weight(0.0) == 0.05 and CURVE.decay(0.0) == 1e-3
    assert CURVE.identity_weight(1.0) == pytest.approx(1.0)
    assert CURVE.decay(1.0) == pytest.approx(3e-2)
    assert CURVE.identity_weight(0.5) == pytest.approx((0.05 * 1.0) ** 0.5)
    places = torch.tensor(PLACES)
    expected = torch.tensor([CURVE.decay(keep) for keep in PLACES])
    torch.testing.assert_close(CURVE.decay(places), expected)
    recipe = CURVE.recipe_at(RECIPES["identity"], 0.25)
    assert recipe.identity_weight == CURVE.identity_weight(0.25)
    assert replace(recipe, identity_weight=0.15, weight_decay=1e-2) == RECIPES["identity"]


def test_the_place_nearest_to_a_recipe_of_the_curve_is_its_own() -> None:
    for keep in PLACES:
        recipe = CURVE.recipe_at(RECIPES["identity"], keep)
        assert CURVE.nearest(recipe) == pytest.approx(keep)
    # Both of its weights have a place of their own.
    assert 0.36 < CURVE.nearest(RECIPES["identity"]) < 0.68
    beyond = replace(RECIPES["identity"], identity_weight=50.0, weight_decay=7.0)
    assert CURVE.nearest(beyond) == 1.0
    without = replace(RECIPES["identity"], identity_weight=0.0, weight_decay=0.0)
    assert CURVE.nearest(without) == 0.0


def test_a_curve_of_one_weight_alone_is_one() -> None:
    curve = TradeoffConfig(identity_weights=(0.1, 0.1), decays=(1e-3, 1e-2))
    assert curve.identity_weight(0.7) == pytest.approx(0.1)
    assert curve.nearest(replace(RECIPES["identity"], weight_decay=1e-2)) == 1.0


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"identity_weights": (0.0, 1.0)}, "identity_weights: expected two finite numbers above 0"),
        ({"identity_weights": (1.0, 0.5)}, "the lower one first"),
        ({"decays": (1e-3, float("inf"))}, "decays"),
        ({"decays": (float("nan"), 1.0)}, "decays"),
        ({"identity_weights": (1.0, 1.0), "decays": (1.0, 1.0)}, "expected ends .* that differ"),
        ({"origin": 1.5}, "origin: expected a number from 0 to 1"),
    ],
)
def test_ends_without_sense_are_refused(ends: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        replace(CURVE, **ends)
    assert "\n" not in str(caught.value)


def test_what_networks_read_is_bounded_and_tells_places_apart() -> None:
    features = keep_features(torch.linspace(0, 1, 21))
    assert features.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(features[:, 0], 2 * torch.linspace(0, 1, 21) - 1)
    assert int(torch.linalg.matrix_rank(features)) == features.shape[1]
    assert torch.cdist(features, features).add(10 * torch.eye(21)).min() > 0.05


def test_at_its_origin_a_curve_has_the_recipe_that_it_was_begun_with() -> None:
    curve, recipe = replace(CURVE, origin=0.34), replace(RECIPES["identity"], weight_decay=3e-3)
    assert curve.recipe_at(recipe, 0.34) == recipe != CURVE.recipe_at(recipe, 0.34)
    assert curve.recipe_at(recipe, 0.8) == CURVE.recipe_at(recipe, 0.8)
    features = keep_features(torch.tensor([0.0, 0.34, 1.0]), 0.34)
    assert not features[1].any() and features[0].any() and features[2].any()
    torch.testing.assert_close(
        features[2] - features[0],
        keep_features(torch.ones(1))[0] - keep_features(torch.zeros(1))[0],
    )


# A mapper that reads a place


def test_fresh_it_answers_everywhere_as_one_that_reads_none() -> None:
    plain = replace(CORRECTED, tradeoff=None)
    expected, mapper = fresh(plain)(embeddings()), fresh(CORRECTED)
    for keep in (None, *PLACES):
        found = mapper(embeddings(), keep)
        assert torch.equal(found.directions, expected.directions)
        assert torch.equal(found.expected, expected.expected)
    difference = torch.randn(2, 12)
    assert torch.equal(
        mapper.directions_of_differences(difference, 0.3),
        fresh(plain).directions_of_differences(difference),
    )


def test_taught_every_answer_follows_the_place() -> None:
    mapper = taught()
    low, high = mapper(embeddings(), 0.0), mapper(embeddings(), 1.0)
    assert not torch.allclose(low.directions, high.directions, atol=0.1)
    assert not torch.allclose(low.expected, high.expected, atol=0.01)
    corrections = [mapper.correct(embeddings(), sources(), keep) for keep in (0.0, 1.0)]
    assert not torch.allclose(*corrections, atol=0.1)
    whole = mapper.edits(embeddings(), sources(), 1.0)
    torch.testing.assert_close(whole, high.directions[:, None] + corrections[1])


def test_each_target_of_a_batch_has_its_own_place() -> None:
    mapper, places = taught(), torch.tensor(PLACES)
    batch = mapper(embeddings(), places)
    edits = mapper.edits(embeddings(), sources(), places)
    for i, keep in enumerate(PLACES):
        alone = mapper(embeddings()[i : i + 1], keep)
        torch.testing.assert_close(batch.directions[i], alone.directions[0])
        torch.testing.assert_close(batch.expected[i], alone.expected[0])
        expected = mapper.edits(embeddings()[i : i + 1], sources(), keep)
        torch.testing.assert_close(edits[i], expected[0])


def test_where_no_place_is_asked_for_that_of_the_record_is_taken() -> None:
    mapper = taught()
    assert mapper.keep == 0.5
    middle = mapper(embeddings()).directions
    torch.testing.assert_close(middle, mapper(embeddings(), 0.5).directions)
    mapper.record = RECORD
    assert mapper.keep == 0.25 and taught(PLAIN).keep is None
    found, score = FoldedMapper(mapper)(embeddings(1))
    expected = mapper(embeddings(1), 0.25)
    torch.testing.assert_close(found, expected.directions[0], rtol=1e-4, atol=1e-5)
    assert score == pytest.approx(float(expected.expected[0]), abs=1e-5)
    assert not torch.allclose(expected.directions, middle[:1], atol=1e-2)


def test_another_default_place_is_another_mapper_by_its_fingerprint() -> None:
    mapper, other = taught(), taught()
    other.record = RECORD
    assert mapper.fingerprint != other.fingerprint
    plain, same = taught(PLAIN), taught(PLAIN)
    same.record = RECORD
    assert plain.fingerprint == same.fingerprint


@pytest.mark.parametrize("keep", [-0.1, 1.1, float("nan")])
def test_a_place_off_the_curve_is_refused(keep: float) -> None:
    mapper = taught()
    for call in (mapper, FoldedMapper(mapper)):
        with pytest.raises(ValueError, match="keep_identity: expected a number from 0 to 1"):
            call(embeddings(1), keep)


def test_a_mapper_that_reads_none_refuses_a_place() -> None:
    mapper = taught(PLAIN)
    for call in (mapper, FoldedMapper(mapper)):
        with pytest.raises(ValueError, match="this mapper was trained at one identity weight"):
            call(embeddings(1), 0.5)


@pytest.mark.parametrize("rank", [None, 3])
def test_at_its_origin_it_answers_to_the_bit_as_the_one_it_was_trained_from(
    rank: int | None,
) -> None:
    curve = replace(CURVE, origin=0.34)
    plain = taught(replace(CORRECTED, tradeoff=None, rank=rank))
    mapper = taught(replace(CORRECTED, tradeoff=curve, rank=rank))
    mapper.load_state_dict(plain.state_dict(), strict=False)
    assert mapper.keep == 0.34
    for keep in (None, 0.34, torch.tensor([0.34] * 4)):
        found, expected = mapper(embeddings(), keep), plain(embeddings())
        assert torch.equal(found.directions, expected.directions)
        assert torch.equal(found.expected, expected.expected)
        edits = mapper.edits(embeddings(), sources(), keep)
        assert torch.equal(edits, plain.edits(embeddings(), sources()))
    folded = [FoldedMapper(one)(embeddings(1)) for one in (mapper, plain)]
    assert torch.equal(folded[0][0], folded[1][0]) and folded[0][1] == folded[1][1]
    assert not torch.allclose(mapper(embeddings(), 0.4).directions, expected.directions, atol=0.01)


# Its faster form


@pytest.mark.parametrize("rank", [None, 3])
def test_the_faster_form_answers_as_the_mapper_at_every_place(rank: int | None) -> None:
    mapper = taught(replace(CORRECTED, rank=rank))
    folded = FoldedMapper(mapper)
    for keep in (*PLACES, *PLACES):  # the second time from memory
        whole, row = mapper(embeddings(1), keep), embeddings(1)
        direction, expected = folded(row, keep)
        torch.testing.assert_close(direction, whole.directions[0], rtol=1e-4, atol=1e-5)
        assert expected == pytest.approx(float(whole.expected[0]), abs=1e-5)
        correction = folded.correction(row, keep)
        assert correction is not None
        torch.testing.assert_close(
            correction(sources()), mapper.correct(row, sources(), keep)[0], rtol=1e-4, atol=1e-5
        )


def test_corrections_of_several_places_mix() -> None:
    folded = FoldedMapper(taught())
    parts = [folded.correction(embeddings(1), keep) for keep in (0.0, 1.0)]
    one, other = (part for part in parts if part is not None)
    mixture = mixed_corrections([one, other], [0.5, -2.0])
    expected = 0.5 * one(sources()) - 2.0 * other(sources())
    torch.testing.assert_close(mixture(sources()), expected, rtol=1e-4, atol=1e-5)


def test_the_faster_form_of_a_place_does_not_depend_on_the_precision_it_was_made_in() -> None:
    mapper = taught()
    first, second = FoldedMapper(mapper), FoldedMapper(mapper)
    with torch.autocast("cpu", torch.bfloat16):
        first(embeddings(1), 0.3)
    assert torch.equal(first(embeddings(1), 0.3)[0], second(embeddings(1), 0.3)[0])


# Its file


@pytest.mark.parametrize("half", [False, True])
def test_a_mapper_that_reads_a_place_outlives_its_file(half: bool, tmp_path: Path) -> None:
    path, mapper = tmp_path / "mapper.safetensors", taught()
    save_mapper(mapper, path, RECORD, half=half)
    loaded, record = load_mapper(path)
    assert loaded.config == CORRECTED and record == RECORD and loaded.keep == 0.25
    for keep in PLACES:
        found, expected = (m.edits(embeddings(), sources(), keep) for m in (loaded, mapper))
        assert float((found - expected).norm()) <= (0.01 if half else 0) * float(expected.norm())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == TRADEOFF_FORMAT
    assert "keep=0.7" in model_card(CORRECTED, RECORD)
    assert "keep=" not in model_card(PLAIN, RECORD)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tradeoff": {"identity_weights": [0.05, 1]}}, "metadata is damaged"),
        ({"tradeoff": {"identity_weights": [0, 1], "decays": [1, 2]}}, "metadata is damaged"),
        ({"tradeoff": "yes"}, "metadata is damaged"),
        (
            {"tradeoff": {"identity_weights": [0.1, 1], "decays": [1, 2], "origin": "here"}},
            "metadata is damaged",
        ),
        ({"tradeoff": None}, "weights do not fit"),
    ],
)
def test_a_file_of_another_curve_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path, mapper = tmp_path / "mapper.safetensors", taught()
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), **change})
    save_file(mapper.state_dict(), path, metadata)
    with pytest.raises(ValueError, match=said):
        load_mapper(path)


def test_an_origin_outlives_its_file_and_an_older_file_is_read(tmp_path: Path) -> None:
    path, config = tmp_path / "mapper.safetensors", replace(CORRECTED, tradeoff=CURVE)
    begun = replace(config, tradeoff=replace(CURVE, origin=0.34))
    save_mapper(taught(begun), path, replace(RECORD, calibration={}))
    assert load_mapper(path)[0].config == begun and load_mapper(path)[0].keep == 0.34
    mapper = taught(config)
    assert mapper.keep_read is not None
    mapper.keep_read.weight.zero_()  # as before a place added to heads
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "format": PLACES_FORMAT}
    new = ("keep_read.weight", "keep_heads.weight")
    save_file({k: v for k, v in mapper.state_dict().items() if k not in new}, path, metadata)
    loaded = load_mapper(path)[0]
    for keep in PLACES:
        expected = mapper.edits(embeddings(), sources(), keep)
        assert torch.equal(loaded.edits(embeddings(), sources(), keep), expected)


def test_a_file_whose_default_place_is_off_the_curve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mapper.safetensors"
    save_mapper(taught(), path, replace(RECORD, calibration={"keep_identity": 1.5}))
    with pytest.raises(ValueError, match=r"damaged .*keep_identity: expected a number from 0 to 1"):
        load_mapper(path)
