"""The teacher against the released loop's own numbers, and its invariants."""

import dataclasses
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from targetclip.embedder import EncoderInput, preprocess_images
from targetclip.generators import load_generator
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.optimize import Optimized, Progress, learning_rate, optimize_directions
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import random_latents

FIXTURES = Path(__file__).parents[1] / "fixtures"


class ProjectionEmbedder:
    """The toy encoder of the stored trajectory: block averages, a projection, tanh."""

    image_size = 224

    def __init__(self, projection: Tensor) -> None:
        self.projection = projection
        self.embed_dim = projection.shape[1]
        self.fingerprint = "projection"

    def embed_images(self, images: Tensor, preprocess: str = "release") -> Tensor:
        wanted = EncoderInput(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
        small = preprocess_images(images, preprocess, wanted)
        return torch.tanh(F.avg_pool2d(small, 16).flatten(1) @ self.projection)

    def embed_pictures(self, pictures: object) -> Tensor:
        raise NotImplementedError


@pytest.fixture(scope="module")
def trajectory() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "official_trajectory.npz") as arrays:
        return {key: arrays[key] for key in arrays}


@pytest.fixture(scope="module")
def reference_generator(
    seeded_weights: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> StyleGAN2:
    state = seeded_weights.seeded_state(FIXTURES / "rosinality_32.keys.json", equalized=True)
    path = tmp_path_factory.mktemp("trajectory") / "rosinality_32.pt"
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    torch.save({"g_ema": tensors, "latent_avg": torch.zeros(512)}, path)
    return load_generator(path)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = StyleGAN2(
            StyleGAN2Config(resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8))
        )
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def embedder() -> ProjectionEmbedder:
    random = torch.Generator().manual_seed(0)
    return ProjectionEmbedder(torch.randn(588, 12, generator=random) / 10)


def quick(**changes: object) -> Recipe:
    settings = {"steps": 8, "sources": 3, "learning_rate": 0.05, **changes}
    return dataclasses.replace(RECIPES["consistent"], **settings)


def run(
    generator: StyleGAN2,
    embedder: ProjectionEmbedder,
    recipe: Recipe,
    rows: list[int],
    initial: Tensor | None = None,
    targets: Tensor | None = None,
    **options: object,
) -> Optimized:
    """Optimize the targets `rows` of four fixed ones, from sources fixed as well."""
    if targets is None:
        images = generator.synthesis(random_latents(generator, [100, 101, 102, 103]))
        targets = embedder.embed_images(images)
    if initial is None:
        initial = torch.zeros(4, generator.num_ws, generator.w_dim)
    bank = random_latents(generator, range(10), truncation=1.0)
    return optimize_directions(
        generator,
        embedder,
        targets[rows],
        bank,
        recipe,
        initial[rows],
        [7 + r for r in rows],
        **options,
    )


