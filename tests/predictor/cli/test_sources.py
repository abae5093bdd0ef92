"""Faces in photos as sources and targets: cut out, inverted, edited, put back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import one_line, report_of, transfer
from PIL import Image

from predictor.cli.options import resolve
from predictor.cli.output import Console
from predictor.cli.sources import Photos, searching_inverter
from predictor.transfer import EssenceTransfer
from targetclip.command import STOPPED
from targetclip.directions import load_direction
from targetclip.media.alignment import FaceFinder, align, face_quad, paste_back
from targetclip.media.images import picture_to_tensor, read_picture, tensor_to_pictures
from targetclip.recipes import RECIPES
from targetclip.scene import Scene

Run = Callable[..., int]
Seen = list[tuple[float, float, int]]
Seeing = Callable[[Callable[[Image.Image], Seen]], FaceFinder]
HOPPER = Path(__file__).parents[2] / "fixtures" / "grace_hopper.jpg"
ONE: Seen = [(60, 40, 24)]
TWO: Seen = [(60, 40, 24), (25, 35, 16)]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture whose every pixel is its own."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def changed_box(before: Path, after: Path) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that differ."""
    y, x = (pixels(before) != pixels(after)).any(axis=2).nonzero()
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def bounds(finder: FaceFinder, photo: Path, index: int = 0) -> tuple[float, float, float, float]:
    quad = face_quad(finder, read_picture(photo), index, "photo")
    return (*quad.min(axis=0), *quad.max(axis=0))


def test_a_photo_comes_back_with_its_face_edited_and_every_other_pixel_as_it_was(
    run: Run,
    tmp_path: Path,
    photo: Path,
    aligned_world: Path,
    tiny: EssenceTransfer,
    direction_file: Path,
    seeing: Seeing,
) -> None:
    finder = seeing(lambda picture: ONE)
    arguments = ("--sources", photo, "--direction", direction_file)
    assert run("transfer", "--world", aligned_world, *arguments) == 0
    out = tmp_path / "out"

    picture = read_picture(photo)
    quad = face_quad(finder, picture, 0, "photo")
    ws = tiny.scene.invert([align(picture, quad, 16)])
    vector = load_direction(direction_file, tiny.scene.generator).direction
    [edited] = tensor_to_pictures(tiny.edit(ws, vector))
    np.testing.assert_array_equal(pixels(out / "edited_photo.png"), np.asarray(edited))
    pasted = paste_back(picture, edited, quad)
    np.testing.assert_array_equal(pixels(out / "photo_photo.png"), np.asarray(pasted))

    left, top, right, bottom = bounds(finder, photo)
    found = changed_box(photo, out / "photo_photo.png")
    assert left <= found[0] < found[2] <= right and top <= found[1] < found[3] <= bottom
    assert pixels(out / "photo_photo.png").shape == pixels(photo).shape
    report = report_of(out)
    assert (report["align"], report["face"], report["invert_steps"]) == (True, 0, 0)
    assert report["edited"] == ["edited_photo.png"] and report["photos"] == ["photo_photo.png"]


def test_align_and_no_align_go_before_what_the_world_says(
    run: Run,
    tmp_path: Path,
    photo: Path,
    tiny_world: Path,
    aligned_world: Path,
    direction_file: Path,
    seeing: Seeing,
) -> None:
    seeing(lambda picture: ONE)
    runs: dict[str, tuple[object, ...]] = {
        "plain": ("--world", tiny_world),
        "off": ("--world", aligned_world, "--no-align"),
        "photo": ("--world", aligned_world),
        "on": ("--world", tiny_world, "--align"),
    }
    for name, arguments in runs.items():
        given = (*arguments, "--sources", photo, "--direction", direction_file)
        assert run("transfer", *given, "--out", tmp_path / name) == 0
    made = {name: (tmp_path / name / "edited_photo.png").read_bytes() for name in runs}
    assert made["plain"] == made["off"] != made["on"] == made["photo"]
    assert {name for name in runs if (tmp_path / name / "photo_photo.png").exists()} == {
        "on",
        "photo",
    }
    assert report_of(tmp_path / "off")["align"] is False


