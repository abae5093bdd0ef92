"""Clips in and out: a video file or a folder of frames, one picture at a time, and its audio.

Knows files, time and the smoothing of latents along it; nothing of generators or directions.
Frames are numbered from 0. Video needs PyAV, an extra that is imported only here and only when
a video file is read or written; a folder of frames needs nothing.
"""

import heapq
import io
import itertools
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from targetclip.media.images import MAX_SIDE, read_picture, write_picture

FOLDER_RATE = Fraction(25)
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
# Formats that hold a clip and nothing else. FFmpeg also knows playlists, which open other files and
# addresses of the network, and shows pictures, texts and lists as videos.
READABLE_VIDEOS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg"
WRITABLE_VIDEOS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}
QUARTERS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
BT709 = 1  # of matrix, primaries and transfer alike
LIMITED_RANGE = 1
H264_OPTIONS = {"crf": "18"}  # no loss to see
MPEG4_OPTIONS = {"flags": "+qscale", "global_quality": str(3 * 118)}  # quantiser 3, in its unit
MPEG4_TICKS = 65535  # a second's, at most


@dataclass(frozen=True)
class Frames:
    """The frames of a clip, in order; each iteration reads them again, one at a time."""

    path: Path
    rate: Fraction
    """Frames a second; of a video whose rate varies, the mean."""
    count: int | None
    """How many: of a folder for certain, of a video as its header says, None if it says nothing."""
    read: Callable[[], Iterator[Image.Image]]

    def __iter__(self) -> Iterator[Image.Image]:
        return self.read()


def pyav() -> Any:
    """The module `av`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(
            'video files need PyAV: pip install "targetclip[video]", or give a folder of frames'
        ) from error
    return av


def reason(error: Any) -> str:
    """What FFmpeg says, without the path and the number it adds."""
    return str(error.strerror or error)


def natural_order(path: Path) -> tuple[list[str | int], str]:
    """A key that puts frame_2 before frame_10."""
    parts = re.split(r"([0-9]+)", path.name)  # texts and numbers take turns
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)], path.name


def folder_frames(folder: Path) -> Frames:
    """The pictures of a folder in natural order, hidden files and other kinds left out."""
    paths = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FRAME_SUFFIXES and not path.name.startswith(".")
    ]
    if not paths:
        raise ValueError(
            f"no frames in {str(folder)!r}: expected pictures ({', '.join(FRAME_SUFFIXES)})"
        )
    paths.sort(key=natural_order)

    def read() -> Iterator[Image.Image]:
        for number, path in enumerate(paths):
            try:
                yield read_picture(path)
            except (ValueError, OSError) as error:
                raise ValueError(f"frame {number}: {error}") from error

    return Frames(folder, FOLDER_RATE, len(paths), read)


def open_file(path: Path) -> Any:
    """A container to read, of one of the known formats."""
    if path.is_dir():
        raise ValueError(f"expected a video, found a folder: {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no video at {str(path)!r}; check the path")
    av, options = pyav(), {"format_whitelist": READABLE_VIDEOS}
    try:
        # With the protocol named, no file name is taken for an address.
        return av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(
            f"{str(path)!r} is not a video of a known kind or is cut short ({reason(error)}); "
            "convert it to MP4"
        ) from error


def moving_streams(container: Any) -> list[Any]:
    """The video streams that can be decoded and are no cover picture."""
    cover = pyav().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if stream.codec_context is not None]
    return [stream for stream in streams if not stream.disposition & cover]


def as_shown(frame: Any) -> Image.Image:
    """The RGB picture of a decoded frame, turned as a player would."""
    picture: Image.Image = frame.to_image()
    turn = QUARTERS[round(frame.rotation / 90) % 4]
    return picture if turn is None else picture.transpose(turn)


def decoded(container: Any, stream: Any, rate: Fraction, path: Path) -> Iterator[Image.Image]:
    """Pictures of a video stream in the order of time."""
    av, number, count = pyav(), 0, 0
    try:
        for packet in container.demux(stream):
            # Decoders deliver late, so the packet's own time says which frame it is.
            since = None if packet.pts is None else packet.pts - (stream.start_time or 0)
            number = count if since is None else round(since * stream.time_base * rate)
            for frame in packet.decode():
                if frame.is_corrupt:
                    number = count
                    raise av.InvalidDataError(0, "parts of it are missing")
                yield as_shown(frame)
                count += 1
    except av.FFmpegError as error:
        raise ValueError(
            f"frame {number} of {str(path)!r} cannot be decoded ({reason(error)}); copy or "
            "download the video again, or cut that part out"
        ) from error


def video_frames(path: Path) -> Frames:
    """The frames of the first video stream of a file."""
    with open_file(path) as container:
        streams = moving_streams(container)
        if not streams:
            raise ValueError(f"{str(path)!r} has no video stream that can be read; check the file")
        stream = streams[0]
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise ValueError(f"{str(path)!r} has no frame rate; convert it to MP4")
        if max(stream.width, stream.height) > MAX_SIDE:
            raise ValueError(
                f"{str(path)!r} is {stream.width} x {stream.height} px, more than {MAX_SIDE} a "
                "side; make it smaller"
            )
        count = stream.frames or None

    def read() -> Iterator[Image.Image]:
        with open_file(path) as container:
            yield from decoded(container, moving_streams(container)[0], rate, path)

    return Frames(path, rate, count, read)


def open_frames(path: str | Path) -> Frames:
    """The frames of a video file, or of a folder of pictures in natural order at 25 a second.

    Iteration gives RGB pictures, a video's turned as its rotation says; pixels count as square,
    and colours of HDR are not mapped. The first frame is decoded here, to find faults early.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a video, no video stream, no frames, or PyAV is not installed; here and
            while iterating, a frame that cannot be decoded, named by its number.
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

    Its standard deviation is (window - 1) / 4 frames, so the window ends at two of them. Near the
    ends of the clip the weights of the frames that exist are scaled to sum to 1. Window 1 changes
    nothing, nor does any window a constant sequence. Cuts are not looked for.

    Raises:
        ValueError: the window is not odd and positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"expected an odd window of 1 or more frames, found {window}")
    if window == 1:
        return ws
    deviation, frames = (window - 1) / 4, len(ws)
    # Differences to the frame itself are summed: of a constant sequence they are exactly 0.
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


