"""The folded mapper, which answers one target at a time as the mapper does; see test_correction."""

import dataclasses

import pytest
import torch
from torch import Tensor

from predictor.folded import FoldedMapper
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig
from targetclip.command import in_precision

CONFIG = MapperConfig(
    embed_dim=12, num_ws=6, w_dim=8, generator="a" * 64, embedder="e" * 64, width=16, depth=2
)


def taught_mapper(config: MapperConfig = CONFIG) -> Mapper:
    """A mapper whose every weight and buffer is far from its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Mapper(config).requires_grad_(False)
        for tensor in network.state_dict().values():
            tensor.add_(0.3 * torch.randn(tensor.shape))
    return network


def embeddings(count: int = 4) -> Tensor:
    return 5 * torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [None, 1, 3, 48, 60])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_folded_mapper_answers_as_the_mapper_of_any_size(rank: int | None, depth: int) -> None:
    mapper = taught_mapper(dataclasses.replace(CONFIG, rank=rank, depth=depth))
    whole, folded = mapper(embeddings(5)), FoldedMapper(mapper)
    for i, embedding in enumerate(embeddings(5).split(1)):
        direction, expected = folded(embedding)
        torch.testing.assert_close(direction, whole.directions[i], rtol=1e-4, atol=1e-5)
        assert expected == pytest.approx(float(whole.expected[i]), abs=1e-5)
    assert whole.directions.std() > 0.1 and whole.expected.std() > 0.01


def test_the_folded_mapper_reads_embeddings_of_any_length() -> None:
    folded = FoldedMapper(taught_mapper())
    for embedding in embeddings(5).split(1):
        direction, expected = folded(embedding)
        for same in (1e3 * embedding, embedding.double(), embedding / embedding.norm()):
            found, score = folded(same)
            torch.testing.assert_close(found, direction, rtol=1e-4, atol=1e-5)
            assert score == pytest.approx(expected, abs=1e-5)


def test_the_folded_mapper_of_zeros_is_finite() -> None:
    direction, expected = FoldedMapper(taught_mapper())(torch.zeros(1, 12))
    assert direction.isfinite().all() and abs(expected) <= 1


def test_the_folded_mapper_refuses_another_size() -> None:
    with pytest.raises(ValueError, match=r"expected embeddings of shape \[batch, 12\]"):
        FoldedMapper(taught_mapper())(torch.zeros(1, 13))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_folded_mapper_refuses_an_embedding_that_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="expected an embedding of finite length"):
        FoldedMapper(taught_mapper())(torch.full((1, 12), value))


def test_the_folded_mapper_is_a_copy() -> None:
    for rank in (None, 3):
        mapper = taught_mapper(dataclasses.replace(CONFIG, rank=rank))
        before = {name: tensor.clone() for name, tensor in mapper.state_dict().items()}
        folded = FoldedMapper(mapper)
        answer = folded(embeddings(1))[0]
        assert all(torch.equal(before[k], v) for k, v in mapper.state_dict().items())
        for tensor in mapper.state_dict().values():
            tensor.mul_(2).add_(1)
        assert torch.equal(folded(embeddings(1))[0], answer)
        assert not torch.allclose(FoldedMapper(mapper)(embeddings(1))[0], answer)


def test_the_folded_mapper_does_not_learn_and_answers_in_float32() -> None:
    folded = FoldedMapper(taught_mapper().requires_grad_(True))
    direction, _ = folded(embeddings(1).requires_grad_(True))
    assert not direction.requires_grad
    with in_precision(direction.device, "bf16"):
        rounded, _ = folded(embeddings(1))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, direction, rtol=0.1, atol=0.1)
