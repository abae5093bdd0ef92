"""The judges: which scores there are, the change outside, the released evaluation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.codes import SIZE
from eval.judging import Judges, face_judges, goal_of, judge_edits, released_scores
from eval.metrics import released_score
from eval.reader import AvatarReader
from eval.sets import samples
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world


class Brightness:
    """An identity model whose features are colours, and that expects images in [-1, 1]."""

    fingerprint = "bright"

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)) + 0.02, dim=1)


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)), max_images=8)


@pytest.fixture(scope="module")
def bright(scene: Scene) -> Scene:
    """The scene with an identity model."""
    return replace(scene, identity=Brightness())


def images(seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(2, 3, SIZE, SIZE, generator=numbers) - 1


# Scores


def test_all_judges_that_are_there_give_a_score(bright: Scene) -> None:
    judges = Judges(scene=bright, second=bright.embedder)
    sources, targets = bright.sources(3), samples(bright.generator, 1.0, 2)
    edits = torch.zeros(2, *sources.shape[1:])
    scores = judge_edits(judges, goal_of(judges, targets), sources, edits).scores
    assert list(scores) == [
        "transfer", "consistency", "person", "target_person", "second", "additivity", "outside",
        "sharpness",
    ]  # fmt: skip
    torch.testing.assert_close(scores["person"], torch.ones(2))
    torch.testing.assert_close(scores["sharpness"], torch.ones(2))
    torch.testing.assert_close(scores["second"], scores["transfer"])
    assert not scores["additivity"].any() and not scores["outside"].any()
    assert judges.features_of == "the second judge's embedding"
    assert judges.people_of == "the identity model"


def test_scores_are_those_of_the_scene(bright: Scene) -> None:
    judges = Judges(scene=bright)
    sources, targets = bright.sources(3), samples(bright.generator, 1.0, 2)
    edits = torch.randn(2, *sources.shape[1:], generator=torch.Generator().manual_seed(0))
    goal = goal_of(judges, targets)
    scores = judge_edits(judges, goal, sources, edits, 0.5).scores
    expected = bright.score(goal.embeddings, sources, 0.5 * edits, with_identity=True)
    torch.testing.assert_close(scores["transfer"], expected.transfer)
    torch.testing.assert_close(scores["consistency"], expected.consistency)
    assert expected.identity is not None
    torch.testing.assert_close(scores["person"], expected.identity.mean(dim=1))
    people = Brightness().embed_images(bright.images_of(targets.pictures))
    after = [judges.outputs(bright.edit(sources, edit, 0.5)).people for edit in edits]
    leaks = torch.stack([(a @ p).mean() for a, p in zip(after, people, strict=True)])
    torch.testing.assert_close(scores["target_person"], leaks)


def test_judges_of_faces_want_faces(scene: Scene) -> None:
    with pytest.raises(ValueError, match="a world of avatars of 128 px"):
        face_judges(scene)


# Outside


def test_only_what_an_edit_does_outside_is_perceived(scene: Scene) -> None:
    judges = Judges(scene=scene, reader=AvatarReader().requires_grad_(False))
    before, inside = images(0), images(0)
    inside[..., 8:-8] = images(1)[..., 8:-8]
    found = judges.perceived(before, inside)
    assert found is not None and torch.equal(found, torch.zeros(2))
    outside = before.clone()
    outside[1, ..., :8] = -outside[1, ..., :8]
    found = judges.perceived(before, outside)
    assert found is not None and found[0] == 0 and found[1] > 1e-4


def test_without_a_reader_nothing_is_perceived(scene: Scene) -> None:
    judges, sources = Judges(scene=scene), scene.sources(2)
    goal = goal_of(judges, samples(scene.generator, 1.0, 1))
    judged = judge_edits(judges, goal, sources, torch.zeros(1, *sources.shape[1:]))
    assert "outside" in judged.scores and "perceived" not in judged.scores


# The released evaluation


def test_the_released_fault_is_in_the_range_of_results_alone(bright: Scene) -> None:
    judges = Judges(scene=bright)
    sources, targets = bright.sources(3), samples(bright.generator, 1.0, 2)
    unedited = bright.render(sources)
    references = judges.outputs(unedited).features
    nothing = torch.zeros(2, *sources.shape[1:])
    found = released_scores(judges, sources, nothing, targets, references)
    assert found["identity"]["mean"] == pytest.approx(100, abs=1e-3)
    assert found["identity"]["deviation"] == pytest.approx(0, abs=1e-3)
    shown, model = unedited.clamp(-1, 1), Brightness()
    faulty = model.embed_images(shown / 2 + 0.5)
    expected = released_score(faulty[None], model.embed_images(shown)[None])
    assert found["identity_released"]["mean"] == pytest.approx(expected["mean"], abs=1e-3)
    assert expected["mean"] < 99
    assert found["fid"]["mean"] == pytest.approx(0, abs=1e-4)


def test_the_released_evaluation_edits_at_strength_1_2(scene: Scene) -> None:
    judges = Judges(scene=scene)
    sources, targets = scene.sources(3), samples(scene.generator, 1.0, 2)
    references = judges.outputs(scene.render(sources)).features
    edits = torch.randn(2, *sources.shape[1:], generator=torch.Generator().manual_seed(0))
    found = released_scores(judges, sources, edits, targets, references)
    assert set(found) == {"semantic", "fid"}  # without identity features
    goal = scene.embedder.embed_pictures(list(targets.pictures))
    edited = [scene.render(sources + 1.2 * edit) for edit in edits]
    embeddings = torch.stack([judges.outputs(images).embeddings for images in edited])
    assert found["semantic"] == released_score(embeddings, goal[:, None])
