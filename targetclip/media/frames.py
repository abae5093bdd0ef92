"""Clips: a video file or a folder of frames, read and written one picture at a time, with audio.

Knows files, time and the smoothing of latents along it; nothing of generators or directions.
Frames are numbered from 0. Video needs PyAV, an extra that is imported only when a video file is
read or written; a folder of frames needs nothing.
"""

import heapq
import io
import itertools
import math
import os
import re
import shutil
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from targetclip.command import full_disk_explained, temporary_beside, whole_file
from targetclip.media.images import (
    MAX_SIDE,
    READABLE_SUFFIXES,
    ending_of,
    is_picture,
    read_picture,
    write_as,
)

FOLDER_RATE = Fraction(25)
# Formats that hold a clip and nothing else. FFmpeg also reads playlists, which open other files and
# addresses of the network, and takes pictures, texts and lists for videos.
READABLE_VIDEOS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
WRITABLE_VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
# By the first two columns of a display matrix: a pixel (x, y) goes to (ax + cy, bx + dy).
TURNS = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
ROUNDING = 0.001  # seconds that a frame of a constant rate may be off, as in Matroska
TICK = Fraction(1, 60000)  # of a written clip of variable rate
BT709 = 1  # of matrix, primaries and transfer alike
LIMITED_RANGE = 1
MORPH_RATE = Fraction(25)  # 40 ms; GIF counts in 10 ms
REST = 10  # frames that a morph stays at either end
COLOURS = 255  # of a GIF; one more says that a pixel stays as it is
SAMPLED, SAMPLE_SIDE = 5, 128  # pictures that the colours are taken from, and their pixels a side
H264_OPTIONS = {"crf": "18"}  # no visible loss
MPEG4_OPTIONS = {"flags": "+qscale", "global_quality": str(3 * 118)}  # quantiser 3, times 118
MPEG4_TICKS = 65535  # a second has at most so many


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The frames of a clip, in order; each iteration reads them again, one at a time."""

    path: Path
    rate: Fraction
    """Frames a second; the mean of a video whose rate varies."""
    count: int | None
    """Of a folder exact, of a video from its header. None: the header has no count."""
    read: Callable[[], Iterator[Image.Image]]
    times: Callable[[], Iterator[Fraction]] | None = None
    """The time of each frame in seconds, of a video whose rate varies. None: the rate is constant.
    """

    def __iter__(self) -> Iterator[Image.Image]:
        return self.read()


def pyav() -> Any:
    """Import and return the module `av`; ValueError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            'video files need PyAV: pip install "targetclip[video]", or give a folder of frames'
        ) from error
    return av


def reason(error: Any) -> str:
    """Return the message of an FFmpeg error without its path and number."""
    return str(error.strerror or error)


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """Return a key that sorts frame_2 before frame_10."""
    parts = re.split(r"([0-9]+)", path.name)  # texts and numbers alternate
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], path.name


def folder_frames(folder: Path) -> Frames:
    """Return the pictures of a folder in natural order, without hidden and other files."""
    paths = [path for path in folder.iterdir() if path.name[0] != "." and is_picture(path)]
    if not paths:
        raise ValueError(
            f"no frames in {str(folder)!r}: expected pictures ({', '.join(READABLE_SUFFIXES)})"
        )
    paths.sort(key=natural_order)

    def read() -> Iterator[Image.Image]:
        for number, path in enumerate(paths):
            try:
                yield read_picture(path)
            except (ValueError, OSError) as error:
                raise ValueError(f"frame {number}: {error}") from error

    return Frames(path=folder, rate=FOLDER_RATE, count=len(paths), read=read)


def open_file(path: Path) -> Any:
    """Open a container of one of the known formats."""
    if path.is_dir():
        raise ValueError(f"expected a video, found a folder: {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no video at {str(path)!r}; check the path")
    av, options = pyav(), {"format_whitelist": READABLE_VIDEOS}
    try:
        # With "file:", no file name is taken for an address of the network.
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(
            f"{str(path)!r} is not a video of a known kind or is cut short ({reason(error)}); "
            "convert it to MP4"
        ) from error


def moving_streams(container: Any) -> list[Any]:
    """Return the video streams that can be decoded and are no cover picture."""
    cover = pyav().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    return [stream for stream in streams if not stream.disposition & cover]


