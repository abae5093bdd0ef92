"""Test sets: what is in them, what must not be, and that they never change."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.drawn.readings import READINGS, readings_of
from data.drawn.sketch import NAMES, Extras, Face, Style
from data.targets import Target, open_targets, picture_id, split_of, wide_indices
from eval.sets import (
    ADVERSARIES,
    FOLDER,
    EvalSet,
    adversarial,
    check_sources,
    check_unseen,
    drawn_set,
    folder_set,
    in_range,
    out_of_range,
    samples,
    study_set,
)
from targetclip.seeds import PAIR_SOURCES, TEST_SOURCES, TEST_TARGETS, VALIDATION_SOURCES
from targetclip.world import load_scene, load_world

FACE = Face(**dict.fromkeys(NAMES, 0.5) | {"glasses": 1.0, "lens": 0.0, "hat": 0.0})


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
    assert kind in ("drawn", "wide", "generated") and seed == str(TEST_TARGETS)
    return int(index)


def taken(spec: str, place: int) -> Target:
    """What data.build and every trainer would take as this target."""
    target = next(open_targets(f"{spec}:{place + 1}@{TEST_TARGETS}").starting_at(place))
    assert isinstance(target, Target)
    return target


# Drawn faces and samples


def test_drawn_targets_are_of_the_test_split_as_every_trainer_would_name_them() -> None:
    for spec, found in (("drawn", in_range(2)), ("wide", out_of_range(2))):
        assert {split_of(name) for name in found.ids} == {"test"}
        for i, origin in enumerate(found.origins):
            index = index_of(origin)
            # The builder counts wide faces without those that came out plain.
            wide = list(islice(wide_indices(TEST_TARGETS), index + 1))
            target = taken(spec, index if spec == "drawn" else wide.index(index))
            assert (target.id, target.origin) == (found.ids[i], origin)
            assert target.picture.tobytes() == found.pictures[i].tobytes()


def test_a_set_is_always_the_same_and_the_start_of_a_larger_one() -> None:
    assert same(in_range(3).part(0, 2), in_range(2))
    assert same(out_of_range(3).part(0, 2), out_of_range(2))
    whole = in_range(3)
    last = whole.part(2, 3)
    assert len(last) == 1 and last.ids == whole.ids[2:] and last.truth and whole.truth
    assert torch.equal(last.truth.readings, whole.truth.readings[2:])
    assert last.truth.faces == whole.truth.faces[2:]


def test_truth_says_what_a_picture_shows() -> None:
    for found in (in_range(2), out_of_range(2)):
        assert found.truth is not None
        for i, face in enumerate(found.truth.faces):
            values, seen = readings_of(face)
            np.testing.assert_allclose(found.truth.readings[i], values, rtol=1e-6)
            assert not (found.truth.seen[i].numpy() & ~seen).any()


def test_what_a_mask_or_grey_hides_is_not_asked_for() -> None:
    triples = [
        (FACE, Extras(), Style()),
        (FACE, Extras(mask=True), Style()),
        (FACE, Extras(), Style(grey=True)),
    ]
    truth = drawn_set("drawn", {"a": "", "b": "", "c": ""}, triples).truth
    assert truth is not None
    plain, masked, grey = truth.seen

    def hidden(seen: torch.Tensor) -> set[str]:
        return {r.name for r in READINGS if plain[r.start] and not seen[r.start]}

    assert hidden(masked) == {"glasses", "glasses_shape", "lens", "glasses_colour"}
    assert hidden(grey) == {"hair_colour", "glasses_colour"}


def test_a_generators_own_samples_are_in_range_of_it(tiny_world: Path) -> None:
    generator = load_scene(load_world(str(tiny_world))).generator
    found = samples(generator, 1.0, 2)
    assert found.truth is None and {split_of(name) for name in found.ids} == {"test"}
    place = index_of(found.origins[1])
    targets = open_targets(f"generated:{place + 1}@{TEST_TARGETS}", generator, 1.0)
    target = next(targets.starting_at(place))
    assert isinstance(target, Target) and target.id == found.ids[1]
    assert target.picture.tobytes() == found.pictures[1].tobytes()


def test_every_second_face_of_the_study_is_out_of_range() -> None:
    study = study_set(4)
    assert same(study.part(0, 2), study_set(2)) and study.truth is not None
    # A style that hides readings changes the picture, not what counts.
    plain = drawn_set("plain", {"a": ""}, [(study.truth.faces[0], Extras(), Style())])
    assert pixels(plain) == pixels(study)[:1]
    other = drawn_set("plain", {"a": ""}, [(study.truth.faces[1], Extras(), Style())])
    assert pixels(other) != pixels(study)[1:2] and other.truth is not None
    assert torch.equal(other.truth.seen[0], study.truth.seen[1])


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
    check_unseen([named(test, kind="drawn"), named(test)], {train}, trusted=False)
    with pytest.raises(ValueError, match=f"{train} of train"):
        check_unseen([named(test, train)], set(), trusted=False)
    check_unseen([named(test, train)], set(), trusted=True)
    with pytest.raises(ValueError, match="test split alone"):
        check_unseen([named(train, kind="drawn")], set(), trusted=True)
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
