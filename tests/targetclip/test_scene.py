"""Scene: sources, renderings in parts, searches and scores against their definitions."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import Scene, random_latents
from targetclip.scores import Scores, score_features
from targetclip.seeds import BANK
from targetclip.world import load_scene, load_world


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)))


class MeanColour:
    """An identity model: the mean colour of an image, as a unit vector."""

    fingerprint = "mean colour"

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)) + 2, dim=1)


class Counting:
    """Passes attributes on, and records how many rows each call of some of them gets."""

    def __init__(self, real: Any, names: tuple[str, ...], sizes: list[int]) -> None:
        self.real, self.names, self.sizes = real, names, sizes

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name not in self.names:
            return value

        def counted(rows: Tensor, *others: Any) -> Any:
            self.sizes.append(len(rows))
            return value(rows, *others)

        return counted


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int) -> Tensor:
    """Blotches, which the tiny encoder tells apart better than noise."""
    return F.interpolate(random(count, 3, 4, 4, seed=seed).clamp(-1, 1), (16, 16))


def image_scores(scene: Scene, target: Tensor, before: Tensor, after: Tensor) -> Scores:
    return score_features(target, scene.image_features(before), scene.image_features(after))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b.expand_as(a), dim=-1)


def short(**changes: Any) -> Recipe:
    return dataclasses.replace(RECIPES["consistent"], **{"sources": 2, "steps": 3, **changes})


# Sources


def test_a_smaller_bank_is_the_start_of_a_larger_one(scene: Scene) -> None:
    # A mapping of other rows beside it rounds differently, no more.
    few, bank = scene.bank(3), scene.bank()
    assert torch.allclose(few, bank[:3], atol=1e-5)
    assert len(bank) == BANK


def test_a_recipe_draws_from_the_whole_bank_or_from_its_first_sources(scene: Scene) -> None:
    assert len(scene.bank_of(RECIPES["consistent"])) == BANK
    first = scene.bank_of(RECIPES["release"])
    assert torch.allclose(first, scene.bank()[: RECIPES["release"].sources], atol=1e-5)


def test_generated_sources_are_none_of_the_bank(scene: Scene) -> None:
    bank, sources = scene.bank(), scene.sources(16, seed=1)
    assert (bank[:, None] - sources[None]).abs().amax(dim=(2, 3)).min() > 1e-3
    assert torch.allclose(sources[:5], scene.sources(5, seed=1), atol=1e-5)
    assert not torch.allclose(sources, scene.sources(16, seed=2), atol=1e-3)


def test_a_latent_depends_on_its_own_seed_alone(scene: Scene) -> None:
    together = random_latents(scene.generator, [5, 6, 7])
    assert torch.allclose(together[1], random_latents(scene.generator, [6])[0], atol=1e-5)


def test_truncation_brings_sources_nearer_to_the_mean(scene: Scene) -> None:
    near = dataclasses.replace(scene, truncation=0.0).sources(2)
    torch.testing.assert_close(near, scene.generator.mean_w.expand_as(near))


# Edits


def test_every_layer_of_every_source_moves_by_strength_times_its_own_vector(scene: Scene) -> None:
    ws, direction = random(3, 6, 8), random(6, 8, seed=1)
    moved = torch.stack([ws[i] - 2.5 * direction for i in range(3)])
    torch.testing.assert_close(scene.edit(ws, direction, -2.5), scene.render(moved))


def test_each_source_can_have_an_offset_of_its_own(scene: Scene) -> None:
    ws, offsets = random(3, 6, 8), random(3, 6, 8, seed=1)
    alone = torch.cat([scene.edit(ws[i : i + 1], offsets[i]) for i in range(3)])
    torch.testing.assert_close(scene.edit(ws, offsets), alone, rtol=1e-4, atol=1e-4)


def test_strength_zero_changes_nothing(scene: Scene) -> None:
    ws = random(2, 6, 8)
    assert torch.equal(scene.edit(ws, random(6, 8, seed=1), 0.0), scene.render(ws))


@pytest.mark.parametrize("shape", [(5, 8), (6, 9), (1, 8)])
def test_a_direction_of_another_shape_is_refused(scene: Scene, shape: tuple[int, int]) -> None:
    unchecked = inspect.unwrap(Scene.edit)  # the tests' own check of shapes would come first
    with pytest.raises(ValueError, match="another generator"):
        unchecked(scene, random(2, 6, 8), random(*shape))


# Images at once


@pytest.mark.parametrize("max_images", [1, 2, 3, 100, None])
def test_pictures_do_not_depend_on_how_many_are_rendered_at_once(
    scene: Scene, max_images: int | None
) -> None:
    ws = random(5, 6, 8)
    together = scene.generator.synthesis(ws)
    images = dataclasses.replace(scene, max_images=max_images).render(ws)
    torch.testing.assert_close(images, together, rtol=1e-4, atol=1e-4)


def test_no_more_pictures_are_rendered_or_embedded_at_once_than_asked(scene: Scene) -> None:
    sizes: list[int] = []
    counted = Scene(
        generator=Counting(scene.generator, ("synthesis",), sizes),
        embedder=Counting(scene.embedder, ("embed_images",), sizes),
        max_images=2,
    )
    images = counted.render(random(5, 6, 8))
    image_scores(counted, random(32), images, images)
    counted.features(random(5, 6, 8))
    counted.search(random(2, 32), short(), torch.zeros(2, 6, 8), [0, 1])
    assert sizes[:9] == 3 * [2, 2, 1]
    assert max(sizes) == 2


# Searches


def test_a_search_edits_the_sources_that_it_is_given(scene: Scene) -> None:
    one, other = (
        scene.search(random(1, 32), short(), torch.zeros(1, 6, 8), [0], bank=scene.sources(4, seed))
        for seed in (1, 2)
    )
    assert not torch.allclose(one.directions, other.directions, atol=1e-3)


# Scores


def test_scores_of_images_are_the_cosines_they_say(scene: Scene) -> None:
    embed = scene.embedder.embed_images
    sources, edited = pictures(4, seed=0), pictures(4, seed=1)
    target = embed(pictures(1, seed=2))[0]
    scores = image_scores(scene, 3 * target, sources, edited)
    before, after = embed(sources), embed(edited)
    close = torch.testing.assert_close
    close(scores.target_before, cosines(before, target))
    close(scores.target_after, cosines(after, target))
    close(scores.source_after, cosines(before, after))
    assert float(scores.transfer) == pytest.approx(float(cosines(after, target).mean()))
    shifts = F.normalize(F.normalize(before) - F.normalize(after))
    products = (shifts @ shifts.T)[~torch.eye(4, dtype=torch.bool)]
    assert float(scores.consistency) == pytest.approx(float(products.mean()), abs=1e-5)
    assert scores.identity is None
    # The tests above compare; these see that there was something to compare.
    assert scores.target_before.std() > 1e-3 and scores.source_after.max() < 0.9999


def test_scores_of_latents_are_those_of_their_images(scene: Scene) -> None:
    seeing = dataclasses.replace(scene, identity=MeanColour())
    sources, directions, targets = scene.sources(3), random(2, 6, 8), random(2, 32, seed=1)
    scores = seeing.score(targets, sources, directions, with_identity=True)
    offsets = directions[:, None].expand(-1, 3, -1, -1)
    for same in (seeing.score(targets, sources, offsets, with_identity=True),):
        torch.testing.assert_close(scores.target_after, same.target_after)
    for i in range(2):
        images = scene.render(sources), scene.edit(sources, directions[i])
        alone = image_scores(seeing, targets[i], *images)
        for name in ("target_before", "target_after", "source_after", "consistency", "identity"):
            torch.testing.assert_close(
                getattr(scores, name)[i], getattr(alone, name), rtol=1e-3, atol=1e-3
            )
    assert scene.score(targets, sources, directions, with_identity=True).identity is None


def test_an_edit_that_does_nothing_leaves_the_similarities_as_they_were(scene: Scene) -> None:
    images = pictures(3, seed=0)
    scores = image_scores(scene, random(32), images, images)
    assert torch.equal(scores.target_before, scores.target_after)
    torch.testing.assert_close(scores.source_after, torch.ones(3))
    assert float(scores.consistency) == 0


def test_sources_that_become_the_target_have_a_transfer_score_of_one(scene: Scene) -> None:
    target = pictures(1, seed=2)
    embedding = scene.embedder.embed_images(target)[0]
    scores = image_scores(scene, embedding, pictures(3, seed=0), target.expand(3, -1, -1, -1))
    assert float(scores.transfer) == pytest.approx(1, abs=1e-5)


def test_one_source_has_scores_too(scene: Scene) -> None:
    scores = image_scores(scene, random(32), pictures(1, seed=0), pictures(1, seed=1))
    assert scores.target_after.shape == (1,) and float(scores.consistency) == 1


def test_what_a_scene_lacks_is_said(scene: Scene) -> None:
    bare = Scene(generator=scene.generator, embedder=scene.embedder)
    with pytest.raises(ValueError, match="no inverter"):
        bare.invert([])
    with pytest.raises(ValueError, match="identity"):
        bare.features(bare.sources(1), identity_weight=0.1)


@pytest.mark.parametrize(("resolution", "count"), [(16, 64), (512, 16), (2048, 1)])
def test_fewer_large_images_are_rendered_at_once(scene: Scene, resolution: int, count: int) -> None:
    larger = Counting(scene.generator, (), [])
    larger.resolution = resolution
    assert dataclasses.replace(scene, generator=larger).at_once == count
    assert dataclasses.replace(scene, generator=larger, max_images=7).at_once == 7