def turn_of(frame: Any) -> Image.Transpose | None:
    """Return how a frame is turned or mirrored by its display matrix, to the nearest quarter."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    return TURNS[max(TURNS, key=lambda turn: np.dot(turn, (a, b, c, d)))]


def square_pixels(size: tuple[int, int], aspect: Fraction) -> tuple[int, int]:
    """Return the size that shows pixels of an aspect (width by height) as squares; none is lost."""
    width, height = size
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def as_shown(frame: Any, aspect: Fraction) -> Image.Image:
    """Return a decoded frame as an RGB picture of square pixels, turned by its display matrix."""
    picture: Image.Image = frame.to_image()
    size, turn = square_pixels(picture.size, aspect), turn_of(frame)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture if turn is None else picture.transpose(turn)


def packet_times(container: Any, stream: Any) -> list[int]:
    """Return the times of a stream's packets that are shown, in order, in its ticks."""
    times = []
    with suppress(pyav().FFmpegError):  # decoding names the frame
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                times.append(packet.pts)
    return sorted(times)


def is_constant(times: Sequence[int], tick: Fraction, rate: Fraction) -> bool:
    """Tell whether times, in ticks of `tick` seconds, are those of a rate, but for rounding."""
    frames_per_tick = float(tick * rate)
    most = float(rate) * max(ROUNDING, float(tick) / 2) + 1e-6
    return all(abs((t - times[0]) * frames_per_tick - i) <= most for i, t in enumerate(times))


def decoded(container: Any, stream: Any, times: Sequence[int], path: Path) -> Iterator[Any]:
    """Yield the frames of a video stream in the order of time; `times` number them in errors."""
    av, number, count = pyav(), 0, 0
    try:
        for packet in container.demux(stream):
            # Decoders return frames late, so an error's frame is numbered by the packet's time.
            number = count if packet.pts is None else bisect_left(times, packet.pts)
            for frame in packet.decode():
                if frame.is_corrupt:
                    number = count
                    raise av.InvalidDataError(0, "parts of it are missing")
                yield frame
                count += 1
    except av.FFmpegError as error:
        raise ValueError(
            f"frame {number} of {str(path)!r} cannot be decoded ({reason(error)}); copy or "
            "download the video again, or cut that part out"
        ) from error


def start_of(stream: Any) -> Fraction:
    """Return the time of a stream's first frame in seconds."""
    start: Fraction = (stream.start_time or 0) * stream.time_base
    return start


