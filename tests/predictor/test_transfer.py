"""EssenceTransfer: sources, targets, directions and edits of a tiny world."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from predictor import Mode
from predictor.direction import Direction, Interrupted, Method, WatchStep
from predictor.inputs import Text
from predictor.mapper import Mapper, load_mapper
from predictor.text import TextTargets
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.embedder import ClipEmbedder
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig, identity_similarity
from targetclip.media.images import picture_to_tensor
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.scene import Scene
from targetclip.seeds import seed_of
from targetclip.world import load_scene, load_world

Predicting = Callable[..., EssenceTransfer]


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    """The tiny world at truncation 0.7."""
    return dataclasses.replace(load_scene(load_world(str(tiny_world))), truncation=0.7)


@pytest.fixture(scope="module")
def essence(scene: Scene) -> EssenceTransfer:
    return EssenceTransfer(scene)


@pytest.fixture
def predicting(scene: Scene, tiny_mapper: Path) -> Predicting:
    """Makes one with a mapper whose answers pass from a threshold on."""

    def make(
        threshold: float = 0.5, max_images: int | None = None, **figures: float
    ) -> EssenceTransfer:
        mapper, record = load_mapper(tiny_mapper)
        calibration = {**record.calibration, "threshold": threshold, **figures}
        mapper.record = dataclasses.replace(record, calibration=calibration)
        return EssenceTransfer(dataclasses.replace(scene, max_images=max_images), mapper)

    return make


class Watch:
    """Remembers every search and its steps; presses Ctrl-C as a method begins or after a step."""

    def __init__(self, stop: Method | None = None, after: int = 0) -> None:
        self.stop, self.after = stop, after
        self.searches: list[Method] = []
        self.steps: list[Progress] = []

    def __call__(self, method: Method, recipe: Recipe) -> WatchStep:
        self.searches.append(method)
        self.steps = steps = []

        def on_step(progress: Progress) -> None:
            steps.append(progress)
            if method == self.stop and len(steps) == self.after:
                raise KeyboardInterrupt

        if method == self.stop and self.after == 0:
            raise KeyboardInterrupt
        return on_step


def knowing(scene: Scene) -> Scene:
    """The scene with a small identity model of random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AvatarIdentity(IdentityConfig(16, (8, 8), 16, 5)).requires_grad_(False)
    return dataclasses.replace(scene, identity=model)


def probed(essence: EssenceTransfer, target: Image.Image, direction: Direction) -> float:
    return essence.probe_score(essence.embed_target(target), direction, probes=4)


