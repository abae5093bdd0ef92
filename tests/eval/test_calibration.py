"""What follows from scores: threshold, refinement, reliability."""

import pytest
import torch

from eval.calibration import (
    choose_refinement,
    reliability,
    steps_to_teacher,
    threshold_of,
)

ALL = [torch.ones(4, dtype=torch.bool)]


def test_a_mapper_as_good_as_its_teacher_passes_nearly_everywhere() -> None:
    probe = torch.tensor([0.8, 0.85, 0.9, 0.95])
    threshold = threshold_of(probe, probe, probe - 0.1, ALL)
    assert threshold == pytest.approx(float(torch.quantile(probe, 0.01)))
    assert (probe >= threshold).sum() == 3  # only the very lowest is taken for unlike the others


def test_answers_that_fall_short_of_the_teacher_do_not_pass() -> None:
    mapper = torch.tensor([0.3, 0.5, 0.9, 0.9])
    threshold = threshold_of(mapper, mapper, torch.full((4,), 0.9), ALL)
    assert 0.5 < threshold <= 0.9


def test_every_set_must_hold_on_its_own() -> None:
    mapper = torch.tensor([0.95, 0.95, 0.6, 0.65])
    teacher = torch.tensor([0.7, 0.7, 0.9, 0.9])
    halves = [torch.tensor([True, True, False, False]), torch.tensor([False, False, True, True])]
    together = threshold_of(mapper, mapper, teacher, ALL)
    apart = threshold_of(mapper, mapper, teacher, halves)
    assert together < 0.65 < apart


def test_where_no_answer_of_the_mapper_will_do_none_passes() -> None:
    # High on the probe and low on other sources: the probe says nothing here.
    probe, mapper = torch.full((4,), 0.99), torch.full((4,), 0.1)
    assert threshold_of(probe, mapper, torch.full((4,), 0.9), ALL) == 1.0


def test_the_shortest_refinement_that_is_nearly_the_best_is_chosen() -> None:
    losses = {
        0.01: {0: 0.5, 5: 0.3, 10: 0.2005, 30: 0.2},
        0.03: {0: 0.5, 5: 0.4, 10: 0.3, 30: 0.25},
    }
    assert choose_refinement(losses) == (0.01, 10)
    # No refinement at all is none, however good the predictions are.
    assert choose_refinement({0.01: {0: 0.1, 5: 0.3, 10: 0.3015}}) == (0.01, 5)


def test_steps_to_the_teachers_loss_count_predictions_as_none() -> None:
    losses = {0: 0.3, 5: 0.25, 10: 0.2}
    assert [steps_to_teacher(losses, loss) for loss in (0.3, 0.26, 0.2, 0.1)] == [0, 5, 10, None]


def test_reliability_tells_error_from_bias() -> None:
    reached = torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = reliability(reached + 0.1, reached)
    assert found["expected_error"] == pytest.approx(0.1, abs=1e-6)
    assert found["expected_bias"] == pytest.approx(0.1, abs=1e-6)
    assert found["expected_correlation"] == pytest.approx(1.0, abs=1e-5)
    assert reliability(-reached, reached)["expected_correlation"] == pytest.approx(-1, abs=1e-5)
