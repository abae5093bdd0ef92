"""Clips as sources: a face followed through them, one direction for all frames, whole files."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import report_of
from PIL import Image

from predictor.cli import sources
from predictor.cli.output import Console
from predictor.cli.sources import Clip, evenly_spaced, find_track
from predictor.transfer import EssenceTransfer
from targetclip.command import STOPPED
from targetclip.directions import load_direction
from targetclip.media.alignment import FaceFinder
from targetclip.media.frames import open_frames, write_video
from targetclip.media.images import read_picture, tensor_to_pictures

Run = Callable[..., int]
Seen = list[tuple[float, float, int]]
Seeing = Callable[[Callable[[Image.Image], Seen]], FaceFinder]
QUIET = Console(quiet=True)
RATE = Fraction(30000, 1001)


def frame(number: int, size: int = 64) -> Image.Image:
    """Noise, and the frame's number in its first pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    pixels[0, 0] = number
    return Image.fromarray(pixels)


def number_of(picture: Image.Image) -> int:
    return int(np.asarray(picture)[0, 0, 0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve frames, whose names in the order of texts are not in the order of time."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(12):
        frame(number).save(folder / f"frame_{number + 1}.png")
    return folder


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Ten frames of 64 px."""
    pytest.importorskip("av")
    write_video(tmp_path / "clip.mp4", (frame(i) for i in range(10)), RATE, None)
    return tmp_path / "clip.mp4"


def frames_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def sliding(picture: Image.Image) -> Seen:
    """A face that goes to the right, and is hidden in frames 4, 5 and 9."""
    number = number_of(picture)
    return [] if number in (4, 5, 9) else [(24 + number, 28, 20)]


# A folder


def test_frames_of_a_folder_are_edited_in_natural_order(
    run: Run, tmp_path: Path, folder: Path, direction_file: Path, tiny: EssenceTransfer
) -> None:
    given = ("--clip", "--sources", folder, "--direction", direction_file)
    for name, arguments in {"out": (), "few": ("--max-images", 5)}.items():
        assert run("transfer", *given, "--smooth", 1, *arguments, "--out", tmp_path / name) == 0
    pictures = [read_picture(folder / f"frame_{number + 1}.png") for number in range(12)]
    vector = load_direction(direction_file, tiny.scene.generator).direction
    expected = tensor_to_pictures(tiny.edit(tiny.scene.invert(pictures), vector))
    for name in ("out", "few"):
        found = frames_of(tmp_path / name / "frames")
        np.testing.assert_allclose(found, np.stack(expected), atol=1)
    report = report_of(tmp_path / "out")
    assert report["edited"] == ["frames"] and report["sources"] == [str(folder)]
    assert (report["frames"], report["smooth"], report["align"]) == (12, 1, False)
    assert report["scored_frames"] == [*range(12)]
    assert len(report["scores"]["each"]["target_similarity_after"]) == 12
    assert "frames_without_face" not in report


def test_frames_without_a_face_stay_as_they_are_and_are_told(
    run: Run,
    tmp_path: Path,
    folder: Path,
    direction_file: Path,
    seeing: Seeing,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seeing(sliding)
    given = ("--clip", "--sources", folder, "--direction", direction_file, "--align")
    assert run("transfer", *given, "--strength", 3) == 0
    found = frames_of(tmp_path / "out" / "frames")
    for number, pixels in enumerate(found):
        changed = (pixels != np.asarray(frame(number))).any(axis=2)
        assert changed.any() == (number not in (4, 5, 9))
        assert changed.mean() < 0.5
    report = report_of(tmp_path / "out")
    assert report["frames_without_face"] == [4, 5, 9] and report["frames"] == 12
    assert report["scored_frames"] == [0, 1, 2, 3, 6, 7, 8, 10, 11] and report["face"] == 0
    error = capsys.readouterr().err
    assert error.count("3 of 12 frames show no face and stay as they are") == 1
    assert all(f"{what}: 100%" in error for what in ("find faces", "invert", "edit"))


def test_a_clip_without_any_face_is_refused_before_networks_are_loaded(
    run: Run,
    tmp_path: Path,
    folder: Path,
    unloadable_world: Path,
    seeing: Seeing,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {
        "no face found in any of 12 frames": ([], 0),
        "found 1; no frame shows more than 1": ([(30, 30, 20)], 1),
        "every face is cut off": ([(300, 30, 20)], 0),
    }
    for message, (seen, face) in said.items():
        seeing(lambda picture, seen=seen: seen)
        arguments = ("--align", "--clip", "--sources", folder, "--face", face)
        assert run("transfer", "--world", unloadable_world, *arguments) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"targetclip: error: {folder}: ") and message in line
    assert not list((tmp_path / "out").iterdir())


def test_what_is_there_is_not_written_over(
    run: Run,
    tmp_path: Path,
    folder: Path,
    direction_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out" / "frames").mkdir(parents=True)
    (tmp_path / "out" / "frames" / "mine.txt").write_text("precious")
    (tmp_path / "edited.mp4").write_text("a clip")
    said = {folder: "give another folder, or remove frames", tmp_path / "edited.mp4": "replaced"}
    for (path, message), out in zip(said.items(), (tmp_path / "out", tmp_path), strict=True):
        assert run("transfer", "--clip", "--sources", path, "--out", out, "--overwrite") == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "out" / "frames" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("place", ["inverted", "paste_back"])
def test_ctrl_c_leaves_no_half_a_clip(
    run: Run,
    tmp_path: Path,
    folder: Path,
    direction_file: Path,
    place: str,
    seeing: Seeing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeing(sliding)
    whole, calls = getattr(sources, place), []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 3 or place == "inverted":
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(sources, place, interrupted)
    arguments = ("--align", "--clip", "--sources", folder, "--direction", direction_file)
    assert run("transfer", *arguments) == STOPPED
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == ({"direction.safetensors", "report.json"} if place == "paste_back" else set())


# A video


def test_a_video_comes_back_as_long_and_as_fast(
    run: Run, tmp_path: Path, video: Path, direction_file: Path, seeing: Seeing
) -> None:
    seeing(lambda picture: [(30, 28, 20)])
    sides = {"photo": 64, "square": 16}
    for name, flag in (("photo", "--align"), ("square", "--no-align")):
        arguments = ("--sources", video, "--direction", direction_file, flag)
        assert run("transfer", *arguments, "--out", tmp_path / name) == 0
        edited = open_frames(tmp_path / name / "edited.mp4")
        assert edited.rate == RATE and edited.count == 10
        assert {picture.size for picture in edited} == {(sides[name], sides[name])}
        report = report_of(tmp_path / name)
        assert report["edited"] == ["edited.mp4"] and report["frames"] == 10
        assert report["rate"] == pytest.approx(float(RATE))
    assert report_of(tmp_path / "photo")["frames_without_face"] == []
    with Image.open(tmp_path / "photo" / "grid.png") as grid:  # target and 8 of 10 frames
        assert 9 * 256 < grid.width < 10 * 300 and 3 * 256 < grid.height < 4 * 300


# Along time


def shaking(tiny: EssenceTransfer, clip: Clip) -> float:
    """How far latents of neighbouring frames are apart."""
    ws = clip.latents(tiny.scene).whole
    assert ws is not None
    return float(ws.diff(dim=0).square().mean())


def test_smoothing_brings_neighbouring_frames_closer(tiny: EssenceTransfer, folder: Path) -> None:
    raw, little, much = (
        shaking(tiny, Clip(folder, None, window=window, console=QUIET)) for window in (1, 3, 7)
    )
    assert raw > 1.5 * little > 1.5 * 1.5 * much > 0


def test_nothing_is_smoothed_over_a_gap(
    tiny: EssenceTransfer, folder: Path, seeing: Seeing
) -> None:
    finder = seeing(sliding)
    clip = Clip(folder, finder, window=11, console=QUIET)
    assert clip.track is not None and clip.track.runs == [4, 3, 2]
    # A face that moves evenly keeps its place in the middle of a run, where smoothing is even.
    eyes = clip.track.quads[:, :, 0].mean(dim=1)
    raw = find_track(open_frames(folder), finder, 0, 1, QUIET).quads[:, :, 0].mean(dim=1)
    torch.testing.assert_close(eyes[5], raw[5])
    for run in eyes.split(clip.track.runs):
        assert (run.diff() > 0).all() and (run.diff() < 1).all()
    ws = clip.latents(tiny.scene).whole
    assert ws is not None and len(ws) == 9


def test_a_face_is_followed_when_another_becomes_the_largest(folder: Path, seeing: Seeing) -> None:
    def two(picture: Image.Image) -> Seen:
        number = number_of(picture)
        mine, other = (20.0, 30.0, 16), (48.0, 30.0, 20 if number > 3 else 10)
        return sorted((mine, other), key=lambda face: -face[2])

    finder = seeing(two)
    for index, x in ((0, 20), (1, 48)):
        track = find_track(open_frames(folder), finder, index, 5, QUIET)
        assert track.numbers == [*range(12)] and track.runs == [12]
        assert (track.quads[:, :, 0].mean(dim=1) - x).abs().max() < 2


def test_a_leap_to_another_face_begins_anew(folder: Path, seeing: Seeing) -> None:
    finder = seeing(lambda picture: [(16 if number_of(picture) < 7 else 48, 30, 16)])
    track = find_track(open_frames(folder), finder, 0, 5, QUIET)
    assert track.runs == [7, 5]
    x = track.quads[:, :, 0].mean(dim=1)
    assert len(x[:7].unique()) == len(x[7:].unique()) == 1


@pytest.mark.parametrize("count", [1, 2, 7, 8, 11, 16, 17, 100, 1001])
def test_frames_that_are_shown_are_among_those_that_are_scored(count: int) -> None:
    scored = evenly_spaced(count, sources.SCORED)
    shown = [scored[i] for i in evenly_spaced(len(scored), sources.SHOWN)]
    assert shown == evenly_spaced(count, sources.SHOWN) == sorted({*shown})
    assert len(scored) == min(count, 16) and max(scored) < count
