from pathlib import Path

import pytest
import torch
from torch import Tensor

from targetclip.editing import render
from targetclip.encoders.inversion import (
    InversionConfig,
    OptimizingInverter,
    invert_by_optimization,
    pixel_loss,
)
from targetclip.encoders.inverter import LatentInverter
from targetclip.scene import random_latents
from targetclip.world import Parts, load_parts, load_world

SHORT = InversionConfig(steps=12, learning_rate=0.2)


@pytest.fixture(scope="module")
def parts(tiny_world: Path) -> Parts:
    return load_parts(load_world(str(tiny_world)), torch.device("cpu"))


@pytest.fixture(scope="module")
def images(parts: Parts) -> Tensor:
    return render(parts.generator, random_latents(parts.generator, [1, 2, 3], 1.0))


def mean_start(parts: Parts, count: int) -> Tensor:
    return parts.generator.mean_w.repeat(count, parts.generator.num_ws, 1)


def test_latents_found_show_the_picture_better_than_the_start(parts: Parts, images: Tensor) -> None:
    start = mean_start(parts, 3)
    steps: list[float] = []
    found = invert_by_optimization(
        parts.generator, parts.embedder, images, start, SHORT, steps.append
    )
    before, after = (pixel_loss(render(parts.generator, ws), images) for ws in (start, found))
    assert (after < 0.7 * before).all()
    assert len(steps) == SHORT.steps and steps[-1] < steps[0]


def test_a_batch_of_pictures_is_searched_as_each_alone(parts: Parts, images: Tensor) -> None:
    together = OptimizingInverter(parts.generator, parts.embedder, None, SHORT, at_once=3)(images)
    alone = OptimizingInverter(parts.generator, parts.embedder, None, SHORT, at_once=1)(images)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_the_search_starts_where_the_first_inverter_says(parts: Parts, images: Tensor) -> None:
    none = InversionConfig(steps=0)
    inverter = OptimizingInverter(parts.generator, parts.embedder, parts.inverter, none)
    assert isinstance(inverter, LatentInverter) and parts.inverter is not None
    with torch.no_grad():  # as its callers have it
        assert torch.equal(inverter(images), parts.inverter(images))


def test_steps_that_lead_away_are_not_kept(parts: Parts, images: Tensor) -> None:
    wild = InversionConfig(steps=3, learning_rate=1e4)
    start = mean_start(parts, 3)
    found = invert_by_optimization(parts.generator, parts.embedder, images, start, wild)
    assert torch.equal(found, start)


def test_a_prior_keeps_latents_near_the_start(parts: Parts, images: Tensor) -> None:
    start = mean_start(parts, 3)
    distances = [
        (
            invert_by_optimization(
                parts.generator,
                parts.embedder,
                images,
                start,
                InversionConfig(steps=12, learning_rate=0.2, prior_weight=weight),
            )
            - start
        ).norm()
        for weight in (0.0, 100.0)
    ]
    assert distances[1] < 0.2 * distances[0]


def test_a_loss_that_is_not_finite_is_said(parts: Parts, images: Tensor) -> None:
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        invert_by_optimization(
            parts.generator, parts.embedder, images * torch.nan, mean_start(parts, 3), SHORT
        )


def test_small_pictures_weigh_as_much_as_large_ones() -> None:
    # A chequerboard of single pixels is grey at every smaller size.
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    images = board.expand(1, 3, 32, 32)
    assert float(pixel_loss(images, torch.zeros_like(images))) == pytest.approx(0.5)
