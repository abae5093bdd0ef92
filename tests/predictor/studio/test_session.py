"""Tests of what a visitor works on, without the page."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from predictor.direction import Interrupted
from predictor.studio.session import (
    LARGEST,
    MAX_FACTOR,
    MAX_SOURCES,
    MAX_TARGETS,
    MAX_TEXT,
    OpenWorld,
    Settings,
    direction_of,
    edit,
    find_targets,
    for_people,
    generate_sources,
    in_words,
    open_world,
    read_pictures,
    read_sources,
    strength_within,
    write_files,
)
from targetclip.media.alignment import FaceFinder
from targetclip.world import load_world


@pytest.fixture(scope="module")
def opened(who_world: Path, reading_mapper: Path) -> OpenWorld:
    return open_world(load_world(str(who_world)), "cpu", reading_mapper)


def texts(faces: list[Path]) -> list[str]:
    return [str(face) for face in faces]


def test_settings_only_apply_what_was_found_once(opened: OpenWorld, faces: list[Path]) -> None:
    found = find_targets(opened, texts(faces[:1]), mode="instant")
    sources = read_sources(opened, texts(faces[1:]))
    plain = edit(opened, found, sources, Settings(strength=0))
    assert torch.allclose(plain.scores[0].source_after, torch.ones(2), atol=1e-5)
    moved = edit(opened, found, sources, Settings(strength=1))
    assert (moved.scores[0].source_after < 0.999).all()
    expected = opened.essence.edit_pictures(sources.ws, found.parts[0], 1.0)
    assert [p.tobytes() for p in moved.pictures] == [p.tobytes() for p in expected]


def test_several_targets_are_mixed_by_their_weights(opened: OpenWorld, faces: list[Path]) -> None:
    found = find_targets(opened, texts(faces[:2]), mode="instant")
    mixed = direction_of(opened, found, Settings(weights=(1, -0.5, 0.5, 0.5)))
    one, other = (part.vector for part in found.parts)
    torch.testing.assert_close(mixed.vector, one - 0.5 * other)
    edited = edit(
        opened, found, generate_sources(opened, 1, 0), Settings(weights=(1, -0.5, 0.5, 0.5))
    )
    words = in_words(found, edited, Settings())
    assert {"Transfer score, target 1 (target)", "Transfer score, target 2 (a)"} <= {*words}


def test_a_text_brings_to_a_mixture_what_it_names_alone(
    who_world: Path, tiny_mapper: Path, faces: list[Path]
) -> None:
    world = replace(load_world(str(who_world)), neutral=("a face",))
    opened = open_world(world, "cpu", tiny_mapper)
    whole = opened.essence.direction(text="green hair", mode="instant")
    [alone] = find_targets(opened, [], "green hair", mode="instant").parts
    assert torch.equal(alone.vector, whole.vector)
    named = find_targets(opened, texts(faces[:1]), "green hair", mode="instant").parts[1]
    torch.testing.assert_close(named.vector, 2 * opened.essence.only_named(whole).vector)
    assert not torch.equal(named.vector, whole.vector)


def test_one_direction_and_layers_are_those_of_the_command(
    opened: OpenWorld, faces: list[Path]
) -> None:
    found = find_targets(opened, texts(faces[:1]), mode="instant")
    part = found.parts[0]
    assert part.correction is not None
    alike = direction_of(opened, found, Settings(one_direction=True))
    assert alike.correction is None and torch.equal(alike.vector, part.vector)
    flat = direction_of(opened, found, Settings(coarse=0))
    assert not flat.vector[:4].any() and torch.equal(flat.vector[4:], part.vector[4:])


def test_the_identity_to_keep_lowers_the_strength(opened: OpenWorld, faces: list[Path]) -> None:
    found = find_targets(opened, texts(faces[:1]), mode="instant")
    sources = generate_sources(opened, 3, 1)
    assert strength_within(opened, found, sources, Settings()) == MAX_FACTOR
    full = edit(opened, found, sources, Settings(strength=2))
    kept = full.scores[0].identity
    assert kept is not None
    settings = Settings(strength=2, floor=(1 + float(kept.mean())) / 2)
    most = strength_within(opened, found, sources, settings)
    edited = edit(opened, found, sources, settings, most)
    assert 0 < edited.strength < 2
    held = edited.scores[0].identity
    assert held is not None and float(held.mean()) >= settings.floor - 1e-4
    assert "lowered" in in_words(found, edited, settings)["Strength"]


def test_a_search_that_is_stopped_gives_the_direction_so_far(
    opened: OpenWorld, faces: list[Path]
) -> None:
    steps = list[int]()

    def begun(method: object, recipe: object) -> object:
        def on_step(progress: object) -> None:
            steps.append(progress.step)  # type: ignore[attr-defined]
            if len(steps) == 3:
                raise KeyboardInterrupt

        return on_step

    found = find_targets(opened, texts(faces[:1]), mode="optimize", watch=begun)  # type: ignore[arg-type]
    assert len(steps) == 3 and found.parts[0].vector.any()
    assert issubclass(Interrupted, KeyboardInterrupt)


@pytest.mark.parametrize(
    ("pictures", "text", "said"),
    [
        (0, "", "expected a target"),
        (MAX_TARGETS + 1, "", "at most 4 targets, found 5"),
        (MAX_TARGETS, "red hair", "at most 3 targets, found 4"),
        (1, "x" * (MAX_TEXT + 1), "at most 300 characters"),
        (0, "red hair", "no neutral texts"),
    ],
)
def test_targets_that_cannot_be_are_refused(
    opened: OpenWorld, faces: list[Path], pictures: int, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        find_targets(opened, texts(faces[:1]) * pictures, text, "instant")


def test_sources_that_cannot_be_are_refused(opened: OpenWorld, faces: list[Path]) -> None:
    with pytest.raises(ValueError, match="expected a source"):
        read_sources(opened, [])
    with pytest.raises(ValueError, match=f"at most {MAX_SOURCES} sources"):
        read_sources(opened, texts(faces[:1]) * (MAX_SOURCES + 1))
    for count, seed in ((0, 0), (MAX_SOURCES + 1, 0), (1, -1), (1, 2**31)):
        with pytest.raises(ValueError, match="expected 1 to 12 sources"):
            generate_sources(opened, count, seed)


@pytest.mark.parametrize(
    "settings", [{"strength": 2.1}, {"weights": (float("nan"),)}, {"floor": 2}]
)
def test_numbers_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Settings(**settings)


def test_errors_name_files_without_their_folders(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"'broken\.png' is not a picture") as caught:
        read_pictures([str(broken)], "target", 1)
    assert str(tmp_path) not in str(caught.value)


def test_pictures_are_kept_and_shown_at_sizes_within_bounds(tmp_path: Path) -> None:
    Image.new("RGB", (3 * LARGEST, LARGEST)).save(tmp_path / "wide.png")
    [(name, picture)] = read_pictures([str(tmp_path / "wide.png")], "target", 1)
    assert name == "wide" and picture.size == (LARGEST, round(LARGEST / 3))
    assert for_people(picture).size == (1024, 342)
    assert for_people(Image.new("RGB", (16, 16))).size == (256, 256)
    assert for_people(Image.new("RGB", (300, 400))).size == (300, 400)


def test_faces_of_photos_are_edited_and_put_back(
    opened: OpenWorld, faces: list[Path], tmp_path: Path, seeing: Callable[..., FaceFinder]
) -> None:
    photo = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photo)
    of_photos = replace(opened, finder=seeing(lambda picture: [(100, 90, 40)]))
    sources = read_sources(of_photos, [str(photo)])
    assert sources.quads is not None
    found = find_targets(of_photos, texts(faces[:1]), mode="instant")
    [edited] = edit(of_photos, found, sources, Settings()).pictures
    assert edited.size == (320, 240)
    changed = (np.asarray(edited) != noise).any(axis=2)
    left, top = np.floor(sources.quads[0].min(axis=0)).astype(int)
    right, bottom = np.ceil(sources.quads[0].max(axis=0)).astype(int) + 1
    assert changed[top:bottom, left:right].any()
    changed[top:bottom, left:right] = False
    assert not changed.any()
    faceless = replace(opened, finder=seeing(lambda picture: []))
    with pytest.raises(ValueError, match="photo: no face found"):
        read_sources(faceless, [str(photo)])


def test_files_to_download_are_whole_and_named_by_numbers(
    opened: OpenWorld, faces: list[Path], tmp_path: Path
) -> None:
    found = find_targets(opened, texts(faces[:1]), mode="instant")
    sources = read_sources(opened, texts(faces[1:]))
    paths = write_files(tmp_path, opened, found, sources, Settings(), MAX_FACTOR)
    names = ["edited_1.png", "edited_2.png", "sheet.png", "direction.safetensors"]
    assert [path.name for path in paths] == [*names, "morph.gif"]
    loaded = type(found.parts[0]).load(tmp_path / "direction.safetensors", opened.essence)
    assert torch.equal(loaded.vector, found.parts[0].vector)
