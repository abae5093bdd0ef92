"""Corrections: what is added to a direction for each source, by a mapper and folded."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from predictor.correction import SourceCorrection, mixed_corrections
from predictor.folded import FoldedMapper
from predictor.mapper import Mapper, load_mapper, save_mapper
from predictor.mapper_file import (
    SECOND_FORMAT,
    CorrectionConfig,
    MapperConfig,
    MapperRecord,
    model_card,
)
from targetclip.command import in_precision

EMBED, NUM_WS, W_DIM = 12, 6, 8
PLAIN = MapperConfig(
    embed_dim=EMBED,
    num_ws=NUM_WS,
    w_dim=W_DIM,
    generator="a" * 64,
    embedder="e" * 64,
    width=16,
    depth=2,
)
CONFIG = replace(PLAIN, correction=CorrectionConfig(rank=5, width=7))
FIRST = replace(PLAIN, correction=CorrectionConfig(rank=5, width=7, layers="first"))
RECORD = MapperRecord(recipe={}, calibration={}, licence="MIT", trained_on="nothing", version="0")


def fresh(config: MapperConfig = CONFIG) -> Mapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mapper(config).requires_grad_(False)


def taught(config: MapperConfig = CONFIG, seed: int = 1) -> Mapper:
    """A mapper whose every weight and buffer is far from its start."""
    mapper, numbers = fresh(config), torch.Generator().manual_seed(seed)
    for name, tensor in mapper.state_dict().items():
        drawn = 0.3 * torch.randn(tensor.shape, generator=numbers)
        tensor.add_(drawn.abs() if name == "correction.deviation" else drawn)
    return mapper


def embeddings(count: int = 3) -> Tensor:
    return 5 * torch.randn(count, EMBED, generator=torch.Generator().manual_seed(2))


def sources(count: int = 4) -> Tensor:
    """Latents that differ from layer to layer."""
    return torch.randn(count, NUM_WS, W_DIM, generator=torch.Generator().manual_seed(3))


def folded(mapper: Mapper, target: int = 0) -> SourceCorrection:
    correction = FoldedMapper(mapper).correction(embeddings()[target : target + 1])
    assert correction is not None
    return correction


# The mapper


@pytest.mark.parametrize("config", [CONFIG, FIRST])
def test_a_fresh_correction_is_zero_and_the_rest_answers_as_without(config: MapperConfig) -> None:
    mapper, plain = fresh(config), fresh(PLAIN)
    assert not mapper.correct(embeddings(), sources()).any()
    prediction, before = mapper(embeddings()), plain(embeddings())
    assert torch.equal(prediction.directions, before.directions)
    assert torch.equal(prediction.expected, before.expected)
    direction, expected = FoldedMapper(mapper)(embeddings(1))
    assert torch.equal(direction, FoldedMapper(plain)(embeddings(1))[0])
    assert expected == FoldedMapper(plain)(embeddings(1))[1]


def test_a_correction_reads_the_target_and_every_layer_of_the_source() -> None:
    mapper = taught()
    corrections = mapper.correct(embeddings(), sources())
    assert corrections.shape == (3, 4, NUM_WS, W_DIM)
    assert not torch.allclose(corrections[0], corrections[1], atol=1e-2)
    assert not torch.allclose(corrections[:, 0], corrections[:, 1], atol=1e-2)
    moved = sources()
    moved[:, -1] += 1
    assert not torch.allclose(mapper.correct(embeddings(), moved), corrections, atol=1e-2)
    first = taught(FIRST)
    assert torch.equal(first.correct(embeddings(), moved), first.correct(embeddings(), sources()))


def test_sources_of_each_target_and_sources_of_all_are_corrected_alike() -> None:
    mapper = taught()
    corrections = mapper.correct(embeddings(), sources())
    each = mapper.correct(embeddings(), sources().expand(3, -1, -1, -1))
    torch.testing.assert_close(each, corrections)
    alone = mapper.correct(embeddings()[1:2], sources()[2:3])
    torch.testing.assert_close(alone[0, 0], corrections[1, 2])
    unit = torch.nn.functional.normalize(embeddings(), dim=1)
    torch.testing.assert_close(mapper.correct(unit, sources()), corrections)


def test_corrections_have_the_units_of_directions_and_of_latents() -> None:
    mapper = taught()
    before = mapper.correct(embeddings(), sources())
    mapper.scale[1, 2] *= 3
    after = mapper.correct(embeddings(), sources())
    torch.testing.assert_close(after[..., 1, 2], 3 * before[..., 1, 2])
    assert mapper.correction is not None
    moved = 2 * sources() + 1
    mapper.correction.mean.mul_(2).add_(1)
    mapper.correction.deviation.mul_(2)
    torch.testing.assert_close(mapper.correct(embeddings(), moved), after)


def test_corrections_are_mixtures_of_as_many_directions_as_their_rank() -> None:
    mapper = taught()
    many = torch.randn(30, NUM_WS, W_DIM, generator=torch.Generator().manual_seed(4))
    corrections = (mapper.correct(embeddings(), many) / mapper.scale).flatten(2).flatten(0, 1)
    # One more for their mean
    assert int(torch.linalg.matrix_rank(corrections, rtol=1e-4)) == 5


def test_a_mapper_without_a_correction_corrects_by_zeros() -> None:
    mapper = taught(PLAIN)
    for ws in (sources(), sources().expand(3, -1, -1, -1)):
        corrections = mapper.correct(embeddings(), ws)
        assert corrections.shape == (3, 4, NUM_WS, W_DIM) and not corrections.any()
    assert FoldedMapper(mapper).correction(embeddings(1)) is None


def test_computed_in_bfloat16_a_correction_is_still_float32() -> None:
    mapper = taught()
    exact = mapper.correct(embeddings(), sources())
    with in_precision(torch.device("cpu"), "bf16"):
        rounded = mapper.correct(embeddings(), sources())
        assert folded(mapper)(sources()).dtype == torch.float32
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1)


def test_embeddings_or_latents_of_another_size_are_refused() -> None:
    mapper = taught()
    with pytest.raises(ValueError, match=r"\[batch, 12\]"):
        mapper.correct(torch.zeros(1, 13), sources())
    with pytest.raises(ValueError, match="belongs to another generator"):
        folded(mapper)(torch.zeros(2, NUM_WS + 1, W_DIM))


# Its folded form


@pytest.mark.parametrize("config", [CONFIG, FIRST, replace(CONFIG, rank=3)])
def test_the_folded_correction_is_the_mappers(config: MapperConfig) -> None:
    mapper = taught(config)
    whole = mapper.correct(embeddings(), sources())
    assert float(whole.std()) > 0.1
    for target in range(3):
        torch.testing.assert_close(
            folded(mapper, target)(sources()), whole[target], rtol=1e-4, atol=1e-5
        )


def test_the_folded_correction_is_a_copy() -> None:
    mapper = taught()
    correction = folded(mapper)
    before = correction(sources())
    for tensor in mapper.state_dict().values():
        tensor.mul_(2).add_(1)
    assert torch.equal(correction(sources()), before)


def test_corrections_mix_as_their_targets_do() -> None:
    mapper = taught()
    one, other = folded(mapper), folded(mapper, 1)
    mixture = mixed_corrections([one, other], [0.5, -2.0])
    expected = 0.5 * one(sources()) - 2.0 * other(sources())
    torch.testing.assert_close(mixture(sources()), expected, rtol=1e-4, atol=1e-5)
    layers = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 2.0])
    torch.testing.assert_close(
        mixture.weighted(layers)(sources()), expected * layers[:, None], rtol=1e-4, atol=1e-5
    )
    again = mixed_corrections([mixture, one], [2.0, 1.0])
    torch.testing.assert_close(
        again(sources()), 2 * expected + one(sources()), rtol=1e-4, atol=1e-5
    )


def test_what_does_not_mix_is_refused() -> None:
    one, stranger = folded(taught()), folded(taught(seed=9))
    with pytest.raises(ValueError, match="expected corrections of one mapper"):
        mixed_corrections([one, stranger], [1.0, 1.0])
    with pytest.raises(ValueError, match="one weight for each correction, found 1 for 2"):
        mixed_corrections([one, one], [1.0])
    with pytest.raises(ValueError, match="found 0 for 0"):
        mixed_corrections([], [])


def test_the_tensors_of_a_correction_are_all_that_it_needs(tmp_path: Path) -> None:
    mapper = taught()
    correction = mixed_corrections([folded(mapper), folded(mapper, 1)], [0.5, 0.5])
    save_file(correction.tensors(), tmp_path / "correction.safetensors")
    again = SourceCorrection(**load_file(tmp_path / "correction.safetensors"))
    assert torch.equal(again(sources()), correction(sources()))


# The mapper's file


@pytest.mark.parametrize("config", [CONFIG, FIRST])
def test_a_mapper_with_a_correction_outlives_its_file(config: MapperConfig, tmp_path: Path) -> None:
    path, mapper = tmp_path / "mapper.safetensors", taught(config)
    save_mapper(mapper, path, RECORD)
    loaded, _ = load_mapper(path)
    assert loaded.config == config and loaded.fingerprint == mapper.fingerprint
    assert torch.equal(
        loaded.correct(embeddings(), sources()), mapper.correct(embeddings(), sources())
    )
    assert "mapper.correct(embeddings, latents)" in model_card(config, RECORD)
    assert "mapper.correct" not in model_card(PLAIN, RECORD)


def test_half_precision_spares_the_units_of_latents(tmp_path: Path) -> None:
    path, mapper = tmp_path / "mapper.safetensors", taught()
    save_mapper(mapper, path, RECORD, half=True)
    kept = load_file(path)
    full = {name for name, tensor in kept.items() if tensor.dtype == torch.float32}
    assert {"correction.mean", "correction.deviation", "scale"} < full
    assert "correction.source.weight" not in full


def test_a_file_of_the_second_format_has_no_correction(tmp_path: Path) -> None:
    """As this project wrote them: the config does not name a correction."""
    path, mapper = tmp_path / "mapper.safetensors", taught(PLAIN)
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = asdict(PLAIN)
    del config["correction"]
    metadata |= {"format": SECOND_FORMAT, "config": json.dumps(config)}
    save_file(mapper.state_dict(), path, metadata)
    loaded, record = load_mapper(path)
    assert loaded.config == PLAIN and record == RECORD
    assert loaded.fingerprint == mapper.fingerprint
    assert torch.equal(loaded(embeddings()).directions, mapper(embeddings()).directions)


@pytest.mark.parametrize(
    ("correction", "said"),
    [
        ({"rank": 5, "width": 8}, "weights do not fit"),
        ({"rank": 5, "width": 7, "layers": "last"}, "metadata is damaged"),
        ({"rank": 0, "width": 7}, "metadata is damaged"),
        ({"colour": 1}, "metadata is damaged"),
        ("yes", "metadata is damaged"),
        (None, "weights do not fit"),
    ],
)
def test_a_file_of_another_correction_is_refused(
    correction: object, said: str, tmp_path: Path
) -> None:
    path, mapper = tmp_path / "mapper.safetensors", taught()
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps({**asdict(CONFIG), "correction": correction})
    save_file(mapper.state_dict(), path, metadata)
    with pytest.raises(ValueError, match=said) as caught:
        load_mapper(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"rank": 0}, {"width": True}])
def test_a_correction_without_sense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        CorrectionConfig(**change)  # type: ignore[arg-type]
