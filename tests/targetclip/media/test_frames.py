"""Clips: frames in order with their time, audio beside them, and files whole or not there."""

import math
import resource
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from targetclip.media.frames import (
    MORPH_RATE,
    REST,
    Frames,
    open_frames,
    smooth_latents,
    write_frames,
    write_morph,
    write_video,
)

NTSC = Fraction(30000, 1001)
COUNT = 16
GREYS = [10 + 14 * i for i in range(COUNT)]
SAMPLES = 44100
RED, BLUE = (255, 0, 0), (0, 0, 255)
IDENTITY = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


@pytest.fixture
def no_x264(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV has no encoder of H.264, as where its licence is not wanted."""
    av = pytest.importorskip("av")
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})


def plain(grey: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (grey,) * 3)


def sine(codec_rate: int, seconds: Fraction = COUNT / NTSC) -> Any:
    """Audio as long as the clip."""
    av = pytest.importorskip("av")
    times = np.arange(int(seconds * codec_rate)) / codec_rate
    wave = (9000 * np.sin(2 * np.pi * 440 * times)).astype(np.int16)
    frame = av.AudioFrame.from_ndarray(np.repeat(wave, 2)[None], format="s16", layout="stereo")
    frame.sample_rate, frame.pts = codec_rate, 0
    return frame


def make_clip(
    path: Path,
    pictures: Iterable[Image.Image] | None = None,
    video: str | None = "libx264",
    audio: str | None = "aac",
    start: int = 0,
    options: dict[str, str] | None = None,
    times: Sequence[Fraction] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """A clip of its own making, so that reading is tested apart from writing.

    `times` are those of the frames in seconds, instead of a constant rate.
    """
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as output:
        # Both streams must be there before the first packet.
        if video:
            moving = output.add_stream(video, rate=NTSC, options=options or {})
            moving.width = moving.height = 64
            moving.pix_fmt = "yuv420p"
            if aspect is not None:
                moving.codec_context.sample_aspect_ratio = aspect
            if times is not None:
                moving.codec_context.time_base = Fraction(1, 90000)
        if audio:
            sound = output.add_stream(audio, rate=SAMPLES, layout="stereo")
        output.start_encoding()
        if video:
            for i, picture in enumerate(
                [plain(g) for g in GREYS] if pictures is None else pictures
            ):
                frame = av.VideoFrame.from_image(picture)
                frame.pts, frame.time_base = start + i, 1 / NTSC
                if times is not None:
                    frame.pts, frame.time_base = round(times[i] * 90000), Fraction(1, 90000)
                output.mux(moving.encode(frame))
            output.mux(moving.encode(None))
        if audio:
            output.mux(sound.encode(sine(SAMPLES, times[-1] if times else COUNT / NTSC)))
            output.mux(sound.encode(None))
    return path


def times_of(path: Path) -> list[Fraction]:
    """The times of a clip's frames in seconds, from the first one."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        times = sorted(p.pts * p.time_base for p in file.demux(video=0) if p.size)
    return [time - times[0] for time in times]


def packets(path: Path, kind: str) -> list[tuple[int, int]]:
    """Where in the file the packets of a stream lie: position and size."""
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return [(p.pos, p.size) for p in file.demux(**{kind: 0}) if p.size]


def facts(path: Path) -> dict[str, Any]:
    """Of each kind of stream: codec, first time and length in seconds, its packets' bytes."""
    av = pytest.importorskip("av")
    streams = {}
    for kind in ("video", "audio"):
        with av.open(str(path)) as file:
            if not getattr(file.streams, kind):
                continue
            content = [p for p in file.demux(**{kind: 0}) if p.size]
            start = min(p.pts * p.time_base for p in content)
            streams[kind] = {
                "codec": getattr(file.streams, kind)[0].codec_context.name,
                "start": start,
                "seconds": max((p.pts + p.duration) * p.time_base for p in content) - start,
                "bytes": [bytes(p) for p in content],
            }
    return streams


def greys(pictures: Iterable[Image.Image]) -> list[int]:
    return [round(float(np.asarray(picture).mean())) for picture in pictures]


def close(actual: list[int], expected: list[int]) -> bool:
    return len(actual) == len(expected) and all(
        abs(a - b) <= 3 for a, b in zip(actual, expected, strict=True)
    )


def error_of(path: Path) -> str:
    """What is said of a clip that cannot be read to its end."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        list(open_frames(path))
    message = str(caught.value)
    assert "\n" not in message and path.name in message
    return message


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts", "strange: 100%d #1.mp4"])
def test_frames_come_in_order_and_exactly_as_many_as_there_are(tmp_path: Path, name: str) -> None:
    frames = open_frames(make_clip(tmp_path / name))
    assert frames.rate == NTSC and frames.count in (COUNT, None)
    assert frames.times is None  # the rate is constant
    assert [picture.mode for picture in frames] == ["RGB"] * COUNT
    assert close(greys(frames), GREYS)
    assert close(greys(frames), GREYS)  # again from the start


def test_a_reader_that_stops_early_lets_go_of_the_file(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4")
    pictures = iter(open_frames(path))

    def is_open() -> bool:
        return str(path) in [file.path for file in psutil.Process().open_files()]

    assert close(greys([next(pictures)]), GREYS[:1]) and is_open()
    del pictures
    assert not is_open()


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), "top left"),
        ((0, 1, -1, 0), "top right"),  # a quarter clockwise, as phones held upright write
        ((-1, 0, 0, -1), "bottom right"),
        ((0, -1, 1, 0), "bottom left"),
        ((-1, 0, 0, 1), "top right"),  # mirrored, as front cameras write
        ((1, 0, 0, -1), "bottom left"),
        ((0, 1, 1, 0), "top left"),
        ((0, -1, -1, 0), "bottom right"),
    ],
)
def test_a_clip_of_a_turned_or_mirrored_phone_comes_upright(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: str
) -> None:
    # The corner is red, and what lies to its right green: it tells a turn from a mirror.
    picture = Image.new("RGB", (64, 64), BLUE)
    picture.paste(RED, (0, 0, 32, 32))
    picture.paste((0, 255, 0), (32, 0, 64, 32))
    path = make_clip(tmp_path / "a.mp4", [picture] * 2)
    content = path.read_bytes()
    a, b, c, d = (value << 16 for value in matrix)
    place = content.index(IDENTITY, content.index(b"tkhd"))  # of the first stream, the video
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:place] + turned + content[place + len(turned) :])
    shown = next(iter(open_frames(path)))
    places = {"top left": (16, 16), "top right": (48, 16)}
    places |= {"bottom left": (16, 48), "bottom right": (48, 48)}
    colors = {name: shown.getpixel(place) for name, place in places.items()}
    assert [name for name, (red, _, _) in colors.items() if red > 200] == [corner]
    # By the matrix, the corner's right neighbour lies where (1, 0) goes.
    x, y = places[corner]
    _, green, _ = shown.getpixel((x + 32 * matrix[0], y + 32 * matrix[1]))
    assert green > 200


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (Fraction(2), (128, 64)),
        (Fraction(64, 45), (91, 64)),
        (Fraction(1, 2), (64, 128)),
        (Fraction(1), (64, 64)),
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_that_are_not_square_are_shown_in_their_true_shape(
    tmp_path: Path, aspect: Fraction, size: tuple[int, int], name: str
) -> None:
    picture = Image.new("RGB", (64, 64), BLUE)
    picture.paste(RED, (0, 0, 32, 32))
    frames = open_frames(make_clip(tmp_path / name, [picture] * 3, aspect=aspect))
    assert [frame.size for frame in frames] == [size] * 3
    frame = next(iter(frames))
    quarters = [
        frame.getpixel((size[0] * x // 4, size[1] * y // 4))[0] for x, y in ((1, 1), (3, 3))
    ]
    assert quarters[0] > 200 and quarters[1] < 60
    write_video(tmp_path / "out.mp4", frames, frames, None)
    [first, *_] = open_frames(tmp_path / "out.mp4")
    assert first.size == tuple(side + side % 2 for side in size)


# Slow, then quick: the mean rate would show the quick part too late.
VARYING = [Fraction(i, 10) for i in range(8)] + [
    Fraction(8, 10) + Fraction(i, 30) for i in range(8)
]


@pytest.mark.parametrize("source", ["s.mp4", "s.mkv"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_frames_of_a_varying_rate_keep_their_times_and_their_sound(
    tmp_path: Path, source: str, name: str
) -> None:
    clip = make_clip(tmp_path / source, times=VARYING)
    frames = open_frames(clip)
    assert frames.times is not None and close(greys(frames), GREYS)
    tolerance = Fraction(1, 1000) if "mkv" in source + name else Fraction(1, 10000)
    for actual in (list(frames.times()), times_of(clip)):
        assert max(abs(a - b) for a, b in zip(actual, VARYING, strict=True)) <= tolerance
    write_video(tmp_path / name, frames, frames, clip)
    written = times_of(tmp_path / name)
    assert max(abs(a - b) for a, b in zip(written, VARYING, strict=True)) <= 2 * tolerance
    assert close(greys(open_frames(tmp_path / name)), GREYS)
    before, after = facts(clip), facts(tmp_path / name)
    assert after["audio"]["bytes"] == before["audio"]["bytes"]
    ahead = [f["video"]["start"] - f["audio"]["start"] for f in (before, after)]
    assert abs(ahead[0] - ahead[1]) < Fraction(1, 100)


@pytest.mark.usefixtures("no_x264")
def test_a_varying_rate_is_kept_without_x264(tmp_path: Path) -> None:
    frames = open_frames(make_clip(tmp_path / "s.mp4", times=VARYING))
    write_video(tmp_path / "a.mp4", frames, frames, None)
    assert facts(tmp_path / "a.mp4")["video"]["codec"] == "mpeg4"
    off = zip(times_of(tmp_path / "a.mp4"), VARYING, strict=True)
    assert max(abs(a - b) for a, b in off) < Fraction(1, 1000)


def test_a_dropped_frame_makes_a_varying_rate(tmp_path: Path) -> None:
    even = [Fraction(i, 25) for i in range(COUNT + 1)]
    dropped = [*even[:6], *even[7:]]
    frames = open_frames(make_clip(tmp_path / "dropped.mp4", times=dropped))
    assert frames.times is not None and list(frames.times()) == dropped


def test_a_constant_rate_gives_the_same_file_by_its_number_or_by_its_clip(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "s.mp4")
    frames = open_frames(clip)
    write_video(tmp_path / "a.mp4", frames, frames.rate, clip)
    write_video(tmp_path / "b.mp4", frames, frames, clip)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_more_pictures_than_times_are_refused(tmp_path: Path) -> None:
    frames = open_frames(make_clip(tmp_path / "s.mp4", times=VARYING))
    with pytest.raises(ValueError, match=f"more than {COUNT}"):
        write_video(tmp_path / "a.mp4", [*frames, plain(1)], frames, None)
    assert not (tmp_path / "a.mp4").exists()


def test_a_folder_is_read_in_natural_order_without_pyav(
    tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("av")
    for number in range(COUNT):
        plain(GREYS[number]).save(tmp_path / f"frame_{number}.png")
    plain(255).save(tmp_path / "._frame_3.png")  # as macOS leaves them
    (tmp_path / "frame_5.png").rename(tmp_path / "frame_5")  # known by its content
    (tmp_path / "LICENSE").write_text("not a frame")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = open_frames(tmp_path)
    assert frames.rate == 25 and frames.count == COUNT
    assert greys(frames) == GREYS


def shaded(red: int) -> Image.Image:
    """Four greens by four blues, and one red."""
    ramp = Image.linear_gradient("L").resize((64, 64)).point(lambda value: value // 64 * 64)
    return Image.merge("RGB", (Image.new("L", (64, 64), red), ramp, ramp.rotate(90)))


WAY = [shaded(grey) for grey in GREYS[:4]]


def test_a_gif_goes_there_and_back_for_ever_in_one_set_of_colours(tmp_path: Path) -> None:
    write_morph(tmp_path / "morph.gif", iter(WAY))
    with Image.open(tmp_path / "morph.gif") as file:
        assert file.info["loop"] == 0 and file.n_frames == 6
        found, ticks = [], []
        for number in range(file.n_frames):
            file.seek(number)
            found.append(np.asarray(file.convert("RGB")).astype(int))
            ticks.append(file.info["duration"])
    rest = 40 * (REST + 1)
    assert ticks == [rest, 40, 40, rest, 40, 40]
    for place, expected in enumerate((0, 1, 2, 3, 2, 1)):
        assert np.abs(found[place] - np.asarray(WAY[expected])).max() <= 1
    # Nothing flickers: where two pictures are the same on the way back, so are their pixels.
    np.testing.assert_array_equal(found[1], found[5])
    colours = {tuple(c) for frame in found for c in frame.reshape(-1, 3).tolist()}
    assert len(colours) <= 255


def test_a_picture_that_does_not_change_is_the_same_in_every_frame(tmp_path: Path) -> None:
    write_morph(tmp_path / "still.gif", [WAY[0], WAY[0]])
    with Image.open(tmp_path / "still.gif") as file:
        assert getattr(file, "n_frames", 1) == 1


def test_a_video_of_a_morph_is_one_round_at_25_a_second(tmp_path: Path) -> None:
    pytest.importorskip("av")
    write_morph(tmp_path / "morph.mp4", WAY)
    frames = open_frames(tmp_path / "morph.mp4")
    assert frames.rate == MORPH_RATE == 25 and frames.count == 2 * REST + 4 + 2
    reds = [np.asarray(picture)[..., 0].mean() for picture in frames]
    assert reds[0] == pytest.approx(GREYS[0], abs=6) and reds[-1] == pytest.approx(reds[1], abs=20)
    assert max(reds) == pytest.approx(GREYS[3], abs=6)


def test_a_morph_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[Image.Image]:
        yield WAY[0]
        raise KeyboardInterrupt

    (tmp_path / "morph.gif").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_morph(tmp_path / "morph.gif", broken())
    for name, said in {"morph.gif": "at least one picture", "morph.txt": "ending in .gif"}.items():
        with pytest.raises(ValueError, match=said):
            write_morph(tmp_path / name, [] if name == "morph.gif" else WAY)
    assert [path.name for path in tmp_path.iterdir()] == ["morph.gif"]
    assert (tmp_path / "morph.gif").read_text() == "before"


def test_names_of_numbers_and_words_can_be_ordered_together(tmp_path: Path) -> None:
    names = ["1.png", "2.PNG", "2b.png", "10.png", "a2b1.png", "a2b03.png", "a10.png", "B.png"]
    for grey, name in reversed(list(enumerate(names))):
        plain(grey).save(tmp_path / name)
    assert [names[grey] for grey in greys(open_frames(tmp_path))] == names


def test_a_damaged_picture_in_a_folder_is_named_by_its_number(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames", [plain(grey) for grey in GREYS[:4]])
    (tmp_path / "frames" / "frame_000002.png").write_bytes(b"not a picture")
    frames = iter(open_frames(tmp_path / "frames"))
    assert greys([next(frames), next(frames)]) == GREYS[:2]
    with pytest.raises(ValueError, match=r"^frame 2: .*frame_000002\.png"):
        next(frames)


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a frame")
    assert "no frames" in error_of(tmp_path)


def test_other_files_than_videos_are_refused_in_one_line(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4")
    empty, text, cut = (tmp_path / name for name in ("empty.mp4", "text.txt", "cut.mp4"))
    empty.write_bytes(b"")
    text.write_text("not a video\n" * 50)
    cut.write_bytes(clip.read_bytes()[:-600])
    picture = tmp_path / "a.png"
    plain(9).save(picture)
    assert "check the path" in error_of(tmp_path / "nobody.mp4")
    for path in (empty, text, cut, picture):
        assert "not a video" in error_of(path)


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile a.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: str) -> None:
    make_clip(tmp_path / "a.mp4")
    make_clip(tmp_path / "a.ts")
    path = tmp_path / "list.mp4"
    path.write_text(playlist)
    assert "not a video" in error_of(path)


def test_a_file_without_a_video_stream_is_refused(tmp_path: Path) -> None:
    assert "no video stream" in error_of(make_clip(tmp_path / "a.mp4", video=None))
    unknown = make_clip(tmp_path / "b.mp4")
    unknown.write_bytes(unknown.read_bytes().replace(b"avc1", b"zzzz"))
    assert "no video stream" in error_of(unknown)


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as output:
        cover = output.add_stream("png", width=64, height=64, pix_fmt="rgb24")
        cover.disposition = av.stream.Disposition.attached_pic.value
        sound = output.add_stream("aac", rate=SAMPLES, layout="stereo")
        output.mux(cover.encode(av.VideoFrame.from_image(plain(9))))
        output.mux(cover.encode(None))
        output.mux(sound.encode(sine(SAMPLES)))
        output.mux(sound.encode(None))
    with av.open(str(path)) as file:
        assert len(file.streams.video) == 1  # FFmpeg takes it for one
    assert "no video stream" in error_of(path)


def test_a_clip_of_no_frames_is_refused(tmp_path: Path) -> None:
    assert "no frames" in error_of(make_clip(tmp_path / "a.avi", [], audio=None))


@pytest.mark.parametrize("options", [{}, {"bf": "0"}])
@pytest.mark.parametrize("position", [0, 5, COUNT - 1])
@pytest.mark.parametrize("times", [None, VARYING])
def test_a_frame_that_cannot_be_decoded_is_named_by_its_number(
    tmp_path: Path, position: int, options: dict[str, str], times: list[Fraction] | None
) -> None:
    av = pytest.importorskip("av")
    path = make_clip(tmp_path / "a.mp4", options=options, times=times)
    with av.open(str(path)) as file:
        times = [p.pts for p in file.demux(video=0) if p.size]
    number = sorted(times).index(times[position])
    place, size = packets(path, "video")[position]
    content = path.read_bytes()
    path.write_bytes(content[: place + 4] + bytes(size - 4) + content[place + size :])
    assert f"frame {number} of" in error_of(path)


def test_a_frame_of_which_parts_are_missing_is_not_passed_on(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (COUNT, 64, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    path = make_clip(tmp_path / "a.mp4", pictures, options={"bf": "0"})
    place, size = packets(path, "video")[5]
    content, half = path.read_bytes(), size // 2
    path.write_bytes(content[: place + half] + bytes(size - half) + content[place + size :])
    message = error_of(path)
    assert "frame 5 of" in message and "missing" in message


@pytest.mark.parametrize("name", ["a.mp4", "strange: 100%d #1.mov", "a.MKV"])
def test_a_written_clip_keeps_frames_and_rate_and_leaves_nothing_else(
    tmp_path: Path, name: str
) -> None:
    write_video(tmp_path / name, (plain(grey) for grey in GREYS), NTSC, None)
    frames = open_frames(tmp_path / name)
    assert frames.rate == NTSC and close(greys(frames), GREYS)
    streams = facts(tmp_path / name)
    assert streams.keys() == {"video"} and streams["video"]["codec"] == "h264"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_name_is_never_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_clip(tmp_path / "a.mp4").rename("http:a.mp4")
    write_video("http:b.mp4", open_frames("http:a.mp4"), NTSC, Path("http:a.mp4"))
    assert close(greys(open_frames("http:b.mp4")), GREYS)


@pytest.mark.parametrize("rate", [Fraction(1, 3), Fraction(24), Fraction(1000003, 33367)])
def test_any_rate_is_kept(tmp_path: Path, rate: Fraction) -> None:
    write_video(tmp_path / "a.mp4", [plain(grey) for grey in GREYS[:3]], rate, None)
    assert open_frames(tmp_path / "a.mp4").rate == rate


@pytest.mark.parametrize("color", [RED, BLUE, (0, 255, 0), (200, 120, 80)])
def test_colors_survive_writing_and_reading(tmp_path: Path, color: tuple[int, int, int]) -> None:
    write_video(tmp_path / "a.mp4", [Image.new("RGB", (64, 64), color)] * 2, NTSC, None)
    for picture in open_frames(tmp_path / "a.mp4"):
        assert np.abs(np.asarray(picture).astype(int) - color).max() <= 4


def test_odd_sides_become_even_without_moving_a_pixel(tmp_path: Path) -> None:
    picture = Image.new("RGB", (33, 47), BLUE)
    picture.paste(RED, (0, 0, 16, 47))
    write_video(tmp_path / "a.mp4", [picture], NTSC, None)
    [frame] = open_frames(tmp_path / "a.mp4")
    assert frame.size == (34, 48)
    difference = np.asarray(frame.crop((0, 0, 33, 47))).astype(int) - np.asarray(picture)
    assert np.abs(difference).mean() < 8
    # What is added looks like what it lies beside.
    assert np.asarray(frame)[:, 33, 2].min() > 200 and np.asarray(frame)[47, :, 1].max() < 60


@pytest.mark.usefixtures("no_x264")
def test_without_x264_the_clip_is_mpeg4(tmp_path: Path) -> None:
    # Of more ticks a second than MPEG-4 can count.
    rate = Fraction(1000003, 33367)
    write_video(tmp_path / "a.mp4", [plain(grey) for grey in GREYS], rate, None)
    assert facts(tmp_path / "a.mp4")["video"]["codec"] == "mpeg4"
    frames = open_frames(tmp_path / "a.mp4")
    assert close(greys(frames), GREYS) and abs(frames.rate / rate - 1) < 1e-6


@pytest.mark.parametrize(
    ("source", "name"), [("s.mp4", "a.mp4"), ("s.mkv", "a.mov"), ("s.mov", "a.mkv")]
)
def test_audio_is_copied_bit_for_bit(tmp_path: Path, source: str, name: str) -> None:
    clip = make_clip(tmp_path / source)
    frames = open_frames(clip)
    write_video(tmp_path / name, frames, frames.rate, clip)
    before, after = facts(clip), facts(tmp_path / name)
    assert after["audio"]["bytes"] == before["audio"]["bytes"]
    assert abs(after["audio"]["seconds"] - before["audio"]["seconds"]) < 1 / NTSC
    assert abs(after["video"]["seconds"] - COUNT / NTSC) < Fraction(1, 1000)
    assert close(greys(open_frames(tmp_path / name)), GREYS)


# Of the second one MP4 takes the header, and fails at the first packet.
@pytest.mark.parametrize(("source", "audio"), [("s.avi", "adpcm_ms"), ("s.mkv", "pcm_s16le")])
def test_audio_that_the_container_does_not_take_is_encoded_again(
    tmp_path: Path, source: str, audio: str
) -> None:
    clip = make_clip(tmp_path / source, audio=audio)
    write_video(tmp_path / "a.mp4", open_frames(clip), NTSC, clip)
    after = facts(tmp_path / "a.mp4")["audio"]
    assert after["codec"] == "aac"
    # An encoder adds a block before and fills the last one; what it adds is not played.
    assert abs(after["seconds"] - COUNT / NTSC) < 3 * Fraction(1024, 48000)


@pytest.mark.parametrize("audio", ["pcm_s16le", "aac"])
def test_audio_keeps_its_place_in_time(tmp_path: Path, audio: str) -> None:
    clip = make_clip(tmp_path / "s.mkv", audio=audio, start=30)  # a second of sound before it
    before = facts(clip)
    ahead = before["video"]["start"] - before["audio"]["start"]
    assert ahead > Fraction(9, 10)
    write_video(tmp_path / "a.mkv", open_frames(clip), NTSC, clip)
    after = facts(tmp_path / "a.mkv")
    assert abs(after["video"]["start"] - after["audio"]["start"] - ahead) < Fraction(1, 100)


def test_a_clip_without_audio_gives_a_clip_without(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "s.mp4", audio=None)
    write_video(tmp_path / "a.mp4", open_frames(clip), NTSC, clip)
    assert facts(tmp_path / "a.mp4").keys() == {"video"}


def interrupted(after: int, error: BaseException) -> Iterator[Image.Image]:
    for grey in range(after):
        yield plain(grey)
    raise error


@pytest.mark.parametrize("after", [0, 1, 9, 90])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("frame 7: damaged")])
def test_interrupted_writing_leaves_what_was_there(
    tmp_path: Path, after: int, error: BaseException
) -> None:
    clip = make_clip(tmp_path / "s.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(b"an older one")
    with pytest.raises(type(error)) as caught:
        write_video(path, interrupted(after, error), NTSC, clip)
    assert caught.value is error
    assert path.read_bytes() == b"an older one"
    with pytest.raises(type(error)):
        write_frames(tmp_path / "frames", interrupted(after, error))
    assert {entry.name for entry in tmp_path.iterdir()} == {"s.mp4", "a.mp4"}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels) for pixels in noise]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(
            OSError, match=r"^[^\n]*a\.mp4', found 'File too large'; free some space"
        ):
            write_video(tmp_path / "a.mp4", pictures, NTSC, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_writing_refuses_what_gives_no_clip(tmp_path: Path) -> None:
    pytest.importorskip("av")
    one = [plain(1)]
    with pytest.raises(ValueError, match=r"\.mp4.*a\.gif"):
        write_video(tmp_path / "a.gif", one, NTSC, None)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_video(tmp_path / "nowhere" / "a.mp4", one, NTSC, None)
    with pytest.raises(ValueError, match="found none"):
        write_video(tmp_path / "a.mp4", [], NTSC, None)
    with pytest.raises(ValueError, match="rate"):
        write_video(tmp_path / "a.mp4", one, Fraction(0), None)
    with pytest.raises(ValueError, match="number 1 to be 32 x 64"):
        write_video(tmp_path / "a.mp4", [plain(1), plain(1, (32, 64))], NTSC, None)
    with pytest.raises(FileNotFoundError, match=r"sound\.mp4"):
        write_video(tmp_path / "a.mp4", one, NTSC, tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match="folder"):
        write_video(tmp_path / "a.mp4", one, NTSC, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_pyav_a_video_says_how_to_get_it(
    tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("av")
    (tmp_path / "a.mp4").write_bytes(b"a video")
    install = r'^[^\n]*pip install "targetclip\[video\]"[^\n]*$'
    with pytest.raises(ValueError, match=install):
        open_frames(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=install):
        write_video(tmp_path / "b.mp4", [plain(1)], NTSC, None)


def test_written_frames_are_read_back_exactly(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 8, 6, 3), dtype=np.uint8)
    (tmp_path / "frames").mkdir()  # an empty folder is as good as none
    write_frames(tmp_path / "frames", (Image.fromarray(pixels) for pixels in noise))
    frames = [np.asarray(picture) for picture in open_frames(tmp_path / "frames")]
    np.testing.assert_array_equal(np.stack(frames), noise)
    assert (tmp_path / "frames" / "frame_000011.png").is_file()
    assert [entry.name for entry in tmp_path.iterdir()] == ["frames"]


def test_frames_do_not_mix_with_what_a_folder_holds(tmp_path: Path) -> None:
    plain(1).save(tmp_path / "frame_000099.png")
    with pytest.raises(FileExistsError, match="empty folder"):
        write_frames(tmp_path, [plain(2)])
    with pytest.raises(ValueError, match="found none"):
        write_frames(tmp_path / "new", [])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_frames(tmp_path / "nowhere" / "frames", [plain(2)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["frame_000099.png"]


def test_pictures_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """A clip of any length needs the memory of a few frames: the reader never runs ahead."""
    frames = open_frames(make_clip(tmp_path / "s.mp4"))
    taken: list[int] = []

    def watched(frames: Frames) -> Iterator[Image.Image]:
        for number, picture in enumerate(frames):
            taken.append(number)
            yield picture

    edited = watched(frames)
    next(edited)
    assert taken == [0]
    write_video(tmp_path / "a.mp4", edited, NTSC, None)
    assert taken == list(range(COUNT))


def walk(frames: int, seed: int = 0) -> Tensor:
    """Latents that drift and jitter."""
    return torch.randn(frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def test_a_window_of_one_changes_nothing() -> None:
    assert torch.equal(smooth_latents(walk(9), 1), walk(9))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 15).map(lambda n: 2 * n + 1), st.integers(0, 99))
def test_smoothing_keeps_constants_order_and_bounds(frames: int, window: int, seed: int) -> None:
    ws = walk(frames, seed)
    constant = ws[:1].expand(frames, -1, -1)
    assert torch.equal(smooth_latents(constant, window), constant)
    smooth = smooth_latents(ws, window)
    assert smooth.shape == ws.shape
    # A mean of frames, weighted the same towards past and future.
    assert (smooth <= ws.amax(dim=0) + 1e-5).all() and (smooth >= ws.amin(dim=0) - 1e-5).all()
    torch.testing.assert_close(smooth_latents(ws.flip(0), window), smooth.flip(0))
    torch.testing.assert_close(smooth_latents(ws + 5, window), smooth + 5)


def test_the_weights_are_a_gaussian_of_the_deviation_stated() -> None:
    impulse = torch.zeros(21, 1, 1)
    impulse[10] = 1
    weights = smooth_latents(impulse, 9).flatten()
    assert weights.count_nonzero() == 9 and float(weights.sum()) == pytest.approx(1)
    for offset in range(5):
        ratio = float(weights[10 + offset] / weights[10])
        assert ratio == pytest.approx(math.exp(-0.5 * (offset / 2) ** 2))  # (9 - 1) / 4 frames


def test_at_the_ends_only_the_frames_that_exist_are_weighed() -> None:
    weight = math.exp(-0.5 * (1 / 0.5) ** 2)  # (3 - 1) / 4 frames
    ws = walk(5)
    smooth = smooth_latents(ws, 3)
    torch.testing.assert_close(smooth[0], (ws[0] + weight * ws[1]) / (1 + weight))
    torch.testing.assert_close(smooth[-1], (ws[-1] + weight * ws[-2]) / (1 + weight))


def test_smoothing_takes_jitter_and_leaves_slow_movement() -> None:
    times = torch.linspace(0, 1, 200)[:, None, None]
    slow = torch.sin(2 * torch.pi * times).expand(-1, 2, 3)
    smooth = smooth_latents(slow + 0.1 * walk(200), 9)
    assert (smooth - slow).square().mean() < 0.3 * 0.1**2


@pytest.mark.parametrize("window", [0, -3, 4])
def test_a_window_without_a_middle_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="odd"):
        smooth_latents(walk(5), window)
