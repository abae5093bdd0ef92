"""A clip as the source of the `targetclip` command: one direction for all of its frames.

Knows frames, where a face is in each of them, and latents smoothed along time; nothing of how
directions are found. Frames are read again in every pass, so that a long clip needs no more memory
than its latents do.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.sources import Edit, Rows, inverted, quad_in, rendered
from predictor.transfer import EssenceTransfer
from targetclip.media.alignment import align, paste_back
from targetclip.media.faces import Face, FaceFinder
from targetclip.media.frames import Frames, open_frames, smooth_latents, write_frames, write_video
from targetclip.media.images import tensor_to_pictures

# What the containers that targetclip.media.frames reads are called.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp"),
)
VIDEO, FOLDER = "edited.mp4", "frames"  # what is written
WINDOW = 5
SCORED, SHOWN = 16, 8


def clips_among(sources: Sequence[Path] | None) -> list[Path]:
    """Those sources that are folders, or videos by their suffix."""
    return [
        path for path in sources or () if path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()
    ]


def check_clip(sources: Sequence[Path] | None, smooth: int | None, out: Path) -> None:
    """Look at what is there before any work.

    Raises:
        ValueError: a clip among other sources, smoothing without a clip, or a clip that the
            results would replace.
        FileExistsError: there is something already where a folder's frames would be written.
    """
    clips = clips_among(sources)
    if smooth is not None and not clips:
        raise ValueError("--smooth is for clips: drop it, or give a video or a folder of frames")
    if not sources or not clips:
        return
    clip = clips[0]
    if len(sources) > 1:
        raise ValueError(
            f"--sources: expected pictures or one clip alone, found {str(clip)!r} among "
            f"{len(sources)} sources"
        )
    written = out / (FOLDER if clip.is_dir() else VIDEO)
    if written.resolve() == clip.resolve():
        raise ValueError(f"--out: {str(written)!r} would replace the clip: give another folder")
    if clip.is_dir() and written.exists() and (written.is_file() or any(written.iterdir())):
        raise FileExistsError(
            f"--out: expected a new or an empty folder, found {str(written)!r}: give another one"
        )


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, with 0 among them."""
    wanted = min(wanted, count)
    return [i * count // wanted for i in range(wanted)]


# Where the face is


@dataclass(frozen=True)
class Track:
    """Where a face is in the frames that show it."""

    numbers: list[int]
    """Of those frames."""
    runs: list[int]
    """How many of them follow each other without a gap or a leap, run by run."""
    quads: Float[Tensor, "found 4 2"]
    """Smoothed along every run, in the frames' pixels."""
    frames: int
    """How many there are, with or without a face."""


def distance(one: Face, other: Face) -> float:
    """Between the middles of two faces, in pixels."""
    return float(np.hypot(*(one.landmarks.mean(axis=0) - other.landmarks.mean(axis=0))))


def followed(faces: Sequence[Face], index: int, before: Face | None) -> Face | None:
    """The face nearest to where it was before, if that is less than its size away; otherwise the
    one of the number, if there is one."""
    if before is not None and faces:
        nearest = min(faces, key=lambda face: distance(face, before))
        if distance(nearest, before) < before.size:
            return nearest
    return faces[index] if index < len(faces) else None


def quad_inside(face: Face, frame: Image.Image) -> Float[ndarray, "4 2"] | None:
    """The face's square; None where its middle is beyond the frame."""
    try:
        return quad_in(face, frame)
    except ValueError:
        return None


def smooth_runs(
    values: Float[Tensor, "found a b"], runs: Sequence[int], window: int
) -> Float[Tensor, "found a b"]:
    """Each run of frames smoothed for itself."""
    return torch.cat([smooth_latents(run, window) for run in values.split(list(runs))])


def find_track(frames: Frames, finder: FaceFinder, index: int, window: int) -> Track:
    """Follow a face through a clip.

    It is the face of the number `index`, by size, in the first frame that shows so many, and in
    every later frame the one nearest to it. A leap of more than the face's size begins anew.

    Raises:
        ValueError: no frame shows a face, or none so many.
    """
    numbers: list[int] = []
    runs: list[int] = []
    quads: list[Float[ndarray, "4 2"]] = []
    before, size, count, most = None, (0, 0), 0, 0
    with tqdm(frames, total=frames.count, desc="find faces", unit="frame") as bar:
        for number, frame in enumerate(bar):
            faces = finder.find(frame)
            count, most = number + 1, max(most, len(faces))
            face = followed(faces, index, before)
            quad = None if face is None else quad_inside(face, frame)
            if face is None or quad is None:
                continue
            near = before is not None and distance(face, before) < before.size
            if near and numbers[-1] == number - 1 and size == frame.size:
                runs[-1] += 1
            else:
                runs.append(1)
            numbers.append(number)
            quads.append(quad)
            before, size = face, frame.size
    if not numbers and most > index:
        raise ValueError(f"{frames.path}: every face is cut off by the frame; take another clip")
    if not numbers:
        found = f"no face found in any of {count} frames"
        if most:
            found = f"expected the number of a face, found {index}; no frame shows more than {most}"
        raise ValueError(
            f"{frames.path}: {found}; take a clip with larger faces that look into the camera, or "
            "give --no-align if its frames are aligned already"
        )
    smoothed = smooth_runs(torch.from_numpy(np.stack(quads)), runs, window)
    return Track(numbers, runs, smoothed, count)


class Clip:
    """A video file or a folder of frames; its face is followed through it when this is made.

    Args:
        finder: None: the frames are aligned already, and edited frames are the generator's squares.
        face: which one of the frame where it first shows, 0 being the largest.
        window: frames over which places and latents are smoothed.

    Raises:
        FileNotFoundError, ValueError: as `open_frames` and `find_track`.
    """

    def __init__(
        self, path: Path, finder: FaceFinder | None, face: int = 0, window: int = WINDOW
    ) -> None:
        self.frames, self.window = open_frames(path), window
        self.ws, self.max_images = torch.empty(0), 0
        self.facts: dict[str, Any] = {
            "sources": [str(path)],
            "smooth": window,
            "rate": float(self.frames.rate),
        }
        self.track: Track | None = None
        if finder is not None:
            self.track = track = find_track(self.frames, finder, face, window)
            without = sorted({*range(track.frames)} - {*track.numbers})
            self.facts |= {"face": face, "frames_without_face": without}
            if without:
                kept = f"{len(without)} of {track.frames} frames show no face and stay as they are"
                print(f"targetclip: {kept}", file=sys.stderr)

    def placed(self) -> Iterator[tuple[Image.Image, Float[ndarray, "4 2"] | None]]:
        """Every frame, and where its face is; None where it has none, or where all are aligned."""
        quads = {}
        if self.track is not None:
            quads = dict(zip(self.track.numbers, self.track.quads.numpy(), strict=True))
        for number, frame in enumerate(self.frames):
            yield frame, quads.get(number)

    def squares(self, size: int, only: Sequence[int] | None = None) -> Iterator[Image.Image]:
        """What is inverted of the frames that have a face, or of some of these, by their place."""
        place = 0
        for frame, quad in self.placed():
            if self.track is not None and quad is None:
                continue
            if only is None or place in only:
                yield frame if quad is None else align(frame, quad, size)
            place += 1

    def latents(
        self, essence: EssenceTransfer
    ) -> tuple[Float[Tensor, "sources num_ws w_dim"], Rows]:
        """Latents of some frames, evenly spaced; those of all are kept for `write`."""
        size, device = essence.generator.resolution, essence.generator.mean_w.device
        total = self.frames.count if self.track is None else len(self.track.numbers)
        with tqdm(self.squares(size), total=total, desc="invert", unit="frame") as bar:
            ws = torch.cat([batch.cpu() for batch in inverted(essence, iter(bar))])
        runs = [len(ws)] if self.track is None else self.track.runs
        self.ws, self.max_images = smooth_runs(ws, runs, self.window), essence.max_images
        scored, shown = evenly_spaced(len(ws), SCORED), evenly_spaced(len(ws), SHOWN)
        numbers = range(len(ws)) if self.track is None else self.track.numbers
        self.facts |= {
            "frames": len(ws) if self.track is None else self.track.frames,
            "scored_frames": [numbers[i] for i in scored],
        }
        rows: Rows = {
            "frames": [*self.squares(size, shown)],
            "frames, inverted": rendered(essence, self.ws[shown].to(device)),
        }
        return self.ws[scored].to(device), rows

    def shown(self, edited: Sequence[Image.Image]) -> Sequence[Image.Image]:
        # Every second one of 16, or as evenly spaced as they are themselves.
        return [edited[i] for i in evenly_spaced(len(edited), SHOWN)]

    def edited(self, edit: Edit) -> Iterator[Image.Image]:
        """The edited frames, with the face put back where it was cut out."""

        def squares() -> Iterator[Image.Image]:
            for part in self.ws.split(self.max_images):
                yield from tensor_to_pictures(edit(part))

        faces = squares()
        if self.track is None:
            yield from faces
            return
        for frame, quad in self.placed():
            yield frame if quad is None else paste_back(frame, next(faces), quad)

    def write(self, out: Path, edited: Sequence[Image.Image], edit: Edit) -> dict[str, Any]:
        """edited.mp4 with the clip's audio and rate, or frames/ of a folder."""
        path = self.frames.path
        name = FOLDER if path.is_dir() else VIDEO
        total = self.facts["frames"]
        with tqdm(self.edited(edit), total=total, desc="edit", unit="frame") as bar:
            if path.is_dir():
                write_frames(out / name, iter(bar))
            else:
                write_video(out / name, iter(bar), self.frames.rate, path)
        return {"edited": [name]}
