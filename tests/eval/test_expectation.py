"""Fitting what a mapper expects: the regression, and the head it makes."""

from pathlib import Path

import pytest
import torch

from data.targets import BadTarget, open_targets, split_of
from eval import expectation
from eval.expectation import (
    fit_expectation,
    left_out_error,
    ridge,
    scores_reached,
    training_targets,
)
from predictor.load import load_essence
from predictor.transfer import EssenceTransfer
from targetclip.world import load_world

SPECS = ("drawn:40@29", "generated:40@29")


@pytest.fixture
def essence(tiny_world: Path, tiny_mapper: Path) -> EssenceTransfer:
    return load_essence(load_world(str(tiny_world)), torch.device("cpu"), tiny_mapper)


def test_a_linear_truth_is_found() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 7, generator=numbers) * torch.tensor([1, 2, 3, 1e-3, 5, 6, 100.0]) + 4
    truth = torch.tensor([0.3, -0.2, 0.1, 50.0, 0.0, 0.01, 0.002])
    weights, offset = ridge(inputs, inputs @ truth - 0.7)
    torch.testing.assert_close(inputs @ weights + offset, inputs @ truth - 0.7, rtol=0, atol=5e-3)


def test_where_inputs_say_nothing_the_mean_is_told() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 25, generator=numbers)
    outputs = 0.5 + 0.1 * torch.randn(30, generator=numbers)
    weights, offset = ridge(inputs, outputs)
    others = torch.randn(200, 25, generator=numbers) @ weights + offset
    assert float((others - outputs.mean()).abs().max()) < 0.1  # least squares alone: beyond 0.3
    assert ridge(torch.ones(5, 3), outputs[:5])[1] == pytest.approx(float(outputs[:5].mean()))


@pytest.mark.parametrize("penalty", [1e-4, 0.03, 10.0])
def test_the_error_in_closed_form_is_that_of_leaving_each_out(penalty: float) -> None:
    numbers = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 20, generator=numbers).double()
    outputs = inputs[:, 0] + 2 * torch.randn(40, generator=numbers).double()
    left, sizes, _ = torch.linalg.svd(inputs - inputs.mean(dim=0), full_matrices=False)
    missed = []
    for i in range(40):
        kept = torch.arange(40) != i
        x, y = inputs[kept] - inputs[kept].mean(dim=0), outputs[kept] - outputs[kept].mean()
        weights = torch.linalg.solve(x.T @ x + 40 * penalty * torch.eye(20).double(), x.T @ y)
        told = outputs[kept].mean() + (inputs[i] - inputs[kept].mean(dim=0)) @ weights
        missed.append(float(told - outputs[i]) ** 2)
    found = left_out_error(left, sizes, outputs, penalty)
    assert found == pytest.approx(sum(missed) / 40, rel=1e-6)


def test_the_penalty_of_the_least_error_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 20, generator=numbers)
    outputs = inputs[:, 0] + 2 * torch.randn(40, generator=numbers)
    errors = {1e-4: 3.0, 1e-1: 1.0, 100.0: 2.0}
    monkeypatch.setattr(expectation, "left_out_error", lambda *known: errors[known[3]])
    monkeypatch.setattr(expectation, "PENALTIES", tuple(errors))
    found = ridge(inputs, outputs)[0]
    monkeypatch.setattr(expectation, "PENALTIES", (1e-1,))
    assert torch.equal(found, ridge(inputs, outputs)[0])
    monkeypatch.setattr(expectation, "PENALTIES", (100.0,))
    assert ridge(inputs, outputs)[0].norm() < 0.1 * found.norm()


def test_only_the_training_split_is_taken(essence: EssenceTransfer) -> None:
    found = list(training_targets(SPECS, 5, essence))
    assert len(found) == 10 and {split_of(each.id) for each in found} == {"train"}
    every = [
        each
        for each in open_targets(SPECS[0], essence.generator, essence.truncation)
        if not isinstance(each, BadTarget) and split_of(each.id) == "train"
    ]
    assert [each.id for each in found[:5]] == [each.id for each in every[:5]]


def test_scores_do_not_depend_on_what_is_rendered_at_once(essence: EssenceTransfer) -> None:
    mapper, targets = essence.asked_mapper(), list(training_targets(SPECS, 3, essence))
    together = scores_reached(essence, mapper, targets, 0)
    essence.max_images = 5
    alone = scores_reached(essence, mapper, targets, 0)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1], scores_reached(essence, mapper, targets, 1)[1])


def test_the_head_expects_what_other_targets_reach_and_directions_stay(
    essence: EssenceTransfer,
) -> None:
    mapper = essence.asked_mapper()
    others = training_targets(("drawn:60@31", "generated:60@31"), 50, essence)
    wanted, reached = scores_reached(essence, mapper, others, 0)
    before = mapper(wanted)
    assert fit_expectation(essence, mapper, ("drawn:200@29", "generated:200@29"), 150, 0) == 300
    after = mapper(wanted)
    assert torch.equal(after.directions, before.directions)
    error = float((after.expected - reached).abs().mean())
    assert error < 0.8 * float((reached.mean() - reached).abs().mean())
    assert error < float((before.expected - reached).abs().mean())


def test_without_a_count_or_targets_nothing_changes(essence: EssenceTransfer) -> None:
    mapper = essence.asked_mapper()
    before = {name: tensor.clone() for name, tensor in mapper.state_dict().items()}
    assert fit_expectation(essence, mapper, SPECS, 0, 0) == 0
    with pytest.raises(ValueError, match="--fitted: expected 2 or more"):
        fit_expectation(essence, mapper, ("drawn:1@29",), 10, 0)
    assert all(torch.equal(before[k], v) for k, v in mapper.state_dict().items())


def test_too_little_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more rows"):
        ridge(torch.ones(1, 3), torch.ones(1))
