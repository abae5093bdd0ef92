"""Test sets: what is in them, what must not be, and that they never change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.illustrated.avatars import HELD_OUT, TRAINED, draw
from data.illustrated.shown import Shown, shown
from data.targets import Target, avatar_at, face_at, open_targets, picture_id, split_of
from eval.sets import (
    ADVERSARIES,
    FOLDER,
    EvalSet,
    adversarial,
    check_sources,
    check_unseen,
    folder_set,
    held_out_styles,
    in_range,
    joined,
    samples,
    study_set,
    trained_styles,
)
from targetclip.seeds import PAIR_SOURCES, TEST_SOURCES, TEST_TARGETS, VALIDATION_SOURCES
from targetclip.world import load_scene, load_world

AVATARS: dict[str, Callable[[int], EvalSet]] = {
    "avataaars": in_range, "styles": trained_styles, "held-out": held_out_styles,
}  # fmt: skip


def blotches(number: int) -> list[Image.Image]:
    """Pictures any two of which differ."""
    arrays = [np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8) for i in range(number)]
    return [Image.fromarray(array) for array in arrays]


def pixels(targets: EvalSet) -> list[bytes]:
    return [picture.tobytes() for picture in targets.pictures]


def same(a: EvalSet, b: EvalSet) -> bool:
    return (a.ids, a.origins, pixels(a)) == (b.ids, b.origins, pixels(b))


def index_of(origin: str) -> int:
    kind, _, rest = origin.partition(":")
    index, _, seed = rest.partition("@")
    assert kind in (*AVATARS, "generated") and seed == str(TEST_TARGETS)
    return int(index)


def taken(spec: str, place: int) -> Target:
    """What data.build and every trainer would take as this target."""
    target = next(open_targets(f"{spec}:{place + 1}@{TEST_TARGETS}").starting_at(place))
    assert isinstance(target, Target)
    return target


# Avatars and samples


@pytest.mark.parametrize("kind", AVATARS)
def test_avatars_are_of_the_test_split_as_every_trainer_would_name_them(kind: str) -> None:
    found = AVATARS[kind](2)
    assert {split_of(name) for name in found.ids} == {"test"}
    for i, origin in enumerate(found.origins):
        target = taken(kind, index_of(origin))
        assert (target.id, target.origin) == (found.ids[i], origin)
        assert target.picture.tobytes() == found.pictures[i].tobytes()


def test_a_set_is_always_the_same_and_the_start_of_a_larger_one() -> None:
    for make in AVATARS.values():
        assert same(make(3).part(0, 2), make(2))
    whole = in_range(3)
    last = whole.part(2, 3)
    assert len(last) == 1 and last.ids == whole.ids[2:] and last.truth and whole.truth
    assert torch.equal(last.truth.readings, whole.truth.readings[2:])
    assert last.truth.contents == whole.truth.contents[2:]


def test_sets_are_of_the_generators_style_of_others_and_of_held_out_ones() -> None:
    def styles(kind: str, found: EvalSet) -> set[str]:
        return {avatar_at(kind, TEST_TARGETS, index_of(origin))[0] for origin in found.origins}

    assert styles("styles", trained_styles(12)) <= set(TRAINED) - {"avataaars"}
    assert styles("held-out", held_out_styles(6)) <= set(HELD_OUT)


def test_truth_says_what_a_picture_shows() -> None:
    found = in_range(2)
    assert found.truth is not None
    for content, origin in zip(found.truth.contents, found.origins, strict=True):
        assert list(content) == face_at(TEST_TARGETS, index_of(origin))  # type: ignore[arg-type]
    others = held_out_styles(2)
    assert others.truth is not None
    for content, origin in zip(others.truth.contents, others.origins, strict=True):
        style, options = avatar_at("held-out", TEST_TARGETS, index_of(origin))
        assert content == shown(style, draw(style, options)[1])


def test_a_generators_own_samples_are_in_range_of_it(tiny_world: Path) -> None:
    generator = load_scene(load_world(str(tiny_world))).generator
    found = samples(generator, 1.0, 2)
    assert found.truth is None and {split_of(name) for name in found.ids} == {"test"}
    place = index_of(found.origins[1])
    targets = open_targets(f"generated:{place + 1}@{TEST_TARGETS}", generator, 1.0)
    target = next(targets.starting_at(place))
    assert isinstance(target, Target) and target.id == found.ids[1]
    assert target.picture.tobytes() == found.pictures[1].tobytes()


def test_every_second_target_of_the_study_is_of_another_style() -> None:
    study = study_set(5)
    assert same(study.part(0, 2), study_set(2)) and study.truth is not None
    kinds = [origin.partition(":")[0] for origin in study.origins]
    assert kinds == ["avataaars", "styles"] * 2 + ["avataaars"]
    assert [isinstance(c, Shown) for c in study.truth.contents] == [False, True, False, True, False]


# Adversaries


def test_every_adversary_is_what_it_is_called() -> None:
    sources = blotches(3)
    found = adversarial(len(ADVERSARIES), 64, sources)
    assert {split_of(name) for name in found.ids} == {"test"} and found.truth is None
    assert {picture.size for picture in found.pictures} == {(64, 64), (4, 4)}
    shown = dict(zip(found.origins, found.pictures, strict=True))
    colours = {kind: len(picture.getcolors(4096) or ()) for kind, picture in shown.items()}
    assert colours["blank"] == 1 and colours["checkerboard"] == 2 and colours["noise"] > 4000
    assert 2 < colours["text"] <= 256 and shown["text"].getpixel((0, 0)) == (255, 255, 255)
    originals = [picture.tobytes() for picture in sources]
    turned = [picture.rotate(180).tobytes() for picture in sources]
    assert shown["source"].tobytes() in originals
    assert shown["upside down"].tobytes() in turned


def test_more_adversaries_are_other_ones_and_the_first_stay() -> None:
    few, many = adversarial(6, 16, blotches(3)), adversarial(12, 16, blotches(3))
    assert same(many.part(0, 6), few)
    assert many.origins[6:] == many.origins[:6] and len(set(many.ids)) == 12


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, picture in enumerate(blotches(80)):
        picture.save(tmp_path / f"{i:03d}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


def test_of_a_folder_the_test_split_alone_is_taken(folder: Path) -> None:
    wanted = [name for name in map(picture_id, blotches(80)) if split_of(name) == "test"]
    assert len(wanted) >= 2
    assert list(folder_set(folder, 80, trusted=False).ids) == wanted
    assert list(folder_set(folder, 1, trusted=False).ids) == wanted[:1]
    assert len(folder_set(folder, 100, trusted=True)) == 80


def test_a_folder_without_test_pictures_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    for i, picture in enumerate(blotches(80)):
        if split_of(picture_id(picture)) == "test":
            (folder / f"{i:03d}.png").unlink()
    with pytest.raises(ValueError, match="--trust-folder"):
        folder_set(folder, 8, trusted=False)
    with pytest.raises(ValueError, match="expected a folder"):
        folder_set(tmp_path / "none", 8, trusted=False)


# Checks


def named(*names: str, kind: str = FOLDER) -> EvalSet:
    pictures = tuple(blotches(len(names)))
    origins = tuple(f"{name}.png" for name in names)
    return EvalSet(name=kind, ids=names, origins=origins, pictures=pictures)


def test_a_target_that_may_have_been_trained_on_is_refused() -> None:
    test = next(str(i) for i in range(1000) if split_of(str(i)) == "test")
    train = next(str(i) for i in range(1000) if split_of(str(i)) == "train")
    check_unseen([named(test, kind="avataaars"), named(test)], {train}, trusted=False)
    with pytest.raises(ValueError, match=f"{train} of train"):
        check_unseen([named(test, train)], set(), trusted=False)
    check_unseen([named(test, train)], set(), trusted=True)
    with pytest.raises(ValueError, match="test split alone"):
        check_unseen([named(train, kind="avataaars")], set(), trusted=True)
    for trusted in (False, True):
        with pytest.raises(ValueError, match=f"{test} .* among the training pairs"):
            check_unseen([named(test)], {test}, trusted=trusted)


def test_sources_that_others_use_are_refused() -> None:
    check_sources(TEST_SOURCES, 68)
    for seed, owner in (
        (VALIDATION_SOURCES, "trainings validate on"),
        (PAIR_SOURCES, "score pairs"),
    ):
        with pytest.raises(ValueError, match=f"16 of sources that {owner}"):
            check_sources(seed, 16)


def test_sets_are_joined_in_turn() -> None:
    targets = study_set(4)
    halves = [targets.part(0, 2), targets.part(2, 4)]
    both = joined("both", halves)
    assert both.ids == tuple(targets.ids[i] for i in (0, 2, 1, 3))
    assert both.truth is not None and targets.truth is not None
    assert both.truth.contents == tuple(targets.truth.contents[i] for i in (0, 2, 1, 3))
    assert both.truth.readings[1].equal(targets.truth.readings[2])
