"""What one pass of the bundled mapper does to pictures, read off by the attribute reader."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from PIL import Image

from data.illustrated.codes import ATTRIBUTES, HAIR_COLOURS, HAT_COLOURS, draw_face
from eval.reader import SPANS, AvatarReader, load_reader
from predictor import EssenceTransfer, load_essence, mixed
from predictor.direction import Direction, Gate, layer_weights
from targetclip import load_world
from targetclip.encoders.identity import identity_similarity
from targetclip.recipes import RECIPES
from targetclip.world import DEFAULT_WORLD

COUNT = 12  # sources


@pytest.fixture(scope="module")
def essence() -> EssenceTransfer:
    return load_essence()


@pytest.fixture(scope="module")
def reader() -> AvatarReader:
    return load_reader()


def drawn(**values: str) -> Image.Image:
    """The picture of an ordinary face, but for what is said."""
    known = {"top": "shortFlat", "hairColor": HAIR_COLOURS["brown"], **values}
    face = [a.values.index(known.get(a.name, a.values[0])) for a in ATTRIBUTES]
    return Image.fromarray(draw_face(face)[0])


SPECTACLED = {"accessories": "prescription02"}
BEARDED = {"facialHair": "beardMedium", "hairColor": HAIR_COLOURS["black"]}
HATTED = {"top": "winterHat03", "hatColor": HAT_COLOURS["blue"]}


Read = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def read(essence: EssenceTransfer, reader: AvatarReader) -> Read:
    """The mean share of sources moved along a direction that have glasses, a beard, a hat."""
    sources = essence.scene.sources(COUNT, seed=3)

    def readings(direction: Direction, strength: float = 1.0) -> dict[str, float]:
        found = reader.read(essence.edit(sources, direction, strength))[1].mean(dim=0)
        return {kind: float(found[SPANS[kind]][1]) for kind in ("glasses", "beard", "hat")}

    return readings


def test_the_worlds_recipe_is_the_optimizers(essence: EssenceTransfer) -> None:
    assert essence.recipe == RECIPES[load_world(DEFAULT_WORLD).recipe] == RECIPES["identity"]


def test_the_world_names_a_calibrated_mapper(essence: EssenceTransfer) -> None:
    direction = essence.direction(drawn(**SPECTACLED))
    assert direction.method == "mapper" and direction.steps == 0
    assert direction.probe is not None and direction.expected is not None
    assert abs(direction.probe - direction.expected) < 0.15


def test_an_answer_to_one_target_is_that_to_many(essence: EssenceTransfer) -> None:
    targets = [drawn(**each) for each in (SPECTACLED, BEARDED, HATTED)]
    embeddings = torch.stack([essence.embed_target(each, essence.trained) for each in targets])
    many = essence.asked_mapper()(embeddings)
    for i, target in enumerate(targets):
        one = essence.predict(target)
        torch.testing.assert_close(one.vector, many.directions[i], rtol=1e-4, atol=1e-5)
        assert one.expected == pytest.approx(float(many.expected[i]), abs=1e-5)


def test_one_pass_brings_unseen_sources_to_the_target(essence: EssenceTransfer) -> None:
    sources = essence.scene.sources(COUNT, seed=3)
    for wanted in (SPECTACLED, BEARDED, HATTED):
        target = drawn(**wanted)
        direction = essence.predict(target)
        before = essence.edit(sources, direction, 0.0)
        scores = essence.score(target, before, essence.edit(sources, direction))
        assert float(scores.transfer) > float(scores.target_before.mean()) + 0.2


def test_more_strength_brings_more(essence: EssenceTransfer, read: Read) -> None:
    for wanted, kind in ((SPECTACLED, "glasses"), (BEARDED, "beard")):
        direction = essence.predict(drawn(**wanted))
        found = [read(direction, strength)[kind] for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
        # A share of nearly 1 has nowhere to go: there it may waver.
        assert all(a < b + 0.05 for a, b in pairwise(found)) and found[-1] > found[0] + 0.2


def test_a_mixture_of_two_targets_has_more_of_each_than_the_other_alone(
    essence: EssenceTransfer, read: Read
) -> None:
    each = [essence.predict(drawn(**one)) for one in (SPECTACLED, HATTED)]
    both = read(mixed(each, [1.0, 1.0]))
    spectacled, hatted = (read(one) for one in each)
    # A target without a hat says so: each alone takes away what the other brings.
    assert both["glasses"] > hatted["glasses"] + 0.1 and both["hat"] > spectacled["hat"] + 0.1


def test_features_of_one_target_and_the_shape_of_another_bring_more_of_both_than_their_sum(
    essence: EssenceTransfer, read: Read
) -> None:
    one, other = (essence.predict(drawn(**each)) for each in (SPECTACLED, BEARDED))
    layers = essence.scene.generator.num_ws
    features = one.weighted(layer_weights(layers, 0.85, 1.3, 1.0))
    found = read(features + other.weighted(layer_weights(layers, 2.0, 0.4, 0.0)))
    plain, before = read(one + other), read(one, 0.0)
    assert min(found[kind] - plain[kind] for kind in ("glasses", "beard")) > 0.05
    assert min(found[kind] - before[kind] for kind in ("glasses", "beard")) > 0.15


def test_less_of_a_target_leads_away_from_it(essence: EssenceTransfer) -> None:
    sources, target = essence.scene.sources(COUNT, seed=3), drawn(**SPECTACLED)
    less = mixed([essence.predict(target)], [-0.5])
    before, after = essence.edit(sources, less, 0.0), essence.edit(sources, less)
    scores = essence.score(target, before, after)
    assert float(scores.transfer) < float(scores.target_before.mean()) - 0.02


def test_coarse_layers_carry_shapes_and_fine_ones_do_not(
    essence: EssenceTransfer, read: Read
) -> None:
    direction = essence.predict(drawn(**SPECTACLED))
    layers = essence.scene.generator.num_ws
    without = [
        read(direction.weighted(layer_weights(layers, **weights)))["glasses"]
        for weights in ({"fine": 0.0}, {"coarse": 0.0, "middle": 0.0})
    ]
    assert without[0] > without[1]


def test_an_identity_floor_is_kept_by_less_strength(essence: EssenceTransfer) -> None:
    sources = essence.scene.sources(COUNT // 3, seed=3)  # they are edited again and again
    direction = essence.predict(drawn(**BEARDED))
    assert essence.scene.identity is not None
    before, after = essence.edit(sources, direction, 0.0), essence.edit(sources, direction)
    whole = float(identity_similarity(essence.scene.identity, before, after).mean())
    floors = (whole - 0.1, (whole + 1) / 2, (whole + 3) / 4)
    found = [essence.strength_at_identity(sources, direction, floor) for floor in floors]
    assert 0 < found[2] < found[1] < found[0] == 1


def test_a_place_on_the_trade_off_trades_essence_for_identity(
    essence: EssenceTransfer, read: Read
) -> None:
    sources = essence.scene.sources(COUNT, seed=3)
    directions = [
        essence.direction(drawn(**SPECTACLED), "instant", keep_identity=keep)
        for keep in (0.0, 0.34, 1.0)
    ]
    assert essence.scene.identity is not None
    before = essence.edit(sources, directions[0], 0.0)
    people = [
        float(
            identity_similarity(essence.scene.identity, before, essence.edit(sources, one)).mean()
        )
        for one in directions
    ]
    assert torch.equal(essence.predict(drawn(**SPECTACLED)).vector, directions[1].vector)
    assert people == sorted(people) and people[-1] > people[0] + 0.02
    arrived = [read(one)["glasses"] for one in directions]
    assert arrived[0] > arrived[-1] and arrived[0] > read(directions[0], 0)["glasses"]
    mapper = essence.asked_mapper()
    assert Gate.of(mapper, 1.0).threshold < Gate.of(mapper, 0.0).threshold


def test_words_bring_what_they_say(essence: EssenceTransfer, read: Read) -> None:
    for text, kind in (("round glasses", "glasses"), ("a long beard", "beard"), ("a hat", "hat")):
        direction = essence.direction(text=text, mode="instant")
        assert read(direction)[kind] > read(direction, 0.0)[kind] + 0.15
