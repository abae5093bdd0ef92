"""What one pass of the bundled mapper does to pictures, read off by the attribute reader."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from data.drawn.readings import READINGS
from data.drawn.sketch import NAMES, Face, draw
from jaxtyping import Float
from torch import Tensor

from eval.reader import AttributeReader, load_reader
from predictor import EssenceTransfer, load_essence, mixed
from predictor.direction import layer_weights
from targetclip import load_world
from targetclip.encoders.identity import identity_similarity
from targetclip.recipes import RECIPES

COUNT = 12  # sources
OFF = ("hat", "beard", "glasses", "moustache", "lipstick", "blush", "face_paint")


@pytest.fixture(scope="module")
def essence() -> EssenceTransfer:
    return load_essence("avatars")


@pytest.fixture(scope="module")
def reader() -> AttributeReader:
    return load_reader()


def face(**values: float) -> Face:
    """An ordinary face, without anything that is put on, but for what is said."""
    return Face(**(dict.fromkeys(NAMES, 0.5) | dict.fromkeys(OFF, 0.0) | values))


SPECTACLED = face(glasses=1.0, glasses_colour=0.05, lens=0.0, hair_colour=0.4)
BEARDED = face(beard=0.9, moustache=1.0, hair_colour=0.4)
HATTED = face(hat=1.0, hat_colour=0.05)


def column(name: str) -> int:
    return next(reading.start for reading in READINGS if reading.name == name)


@pytest.fixture(scope="module")
def read(
    essence: EssenceTransfer, reader: AttributeReader
) -> Callable[[Tensor, float], Float[Tensor, "sources outputs"]]:
    """Readings of sources moved along a direction."""
    sources = essence.scene.sources(COUNT, seed=3)

    def readings(vector: Tensor, strength: float = 1.0) -> Tensor:
        found: Tensor = reader(essence.edit(sources, vector, strength).clamp(-1, 1))
        return found

    return readings


Read = Callable[..., Float[Tensor, "sources outputs"]]


def mean(readings: Tensor, name: str) -> float:
    return float(readings[:, column(name)].mean())


def test_the_worlds_recipe_is_the_optimizers(essence: EssenceTransfer) -> None:
    assert essence.recipe == RECIPES[load_world("avatars").recipe] == RECIPES["identity"]


def test_the_world_names_a_calibrated_mapper(essence: EssenceTransfer) -> None:
    direction = essence.direction(draw(SPECTACLED))
    assert direction.method == "mapper" and direction.steps == 0
    assert direction.probe is not None and direction.expected is not None
    assert abs(direction.probe - direction.expected) < 0.1


def test_an_answer_to_one_target_is_that_to_many(essence: EssenceTransfer) -> None:
    targets = [draw(SPECTACLED), draw(BEARDED), draw(HATTED)]
    embeddings = torch.stack([essence.embed_target(each, essence.trained) for each in targets])
    many = essence.predict_embeddings(embeddings)
    for i, target in enumerate(targets):
        one = essence.predict(target)
        torch.testing.assert_close(one.vector, many.directions[i], rtol=1e-4, atol=1e-5)
        assert one.expected == pytest.approx(float(many.expected[i]), abs=1e-5)


def test_one_pass_brings_unseen_sources_to_the_target(essence: EssenceTransfer) -> None:
    sources = essence.scene.sources(COUNT, seed=3)
    for wanted in (SPECTACLED, BEARDED, HATTED):
        target = draw(wanted)
        vector = essence.predict(target).vector
        before = essence.edit(sources, vector, 0.0)
        scores = essence.score(target, before, essence.edit(sources, vector))
        assert float(scores.transfer) > 0.8 > float(scores.target_before.mean())


def test_more_strength_brings_more(essence: EssenceTransfer, read: Read) -> None:
    for wanted, name in ((SPECTACLED, "glasses"), (BEARDED, "beard")):
        vector = essence.predict(draw(wanted)).vector
        found = [mean(read(vector, strength), name) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
        # A reading of nearly 1 has nowhere to go: there it may waver.
        assert all(a < b + 0.03 for a, b in pairwise(found)) and found[-1] > found[0] + 0.2


def test_a_mixture_of_two_targets_brings_what_each_has(
    essence: EssenceTransfer, read: Read
) -> None:
    each = [essence.predict(draw(one)) for one in (SPECTACLED, HATTED)]
    before, both = read(each[0].vector, 0.0), read(mixed(each, [0.5, 0.5]).vector)
    spectacled, hatted = (read(one.vector) for one in each)
    # A target without a hat says so: each alone takes away what the other brings.
    assert mean(both, "glasses") > max(mean(before, "glasses"), mean(hatted, "glasses")) + 0.2
    assert mean(both, "hat") > max(mean(before, "hat"), mean(spectacled, "hat")) + 0.2


def test_less_of_a_target_takes_away_what_it_has(essence: EssenceTransfer, read: Read) -> None:
    direction = essence.predict(draw(HATTED))
    before, less = read(direction.vector, 0.0), read(mixed([direction], [-0.5]).vector)
    assert mean(less, "hat") < 0.2 * mean(before, "hat")


def test_coarse_layers_carry_shapes_and_fine_ones_do_not(
    essence: EssenceTransfer, read: Read
) -> None:
    vector = essence.predict(draw(SPECTACLED)).vector
    layers = essence.scene.generator.num_ws
    without = [
        mean(read(vector * layer_weights(layers, **weights)[:, None]), "glasses")
        for weights in ({"fine": 0.0}, {"coarse": 0.0, "middle": 0.0})
    ]
    assert without[0] > without[1] + 0.2


def test_an_identity_floor_is_kept_by_less_strength(essence: EssenceTransfer) -> None:
    sources = essence.scene.sources(COUNT, seed=3)
    vector = essence.predict(draw(BEARDED)).vector
    assert essence.scene.identity is not None
    before, after = essence.edit(sources, vector, 0.0), essence.edit(sources, vector)
    whole = float(identity_similarity(essence.scene.identity, before, after).mean())
    floors = (whole - 0.1, (whole + 1) / 2, (whole + 3) / 4)
    found = [essence.strength_at_identity(sources, vector, floor) for floor in floors]
    assert 0 < found[2] < found[1] < found[0] == 1


def test_words_bring_what_they_say(essence: EssenceTransfer, read: Read) -> None:
    for text, name in (("round glasses", "glasses"), ("a long beard", "beard"), ("a hat", "hat")):
        vector = essence.direction(text=text, mode="instant").vector
        assert mean(read(vector), name) > mean(read(vector, 0.0), name) + 0.15
