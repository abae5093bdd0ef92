"""Fitting the score that a mapper expects: the regression, and the head it makes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.targets import BadTarget, open_targets, split_of
from eval.expectation import (
    PENALTIES,
    SOURCES,
    fit_expectation,
    left_out_error,
    ridge,
    scores_reached,
    training_targets,
)
from predictor.mapper import Mapper, load_mapper
from predictor.transfer import EssenceTransfer
from targetclip.scene import Scene
from targetclip.seeds import seed_of
from targetclip.world import load_scene, load_world

SPECS = ("avataaars:40@29", "generated:40@29")


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)))


@pytest.fixture
def mapper(tiny_mapper: Path) -> Mapper:
    return load_mapper(tiny_mapper)[0]


def test_a_linear_truth_is_found() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 7, generator=numbers) * torch.tensor([1, 2, 3, 1e-3, 5, 6, 100.0]) + 4
    truth = torch.tensor([0.3, -0.2, 0.1, 50.0, 0.0, 0.01, 0.002])
    weights, offset = ridge(inputs, inputs @ truth - 0.7)
    torch.testing.assert_close(inputs @ weights + offset, inputs @ truth - 0.7, rtol=0, atol=5e-3)


def test_without_information_in_the_inputs_the_mean_is_predicted() -> None:
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


def test_the_penalty_of_the_least_error_is_taken() -> None:
    numbers = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 20, generator=numbers)
    outputs = inputs[:, 0] + 2 * torch.randn(40, generator=numbers)
    unit = (inputs - inputs.mean(dim=0)) / inputs.std(dim=0)
    left, sizes, _ = torch.linalg.svd(unit.double(), full_matrices=False)
    errors = {p: left_out_error(left, sizes, outputs.double(), p) for p in PENALTIES}
    best = min(PENALTIES, key=lambda penalty: errors[penalty])
    assert best not in (PENALTIES[0], PENALTIES[-1])
    weights = ridge(inputs, outputs)[0]
    assert torch.equal(weights, ridge(inputs, outputs, (best,))[0])
    assert ridge(inputs, outputs, (100.0,))[0].norm() < 0.2 * weights.norm()


def test_only_the_training_split_is_taken(scene: Scene) -> None:
    found = list(training_targets(SPECS, 5, scene))
    assert len(found) == 10 and {split_of(target.id) for target in found} == {"train"}
    every = [
        target
        for target in open_targets(SPECS[0], scene.generator, scene.truncation)
        if not isinstance(target, BadTarget) and split_of(target.id) == "train"
    ]
    assert [target.id for target in found[:5]] == [target.id for target in every[:5]]


def test_scores_do_not_depend_on_what_is_rendered_at_once(scene: Scene, mapper: Mapper) -> None:
    targets = list(training_targets(SPECS, 3, scene))
    together = scores_reached(scene, mapper, targets, 0)
    alone = scores_reached(replace(scene, max_images=5), mapper, targets, 0)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[1], scores_reached(scene, mapper, targets, 1)[1])


def test_the_scores_reached_are_those_of_corrected_edits(
    scene: Scene, mapper: Mapper, reading_mapper: Path
) -> None:
    targets = list(training_targets(SPECS, 2, scene))
    reader = load_mapper(reading_mapper)[0]
    corrected = scores_reached(scene, reader, targets, 0)[1]
    alone = scores_reached(scene, mapper, targets, 0)[1]  # the same directions
    assert not torch.allclose(corrected, alone, atol=1e-3)
    essence = EssenceTransfer(scene, reader)
    for target, reached in zip(targets, corrected, strict=True):
        ws = scene.latents([seed_of("expectation", 0, target.id, i) for i in range(SOURCES)])
        offsets = essence.predict(target.picture).offsets(ws)
        scores = scene.score(essence.embed_target(target.picture)[None], ws, offsets[None])
        assert float(reached) == pytest.approx(float(scores.transfer), abs=1e-4)


def test_the_head_expects_what_other_targets_reach_and_directions_stay(
    scene: Scene, mapper: Mapper
) -> None:
    others = training_targets(("avataaars:40@31", "generated:40@31"), 30, scene)
    inputs, reached, _ = scores_reached(scene, mapper, others, 0)
    before = mapper(inputs)
    specs = ("avataaars:100@29", "generated:100@29")
    assert len(fit_expectation(scene, mapper, specs, 80, 0)[0]) == 160
    after = mapper(inputs)
    assert torch.equal(after.directions, before.directions)
    error = float((after.expected - reached).abs().mean())
    assert error < 0.8 * float((reached.mean() - reached).abs().mean())
    assert error < float((before.expected - reached).abs().mean())


def test_at_an_origin_the_score_is_fitted_whatever_the_default_place(
    scene: Scene, tradeoff_mapper: Path
) -> None:
    read, record = load_mapper(tradeoff_mapper)
    assert read.config.tradeoff is not None
    curve, fitted = replace(read.config.tradeoff, origin=0.34), list[dict[str, torch.Tensor]]()
    for keep in (0.34, 0.8):
        mapper = Mapper(replace(read.config, tradeoff=curve)).requires_grad_(False)
        mapper.load_state_dict(read.state_dict())
        mapper.record = replace(record, calibration={"keep_identity": keep})
        places = fit_expectation(scene, mapper, SPECS, 8, 0)[1]
        assert places is not None and places.unique().tolist() == pytest.approx([0.34])
        fitted.append(mapper.state_dict())
    assert all(torch.equal(fitted[0][name], value) for name, value in fitted[1].items())
    for name in ("score.weight", "keep_score.weight"):
        assert not torch.equal(fitted[0][name], read.state_dict()[name])


def test_without_a_count_or_targets_nothing_changes(scene: Scene, mapper: Mapper) -> None:
    before = {name: tensor.clone() for name, tensor in mapper.state_dict().items()}
    assert not len(fit_expectation(scene, mapper, SPECS, 0, 0)[0])
    with pytest.raises(ValueError, match="--fitted: expected 2 or more"):
        fit_expectation(scene, mapper, ("avataaars:1@29",), 10, 0)
    assert all(torch.equal(before[k], v) for k, v in mapper.state_dict().items())


def test_too_little_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more rows"):
        ridge(torch.ones(1, 3), torch.ones(1))
