"""The teacher: many searches in batches are those of each target."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.teacher import search_in_batches
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def short(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPES["consistent"], **{"sources": 2, "steps": 3, **changes})


def test_batches_of_targets_find_what_each_target_finds_alone(scene: Scene) -> None:
    targets, start = random(3, 32), torch.zeros(3, 6, 8)
    together, failures = search_in_batches(
        dataclasses.replace(scene, max_images=4), targets, short(), start, [7, 8, 9], label="test"
    )
    assert failures == [None] * 3
    for i, seed in enumerate([7, 8, 9]):
        alone = scene.search(targets[i : i + 1], short(), start[:1], [seed])
        torch.testing.assert_close(together[i], alone.directions[0], rtol=1e-3, atol=1e-3)
    assert together.abs().amax(dim=(1, 2)).min() > 1e-3
