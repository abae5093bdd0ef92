"""Applying directions, rendering in parts, and scores against their definitions."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from targetclip.editing import apply_direction, layer_weights, render, score_edit
from targetclip.embedder import ClipEmbedder
from targetclip.world import Parts, load_parts, load_world


@pytest.fixture(scope="module")
def parts(tiny_world: Path) -> Parts:
    return load_parts(load_world(str(tiny_world)), torch.device("cpu"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int) -> Tensor:
    """Blotches, which the tiny encoder tells apart better than noise."""
    return F.interpolate(random(count, 3, 4, 4, seed=seed).clamp(-1, 1), (16, 16))


def test_every_layer_of_every_source_moves_by_strength_times_its_own_vector() -> None:
    ws, direction = random(3, 6, 8), random(6, 8, seed=1)
    edited = apply_direction(ws, direction, -2.5)
    for source in range(3):
        for layer in range(6):
            moved = edited[source, layer] - ws[source, layer]
            torch.testing.assert_close(moved, -2.5 * direction[layer], rtol=1e-5, atol=1e-6)


def test_strength_zero_changes_nothing() -> None:
    ws = random(2, 6, 8)
    assert torch.equal(apply_direction(ws, random(6, 8, seed=1), 0.0), ws)


@pytest.mark.parametrize("shape", [(5, 8), (6, 9), (1, 8)])
def test_a_direction_of_another_shape_is_refused(shape: tuple[int, int]) -> None:
    unchecked = inspect.unwrap(apply_direction)  # the tests' own check of shapes would come first
    with pytest.raises(ValueError, match="another generator"):
        unchecked(random(2, 6, 8), random(*shape))


@pytest.mark.parametrize(
    ("num_ws", "groups"), [(2, (2, 0, 0)), (6, (4, 2, 0)), (8, (4, 4, 0)), (18, (4, 4, 10))]
)
def test_coarse_middle_and_fine_layers_have_their_own_factors(
    num_ws: int, groups: tuple[int, int, int]
) -> None:
    coarse, middle, fine = groups
    found = layer_weights(num_ws, coarse=2, middle=-0.5, fine=0)
    assert found.tolist() == [2] * coarse + [-0.5] * middle + [0] * fine
    assert found.dtype == torch.float32


def test_layers_that_nobody_weighs_count_fully() -> None:
    assert torch.equal(layer_weights(10), torch.ones(10))
    assert layer_weights(10, middle=0).tolist() == [1] * 4 + [0] * 4 + [1] * 2


@pytest.mark.parametrize("max_images", [1, 2, 3, 100])
def test_pictures_do_not_depend_on_how_many_are_rendered_at_once(
    parts: Parts, max_images: int
) -> None:
    ws = random(5, 6, 8)
    together = parts.generator.synthesis(ws)
    found = render(parts.generator, ws, max_images)
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)


def test_no_more_pictures_are_rendered_or_embedded_at_once_than_asked(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    synthesis, embed = parts.generator.synthesis, parts.embedder.embed_images

    def rendering(ws: Tensor) -> Tensor:
        sizes.append(len(ws))
        return synthesis(ws)

    def embedding(images: Tensor, preprocess: str) -> Tensor:
        sizes.append(len(images))
        return embed(images, preprocess)

    monkeypatch.setattr(parts.generator, "synthesis", rendering)
    monkeypatch.setattr(parts.embedder, "embed_images", embedding)
    images = render(parts.generator, random(5, 6, 8), 2)
    score_edit(parts.embedder, random(32), images, images, max_images=2)
    assert sizes == 3 * [2, 2, 1]


def test_scores_are_the_cosines_they_say(clip_dir: Path) -> None:
    embedder = ClipEmbedder.load(clip_dir)
    sources, edited = pictures(4, seed=0), pictures(4, seed=1)
    target = embedder.embed_images(pictures(1, seed=2))[0]
    scores = score_edit(embedder, 3 * target, sources, edited)
    before, after = embedder.embed_images(sources), embedder.embed_images(edited)

    def cosines(a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(a, b.expand_as(a))

    close = torch.testing.assert_close
    close(scores.target_before, cosines(before, target))
    close(scores.target_after, cosines(after, target))
    close(scores.source_after, cosines(before, after))
    assert scores.transfer == pytest.approx(float(cosines(after, target).mean()))
    shifts = F.normalize(F.normalize(before) - F.normalize(after))
    products = (shifts @ shifts.T)[~torch.eye(4, dtype=torch.bool)]
    assert scores.consistency == pytest.approx(float(products.mean()), abs=1e-5)
    # The tests above compare; these see that there was something to compare.
    assert scores.target_before.std() > 1e-3 and scores.source_after.max() < 0.9999


def test_an_edit_that_does_nothing_leaves_the_similarities_as_they_were(clip_dir: Path) -> None:
    embedder = ClipEmbedder.load(clip_dir)
    images = pictures(3, seed=0)
    scores = score_edit(embedder, random(32), images, images)
    assert torch.equal(scores.target_before, scores.target_after)
    torch.testing.assert_close(scores.source_after, torch.ones(3))
    assert scores.consistency == 0


def test_sources_that_become_the_target_have_a_transfer_score_of_one(clip_dir: Path) -> None:
    embedder = ClipEmbedder.load(clip_dir)
    target = pictures(1, seed=2)
    edited = target.expand(3, -1, -1, -1)
    scores = score_edit(embedder, embedder.embed_images(target)[0], pictures(3, seed=0), edited)
    assert scores.transfer == pytest.approx(1, abs=1e-5)


def test_one_source_has_scores_too(clip_dir: Path) -> None:
    embedder = ClipEmbedder.load(clip_dir)
    scores = score_edit(embedder, random(32), pictures(1, seed=0), pictures(1, seed=1))
    assert scores.target_after.shape == (1,) and scores.consistency == 1