def test_another_face_than_the_largest_can_be_chosen(
    run: Run,
    tmp_path: Path,
    photo: Path,
    direction_file: Path,
    seeing: Seeing,
    capsys: pytest.CaptureFixture[str],
) -> None:
    finder = seeing(lambda picture: TWO)
    arguments = ("--align", "--sources", photo, "--direction", direction_file)
    for face in (0, 1):
        assert run("transfer", *arguments, "--face", face) == 0
        found = changed_box(photo, tmp_path / "out" / "photo_photo.png")
        left, top, right, bottom = bounds(finder, photo, face)
        assert left <= found[0] and top <= found[1] and found[2] <= right and found[3] <= bottom
        assert report_of(tmp_path / "out")["face"] == face
    capsys.readouterr()
    assert run("transfer", *arguments, "--face", 2) == 1
    line = one_line(capsys.readouterr().err)
    assert str(photo) in line and "found 2; faces are: 0 (24 px" in line


@pytest.mark.parametrize("fault", ["no dlib", "no face", "cut off"])
def test_what_keeps_a_face_from_being_found_is_one_line_before_networks_are_loaded(
    run: Run,
    tmp_path: Path,
    photo: Path,
    fault: str,
    unloadable_world: Path,
    seeing: Seeing,
    without: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if fault == "no dlib":
        without("dlib")
        said = 'pip install "targetclip[faces]"'
    else:
        seeing(lambda picture: [] if fault == "no face" else [(200, 40, 24)])
        said = f"{photo}: " + ("no face" if fault == "no face" else "expected a face inside")
    assert run("transfer", "--world", unloadable_world, "--align", "--sources", photo) == 1
    assert said in one_line(capsys.readouterr().err)
    out = tmp_path / "out"
    assert not out.exists() or (fault != "no dlib" and not [*out.iterdir()])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--face", "0", "--sources", str(HOPPER)], "--face: no face is looked for here"),
        (["--face", "0", "--num-sources", "1"], "--face: expected 0 or more, and --sources"),
        (["--face=-1", "--align", "--sources", "a.png"], "--face: expected 0 or more"),
        (["--align"], "--align: no picture is inverted here"),
        (["--invert-steps", "5"], "--invert-steps: no picture is inverted here"),
        (["--invert-steps=-1", "--sources", "a.png"], "--invert-steps: expected 0 or more"),
        (["--smooth", "3", "--sources", "a.png"], "--smooth is for clips"),
        (["--smooth", "3"], "--smooth is for clips"),
        (["--smooth", "4", "--sources", "a.mp4"], "--smooth: expected an odd number"),
        (["--sources", "a.mp4", "b.mp4"], "one clip alone, found 'a.mp4' among 2"),
        (["--sources", "a.mp4"], "no video at 'a.mp4'"),
    ],
)
def test_an_option_that_nothing_would_read_is_refused_in_one_line(
    run: Run,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    unloadable_world: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("transfer", "--world", unloadable_world, *arguments) in (1, 2)
    assert said in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# Targets


def test_an_aligned_target_is_where_a_search_starts_and_the_whole_one_what_it_looks_for(
    run: Run, tmp_path: Path, photo: Path, tiny: EssenceTransfer, seeing: Seeing
) -> None:
    finder = seeing(lambda picture: ONE)
    arguments = ("--target", photo, "--initial", "inversion", "--align")
    assert run("optimize", *arguments) == 0
    picture = read_picture(photo)
    face = align(picture, face_quad(finder, picture, 0, "photo"), 16)
    aligning = EssenceTransfer(
        tiny.scene, aligner=lambda whole: align(whole, face_quad(finder, whole, 0, "photo"), 16)
    )
    start = aligning.initial(picture, "inversion", 0)
    torch.testing.assert_close(start, tiny.scene.invert([face])[0])
    assert aligning.initial(picture, "zero", 0).abs().max() == 0
    recipe = dataclasses.replace(RECIPES["consistent"], steps=3, initial="inversion")
    stored = load_direction(tmp_path / "out" / "direction.safetensors", tiny.scene.generator)
    torch.testing.assert_close(stored.direction, aligning.optimize(picture, recipe).vector)
    assert stored.record["align"] is True and stored.record["invert_steps"] == 0


def test_a_target_without_a_face_is_refused_only_where_it_would_be_inverted(
    run: Run,
    faces: list[Path],
    photo: Path,
    aligned_world: Path,
    direction_file: Path,
    seeing: Seeing,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeing(lambda picture: ONE if picture.size == (120, 90) else [])
    given = ("--world", aligned_world, "--sources", photo)
    assert run("transfer", *given) == 0
    capsys.readouterr()
    assert run("transfer", *given, "--initial", "inversion") == 1
    assert f"{faces[0]}: no face found" in one_line(capsys.readouterr().err)


# Searches for latents


def pixel_error(scene: Scene, photos: Photos) -> float:
    images = torch.cat([picture_to_tensor(picture, 16) for picture in photos.squares(16)])
    return float((scene.render(photos.latents(scene).scored) - images).square().mean())


def test_more_steps_bring_the_inversion_closer_to_the_picture(
    tiny: EssenceTransfer, faces: list[Path]
) -> None:
    console = Console(quiet=True)
    photos, scene = Photos(faces[1:], None, 0, console), tiny.scene
    little, much = (
        dataclasses.replace(scene, inverter=searching_inverter(scene, steps, console))
        for steps in (10, 60)
    )
    assert pixel_error(scene, photos) > pixel_error(little, photos) > pixel_error(much, photos)


def test_an_inversion_searches_with_a_bar_and_the_report_says_how_long(
    run: Run,
    tmp_path: Path,
    faces: list[Path],
    direction_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--sources", *faces, *faces, "--direction", direction_file)
    assert run("transfer", *arguments, "--invert-steps", 2) == 0
    bar = capsys.readouterr().err
    assert "search latents" in bar and "4/4" in bar and "loss=" in bar  # two lots of sources
    assert report_of(tmp_path / "out")["invert_steps"] == 2


def test_a_world_without_inverter_searches_for_the_latents_of_pictures(
    run: Run,
    tmp_path: Path,
    bare_world: Path,
    faces: list[Path],
    direction_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = transfer(target=(faces[0],), out=tmp_path, world=str(bare_world))
    assert resolve(asked).invert_steps == 300
    given = ("--world", bare_world, "--direction", direction_file)
    assert run("transfer", *given, "--sources", faces[1], "--invert-steps", 3) == 0
    assert report_of(tmp_path / "out")["invert_steps"] == 3
    assert run("transfer", *given, "--num-sources", 1) == 0
    assert "invert_steps" not in report_of(tmp_path / "out")
    capsys.readouterr()
    assert run("transfer", *given, "--sources", faces[1], "--invert-steps", 0) == 1
    assert "'tiny' has no inverter" in one_line(capsys.readouterr().err)


def test_ctrl_c_while_photos_are_inverted_leaves_nothing(
    run: Run, tmp_path: Path, faces: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("targetclip.encoders.inverter.invert_by_optimization", interrupted)
    assert run("transfer", "--sources", faces[1], "--invert-steps", 5) == STOPPED
    assert not list((tmp_path / "out").iterdir())


# With dlib


def test_a_real_photo_goes_in_and_comes_out(
    run: Run, tmp_path: Path, aligned_world: Path, direction_file: Path
) -> None:
    pytest.importorskip("dlib")
    arguments = ("--world", aligned_world, "--sources", HOPPER, "--direction", direction_file)
    assert run("transfer", *arguments) == 0
    before, after = read_picture(HOPPER), Image.open(tmp_path / "out" / "photo_grace_hopper.png")
    different = (np.asarray(before) != np.asarray(after)).any(axis=2)
    assert before.size == after.size and 0.02 < different.mean() < 0.5
