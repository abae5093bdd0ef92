"""A clip as the source of the `targetclip` command: one direction for all of its frames.

Knows frames, the place of a face in each of them, and latents smoothed along time; nothing of how
directions are found. Frames are read again in every pass, so that a long clip needs no more memory
than its latents do.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from predictor.cli.console import Console
from predictor.cli.options import WINDOW
from predictor.cli.output import FRAMES, VIDEO, OutputFolder
from predictor.cli.sources import Edits, Latents, Sources, inverted, quad_in
from targetclip.media.alignment import Face, FaceFinder, align, paste_back
from targetclip.media.frames import Frames, open_frames, smooth_latents, write_frames, write_video
from targetclip.media.images import tensor_to_pictures
from targetclip.scene import Scene

SCORED, SHOWN = 16, 8  # frames, at most


def evenly_spaced(total: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `total`, with 0 among them."""
    count = min(most, total)
    return [i * total // count for i in range(count)]


# Where the face is


@dataclass(frozen=True)
class Track:
    """The place of a face in the frames that show it."""

    numbers: list[int]
    """Of those frames."""
    runs: list[int]
    """Lengths of the runs of frames without a gap or a leap."""
    quads: Float[Tensor, "found 4 2"]
    """Its squares in the frames' pixels, smoothed along every run."""
    frames: int
    """Number of frames, with or without a face."""


def is_near(face: Face, before: Face) -> bool:
    """Tell whether a face is less than its size away from where it was before."""
    return distance(face, before) < before.size


def distance(one: Face, other: Face) -> float:
    """Return the distance between the middles of two faces, in pixels."""
    return float(np.hypot(*(one.landmarks.mean(axis=0) - other.landmarks.mean(axis=0))))


def same_face(faces: Sequence[Face], index: int, before: Face | None) -> Face | None:
    """Return the face nearest to where it was before, if near; otherwise the face of the number,
    if there is one."""
    if before is not None and faces:
        nearest = min(faces, key=lambda face: distance(face, before))
        if is_near(nearest, before):
            return nearest
    return faces[index] if index < len(faces) else None


def quad_inside(face: Face, frame: Image.Image) -> Float[ndarray, "4 2"] | None:
    """Return the face's square; None if its middle is beyond the frame."""
    try:
        return quad_in(face, frame)
    except ValueError:
        return None


def smooth_runs(
    values: Float[Tensor, "found a b"], runs: Sequence[int], window: int
) -> Float[Tensor, "found a b"]:
    """Smooth each run of frames by itself."""
    return torch.cat([smooth_latents(run, window) for run in values.split(list(runs))])


def find_track(
    frames: Frames, finder: FaceFinder, index: int, window: int, console: Console
) -> Track:
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
    with console.bar(frames, total=frames.count, desc="find faces", unit="frame") as bar:
        for number, frame in enumerate(bar):
            faces = finder.find(frame)
            count, most = number + 1, max(most, len(faces))
            face = same_face(faces, index, before)
            quad = None if face is None else quad_inside(face, frame)
            if face is None or quad is None:
                continue
            near = before is not None and is_near(face, before)
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
        fault = f"no face found in any of {count} frames"
        if most:
            fault = f"expected the number of a face, found {index}; no frame shows more than {most}"
        raise ValueError(
            f"{frames.path}: {fault}; take a clip with larger faces that look into the camera, or "
            "give --no-align if its frames are aligned already"
        )
    smoothed = smooth_runs(torch.from_numpy(np.stack(quads)), runs, window)
    return Track(numbers, runs, smoothed, count)


class Clip(Sources):
    """A video file or a folder of frames; its face is followed through it at construction.

    Args:
        finder: None: the frames are aligned already, and edited frames are the generator's squares.
        face: which one of the frame where it first shows, 0 being the largest.
        window: frames over which places and latents are smoothed.

    Raises:
        FileNotFoundError, ValueError: as `open_frames` and `find_track`.
    """

    def __init__(
        self,
        path: Path,
        finder: FaceFinder | None,
        face: int = 0,
        window: int = WINDOW,
        *,
        console: Console,
    ) -> None:
        self.frames, self.window, self.console = open_frames(path), window, console
        self.facts: dict[str, Any] = {
            "sources": [str(path)],
            "smooth": window,
            "rate": float(self.frames.rate),
        }
        self.track: Track | None = None
        if finder is not None:
            self.track = track = find_track(self.frames, finder, face, window, console)
            without = sorted({*range(track.frames)} - {*track.numbers})
            self.facts |= {"face": face, "frames_without_face": without}
            if without:
                total = track.frames
                console.warn(f"{len(without)} of {total} frames show no face and stay as they are")

    def placed(self) -> Iterator[tuple[Image.Image, Float[ndarray, "4 2"] | None]]:
        """Return every frame with its face's square; None without a face, or if all are aligned."""
        quads = {}
        if self.track is not None:
            quads = dict(zip(self.track.numbers, self.track.quads.numpy(), strict=True))
        for number, frame in enumerate(self.frames):
            yield frame, quads.get(number)

    def squares(self, size: int, only: Sequence[int] | None = None) -> Iterator[Image.Image]:
        """Return the squares to invert of the frames that have a face, or of some, by their place
        among these."""
        place = 0
        for frame, quad in self.placed():
            if self.track is not None and quad is None:
                continue
            if only is None or place in only:
                yield frame if quad is None else align(frame, quad, size)
            place += 1

    def latents(self, scene: Scene) -> Latents:
        """Invert every frame; the edit is scored on some of them, evenly spaced."""
        size = scene.generator.resolution
        total = self.frames.count if self.track is None else len(self.track.numbers)
        squares = self.squares(size)
        with self.console.bar(squares, total=total, desc="invert", unit="frame") as bar:
            ws = torch.cat([batch.cpu() for batch in inverted(scene, iter(bar))])
        runs = [len(ws)] if self.track is None else self.track.runs
        ws = smooth_runs(ws, runs, self.window)
        scored, shown = evenly_spaced(len(ws), SCORED), evenly_spaced(len(ws), SHOWN)
        numbers = range(len(ws)) if self.track is None else self.track.numbers
        rendered = tensor_to_pictures(scene.render(ws[shown].to(scene.device)))
        return Latents(
            scored=ws[scored].to(scene.device),
            # Every second one of 16, or as evenly spaced as these are themselves.
            shown=evenly_spaced(len(scored), SHOWN),
            rows={"frames": [*self.squares(size, shown)], "frames, inverted": rendered},
            whole=ws,
            facts={
                "frames": len(ws) if self.track is None else self.track.frames,
                "scored_frames": [numbers[i] for i in scored],
            },
        )

    def pasted(self, faces: Iterator[Image.Image]) -> Iterator[Image.Image]:
        """Return the frames, with edited faces put back where faces were cut out."""
        if self.track is None:
            yield from faces
            return
        for frame, quad in self.placed():
            yield frame if quad is None else paste_back(frame, next(faces), quad)

    def write(
        self, out: OutputFolder, edited: Iterable[Image.Image], latents: Latents, edits: Edits
    ) -> dict[str, Any]:
        """Write edited.mp4 with the clip's audio and rate, or frames/ of a folder."""
        assert latents.whole is not None
        path = self.frames.path
        frames, total = self.pasted(edits(latents.whole)), latents.facts["frames"]
        with self.console.bar(frames, total=total, desc="edit", unit="frame") as bar:
            if not path.is_dir():
                write_video(out.take(VIDEO), iter(bar), self.frames, path)
                return {"edited": [VIDEO]}
            write_frames(out.path / FRAMES, iter(bar))
        for frame in sorted((out.path / FRAMES).iterdir()):
            out.take(f"{FRAMES}/{frame.name}")
        return {"edited": [FRAMES]}