def video_frames(path: Path) -> Frames:
    """Return the frames of the first video stream of a file."""
    with open_file(path) as container:
        streams = moving_streams(container)
        if not streams:
            raise ValueError(f"{str(path)!r} has no video stream that can be read; check the file")
        stream = streams[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError(f"{str(path)!r} has no frame rate; convert it to MP4")
        aspect = stream.sample_aspect_ratio or Fraction(1)
        width, height = square_pixels((stream.width, stream.height), aspect)
        if max(width, height) > MAX_SIDE:
            raise ValueError(
                f"{str(path)!r} is {width} x {height} px, more than {MAX_SIDE} a side; make it "
                "smaller"
            )
        count = stream.frames or None
        ticks = packet_times(container, stream)
        constant = is_constant(ticks, stream.time_base, rate)

    def frames() -> Iterator[Any]:
        with open_file(path) as container:
            yield from decoded(container, moving_streams(container)[0], ticks, path)

    def read() -> Iterator[Image.Image]:
        for frame in frames():
            yield as_shown(frame, aspect)

    def times() -> Iterator[Fraction]:
        with open_file(path) as container:
            start = start_of(moving_streams(container)[0])
        after = Fraction(0)  # of a frame without a time
        for frame in frames():
            time = after if frame.pts is None else frame.pts * frame.time_base - start
            yield time
            after = time + 1 / rate

    return Frames(path=path, rate=rate, count=count, read=read, times=None if constant else times)


def open_frames(path: str | Path) -> Frames:
    """Open a video file, or a folder of pictures in natural order at 25 a second.

    Iteration gives RGB pictures, a video's turned and mirrored by its display matrix, and enlarged
    along one side where its pixels are not square. Colours of HDR are not mapped. The first frame
    is decoded here, to find faults early.

    FileNotFoundError: no such file or folder. ValueError: not a video, no video stream, no frames,
    or PyAV is not installed; also while iterating, a frame that cannot be decoded, named by its
    number.
    """
    path = Path(path)
    frames = folder_frames(path) if path.is_dir() else video_frames(path)
    if next(iter(frames), None) is None:
        raise ValueError(f"{str(path)!r} holds no frames; check how it was made")
    return frames


def smooth_latents(
    ws: Float[Tensor, "frames num_ws w_dim"], window: int
) -> Float[Tensor, "frames num_ws w_dim"]:
    """Smooth latents along time by a centred Gaussian over `window` frames.

    The window spans two standard deviations, of (window - 1) / 4 frames each, to either side. Near
    the ends of the clip the weights of the existing frames are scaled to sum to 1. Window 1 changes
    nothing, and a constant sequence stays exactly as it is. Cuts are not detected.

    ValueError: the window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"expected an odd window of 1 or more frames, found {window}")
    if window == 1:
        return ws
    deviation, frames = (window - 1) / 4, len(ws)
    # Sums differences to the frame itself: those of a constant sequence are exactly 0.
    pull = torch.zeros_like(ws)
    total = ws.new_ones(frames, 1, 1)
    for offset in range(1, min(window // 2 + 1, frames)):
        weight = math.exp(-0.5 * (offset / deviation) ** 2)
        step = weight * (ws[offset:] - ws[:-offset])
        pull[:-offset] += step
        pull[offset:] -= step
        total[:-offset] += weight
        total[offset:] += weight
    return ws + pull / total


def yuv_frame(picture: Image.Image) -> Any:
    """Return a frame in limited-range BT.709; the last row or column of an odd side is repeated."""
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = pyav().VideoFrame.from_ndarray(even, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def add_video(output: Any, size: tuple[int, int], rate: Fraction) -> Any:
    """Add a stream for pictures of `size`: H.264, or MPEG-4 where FFmpeg has no x264."""
    if "libx264" in pyav().codecs_available:
        stream = output.add_stream("libx264", rate=rate, options=H264_OPTIONS)
    else:
        rate = 1 / (1 / rate).limit_denominator(MPEG4_TICKS)
        stream = output.add_stream("mpeg4", rate=rate, options=MPEG4_OPTIONS)
    stream.width, stream.height = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    # Stated, because players guess a matrix that is not stated from the size.
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream


def video_packets(
    stream: Any,
    pictures: Iterable[Image.Image],
    size: tuple[int, int],
    times: Iterator[Fraction] | None,
) -> Iterator[Any]:
    """Yield the packets of pictures, encoded at the stream's rate or with times in seconds."""
    context, last = stream.codec_context, -1
    tick = 1 / context.framerate if times is None else context.time_base
    for number, picture in enumerate(pictures):
        if picture.size != size:
            raise ValueError(
                f"expected pictures of {size[0]} x {size[1]} px like the first, found number "
                f"{number} to be {picture.width} x {picture.height}"
            )
        if times is None:
            last = number
        elif (time := next(times, None)) is not None:
            last = max(round(time / tick), last + 1)
        else:
            raise ValueError(f"expected as many pictures as frames, found more than {number}")
        frame = yuv_frame(picture)
        frame.pts, frame.time_base = last, tick
        yield from stream.encode(frame)
    yield from stream.encode(None)


def copied_audio(source: Any, audio: Any, stream: Any, start: Fraction) -> Iterator[Any]:
    """Yield the packets of the audio as they are, shifted so that `start` seconds become 0."""
    for packet in source.demux(audio):
        if packet.dts is None:  # marks the end
            continue
        shift = round(start / packet.time_base)
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        packet.stream = stream
        yield packet


def encoded_audio(source: Any, audio: Any, stream: Any, start: Fraction) -> Iterator[Any]:
    """Yield packets of the audio encoded again, shifted so that `start` seconds become 0."""
    for frame in source.decode(audio):
        if frame.pts is not None:
            frame.pts -= round(start / frame.time_base)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def accepts_audio(format_name: str, path: Path) -> bool:
    """Try whether a container of a format accepts the audio of a file as it is."""
    av = pyav()
    with open_file(path) as source:
        audio = source.streams.audio[0]
        try:
            with av.open(io.BytesIO(), "w", format=format_name) as trial:
                stream = trial.add_stream_from_template(audio)
                # Also a packet, because some codecs pass the header and fail after it.
                for packet in itertools.islice(copied_audio(source, audio, stream, Fraction(0)), 1):
                    trial.mux(packet)
        except (av.FFmpegError, ValueError):
            return False
    return True


def add_audio(output: Any, source: Any, path: Path) -> Iterator[Any]:
    """Add a stream for the source's first audio, if any; return packets in time with its video."""
    if not source.streams.audio:
        return iter(())
    audio = source.streams.audio[0]
    start = start_of((moving_streams(source) or [audio])[0])
    if accepts_audio(output.format.name, path):
        return copied_audio(source, audio, output.add_stream_from_template(audio), start)
    return encoded_audio(source, audio, output.add_stream("aac", rate=48000), start)


def write_video(
    path: str | Path,
    pictures: Iterable[Image.Image],
    timing: Fraction | Frames,
    audio_from: Path | None,
) -> None:
    """Write pictures of one size as .mp4, .mov or .mkv, whole or not at all.

    H.264 in yuv420p (MPEG-4 where FFmpeg has no x264), so odd sides become even. The audio of the
    video `audio_from` is copied where the container accepts it, otherwise encoded as AAC; it keeps
    its time relative to the first frame. Pictures are taken one at a time.

    Args:
        timing: frames a second, or the clip whose frames the pictures were: they get its times.

    Raises:
        FileNotFoundError: the folder or `audio_from` does not exist.
        ValueError: another suffix, no pictures, pictures of several sizes, a rate that is not
            positive, an `audio_from` that is no video, or PyAV is not installed.
        OSError: it cannot be written.
    """
    path, av = Path(path), pyav()
    format_name = WRITABLE_VIDEOS[ending_of(path, WRITABLE_VIDEOS)]
    rate = timing.rate if isinstance(timing, Frames) else timing
    times = timing.times() if isinstance(timing, Frames) and timing.times else None
    if rate <= 0:
        raise ValueError(f"expected a rate of more than 0 frames a second, found {rate}")
    try:
        with whole_file(path) as temporary, ExitStack() as stack:
            pictures = iter(pictures)
            first = next(pictures, None)
            if first is None:
                raise ValueError(f"expected at least one picture for {str(path)!r}, found none")
            pictures, size = itertools.chain([first], pictures), first.size
            source = audio_from and stack.enter_context(open_file(audio_from))
            output = stack.enter_context(av.open(f"file:{temporary}", "w", format=format_name))
            video = add_video(output, size, rate)
            if times is not None:
                video.codec_context.time_base = TICK
            tracks = [video_packets(video, pictures, size, times)]
            if audio_from is not None:
                tracks.append(add_audio(output, source, audio_from))
            # By the time of decoding, as players need them side by side.
            for packet in heapq.merge(*tracks, key=lambda packet: packet.dts * packet.time_base):
                output.mux(packet)
    except av.FFmpegError as error:
        audio = f" with the audio of {str(audio_from)!r}" if audio_from else ""
        raise OSError(f"{str(path)!r} cannot be written{audio} ({reason(error)})") from error


def there_and_back(pictures: list[Image.Image]) -> list[Image.Image]:
    """Return one round of a loop over pictures, which rests for a moment at either end."""
    return pictures[:1] * REST + pictures + pictures[-1:] * REST + pictures[-2:0:-1]


def in_shared_colours(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Return pictures with one palette for all. None is dithered: nothing flickers."""
    count = min(len(pictures), SAMPLED)
    sample = Image.new("RGB", (SAMPLE_SIDE, SAMPLE_SIDE * count))
    for i in range(count):  # the first and the last are among them
        picture = pictures[i * (len(pictures) - 1) // max(count - 1, 1)]
        small = picture.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.NEAREST)
        sample.paste(small, (0, i * SAMPLE_SIDE))
    palette = sample.quantize(COLOURS, kmeans=1000)  # stops early: the rest takes long
    return [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]


def write_morph(path: str | Path, pictures: Iterable[Image.Image]) -> None:
    """Write pictures as a loop, there and back, at 25 a second, whole or not at all.

    The suffix of `path` decides: .gif is an endless loop of 255 colours, .mp4, .mov and .mkv are
    one round of it, as `write_video` writes.

    Args:
        pictures: those of the way there, of one size.

    Raises:
        FileNotFoundError, OSError, ValueError: as `write_video`.
    """
    path, way = Path(path), list(pictures)
    suffix = ending_of(path, (".gif", *WRITABLE_VIDEOS))
    if not way:
        raise ValueError(f"expected at least one picture for {str(path)!r}, found none")
    if suffix != ".gif":
        write_video(path, there_and_back(way), MORPH_RATE, None)
        return
    first, *others = there_and_back(in_shared_colours(way))
    tick = round(1000 / MORPH_RATE)
    with whole_file(path) as temporary:
        first.save(temporary, "GIF", save_all=True, append_images=others, duration=tick, loop=0)


def write_frames(folder: str | Path, pictures: Iterable[Image.Image]) -> None:
    """Write frame_000000.png and so on into a new folder, whole or not at all.
    FileNotFoundError: the folder above does not exist. FileExistsError: the folder is not empty.
    OSError: it cannot be written. ValueError: no pictures."""
    folder = Path(folder)
    temporary = temporary_beside(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a new or an empty folder, found {str(folder)!r}")
    temporary.mkdir()
    try:
        with full_disk_explained(folder):
            for number, picture in enumerate(pictures):
                write_as(picture, temporary / f"frame_{number:06d}.png", "PNG")
        if not any(temporary.iterdir()):
            raise ValueError(f"expected at least one picture for {str(folder)!r}, found none")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
