"""Directions: sums, files, the better of two, the gate, and how far to go along one."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from predictor.correction import SourceCorrection
from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    better,
    layer_weights,
    mixed,
    strength_at_floor,
)
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.tradeoff import TradeoffConfig
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.directions import load_direction
from targetclip.recipes import RECIPES

CALIBRATION = {"threshold": 0.8, "probes": 6.0, "refine_steps": 30.0, "refine_rate": 0.02}
GATE = Gate(threshold=0.8, probes=6, refine_steps=30, refine_rate=0.02)
CONFIG = MapperConfig(embed_dim=4, num_ws=2, w_dim=3, generator="g", embedder="e", width=4, depth=1)
RECORD = MapperRecord(recipe={}, calibration={}, licence="MIT", trained_on="nothing", version="1")


def vector(seed: int) -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


def correction(seed: int, mapper: int = 0) -> SourceCorrection:
    """Of a target, by one of several mappers."""
    own, shared = (torch.Generator().manual_seed(n) for n in (seed, 100 + mapper))
    shapes = {"first": (48, 7), "hidden": (7, 7), "hidden_bias": (7,), "mix": (7, 5)}
    shapes |= {"mix_bias": (5,), "basis": (5, 48)}
    tensors = {name: torch.randn(shape, generator=shared) for name, shape in shapes.items()}
    biases = torch.randn(1, 7, generator=own)
    return SourceCorrection(**tensors, biases=biases, weights=torch.ones(1, 6))


def sources(count: int = 4) -> Tensor:
    return torch.randn(count, 6, 8, generator=torch.Generator().manual_seed(5))


def reading(seed: int, mapper: int = 0, **facts: Any) -> Direction:
    """A direction with a correction for each source."""
    return made(seed, correction=correction(seed, mapper), **facts)


def made(seed: int, method: str = "mapper", **facts: Any) -> Direction:
    return Direction(**{"vector": vector(seed), "method": method, **facts})


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


def test_a_mixture_of_mixtures_names_each_method_once() -> None:
    both = mixed([made(0), made(1, "refined", steps=30)], [0.5, 0.5])
    found = mixed([both, made(0), made(2, "optimizer", steps=5)], [1.0] * 3)
    assert found.method == "mapper + refined + optimizer" and found.steps == 35


def test_directions_of_several_generators_do_not_mix() -> None:
    of_a, of_b = made(0, generator="a"), made(1, generator="b")
    with pytest.raises(ValueError, match="directions of one generator"):
        mixed([of_a, of_b], [1.0, 1.0])
    other_size = Direction(vector=torch.zeros(2, 3), method="mapper")
    with pytest.raises(ValueError, match="directions of one generator"):
        mixed([made(0), other_size], [1.0, 1.0])
    assert (of_a + made(1)).generator == "a" and (made(0) + made(1)).generator is None


def test_directions_are_added_and_multiplied_by_numbers() -> None:
    a, b = made(0, steps=2), made(1, "optimizer", steps=3)
    found = 0.5 * a - b * 2 + a / 4
    torch.testing.assert_close(found.vector, 0.75 * vector(0) - 2 * vector(1))
    assert found.method == "mapper + optimizer" and found.steps == 7
    assert torch.equal((-a).vector, -a.vector) and (-a).steps == 2
    assert torch.equal((a * np.float64(2)).vector, 2 * a.vector)
    assert torch.equal(a.vector, vector(0))  # itself unchanged


@pytest.mark.parametrize(
    "wrong",
    [lambda a: a + 1, lambda a: a - a.vector, lambda a: a * a, lambda a: "2" * a],
    ids=["+ 1", "- vector", "* direction", "text *"],
)
def test_what_is_no_sum_of_directions_is_a_type_error(wrong: Callable[[Direction], Any]) -> None:
    with pytest.raises(TypeError):
        wrong(made(0))


def test_a_direction_is_shown_in_one_short_line() -> None:
    plain = Direction(vector=torch.ones(6, 8), method="mapper")
    assert repr(plain) == "Direction(6 x 8, norm 6.93, method 'mapper')"
    scored = dataclasses.replace(plain, expected=0.81234, probe=0.5, steps=3)
    facts = "method 'mapper', expected 0.812, probe 0.500"
    assert repr(scored) == f"Direction(6 x 8, norm 6.93, {facts})"


# With a correction for each source


def test_what_is_added_to_a_source_is_the_vector_and_its_own_correction() -> None:
    one = reading(0)
    added = one.offsets(sources())
    torch.testing.assert_close(added, vector(0) + correction(0)(sources()))
    assert not torch.allclose(added[0], added[1], atol=0.1)
    assert made(0).offsets(sources()).shape == (6, 8)  # one for all
    assert repr(one).endswith("method 'mapper', corrected for each source)")


def test_corrections_follow_strengths_mixtures_and_negative_weights() -> None:
    a, b, plain = reading(0), reading(1), made(2, "optimizer")
    found = 0.5 * a - b / 4 + plain
    expected = 0.5 * a.offsets(sources()) - 0.25 * b.offsets(sources()) + plain.vector
    torch.testing.assert_close(found.offsets(sources()), expected, rtol=1e-4, atol=1e-5)
    assert found.method == "mapper + optimizer"
    assert not (a - a).offsets(sources()).any()
    assert torch.equal(mixed([a], [1.0]).offsets(sources()), a.offsets(sources()))
    assert mixed([plain, plain], [1.0, 2.0]).correction is None


def test_corrections_of_two_mappers_do_not_mix_but_their_vectors_do() -> None:
    a, b = reading(0), reading(1, mapper=1)
    with pytest.raises(ValueError, match=r"^expected corrections of one mapper[^\n]+$"):
        mixed([a, b], [0.5, 0.5])
    vectors = mixed([a.uncorrected(), b.uncorrected()], [0.5, 0.5])
    assert torch.equal(vectors.vector, mixed([made(0), made(1)], [0.5, 0.5]).vector)


def test_layer_weights_are_those_of_the_correction_too() -> None:
    factors = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.5, 2.0])
    for one in (reading(0), made(0)):
        found = one.weighted(factors).offsets(sources())
        torch.testing.assert_close(found, one.offsets(sources()) * factors[:, None])


def test_left_out_the_correction_leaves_the_vector_and_no_score_of_corrected_edits() -> None:
    one = reading(0, expected=0.8, probe=0.7, steps=3, generator="a")
    left = one.uncorrected()
    assert torch.equal(left.offsets(sources()), vector(0))
    assert left == made(0, steps=3, generator="a", vector=left.vector)
    assert made(1, probe=0.7).uncorrected().probe == 0.7  # there was nothing to leave out


def test_a_clip_has_one_direction_by_the_correction_of_its_mean_latent() -> None:
    one = reading(0)
    found = one.for_clip(sources())
    mean = sources().mean(dim=0, keepdim=True)
    torch.testing.assert_close(found.vector, vector(0) + correction(0)(mean)[0])
    assert found.correction is None and torch.equal(found.offsets(sources()), found.vector)
    plain = made(0)
    assert plain.for_clip(sources()) is plain


# Files


@pytest.fixture(scope="module")
def tiny(tiny_world: Path) -> EssenceTransfer:
    return load_essence(tiny_world)


def test_a_direction_is_saved_and_loaded(tiny: EssenceTransfer, tmp_path: Path) -> None:
    generator, path = tiny.scene.generator, tmp_path / "joker.safetensors"
    facts = {"expected": 0.8, "probe": 0.75, "transfer": 0.9, "consistency": 0.4, "steps": 30}
    saved = made(0, "refined", generator=generator.fingerprint, **facts)
    saved.save(path)
    for owner in (tiny, generator):
        loaded = Direction.load(str(path), owner)
        assert torch.equal(loaded.vector, saved.vector)
        assert dataclasses.replace(loaded, vector=saved.vector) == saved
    stored = load_direction(path, generator)  # as the command reads it
    assert torch.equal(stored.direction, saved.vector) and stored.record["method"] == "refined"
    again = tmp_path / "again.safetensors"
    saved.save(str(again))
    assert again.read_bytes() == path.read_bytes()


def test_the_commands_files_and_those_of_the_release_are_loaded(
    tiny: EssenceTransfer, direction_file: Path, tmp_path: Path
) -> None:
    generator = tiny.scene.generator
    ours = Direction.load(direction_file, tiny)
    assert torch.equal(ours.vector, load_direction(direction_file, generator).direction)
    assert ours.method == "optimizer" and ours.generator == generator.fingerprint
    np.save(tmp_path / "released.npy", vector(1).numpy()[None])
    released = Direction.load(tmp_path / "released.npy", generator)
    assert torch.equal(released.vector, vector(1)) and released.method == "released"


def test_a_file_holds_the_vector_and_beside_it_the_correction(
    tiny: EssenceTransfer, tmp_path: Path
) -> None:
    path, generator = tmp_path / "joker.safetensors", tiny.scene.generator
    saved = reading(0, generator=generator.fingerprint) - 0.5 * reading(1)
    saved.save(path)
    loaded = Direction.load(path, tiny)
    assert torch.equal(loaded.offsets(sources()), saved.offsets(sources()))
    assert (loaded + saved).correction is not None  # it is still of the same mapper
    tensors = load_file(path)  # as another program reads it
    assert torch.equal(tensors["direction"], saved.vector)
    assert {name.split(".")[0] for name in set(tensors) - {"direction"}} == {"correction"}
    assert torch.equal(Direction.load(path, tiny).uncorrected().vector, tensors["direction"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"correction.mix": None}, "expected a correction of"),
        ({"correction.more": torch.ones(1)}, "expected a correction of"),
        ({"correction.mix": torch.ones(7, 4)}, "expected a correction of shapes"),
        ({"correction.first": torch.ones(16, 7)}, "expected a correction of shapes"),
        ({"correction.weights": torch.ones(1, 5)}, "expected a correction of shapes"),
        ({"correction.hidden_bias": torch.tensor(1.0)}, "expected a correction of shapes"),
        ({"correction.mix": torch.full((7, 5), math.nan)}, "finite float32"),
        ({"correction.mix": torch.ones(7, 5).half()}, "finite float32"),
    ],
)
def test_a_damaged_correction_is_refused_in_one_line(
    change: dict[str, Tensor | None], said: str, tiny: EssenceTransfer, tmp_path: Path
) -> None:
    path = tmp_path / "joker.safetensors"
    reading(0, generator=tiny.scene.generator.fingerprint).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: t for name, t in (load_file(path) | change).items() if t is not None}
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=said) as caught:
        Direction.load(path, tiny)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_could_not_be_loaded_is_not_saved(tiny: EssenceTransfer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows its generator"):
        made(0).save(tmp_path / "a.safetensors")
    known = made(0, generator="a" * 64)
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        known.save(tmp_path / "a.pt")
    assert not [*tmp_path.iterdir()]
    known.save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="of generator aaaaaaaaaaaa"):
        Direction.load(tmp_path / "a.safetensors", tiny)


# The better of two


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


def test_a_threshold_is_linear_between_places_on_the_trade_off() -> None:
    ends = TradeoffConfig(identity_weights=(0.05, 1.0), decays=(1e-3, 3e-2))
    with torch.random.fork_rng(devices=[]):
        mapper = Mapper(dataclasses.replace(CONFIG, tradeoff=ends))
    figures = {"keep_identity": 0.5, "threshold_at_0": 1.0, "threshold_at_1": 0.0}
    mapper.record = dataclasses.replace(RECORD, calibration={**CALIBRATION, **figures})
    assert Gate.of(mapper) == Gate.of(mapper, 0.5) == GATE
    for keep, threshold in ((0.0, 1.0), (0.25, 0.9), (0.75, 0.4), (1.0, 0.0)):
        gate = Gate.of(mapper, keep)
        assert gate.threshold == pytest.approx(threshold)
        assert dataclasses.replace(gate, threshold=0.8) == GATE


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


def probe(direction: Direction) -> float:
    return float(direction.vector[0, 0])


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


# Layers


@pytest.mark.parametrize(
    ("num_ws", "groups"), [(2, (2, 0, 0)), (6, (4, 2, 0)), (8, (4, 4, 0)), (18, (4, 4, 10))]
)
def test_coarse_middle_and_fine_layers_have_their_own_factors(
    num_ws: int, groups: tuple[int, int, int]
) -> None:
    coarse, middle, fine = groups
    factors = layer_weights(num_ws, coarse=2, middle=-0.5, fine=0)
    assert factors.tolist() == [2] * coarse + [-0.5] * middle + [0] * fine
    assert factors.dtype == torch.float32


def test_layers_without_a_weight_count_fully() -> None:
    assert torch.equal(layer_weights(10), torch.ones(10))
    assert layer_weights(10, middle=0).tolist() == [1] * 4 + [0] * 4 + [1] * 2