def test_the_release_recipe_follows_the_released_loop(
    trajectory: dict[str, np.ndarray], reference_generator: StyleGAN2
) -> None:
    recipe = dataclasses.replace(RECIPES["release"], steps=60)
    steps: list[Progress] = []

    class Enough(Exception):
        pass

    def on_step(progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == 11:
            raise Enough

    with pytest.raises(Enough):
        optimize_directions(
            reference_generator,
            ProjectionEmbedder(torch.from_numpy(trajectory["projection"])),
            torch.from_numpy(trajectory["target_embedding"]),
            torch.from_numpy(trajectory["source_ws"]),
            recipe,
            torch.from_numpy(trajectory["init"]),
            [0],
            on_step=on_step,
        )
    for step in range(10):
        assert abs(steps[step].loss.item() - trajectory["loss"][step]) < 1e-3
        rate = trajectory["consistency_transfer_lr"][step, 2]
        assert abs(steps[step].learning_rate - rate) < 1e-4
        expected = torch.from_numpy(trajectory["coefficients_after_step"][step]).float()
        # Each factor steps by 0.2 in the direction of a sign; one sign wrong is 0.4 off.
        assert torch.allclose(steps[step].coefficients[0], expected, atol=0.02)
    for position, step in enumerate(trajectory["recorded_steps"].tolist()):
        if step <= 10:
            expected = torch.from_numpy(trajectory["direction_after_step"][position])
            found = steps[step - 1].directions[0]
            assert (found - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("fresh", [True, False])
def test_embeddings_of_the_bank_given_are_used_in_place_of_its_own(
    generator: StyleGAN2, embedder: ProjectionEmbedder, fresh: bool
) -> None:
    recipe = quick(fresh_sources=fresh, steps=2)
    bank = random_latents(generator, range(10), truncation=1.0)
    embedded = embedder.embed_images(generator.synthesis(bank), recipe.preprocess)
    # Not from zero, where what is compared is rounding noise.
    initial = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(4))

    def found(given: Tensor | None) -> Optimized:
        return run(generator, embedder, recipe, [0, 1], initial, bank_features=given)

    own, given, other = (found(each) for each in (None, embedded, embedded.roll(1, dims=0)))
    torch.testing.assert_close(own.consistency, given.consistency, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own.consistency, other.consistency, atol=1e-3)
    with pytest.raises(ValueError, match="10 sources, found 4"):
        run(generator, embedder, recipe, [0], bank_features=embedded[:4])


def test_a_batch_of_targets_equals_each_target_alone(embedder: ProjectionEmbedder) -> None:
    # In double precision: Adam's first steps have the size of the rate whatever the gradient, so
    # they show the rounding of single precision, which a batch's size does change.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = StyleGAN2(
            StyleGAN2Config(resolution=16, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8, 8))
        ).double()
    generator.requires_grad_(False)
    embedder = ProjectionEmbedder(embedder.projection.double())
    random = torch.Generator().manual_seed(3)
    targets = torch.randn(4, 12, generator=random, dtype=torch.float64)
    bank = torch.randn(10, generator.num_ws, 8, generator=random, dtype=torch.float64)
    initial = torch.randn(4, generator.num_ws, 8, generator=random, dtype=torch.float64)
    initial[0] = 0
    for recipe in (quick(), quick(fresh_sources=False, coefficients=True, keep="best")):

        def found(rows: list[int], recipe: Recipe = recipe) -> Optimized:
            seeds = [7 + row for row in rows]
            return optimize_directions(
                generator, embedder, targets[rows], bank, recipe, initial[rows], seeds
            )

        together = found([0, 1, 2, 3])
        for row in range(4):
            alone = found([row])
            torch.testing.assert_close(together.directions[[row]], alone.directions)
            torch.testing.assert_close(together.coefficients[[row]], alone.coefficients)
            torch.testing.assert_close(together.loss[[row]], alone.loss)


