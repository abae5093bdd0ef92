"""The losses against stored numbers of the released code, and what they promise beyond it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from targetclip.losses import consistency_loss, identity_loss, transfer_loss
from targetclip.recipes import Differences

FIXTURE = Path(__file__).parents[1] / "fixtures" / "losses.npz"
DIFFERENCES: tuple[Differences, ...] = ("unit", "raw")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(source: Tensor, edited: Tensor, differences: Differences) -> float:
    """The consistency of one target by the double sum of its definition."""
    if differences == "unit":
        source, edited = F.normalize(source, dim=-1), F.normalize(edited, dim=-1)
    d = source - edited
    count = len(d)
    total = sum(
        1 - float(F.cosine_similarity(d[i], d[j], dim=0))
        for i in range(count)
        for j in range(count)
        if i != j
    )
    return total / (count * (count - 1))


def test_losses_equal_the_released_code() -> None:
    stored = np.load(FIXTURE)
    source, edited = (torch.from_numpy(stored[name])[None] for name in ("source", "edited"))
    found = {
        "transfer": transfer_loss(edited, torch.from_numpy(stored["target"])),
        "consistency_unit": consistency_loss(source, edited, "unit"),
        "consistency_raw": consistency_loss(source, edited, "raw"),
    }
    for name, value in found.items():
        assert value.shape == (1,)
        assert abs(float(value) - float(stored[name])) < 1e-6, name


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_consistency_is_the_mean_over_ordered_pairs_also_of_small_edits(
    differences: Differences,
) -> None:
    source = random(1, 5, 16)
    for size in (3.0, 0.05):
        edited = source + size * random(1, 5, 16, seed=1)
        expected = written_out(source[0], edited[0], differences)
        assert float(consistency_loss(source, edited, differences)) == pytest.approx(
            expected, abs=2e-5
        )


def test_a_batch_of_targets_equals_each_alone() -> None:
    source, edited, target = random(3, 4, 16), random(3, 4, 16, seed=1), random(3, 16, seed=2)
    for loss in (
        lambda rows: transfer_loss(edited[rows], target[rows]),
        lambda rows: consistency_loss(source[rows], edited[rows], "unit"),
        lambda rows: consistency_loss(source[rows], edited[rows], "raw"),
    ):
        alone = torch.cat([loss(slice(row, row + 1)) for row in range(3)])
        torch.testing.assert_close(loss(slice(None)), alone, rtol=0, atol=1e-6)
        assert alone.std() > 1e-3  # or the comparison would say nothing


def test_transfer_is_zero_at_the_target_and_two_opposite_of_it_at_any_length() -> None:
    target = random(2, 16)
    there = 7.0 * target[:, None].expand(2, 3, 16)
    torch.testing.assert_close(transfer_loss(there, target), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(transfer_loss(-there, target), torch.full((2,), 2.0))


def test_the_same_raw_edit_of_every_source_is_fully_consistent() -> None:
    source = random(2, 4, 16)
    edited = source + random(2, 1, 16, seed=1)
    assert consistency_loss(source, edited, "raw").abs().max() < 1e-6
    assert consistency_loss(source, edited, "unit").min() > 1e-3  # lengths differ: not the same


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_consistency_does_not_depend_on_the_scale_of_embeddings(differences: Differences) -> None:
    source, edited = random(1, 4, 16), random(1, 4, 16, seed=1)
    small = consistency_loss(1e-4 * source, 1e-4 * edited, differences)
    torch.testing.assert_close(small, consistency_loss(source, edited, differences))


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_an_edit_that_does_nothing_has_value_one_and_no_gradient(differences: Differences) -> None:
    source = random(2, 4, 16)
    edited = source.clone().requires_grad_()
    loss = consistency_loss(source, edited, differences)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.ones(2))
    assert edited.grad is not None and (edited.grad == 0).all()


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_one_unmoved_source_among_moved_ones_keeps_the_gradient_small(
    differences: Differences,
) -> None:
    source = F.normalize(random(1, 4, 16), dim=-1)
    moved = F.normalize(random(1, 4, 16, seed=1), dim=-1)
    edited = torch.cat([source[:, :1], moved[:, 1:]], dim=1).requires_grad_()
    loss = consistency_loss(source, edited, differences)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert edited.grad is not None and edited.grad.abs().max() < 2000


def test_rounding_noise_instead_of_an_edit_passes_hardly_any_gradient() -> None:
    source = F.normalize(random(1, 4, 64), dim=-1)
    edited = (source + 1e-8 * random(1, 4, 64, seed=1)).requires_grad_()
    consistency_loss(source, edited, "unit").sum().backward()
    assert edited.grad is not None and edited.grad.norm() < 1


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_one_source_alone_has_no_pairs_and_no_loss(differences: Differences) -> None:
    edited = random(2, 1, 16, seed=1).requires_grad_()
    loss = consistency_loss(random(2, 1, 16), edited, differences)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.zeros(2), rtol=0, atol=1e-6)
    assert edited.grad is not None and edited.grad.abs().max() < 1e-6


def test_half_precision_embeddings_are_compared_in_float32() -> None:
    source, edited = random(1, 4, 64).bfloat16(), random(1, 4, 64, seed=1).bfloat16()
    loss = consistency_loss(source, edited, "unit")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, consistency_loss(source.float(), edited.float(), "unit"))


def test_gradients_equal_finite_differences() -> None:
    source, target = random(2, 3, 8).double(), random(2, 8, seed=2).double()
    edited = random(2, 3, 8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda e: transfer_loss(e, target), edited)
    for differences in DIFFERENCES:
        assert torch.autograd.gradcheck(
            lambda e, kind=differences: consistency_loss(source, e, kind), edited
        )


def test_unknown_differences_are_refused() -> None:
    from targetclip.losses import unit_differences

    plain = getattr(unit_differences, "__wrapped__", unit_differences)  # past the test-time types
    with pytest.raises(ValueError, match="'unit' or 'raw', found 'cosine'"):
        plain(random(1, 2, 4), random(1, 2, 4), "cosine")


def test_the_identity_loss_is_zero_of_the_same_people_and_two_of_their_opposites() -> None:
    people = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    lengths = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    torch.testing.assert_close(identity_loss(people, people * lengths), torch.zeros(2))
    torch.testing.assert_close(identity_loss(people, -people), torch.full((2,), 2.0))
    half = torch.cat([people[:, :1], -people[:, 1:2]], dim=1)
    torch.testing.assert_close(identity_loss(people[:, :2], half), torch.ones(2))
    assert identity_loss(people.half(), people.half()).dtype == torch.float32
