"""The folded mapper answers as the mapper does."""

import dataclasses

import pytest
import torch
from torch import Tensor

from predictor.folded import FoldedMapper
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig
from targetclip.precision import in_bfloat16

CONFIG = MapperConfig(12, 6, 8, "a" * 64, "e" * 64, width=16, depth=2)


def taught(config: MapperConfig = CONFIG) -> Mapper:
    """As after training: no weight or buffer is what it was at the start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Mapper(config).requires_grad_(False)
        for tensor in network.state_dict().values():
            tensor.add_(0.3 * torch.randn(tensor.shape))
    return network


def embeddings(count: int = 5) -> Tensor:
    return 5 * torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rank", [None, 1, 3, 48, 60])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_it_answers_as_the_mapper_whatever_the_sizes(rank: int | None, depth: int) -> None:
    mapper = taught(dataclasses.replace(CONFIG, rank=rank, depth=depth))
    whole, folded = mapper(embeddings()), FoldedMapper(mapper)
    for i, embedding in enumerate(embeddings().split(1)):
        direction, expected = folded(embedding)
        torch.testing.assert_close(direction, whole.directions[i], rtol=1e-4, atol=1e-5)
        assert expected == pytest.approx(float(whole.expected[i]), abs=1e-5)
    assert whole.directions.std() > 0.1 and whole.expected.std() > 0.01


def test_the_length_of_an_embedding_says_nothing() -> None:
    folded = FoldedMapper(taught())
    for embedding in embeddings().split(1):
        direction, expected = folded(embedding)
        for same in (1e3 * embedding, embedding.double(), embedding / embedding.norm()):
            found, score = folded(same)
            torch.testing.assert_close(found, direction, rtol=1e-4, atol=1e-5)
            assert score == pytest.approx(expected, abs=1e-5)


def test_an_embedding_of_zeros_gives_finite_numbers() -> None:
    direction, expected = FoldedMapper(taught())(torch.zeros(1, 12))
    assert direction.isfinite().all() and abs(expected) <= 1


def test_an_embedding_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected embeddings of shape \[batch, 12\]"):
        FoldedMapper(taught())(torch.zeros(1, 13))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_an_embedding_without_a_length_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="expected an embedding of finite length"):
        FoldedMapper(taught())(torch.full((1, 12), value))


def test_what_it_is_made_of_stays_as_it_was() -> None:
    for rank in (None, 3):
        mapper = taught(dataclasses.replace(CONFIG, rank=rank))
        before = {name: tensor.clone() for name, tensor in mapper.state_dict().items()}
        folded = FoldedMapper(mapper)
        answer = folded(embeddings(1))[0]
        assert all(torch.equal(before[k], v) for k, v in mapper.state_dict().items())
        for tensor in mapper.state_dict().values():
            tensor.mul_(2).add_(1)
        assert torch.equal(folded(embeddings(1))[0], answer)
        assert not torch.allclose(FoldedMapper(mapper)(embeddings(1))[0], answer)


def test_nothing_of_it_learns_and_its_answers_are_in_float32() -> None:
    folded = FoldedMapper(taught().requires_grad_(True))
    direction, _ = folded(embeddings(1).requires_grad_(True))
    assert not direction.requires_grad
    with in_bfloat16(direction.device):
        rounded, _ = folded(embeddings(1))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, direction, rtol=0.1, atol=0.1)