def test_a_search_at_a_coarser_size_is_the_search_of_the_coarse_levels(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    coarse = StyleGAN2(
        StyleGAN2Config(resolution=8, w_dim=8, z_dim=8, mapping_layers=2, channels=(8, 8))
    ).requires_grad_(False)
    coarse.load_state_dict(generator.state_dict(), strict=False)
    found = run(generator, embedder, quick(render_size=8), [0, 2]).directions
    targets = embedder.embed_images(generator.synthesis(random_latents(generator, range(100, 104))))
    zero = torch.zeros(4, coarse.num_ws, 8)
    expected = run(coarse, embedder, quick(), [0, 2], zero, targets).directions
    assert torch.equal(found[:, : coarse.num_ws], expected)
    assert not found[:, coarse.num_ws :].any()  # nothing on these images depends on them
    with pytest.raises(ValueError, match=r"size in px of \[4, 8, 16\], found 12"):
        run(generator, embedder, quick(render_size=12), [0])


def test_chunks_of_images_change_nothing(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    whole = run(generator, embedder, quick(), [0, 1])
    chunked = run(generator, embedder, quick(), [0, 1], max_images=2)
    assert torch.allclose(whole.directions, chunked.directions, atol=2e-4)


class Stopped(Exception):
    """Raised by a callback, as a signal would stop a run."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"keep": "best", "patience": 2, "steps": 12},
        {"fresh_sources": False, "coefficients": True},
        {"tied_layers": True},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(
    generator: StyleGAN2, embedder: ProjectionEmbedder, tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = quick(**changes)
    whole = run(generator, embedder, recipe, [0, 1, 2])

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            torch.save(progress.snapshot(), tmp_path / "run.pt")
            raise Stopped

    with pytest.raises(Stopped):
        run(generator, embedder, recipe, [0, 1, 2], on_step=stop)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    steps: list[int] = []
    resumed = run(
        generator, embedder, recipe, [0, 1, 2], resume=saved, on_step=lambda p: steps.append(p.step)
    )
    assert steps[0] == 5
    for name, value in vars(whole).items():
        found = getattr(resumed, name)
        assert torch.equal(value, found) if isinstance(value, Tensor) else value == found


def test_a_snapshot_of_other_targets_is_refused(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    saved: list[dict[str, object]] = []
    run(generator, embedder, quick(), [0, 1], on_step=lambda p: saved.append(p.snapshot()))
    with pytest.raises(ValueError, match="other targets"):
        run(generator, embedder, quick(), [0, 1, 2], resume=saved[-1])


def test_optimization_brings_held_out_sources_nearer_to_the_target(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    found = run(generator, embedder, quick(steps=60), [0, 1])
    held_out = random_latents(generator, range(50, 62), truncation=1.0)
    targets = embedder.embed_images(generator.synthesis(random_latents(generator, [100, 101])))
    for target, direction in zip(targets, found.directions, strict=True):
        before = F.cosine_similarity(
            embedder.embed_images(generator.synthesis(held_out)), target[None]
        )
        edited = embedder.embed_images(generator.synthesis(held_out + direction))
        after = F.cosine_similarity(edited, target[None])
        assert after.mean() > before.mean() + 0.05


def test_a_target_that_is_not_finite_ends_alone(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    targets = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    healthy = run(generator, embedder, quick(), [0, 2], targets=targets)
    targets[1] = math.nan
    mixed = run(generator, embedder, quick(), [0, 1, 2], targets=targets)
    assert mixed.failures[0] is None and mixed.failures[2] is None
    assert mixed.failures[1] == "the loss of step 0 is not finite"
    assert mixed.steps.tolist() == [8, 0, 8]
    assert torch.allclose(mixed.directions[[0, 2]], healthy.directions, atol=2e-4)
    assert mixed.directions.isfinite().all()


def test_a_weight_of_zero_for_the_consistency_loss_runs(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    recipe = quick(consistency_weight=0.0, coefficients=True, fresh_sources=False)
    found = run(generator, embedder, recipe, [0])
    assert torch.allclose(found.loss, found.transfer)


def test_fixed_sources_are_the_first_of_the_bank_and_fresh_ones_are_drawn(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    bank = random_latents(generator, range(10), truncation=1.0)
    target = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    start = torch.full((1, generator.num_ws, generator.w_dim), 0.05)

    def losses(bank: Tensor, fresh: bool) -> list[float]:
        seen: list[float] = []
        optimize_directions(
            generator, embedder, target, bank, quick(fresh_sources=fresh), start, [0],
            on_step=lambda p: seen.append(p.loss.item()),
        )  # fmt: skip
        return seen

    assert losses(bank[:3], fresh=False) == pytest.approx(losses(bank, fresh=False), abs=1e-5)
    assert losses(bank, fresh=True) != pytest.approx(losses(bank, fresh=False), abs=1e-3)


def test_tied_layers_give_one_vector_to_every_layer(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    tied = run(generator, embedder, quick(tied_layers=True), [0]).directions[0]
    free = run(generator, embedder, quick(), [0]).directions[0]
    assert torch.equal(tied, tied[:1].expand_as(tied)) and tied.norm() > 0
    assert not torch.allclose(free, free[:1].expand_as(free))


def test_patience_stops_a_target_that_no_longer_improves(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    recipe = quick(steps=400, learning_rate=0.0, fresh_sources=False, patience=5)
    found = run(generator, embedder, recipe, [0, 1])
    assert found.steps.tolist() == [6, 6]
    assert found.failures == (None, None)


def test_keeping_the_best_returns_the_lowest_loss_seen(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    seen: list[float] = []
    recipe = quick(keep="best", fresh_sources=False, learning_rate=2.0, steps=20)
    found = run(generator, embedder, recipe, [0], on_step=lambda p: seen.append(p.loss.item()))
    assert found.loss.item() == pytest.approx(min(seen))
    assert min(seen) < seen[-1]


# The identity loss


class Colours:
    """Who is on an image says its mean colour."""

    fingerprint = "colours"

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)), dim=1)


def kept(generator: StyleGAN2, found: Optimized) -> float:
    """How alike the colours of new sources are before and after their edits."""
    ws = random_latents(generator, range(50, 58), truncation=1.0)
    before = Colours().embed_images(generator.synthesis(ws))
    edited = [Colours().embed_images(generator.synthesis(ws + each)) for each in found.directions]
    return float(torch.stack([(before * after).sum(dim=1).mean() for after in edited]).mean())


def test_the_identity_loss_keeps_what_the_model_looks_at(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    plain, kind = quick(steps=30), quick(steps=30, identity_weight=5.0)
    rows = [0, 1, 2, 3]
    without = run(generator, embedder, plain, rows, identity=Colours())
    with_loss = run(generator, embedder, kind, rows, identity=Colours())
    assert kept(generator, with_loss) > kept(generator, without) + 0.01
    none = run(generator, embedder, plain, rows)
    assert torch.equal(without.directions, none.directions)


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_held_is_added_to_each_source_of_its_target(
    fresh: bool, generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    # Offsets that are the same for all sources are a direction that is already there.
    recipe = quick(steps=6, weight_decay=0.0, fresh_sources=fresh)
    random = torch.Generator().manual_seed(5)
    apart = 0.3 * torch.randn(4, generator.num_ws, generator.w_dim, generator=random)
    held, start = apart[:, None].expand(-1, 10, -1, -1), torch.zeros_like(apart)
    rows = [0, 1, 3]
    found = run(generator, embedder, recipe, rows, initial=start, held=held[rows])
    moved = run(generator, embedder, recipe, rows, initial=apart)
    torch.testing.assert_close(found.loss, moved.loss, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.directions + apart[rows], moved.directions, rtol=0, atol=2e-2)
    nothing = run(generator, embedder, recipe, rows, initial=start)
    assert not torch.allclose(nothing.directions, found.directions, atol=5e-2)
    # Each source has its own.
    other = held.clone()
    other[:, ::2] = -other[:, ::2]
    mixed = run(generator, embedder, recipe, rows, initial=start, held=other[rows])
    assert not torch.allclose(mixed.directions, found.directions, atol=5e-2)


def test_held_offsets_of_other_sources_or_targets_are_refused(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    for shape in ((1, 9, 6, 8), (2, 10, 6, 8)):
        with pytest.raises(ValueError, match="one for each target and source"):
            run(generator, embedder, quick(), [0], held=torch.zeros(shape))


def test_the_identity_loss_is_part_of_the_loss_of_a_step(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    recipe = quick(steps=1, identity_weight=2.0, fresh_sources=False)
    initial = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(4))
    found = run(generator, embedder, recipe, [0], initial, identity=Colours())
    bank = random_latents(generator, range(recipe.sources), truncation=1.0)
    before = Colours().embed_images(generator.synthesis(bank))
    after = Colours().embed_images(generator.synthesis(bank + initial[0]))
    expected = found.transfer + recipe.consistency_weight * found.consistency
    expected = expected + 2 * (1 - (before * after).sum(dim=1).mean())
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)


def test_sources_seen_without_the_identity_model_are_refused(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    recipe = quick(identity_weight=1.0)
    bank = random_latents(generator, range(10), truncation=1.0)
    embedded = embedder.embed_images(generator.synthesis(bank), recipe.preprocess)
    with pytest.raises(ValueError, match="found 12 and 15"):
        run(generator, embedder, recipe, [0], bank_features=embedded, identity=Colours())


def test_an_identity_search_goes_on_bit_for_bit(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    recipe, snapshots = quick(identity_weight=1.0), []
    whole = run(
        generator, embedder, recipe, [0, 1], identity=Colours(),
        on_step=lambda progress: snapshots.append(progress.snapshot()),
    )  # fmt: skip
    resumed = run(generator, embedder, recipe, [0, 1], identity=Colours(), resume=snapshots[3])
    assert torch.equal(resumed.directions, whole.directions)


def test_an_identity_search_gives_the_same_in_chunks(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    # From zero the first gradients are rounding noise, by whose sign Adam takes full steps.
    start = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(4))
    recipe = quick(identity_weight=1.0, steps=3)
    whole = run(generator, embedder, recipe, [0, 1], start, identity=Colours())
    chunked = run(generator, embedder, recipe, [0, 1], start, identity=Colours(), max_images=1)
    assert torch.allclose(chunked.directions, whole.directions, atol=1e-3)
    assert not torch.allclose(start[:2], whole.directions, atol=1e-2)


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_an_identity_weight_that_cannot_be_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="expected an identity weight from 0 on"):
        quick(identity_weight=weight)


def test_an_identity_loss_without_a_model_is_refused(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    with pytest.raises(ValueError, match="needs an identity model, found none"):
        run(generator, embedder, quick(identity_weight=0.1), [0])


def test_the_schedule_rises_then_falls() -> None:
    rates = [learning_rate(step, 1000, 0.2) for step in range(1000)]
    assert rates[0] == 0.0
    assert rates[5] == pytest.approx(0.2)
    assert rates[250] == pytest.approx(0.2)
    assert rates[625] == pytest.approx(0.1)
    assert rates[999] < 1e-5


def test_arguments_that_disagree_are_refused(
    generator: StyleGAN2, embedder: ProjectionEmbedder
) -> None:
    bank = random_latents(generator, [0, 1])
    start = torch.zeros(1, generator.num_ws, generator.w_dim)
    with pytest.raises(ValueError, match="edits 3 sources a step, found a bank of 2"):
        optimize_directions(generator, embedder, torch.ones(1, 12), bank, quick(), start, [0])
    with pytest.raises(ValueError, match="found 2 and"):
        optimize_directions(
            generator, embedder, torch.ones(1, 12), bank, quick(sources=2), start, [0, 1]
        )
    with pytest.raises(ValueError, match="fixed sources"):
        quick(coefficients=True)