def picture(seed: int = 0, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Blotches of colour, wider than high."""
    blotches = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(blotches).resize(size, Image.Resampling.NEAREST)


def quick(name: str = "consistent", **changes: object) -> Recipe:
    return dataclasses.replace(RECIPES[name], **{"steps": 3, **changes})


def test_each_picture_is_inverted_as_if_alone(essence: EssenceTransfer) -> None:
    pictures = [picture(0), picture(1, (24, 40)), picture(2, (16, 16))]
    together = essence.scene.invert(pictures)
    assert together.shape == (3, 6, 8) and not together.requires_grad
    for shown, ws in zip(pictures, together, strict=True):
        torch.testing.assert_close(essence.scene.invert([shown])[0], ws)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_a_world_without_inverter_says_what_to_do_instead(scene: Scene) -> None:
    essence = EssenceTransfer(dataclasses.replace(scene, inverter=None))
    with pytest.raises(ValueError, match="use generated sources"):
        essence.scene.invert([picture()])
    with pytest.raises(ValueError, match="no inverter"):
        essence.optimize(picture(), quick(initial="inversion"))
    assert essence.optimize(picture(), quick(initial="zero")).steps == 3


def test_the_target_reaches_the_encoder_as_the_recipe_says(essence: EssenceTransfer) -> None:
    shown = picture()
    image = picture_to_tensor(shown, 16)
    expected = {
        ("encoder", "release"): essence.scene.embedder.embed_pictures([shown])[0],
        ("encoder", "consistent"): essence.scene.embedder.embed_pictures([shown])[0],
        ("same", "release"): essence.scene.embedder.embed_images(image, "release")[0],
        ("same", "consistent"): essence.scene.embedder.embed_images(image, "consistent")[0],
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
    torch.testing.assert_close(start("inversion"), essence.scene.invert([picture()])[0])
    assert torch.equal(start("random"), start("random"))
    assert not torch.allclose(start("random"), start("random", 1))


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_seed_gives_the_same_direction_again(scene: Scene, name: str) -> None:
    essence = EssenceTransfer(knowing(scene))
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
    ws = essence.scene.sources(8)
    scores = essence.score(target, essence.edit(ws, direction, 0.0), essence.edit(ws, direction))
    assert float(scores.transfer) > float(scores.target_before.mean()) + 0.05


def test_progress_is_reported_after_every_step(essence: EssenceTransfer) -> None:
    steps: list[Progress] = []
    direction = essence.optimize(picture(), quick(), on_step=steps.append)
    assert [progress.step for progress in steps] == [0, 1, 2]
    assert torch.equal(steps[-1].kept.directions[0], direction.vector)


def test_a_loss_that_is_not_finite_is_an_error_and_no_direction(scene: Scene) -> None:
    embedder = copy.deepcopy(scene.embedder)
    for parameter in cast("ClipEmbedder", embedder).parameters():
        parameter.fill_(float("nan"))
    essence = EssenceTransfer(dataclasses.replace(scene, embedder=embedder))
    with pytest.raises(FloatingPointError, match="step 0"):
        essence.optimize(picture(), quick())


# A mapper's answers, and what is done where they fall short


def test_an_instant_answer_is_the_mappers_row_of_a_batch(predicting: Predicting) -> None:
    essence = predicting()
    pictures = [picture(seed) for seed in range(3)]
    batch = essence.asked_mapper()(torch.stack([essence.embed_target(p) for p in pictures]))
    for i, shown in enumerate(pictures):
        found = essence.direction(shown, "instant")
        torch.testing.assert_close(found.vector, batch.directions[i])
        assert found.expected == pytest.approx(float(batch.expected[i]), abs=1e-5)
        assert (found.method, found.steps, found.probe) == ("mapper", 0, None)
    assert not torch.allclose(batch.directions[0], batch.directions[1], atol=1e-2)


def test_an_answer_that_passes_is_kept_without_a_search(predicting: Predicting) -> None:
    essence, watch = predicting(threshold=-1), Watch()
    found = essence.direction(picture(), watch=watch)
    predicted = essence.direction(picture(), "instant")
    assert torch.equal(found.vector, predicted.vector) and found.expected == predicted.expected
    assert found.method == "mapper" and found.steps == 0 and watch.searches == []
    assert found.probe == pytest.approx(probed(essence, picture(), predicted))


@pytest.mark.parametrize(
    ("best", "shown", "steps", "rate", "refine_rate"),
    [
        ("refined", 1, 3, 0.2, 0.5),
        ("optimizer", 1, 8, 0.5, 0.5),
        ("mapper", 0, 3, 50.0, 50.0),  # so great that both searches lose their way
    ],
)
def test_where_nothing_passes_all_is_tried_and_the_best_is_kept(
    predicting: Predicting, best: str, shown: int, steps: int, rate: float, refine_rate: float
) -> None:
    target, recipe, watch = picture(shown), quick(steps=steps, learning_rate=rate), Watch()
    essence = predicting(threshold=2, refine_rate=refine_rate)
    found = essence.direction(target, "auto", recipe, seed=5, watch=watch)
    modes: list[Mode] = ["instant", "refine", "optimize"]
    each = [essence.direction(target, mode, recipe, seed=5) for mode in modes]
    scores = [probed(essence, target, one) for one in each]
    winner = each[scores.index(max(scores))]
    assert found.method == winner.method == best
    assert torch.equal(found.vector, winner.vector)
    assert found.probe == pytest.approx(max(scores), abs=1e-6)
    assert found.expected == each[0].expected
    assert watch.searches == ["refined", "optimizer"] and found.steps == 6 + steps


def test_a_refinement_that_passes_spares_the_optimizer(predicting: Predicting) -> None:
    essence, target, watch = predicting(), picture(1), Watch()
    refined = essence.direction(target, "refine", quick())
    score = probed(essence, target, refined)
    assert probed(essence, target, essence.direction(target, "instant")) < score
    found = predicting(threshold=score).direction(target, "auto", quick(), watch=watch)
    assert watch.searches == ["refined"]
    assert found.method == "refined" and found.steps == refined.steps == 6
    assert torch.equal(found.vector, refined.vector) and found.probe == pytest.approx(score)


def test_a_mapper_taught_identity_is_refined_by_it_and_needs_the_model_for_that(
    scene: Scene, predicting: Predicting
) -> None:
    mapper = predicting(threshold=2).mapper
    assert mapper is not None and mapper.record is not None
    taught = dataclasses.asdict(quick(identity_weight=5.0))
    mapper.record = dataclasses.replace(mapper.record, recipe={"recipe": taught})
    without = EssenceTransfer(scene, mapper)
    assert without.direction(picture(), "instant").method == "mapper"
    for mode in ("auto", "refine"):  # also where no refinement would be needed
        with pytest.raises(ValueError, match="needs an identity model"):
            without.direction(picture(), mode, quick())
    essence = EssenceTransfer(knowing(scene), mapper)
    found = essence.direction(picture(), "refine", quick())
    plain = predicting(threshold=2).direction(picture(), "refine", quick())
    assert not torch.allclose(found.vector, plain.vector, atol=1e-3)


def test_auto_by_a_recipe_for_identity_needs_the_model_though_the_answer_would_pass(
    predicting: Predicting,
) -> None:
    with pytest.raises(ValueError, match="needs an identity model, found none"):
        predicting(threshold=-2).direction(picture(), "auto", quick("identity"))


def test_what_searches_see_of_sources_is_kept_apart_from_their_embeddings(
    scene: Scene,
) -> None:
    essence = EssenceTransfer(knowing(scene))
    embedded = essence.source_features("consistent", 0)
    seen = essence.source_features("consistent", 0.2)
    assert torch.equal(seen[:, : embedded.shape[1]], embedded)
    assert seen.shape[1] == embedded.shape[1] + 5
    assert essence.source_features("consistent", 0) is embedded
    assert essence.source_features("consistent", 1) is seen


def test_a_refinement_starts_at_the_prediction(predicting: Predicting) -> None:
    essence, watch = predicting(threshold=-1), Watch()
    found = essence.direction(picture(), "refine", quick(), watch=watch)
    predicted = essence.direction(picture(), "instant")
    assert watch.searches == ["refined"] and found.method == "refined"
    assert [progress.step for progress in watch.steps] == list(range(6))
    start = watch.steps[0].directions[0]
    assert (start - predicted.vector).norm() < 0.1 * predicted.vector.norm()
    assert (found.vector - predicted.vector).norm() > 0 and found.expected == predicted.expected


@pytest.fixture
def reader(scene: Scene, reading_mapper: Path) -> Predicting:
    """Makes one with a mapper that corrects its directions for each source."""

    def make(threshold: float = 0.5, identity: bool = False, **figures: float) -> EssenceTransfer:
        mapper, record = load_mapper(reading_mapper)
        calibration = {**record.calibration, "threshold": threshold, **figures}
        mapper.record = dataclasses.replace(record, calibration=calibration)
        return EssenceTransfer(knowing(scene) if identity else scene, mapper)

    return make


def test_an_answer_is_corrected_for_each_source_as_the_mapper_does_it(reader: Predicting) -> None:
    essence = reader()
    ws, embedding = essence.scene.sources(4), essence.embed_target(picture())[None]
    direction = essence.predict(picture())
    expected = direction.vector + essence.asked_mapper().correct(embedding, ws)[0]
    torch.testing.assert_close(direction.offsets(ws), expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).norm() > 0.5
    for strength in (0.0, 0.7, -1.5):
        edited = essence.edit(ws, direction, strength)
        torch.testing.assert_close(edited, essence.scene.render(ws + strength * expected))
    alone = essence.edit(ws[1:2], direction)
    torch.testing.assert_close(alone, essence.edit(ws, direction)[1:2])
    vector = essence.edit(ws, direction.vector)  # the correction is left out
    assert not torch.allclose(vector, essence.edit(ws, direction), atol=1e-2)


@pytest.mark.parametrize("mode", ["instant", "auto", "refine"])
def test_one_direction_is_that_of_the_mapper_without_its_correction_to_the_bit(
    reader: Predicting, predicting: Predicting, mode: Mode
) -> None:
    essence, old, recipe = reader(threshold=2), predicting(threshold=2), quick()
    found = essence.direction(picture(1), mode, recipe, seed=3, one_direction=True)
    expected = old.direction(picture(1), mode, recipe, seed=3)
    assert found.correction is None and torch.equal(found.vector, expected.vector)
    assert (found.method, found.steps, found.probe) == (
        expected.method, expected.steps, expected.probe,
    )  # fmt: skip
    assert found.expected is None  # what the mapper expects is of corrected edits
    ws = essence.scene.sources(2)
    assert torch.equal(essence.edit(ws, found, 0.7), old.edit(ws, expected, 0.7))


def test_a_refinement_holds_the_correction_and_starts_at_the_corrected_answer(
    reader: Predicting,
) -> None:
    essence, watch, target = reader(refine_rate=0.05), Watch(), picture(1)
    predicted, recipe = essence.predict(target), quick()
    refined = essence.direction(target, "refine", recipe, watch=watch)
    assert refined.correction is not None and predicted.correction is not None
    ws = essence.scene.sources(2)
    assert torch.equal(refined.correction(ws), predicted.correction(ws))
    assert refined.method == "refined"
    assert 0 < (refined.vector - predicted.vector).norm() < predicted.vector.norm()
    # Its first loss is that of the corrected edits of the sources that it draws.
    bank, first = essence.scene.bank(), watch.steps[0]
    draw = torch.Generator().manual_seed(seed_of("target", 0))
    chosen = torch.randperm(len(bank), generator=draw)[: recipe.sources]
    embedding = essence.embed_target(target)[None]

    def transfer(moves: Tensor) -> float:
        return 1 - float(essence.scene.score(embedding, bank[chosen], moves[None]).transfer)

    corrected = transfer(predicted.offsets(bank[chosen]))
    assert float(first.transfer) == pytest.approx(corrected, abs=1e-4)
    assert transfer(predicted.vector) != pytest.approx(corrected, abs=1e-3)
    with pytest.raises(Interrupted) as caught:
        essence.direction(target, "refine", recipe, watch=Watch("refined", 2))
    assert caught.value.direction.correction is not None


@pytest.mark.parametrize("fresh", [True, False])
def test_refinements_of_any_sources_bring_a_corrected_answer_nearer(
    reader: Predicting, fresh: bool
) -> None:
    essence, target = reader(refine_steps=20, refine_rate=0.05), picture(1)
    recipe = quick("consistent" if fresh else "paper")
    predicted, refined = (essence.direction(target, m, recipe) for m in ("instant", "refine"))
    embedding = essence.embed_target(target)
    scores = [essence.probe_score(embedding, one, 4) for one in (predicted, refined)]
    assert scores[1] > scores[0]


def test_the_gate_checks_corrected_edits(reader: Predicting) -> None:
    essence, target = reader(threshold=-1), picture()
    predicted = essence.direction(target, "instant")
    scores = [probed(essence, target, one) for one in (predicted, predicted.uncorrected())]
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    found = essence.direction(target)
    assert found.probe == scores[0] and found.correction is not None
    between = sum(scores) / 2
    higher = predicted if scores[0] > scores[1] else predicted.uncorrected()
    one_direction, watch = higher.correction is None, Watch()
    strict = reader(threshold=between)
    assert strict.direction(target, watch=watch, one_direction=one_direction).method == "mapper"
    assert watch.searches == []
    strict.direction(target, "auto", quick(), watch=watch, one_direction=not one_direction)
    assert watch.searches[0] == "refined"


def test_an_identity_floor_is_kept_by_corrected_edits(reader: Predicting) -> None:
    essence = reader(identity=True)
    ws, direction = essence.scene.sources(3), essence.predict(picture())
    model = essence.scene.identity
    assert model is not None

    def kept(strength: float, moves: Direction) -> float:
        edited = essence.edit(ws, moves, strength)
        return float(identity_similarity(model, essence.edit(ws, moves, 0), edited).mean())

    floor = (1 + kept(1.0, direction)) / 2
    found = essence.strength_at_identity(ws, direction, floor)
    assert 0 < found < 1 and kept(found, direction) >= floor > kept(found + 1 / 160, direction)
    assert found != essence.strength_at_identity(ws, direction.uncorrected(), floor)


def test_texts_and_mixtures_with_them_are_corrected(scene: Scene, reading_mapper: Path) -> None:
    essence = reading(scene, load_mapper(reading_mapper)[0])
    text, shown = essence.predict(Text("green hair")), essence.predict(picture())
    ws = scene.sources(3)
    assert text.correction is not None
    mixture = (text - 0.5 * shown).offsets(ws)
    torch.testing.assert_close(mixture, text.offsets(ws) - 0.5 * shown.offsets(ws))


# The trade-off between essence and identity


class Recipes:
    """Remembers the recipe of every search."""

    def __init__(self) -> None:
        self.by: dict[Method, Recipe] = {}

    def __call__(self, method: Method, recipe: Recipe) -> WatchStep:
        self.by[method] = recipe
        return lambda progress: None


@pytest.fixture
def placed(scene: Scene, tradeoff_mapper: Path) -> Predicting:
    """Makes one with a mapper that reads the trade-off, by default at 0.25."""

    def make(**figures: float) -> EssenceTransfer:
        mapper, record = load_mapper(tradeoff_mapper)
        calibration = {**record.calibration, **figures}
        mapper.record = dataclasses.replace(record, calibration=calibration)
        return EssenceTransfer(knowing(scene), mapper)

    return make


def test_a_place_on_the_trade_off_is_answered_and_recorded(
    placed: Predicting, tmp_path: Path
) -> None:
    essence = placed()
    mapper, ws = essence.asked_mapper(), essence.scene.sources(2)
    embedding = essence.embed_target(picture(), essence.trained)[None]
    for asked, place in ((None, 0.25), (0.0, 0.0), (0.7, 0.7)):
        found = essence.direction(picture(), "instant", keep_identity=asked)
        expected = mapper.edits(embedding, ws, place)[0]
        torch.testing.assert_close(found.offsets(ws), expected, rtol=1e-4, atol=1e-5)
        assert found.keep_identity == place and f"keep_identity {place:g}" in repr(found)
        batch = mapper(embedding, essence.place(asked))
        torch.testing.assert_close(batch.directions[0], found.vector, rtol=1e-4, atol=1e-5)
    found.save(tmp_path / "direction.safetensors")
    assert Direction.load(tmp_path / "direction.safetensors", essence).keep_identity == 0.7
    other = essence.direction(picture(), "instant", keep_identity=1.0)
    assert (0.5 * found).keep_identity == 0.7 and (found + other).keep_identity is None
    expected = found.offsets(ws) + other.offsets(ws)
    torch.testing.assert_close((found + other).offsets(ws), expected, rtol=1e-4, atol=1e-5)


def test_searches_weigh_identity_and_length_as_training_did_at_the_place(
    placed: Predicting,
) -> None:
    essence, seen = placed(), Recipes()
    ends = essence.asked_mapper().config.tradeoff
    assert ends is not None
    for asked, place in ((None, 0.25), (1.0, 1.0)):
        found = essence.direction(picture(), "refine", quick(), watch=seen, keep_identity=asked)
        assert found.method == "refined" and found.keep_identity == place
        refined = seen.by["refined"]
        assert refined.identity_weight == pytest.approx(ends.identity_weight(place))
        assert refined.weight_decay == pytest.approx(ends.decay(place))
    strict = placed(threshold=2.0, threshold_at_0=2.0, threshold_at_1=2.0)
    strict.direction(picture(), "auto", quick(), watch=seen)
    assert seen.by["optimizer"] == quick()  # a place that nobody asked for changes no recipe
    strict.direction(picture(), "auto", quick(), watch=seen, keep_identity=1.0)
    assert seen.by["optimizer"].identity_weight == pytest.approx(1.0)


def test_the_gate_has_a_threshold_at_every_place(placed: Predicting) -> None:
    scores: list[tuple[float, float]] = []
    essence = placed(threshold=-1.0, threshold_at_0=-1.0, threshold_at_1=-1.0)
    for keep in (None, 0.0, 1.0):
        found = essence.direction(
            picture(),
            "auto",
            quick(),
            keep_identity=keep,
            watch_probe=lambda *pair: scores.append(pair),
        )
        assert found.method == "mapper"
    assert len({score for score, _ in scores}) == 3


@pytest.mark.parametrize("keep", [-0.1, 1.5, float("nan")])
def test_a_place_off_the_trade_off_is_refused(placed: Predicting, keep: float) -> None:
    with pytest.raises(ValueError, match="keep_identity: expected a number from 0 to 1"):
        placed().direction(picture(), "instant", keep_identity=keep)


def test_a_place_that_nothing_reads_is_refused(predicting: Predicting, placed: Predicting) -> None:
    for mode in ("instant", "auto"):
        with pytest.raises(ValueError, match="this mapper was trained at one identity weight"):
            predicting().direction(picture(), mode, keep_identity=0.5)
    with pytest.raises(ValueError, match="choose another mode"):
        placed().direction(picture(), "optimize", keep_identity=0.5)
    assert predicting().direction(picture(), "instant").keep_identity is None


@pytest.mark.parametrize("mode", ["instant", "auto", "refine"])
def test_without_a_mapper_only_the_optimizer_answers(essence: EssenceTransfer, mode: Mode) -> None:
    with pytest.raises(ValueError, match=r'no mapper.*mode "optimize"'):
        essence.direction(picture(), mode, quick())
    assert essence.direction(picture(), "optimize", quick()).method == "optimizer"


def test_a_mapper_that_is_not_calibrated_answers_unchecked_only(predicting: Predicting) -> None:
    essence, watch = predicting(), Watch()
    assert essence.mapper is not None and essence.mapper.record is not None
    essence.mapper.record = dataclasses.replace(essence.mapper.record, calibration={})
    assert essence.direction(picture(), "instant").method == "mapper"
    for mode in ("auto", "refine"):
        with pytest.raises(ValueError, match="not calibrated"):
            essence.direction(picture(), mode, quick(), watch=watch)
    assert watch.searches == []


@pytest.mark.parametrize("part", ["generator", "embedder"])
def test_a_mapper_of_other_networks_is_refused(scene: Scene, tiny_mapper: Path, part: str) -> None:
    mapper, _ = load_mapper(tiny_mapper)
    mapper.config = dataclasses.replace(mapper.config, **{part: "b" * 64})
    with pytest.raises(ValueError, match=f"{part} bbbbbbbbbbbb.*the {part} loaded is"):
        EssenceTransfer(scene, mapper)


@pytest.mark.parametrize(
    ("stop", "after", "rate", "methods"),
    [
        ("refined", 0, 0.5, {"mapper"}),
        ("refined", 5, 0.5, {"refined"}),
        ("refined", 5, 50.0, {"mapper"}),
        ("optimizer", 0, 0.5, {"refined"}),
        ("optimizer", 2, 0.5, {"refined", "optimizer"}),
    ],
)
def test_ctrl_c_leaves_the_best_so_far_of_what_was_tried(
    predicting: Predicting, stop: Method, after: int, rate: float, methods: set[str]
) -> None:
    essence, watch = predicting(threshold=2, refine_rate=rate), Watch(stop, after)
    target = picture(0 if rate == 50 else 1)
    with pytest.raises(Interrupted) as caught:
        essence.direction(target, "auto", quick(), watch=watch)
    found = caught.value.direction
    assert found.method in methods and watch.searches[-1] == stop
    assert found.steps == after + (6 if stop == "optimizer" else 0)
    assert found.probe is not None
    assert found.probe == pytest.approx(probed(essence, target, found), abs=1e-6)
    predicted = probed(essence, target, essence.direction(target, "instant"))
    assert found.probe > predicted if found.method != "mapper" else found.probe == predicted


def test_a_probe_score_does_not_depend_on_how_many_images_are_rendered_at_once(
    predicting: Predicting,
) -> None:
    direction = predicting().direction(picture(), "instant")
    scores = [probed(predicting(max_images=count), picture(), direction) for count in (1, 3, 64)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)


def test_a_seed_gives_the_same_checked_answer_again(predicting: Predicting) -> None:
    essence, one = predicting(threshold=2), picture(1)
    first, again = (essence.direction(one, "auto", quick(), seed=3) for _ in range(2))
    assert torch.equal(first.vector, again.vector)
    assert dataclasses.replace(first, vector=again.vector) == again
    other = essence.direction(one, "auto", quick(), seed=4)
    assert not torch.equal(first.vector, other.vector)


def test_where_no_recipe_is_given_its_own_is_taken(scene: Scene) -> None:
    own = EssenceTransfer(scene, recipe=quick(steps=2))
    found = own.direction(picture(), "optimize")
    assert found.steps == 2
    assert torch.equal(found.vector, own.optimize(picture(), quick(steps=2)).vector)
    assert own.direction(picture(), "optimize", quick()).steps == 3


# Targets as people give them


def test_a_path_is_read_as_a_picture_wherever_a_target_is_asked_for(
    predicting: Predicting, tmp_path: Path
) -> None:
    essence, path = predicting(threshold=-1), tmp_path / "target.png"
    picture(1).save(path)
    expected = essence.direction(picture(1))
    array = np.asarray(picture(1))
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 127.5 - 1
    for given in (path, str(path), array, array / 255, tensor, picture(1).convert("RGBA")):
        found = essence.direction(given)
        assert torch.equal(found.vector, expected.vector) and found.probe == expected.probe
    assert torch.equal(essence.predict(str(path)).vector, expected.vector)
    embedding = essence.embed_target(picture(1))
    assert torch.equal(essence.embed_target(path), embedding)
    for name in ("release", "consistent"):  # the first starts at the inversion
        found = essence.optimize(str(path), quick(name))
        assert torch.equal(found.vector, essence.optimize(picture(1), quick(name)).vector)
    images = essence.edit(essence.scene.sources(2), expected, [0.0, 1.0])
    scores = essence.score(str(path), *images)
    assert torch.equal(scores.target_after, essence.score(picture(1), *images).target_after)


def test_words_that_are_no_file_are_refused_where_a_picture_is_meant(
    predicting: Predicting,
) -> None:
    essence = predicting()
    for ask in (essence.direction, essence.predict, essence.embed_target):
        with pytest.raises(FileNotFoundError, match="or give words as text='green hair'"):
            ask("green hair")


def test_a_directions_generator_is_known(predicting: Predicting) -> None:
    essence = predicting(threshold=2)
    fingerprint = essence.scene.generator.fingerprint
    modes: list[Mode] = ["instant", "auto", "refine", "optimize"]
    for mode in modes:
        assert essence.direction(picture(), mode, quick()).generator == fingerprint


def test_a_recipe_may_be_named(essence: EssenceTransfer) -> None:
    with pytest.raises(ValueError, match="found 'relaese': did you mean 'release'"):
        essence.direction(picture(), "optimize", "relaese")
    with pytest.raises(ValueError, match="needs an identity model"):
        essence.direction(picture(), "optimize", "identity")


# On another device


# Texts


def reading(scene: Scene, mapper: Mapper | None = None) -> EssenceTransfer:
    """With texts."""
    texts = TextTargets(scene.embedder, ("a face",))
    return EssenceTransfer(scene, mapper, texts=texts)


def test_a_text_becomes_a_target_beside_the_bank_of_sources(scene: Scene) -> None:
    essence = reading(scene)
    with torch.no_grad():
        images = scene.generator.synthesis(scene.bank())
        sources = scene.embedder.embed_images(images)
    bank = essence.source_features("consistent", 0)
    torch.testing.assert_close(bank, sources, rtol=1e-4, atol=1e-4)
    assert essence.texts is not None
    expected = essence.texts.embed("a hat", bank)
    torch.testing.assert_close(essence.embed_target(Text("a hat")), expected)


@pytest.mark.parametrize("one_direction", [False, True])
def test_what_a_text_does_not_name_is_the_answer_to_the_mean_source(
    one_direction: bool, scene: Scene, reading_mapper: Path
) -> None:
    essence = reading(scene, load_mapper(reading_mapper)[0])
    mean = F.normalize(F.normalize(essence.source_features("consistent", 0), dim=1).mean(0), dim=0)
    shared = essence.asked_mapper().edits(mean[None], ws := scene.sources(3))[0]
    whole = essence.direction(text="green hair", mode="instant", one_direction=one_direction)
    named = essence.only_named(whole)
    if one_direction:
        assert named.correction is None
        shared = essence.asked_mapper()(mean[None]).directions
    expected = ws + whole.offsets(ws) - shared
    torch.testing.assert_close(ws + named.offsets(ws), expected, rtol=1e-3, atol=1e-5)
    assert (named.method, named.expected) == (whole.method, None)  # no score of another direction
    with pytest.raises(ValueError, match="there is no mapper"):
        reading(scene).only_named(whole)
    found = essence.direction(text="green hair", mode="optimize", recipe=quick())
    assert essence.only_named(found) is found


def test_a_text_is_a_target_like_any_other(scene: Scene) -> None:
    essence = reading(scene)
    direction = essence.direction(text="green hair", mode="optimize", recipe=quick(steps=40))
    ws = essence.scene.sources(4)
    before, after = essence.edit(ws, direction, 0.0), essence.edit(ws, direction)
    green, other = (essence.score(Text(t), before, after) for t in ("green hair", "glasses"))
    assert float(green.transfer) > float(green.target_before.mean()) + 0.05
    assert float(green.transfer) != pytest.approx(float(other.transfer), abs=1e-2)


def test_a_text_is_refused_where_nothing_is_said_of_texts(essence: EssenceTransfer) -> None:
    with pytest.raises(ValueError, match="'green hair' is a text"):
        essence.direction(Text("green hair"), "optimize", quick())


def test_the_inversion_of_a_text_is_refused(scene: Scene) -> None:
    with pytest.raises(ValueError, match="'green hair' is a text, which has no inversion"):
        reading(scene).direction(Text("green hair"), "optimize", quick("release"))
    assert reading(scene).initial(Text("green hair"), "random", 0).shape == (6, 8)


# Loading


def test_a_world_is_loaded_by_its_name_or_itself_with_its_mapper_or_another(
    tiny_world: Path, tiny_mapper: Path
) -> None:
    named = load_essence(str(tiny_world), max_images=3)
    assert load_essence(tiny_world).scene.generator.fingerprint == (
        named.scene.generator.fingerprint
    )
    world = load_world(str(tiny_world))
    given = load_essence(world, "cpu", str(tiny_mapper))
    assert named.mapper is None and named.texts is None and named.scene.max_images == 3
    assert named.scene.generator.fingerprint == given.scene.generator.fingerprint
    assert named.recipe == RECIPES[world.recipe] and named.scene.truncation == world.truncation
    assert given.asked_mapper().fingerprint == load_mapper(tiny_mapper)[0].fingerprint
    world = dataclasses.replace(world, mapper=tiny_mapper, neutral=("a face",))
    assert load_essence(world).direction(text="a hat", mode="instant").method == "mapper"


# Identity


def test_sources_keep_an_identity_floor(scene: Scene, essence: EssenceTransfer) -> None:
    ws = essence.scene.sources(3)
    direction = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no identity model"):
        essence.strength_at_identity(ws, direction, 0.9)
    holding = EssenceTransfer(knowing(scene))
    model = holding.scene.identity
    assert model is not None

    def kept(strength: float) -> float:
        edited = essence.edit(ws, direction, strength)
        return float(identity_similarity(model, essence.edit(ws, direction, 0), edited).mean())

    floor = (1 + kept(2.0)) / 2
    found = holding.strength_at_identity(ws, direction, floor, highest=2.0)
    assert 0 < found < 2 and kept(found) >= floor > kept(found + 2 / 160)
    assert holding.strength_at_identity(ws, direction, -1.0, highest=2.0) == 2
