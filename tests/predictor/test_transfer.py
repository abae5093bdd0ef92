"""EssenceTransfer: sources, targets, directions and edits of a tiny world."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from predictor.transfer import EssenceTransfer
from targetclip.images import picture_to_tensor
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.world import Parts, load_parts, load_world


@pytest.fixture(scope="module")
def parts(tiny_world: Path) -> Parts:
    return load_parts(load_world(str(tiny_world)), torch.device("cpu"))


@pytest.fixture
def essence(parts: Parts) -> EssenceTransfer:
    return EssenceTransfer(parts.generator, parts.embedder, parts.inverter)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Blotches of colour, wider than high."""
    blotches = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(size, Image.Resampling.NEAREST)


def quick(name: str = "consistent", **changes: object) -> Recipe:
    return dataclasses.replace(RECIPES[name], **{"steps": 3, **changes})


def test_a_generated_source_depends_on_its_seed_and_place_only(essence: EssenceTransfer) -> None:
    few, many = essence.generated_sources(2, seed=5), essence.generated_sources(4, seed=5)
    torch.testing.assert_close(few, many[:2])
    others = torch.cat([many, essence.generated_sources(4, seed=6)])[:, 0]
    assert torch.pdist(others).min() > 1e-3


def test_truncation_brings_generated_sources_nearer_to_the_mean(parts: Parts) -> None:
    def distance(truncation: float) -> Tensor:
        essence = EssenceTransfer(parts.generator, parts.embedder, truncation=truncation)
        return (essence.generated_sources(3) - parts.generator.mean_w).norm()

    torch.testing.assert_close(distance(0.25), 0.25 * distance(1.0))


def test_each_picture_is_inverted_as_if_alone(essence: EssenceTransfer) -> None:
    pictures = [picture(0), picture(1, (24, 40)), picture(2, (16, 16))]
    together = essence.invert(pictures)
    assert together.shape == (3, 6, 8) and not together.requires_grad
    for shown, ws in zip(pictures, together, strict=True):
        torch.testing.assert_close(essence.invert([shown])[0], ws)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_world_without_inverter_says_what_to_do_instead(parts: Parts) -> None:
    essence = EssenceTransfer(parts.generator, parts.embedder)
    with pytest.raises(ValueError, match="--num-sources"):
        essence.invert([picture()])
    with pytest.raises(ValueError, match="no inverter"):
        essence.optimize(picture(), quick(initial="inversion"))
    assert essence.optimize(picture(), quick(initial="zero")).steps == 3


def test_the_target_reaches_the_encoder_as_the_recipe_says(essence: EssenceTransfer) -> None:
    shown = picture()
    image = picture_to_tensor(shown, 16)
    expected = {
        ("encoder", "release"): essence.embedder.embed_pictures([shown])[0],
        ("encoder", "consistent"): essence.embedder.embed_pictures([shown])[0],
        ("same", "release"): essence.embedder.embed_images(image, "release")[0],
        ("same", "consistent"): essence.embedder.embed_images(image, "consistent")[0],
    }
    for (target_preprocess, preprocess), embedding in expected.items():
        recipe = quick(target_preprocess=target_preprocess, preprocess=preprocess)
        found = essence.embed_target(shown, recipe)
        torch.testing.assert_close(found, embedding)
        assert not found.requires_grad
    first, _, second, third = expected.values()
    assert F.pairwise_distance(torch.stack([first, second, third]), second).max() > 1e-3


def test_a_direction_starts_from_what_is_asked(essence: EssenceTransfer) -> None:
    def start(kind: Initial, seed: int = 0) -> Tensor:
        return essence.initial(picture(), kind, seed)

    assert torch.equal(start("zero"), torch.zeros(6, 8))
    torch.testing.assert_close(start("inversion"), essence.invert([picture()])[0])
    assert torch.equal(start("random"), start("random"))
    assert not torch.allclose(start("random"), start("random", 1))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_seed_gives_the_same_direction_again(essence: EssenceTransfer, name: str) -> None:
    first, again = (essence.optimize(picture(), quick(name), seed=3) for _ in range(2))
    assert torch.equal(first.vector, again.vector)
    assert (first.transfer, first.consistency) == (again.transfer, again.consistency)
    assert first.method == "optimizer" and first.steps == 3
    assert first.vector.norm() > 0 and not first.vector.requires_grad


@pytest.mark.parametrize(("name", "differs"), [("consistent", True), ("release", False)])
def test_another_seed_matters_where_sources_are_fresh(
    essence: EssenceTransfer, name: str, differs: bool
) -> None:
    one, two = (essence.optimize(picture(), quick(name), seed=seed).vector for seed in (1, 2))
    assert torch.equal(one, two) is not differs


def test_the_search_brings_edits_nearer_to_the_target(essence: EssenceTransfer) -> None:
    target = picture(3)
    direction = essence.optimize(target, quick(steps=40)).vector
    ws = essence.generated_sources(8)
    scores = essence.score(target, essence.edit(ws, direction, 0.0), essence.edit(ws, direction))
    assert scores.transfer > float(scores.target_before.mean()) + 0.05


def test_progress_is_told_after_every_step(essence: EssenceTransfer) -> None:
    told: list[Progress] = []
    direction = essence.optimize(picture(), quick(), on_step=told.append)
    assert [progress.step for progress in told] == [0, 1, 2]
    assert torch.equal(told[-1].kept_directions[0], direction.vector)


def test_a_loss_that_is_not_finite_is_an_error_and_no_direction(
    essence: EssenceTransfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed = essence.embedder.embed_images
    monkeypatch.setattr(
        essence.embedder, "embed_images", lambda images, kind: embed(images, kind) * float("nan")
    )
    with pytest.raises(FloatingPointError, match="step 0"):
        essence.optimize(picture(), quick())


def test_an_edit_moves_along_the_direction(parts: Parts, essence: EssenceTransfer) -> None:
    ws = essence.generated_sources(3)
    direction = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = parts.generator.synthesis(ws + 0.7 * direction)
    torch.testing.assert_close(essence.edit(ws, direction, 0.7), expected)
    one_by_one = EssenceTransfer(parts.generator, parts.embedder, max_images=1)
    torch.testing.assert_close(one_by_one.edit(ws, direction, 0.7), expected, rtol=1e-4, atol=1e-4)