def check_folder(folder: Path) -> None:
    """Raise a FileNotFoundError where there is no folder to write into."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to write into; create it first")


def yuv_frame(picture: Image.Image) -> Any:
    """A frame of limited-range BT.709; an odd side gets one more row or column, like its last."""
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    frame = pyav().VideoFrame.from_ndarray(even, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")


def add_video(output: Any, size: tuple[int, int], rate: Fraction) -> Any:
    """A stream for pictures of `size`: H.264, or MPEG-4 where FFmpeg has no x264."""
    if "libx264" in pyav().codecs_available:
        stream = output.add_stream("libx264", rate=rate, options=H264_OPTIONS)
    else:
        rate = 1 / (1 / rate).limit_denominator(MPEG4_TICKS)
        stream = output.add_stream("mpeg4", rate=rate, options=MPEG4_OPTIONS)
    stream.width, stream.height = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    # Said aloud, because players guess an unsaid matrix from the size.
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = LIMITED_RANGE
    return stream


def video_packets(
    stream: Any, pictures: Iterable[Image.Image], size: tuple[int, int]
) -> Iterator[Any]:
    """The pictures, encoded, at the stream's rate."""
    for number, picture in enumerate(pictures):
        if picture.size != size:
            raise ValueError(
                f"expected pictures of {size[0]} x {size[1]} px like the first, found number "
                f"{number} to be {picture.width} x {picture.height}"
            )
        frame = yuv_frame(picture)
        frame.pts, frame.time_base = number, 1 / stream.codec_context.framerate
        yield from stream.encode(frame)
    yield from stream.encode(None)


def copied_audio(source: Any, audio: Any, stream: Any, start: Fraction) -> Iterator[Any]:
    """The audio's packets as they are; what was at `start` seconds is at 0."""
    for packet in source.demux(audio):
        if packet.dts is None:  # the mark of the end
            continue
        shift = round(start / packet.time_base)
        packet.dts -= shift
        packet.pts = packet.dts if packet.pts is None else packet.pts - shift
        packet.stream = stream
        yield packet


