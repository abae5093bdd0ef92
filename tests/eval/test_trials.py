"""Trials: methods are compared on the targets that all of them answered."""

from pathlib import Path

import pytest
import torch

from eval.judging import Judges, goal_of, judge_edits
from eval.sets import samples
from eval.trials import by_attribute, by_rank, differences, means, sheet
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)), max_images=8)


def test_a_method_that_answered_fewer_targets_is_compared_on_those(scene: Scene) -> None:
    sources, targets = scene.sources(3), samples(scene.generator, 1.0, 3)
    edits = torch.randn(3, *sources.shape[1:], generator=torch.Generator().manual_seed(0))
    judges = Judges(scene=scene)
    whole = judge_edits(judges, goal_of(judges, targets), sources, edits)
    part = judge_edits(judges, goal_of(judges, targets.part(0, 2)), sources, edits[:2])
    references = whole.before.features
    assert set(means({"a": whole, "b": part}, 3, references, 0)) == {"a"}
    few = means({"a": whole, "b": part}, 2, references, 0)
    assert few["a"]["transfer"] == pytest.approx(few["b"]["transfer"])
    assert few["a"]["fid"] == pytest.approx(few["b"]["fid"]) and few["a"]["images"] == 6
    paired = differences({"a": whole, "b": part}, "a", 0)["b"]["transfer"]
    assert paired["count"] == 2 and paired["mean"] == pytest.approx(0, abs=1e-6)
    assert by_attribute(whole) == {}  # without a reader


def test_ranks_are_of_the_score() -> None:
    scores = torch.tensor([0.2, 0.9, 0.5, 0.1, 0.7])
    assert by_rank(scores) == {"best": 1, "median": 2, "worst": 3}
    assert by_rank(scores[:1]) == {"best": 0, "median": 0, "worst": 0}


def test_a_sheet_shows_directions_and_offsets_of_sources_alike(scene: Scene) -> None:
    targets, sources = samples(scene.generator, 1.0, 2), scene.sources(3, 1)
    nothing = torch.zeros(2, scene.generator.num_ws, scene.generator.w_dim)
    still, moved = (sheet(scene, targets, sources, nothing + x) for x in (0, 1))
    assert still.size == moved.size and still.tobytes() != moved.tobytes()
    each = (nothing + 1)[:, None].repeat(1, 3, 1, 1)
    assert sheet(scene, targets, sources, each).tobytes() == moved.tobytes()
    each[0, 2] = 0
    assert sheet(scene, targets, sources, each).tobytes() != moved.tobytes()