def encoded_audio(source: Any, audio: Any, stream: Any, start: Fraction) -> Iterator[Any]:
    """The audio decoded and encoded again; what was at `start` seconds is at 0."""
    for frame in source.decode(audio):
        if frame.pts is not None:
            frame.pts -= round(start / frame.time_base)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def takes(format_name: str, path: Path) -> bool:
    """Whether a container of this format takes a file's audio as it is; found by trying."""
    av = pyav()
    with open_file(path) as source:
        audio = source.streams.audio[0]
        try:
            with av.open(io.BytesIO(), "w", format=format_name) as trial:
                stream = trial.add_stream_from_template(audio)
                # With a packet, because some codecs pass the header and fail behind it.
                for packet in itertools.islice(copied_audio(source, audio, stream, Fraction(0)), 1):
                    trial.mux(packet)
        except (av.FFmpegError, ValueError):
            return False
    return True


def add_audio(output: Any, source: Any, path: Path) -> Iterator[Any]:
    """Add a stream for the source's first audio, if any; its packets, in time with its video."""
    if not source.streams.audio:
        return iter(())
    audio = source.streams.audio[0]
    first = (moving_streams(source) or [audio])[0]
    start = (first.start_time or 0) * first.time_base
    if takes(output.format.name, path):
        return copied_audio(source, audio, output.add_stream_from_template(audio), start)
    return encoded_audio(source, audio, output.add_stream("aac", rate=48000), start)


def write_video(
    path: str | Path, pictures: Iterable[Image.Image], rate: Fraction, audio_from: Path | None
) -> None:
    """Write pictures of one size as .mp4, .mov or .mkv; a reader never sees half a file.

    H.264 in yuv420p (MPEG-4 where FFmpeg has no x264), so odd sides become even. The audio of the
    video `audio_from` is copied as it is where the container takes it, otherwise encoded as AAC;
    it keeps its place in time to the first frame. Pictures are taken one at a time; if they raise
    anything, no file is left.

    Raises:
        FileNotFoundError: the folder or `audio_from` does not exist.
        ValueError: another suffix, no pictures, pictures of several sizes, a rate that is not
            positive, an `audio_from` that is no video, or PyAV is not installed.
        OSError: it cannot be written.
    """
    path, av = Path(path), pyav()
    format_name = WRITABLE_VIDEOS.get(path.suffix.lower())
    if format_name is None:
        raise ValueError(
            f"expected a file name ending in {', '.join(WRITABLE_VIDEOS)}, found {str(path)!r}"
        )
    check_folder(path.parent)
    if rate <= 0:
        raise ValueError(f"expected a rate of more than 0 frames a second, found {rate}")
    pictures = iter(pictures)
    first = next(pictures, None)
    if first is None:
        raise ValueError(f"expected at least one picture for {str(path)!r}, found none")
    pictures = itertools.chain([first], pictures)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with ExitStack() as stack:
            source = audio_from and stack.enter_context(open_file(audio_from))
            output = stack.enter_context(av.open(f"file:{temporary}", "w", format=format_name))
            tracks = [video_packets(add_video(output, first.size, rate), pictures, first.size)]
            if audio_from is not None:
                tracks.append(add_audio(output, source, audio_from))
            # By the time they are decoded at, as players want them side by side.
            for packet in heapq.merge(*tracks, key=lambda packet: packet.dts * packet.time_base):
                output.mux(packet)
        os.replace(temporary, path)
    except av.FFmpegError as error:
        audio = f" with the audio of {str(audio_from)!r}" if audio_from else ""
        raise OSError(f"{str(path)!r} cannot be written{audio} ({reason(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_frames(folder: str | Path, pictures: Iterable[Image.Image]) -> None:
    """Write frame_000000.png and so on into a folder that is whole or not there.

    Raises:
        FileNotFoundError: the folder above does not exist.
        FileExistsError: the folder holds something, whose frames would mix with these.
        ValueError: no pictures.
    """
    folder = Path(folder)
    check_folder(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"expected a new or an empty folder, found {str(folder)!r}")
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        for number, picture in enumerate(pictures):
            write_picture(picture, temporary / f"frame_{number:06d}.png")
        if not any(temporary.iterdir()):
            raise ValueError(f"expected at least one picture for {str(folder)!r}, found none")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
