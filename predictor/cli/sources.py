"""Sources of the `targetclip` command: generated ones, latents, squares, photos, and clips.

Knows how a face is cut out, inverted, and put back edited, and how it is followed through a clip;
nothing of how directions are found. A clip's frames are read again in every pass, so that a long
clip needs no more memory than its latents do.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from predictor.cli.options import WINDOW, Request
from predictor.cli.output import FRAMES, VIDEO, Console, OutputFolder, unique_names
from predictor.cli.report import NamedTarget
from predictor.gallery import Shown
from targetclip.directions import check_size, read_released
from targetclip.encoders.inverter import InversionConfig, LatentInverter, OptimizingInverter
from targetclip.media.alignment import Face, FaceFinder, align, face_quad, paste_back, quad_in
from targetclip.media.frames import Frames, open_frames, smooth_latents, write_frames, write_video
from targetclip.media.images import read_picture, tensor_to_pictures, write_picture
from targetclip.scene import Scene

MAX_SHOWN = 64  # sources in a sheet
SMALL = 32  # pixels a side, below which a picture shows no face
AT_ONCE = 4  # images searched for together: gradients take several times the memory of rendering
SCORED, SHOWN = 16, 8  # frames of a clip, at most

Edits = Callable[[Float[Tensor, "sources num_ws w_dim"]], Iterator[Image.Image]]
"""From latents on any device to edited pictures."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Latents of sources, and how they are shown."""

    scored: Float[Tensor, "sources num_ws w_dim"]
    """Those that the edit is scored on."""
    shown: Sequence[int]
    """Places of those among them that the sheet shows."""
    rows: Mapping[str, Sequence[Image.Image]]
    """Rows of the sheet of unedited sources, by their labels."""
    whole: Float[Tensor, "frames num_ws w_dim"] | None = None
    """Those of every frame of a clip, on the processor."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of report.json."""


class Sources:
    """What is edited, wherever it comes from."""

    facts: dict[str, Any]
    """Entries of report.json."""
    names: list[str]
    """Name of each source, in the names of its results."""

    def latents(self, scene: Scene) -> Latents:
        """Return the latents, inverted or generated."""
        raise NotImplementedError

    def write(
        self, out: OutputFolder, edited: Iterable[Image.Image], latents: Latents, edits: Edits
    ) -> dict[str, Any]:
        """Write the scored edits as edited_NAME.png; return entries of report.json.

        Args:
            edits: makes more edits than the scored ones.
        """
        names = [f"edited_{name}.png" for name in self.names]
        for name, picture in zip(names, edited, strict=True):
            write_picture(picture, out.take(name))
        return {"edited": names}

    def named(self, latents: Latents) -> list[tuple[str, str | None]]:
        """Return the name of each shown source for people, and the file of its result, if any."""
        return [(self.names[i], f"edited_{self.names[i]}.png") for i in latents.shown]

    def shown(
        self,
        out: OutputFolder,
        latents: Latents,
        results: Sequence[Image.Image],
        notes: Sequence[str],
    ) -> Iterator[Shown]:
        """Yield the shown sources beside their results, as the page shows them.

        Args:
            results: edited pictures of the shown sources.
            notes: a line on each of them.
        """
        sources = next(iter(latents.rows.values()))
        given = zip(self.named(latents), sources, results, notes, strict=True)
        for (name, link), source, result, note in given:
            yield Shown(name, source, result, link, note)


def check_shows(picture: Image.Image, name: str, console: Console) -> None:
    """Warn of a picture that shows nothing: a few pixels, or a single colour."""
    if min(picture.size) < SMALL:
        size = f"{picture.width} x {picture.height} px"
        console.warn(f"{name}: {size} are too few to show a face; give {SMALL} px a side or more")
    elif len(picture.getcolors(maxcolors=1) or ()) == 1:
        console.warn(f"{name}: the picture is of a single colour; check the file")


# Faces in pictures


def find_faces(request: Request, targets: Sequence[NamedTarget]) -> FaceFinder | None:
    """Return a finder of faces if faces are cut out, after finding those of inverted targets.
    ValueError: the extra is not installed, or a target that may be inverted has no face."""
    if not request.align or not request.inverts:
        return None
    finder = FaceFinder()
    for target in targets if request.inverts_target else ():
        if isinstance(target.content, Image.Image):
            face_quad(finder, target.content, 0, target.name)
    return finder


def target_aligner(finder: FaceFinder, size: int) -> Callable[[Image.Image], Image.Image]:
    """Return a function that cuts the largest face out of a target."""

    def cut_out(picture: Image.Image) -> Image.Image:
        return align(picture, face_quad(finder, picture, 0, "--target"), size)

    return cut_out


# From pictures to latents and back


def searching_inverter(scene: Scene, steps: int, console: Console) -> LatentInverter:
    """Return an inverter that searches, with a progress bar for each call.

    It starts at the answer of the scene's inverter or, without one, at the mean latent.
    """
    at_once = min(AT_ONCE, scene.max_images or AT_ONCE)

    def invert(
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        total = steps * math.ceil(len(images) / at_once)
        # None: beside the bar of a clip's frames it goes away when it is full.
        with console.bar(total=total, desc="search latents", unit="step", leave=None) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()

            search = OptimizingInverter(
                generator=scene.generator,
                embedder=scene.embedder,
                first=scene.inverter,
                config=InversionConfig(steps=steps),
                at_once=at_once,
                on_step=on_step,
            )
            return search(images)

    return invert


def inverted(
    scene: Scene, pictures: Iterable[Image.Image]
) -> Iterator[Float[Tensor, "batch num_ws w_dim"]]:
    """Return latents of pictures, batch by batch."""
    pictures = iter(pictures)
    while batch := list(islice(pictures, scene.at_once)):
        yield scene.invert(batch)


class Rendered(Sources):
    """Sources without a picture but the generator's: results have their numbers, from 0 on."""

    def __init__(self, count: int, facts: Mapping[str, Any]) -> None:
        self.names = [f"{i:03d}" for i in range(count)]
        self.facts = {"sources": {"count": count, **facts}}

    def ws(self, scene: Scene) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return the latents, on the scene's device."""
        raise NotImplementedError

    def latents(self, scene: Scene) -> Latents:
        ws = self.ws(scene)
        shown = range(min(len(ws), MAX_SHOWN))
        rows = {"sources": tensor_to_pictures(scene.render(ws[: len(shown)]))}
        return Latents(scored=ws, shown=shown, rows=rows)

    def named(self, latents: Latents) -> list[tuple[str, str | None]]:
        """Return numbers that read as such, and files."""
        return [(f"source {name}", link) for name, link in super().named(latents)]


class Generated(Rendered):
    """The generator's own samples."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, {"seed": seed})
        self.seed = seed

    def ws(self, scene: Scene) -> Float[Tensor, "sources num_ws w_dim"]:
        return scene.sources(len(self.names), self.seed)


class LatentFile(Rendered):
    """Latents of a file, such as TargetCLIP's release has of faces; read at construction.

    Raises:
        FileNotFoundError, ValueError: as `read_released`.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.items = path, read_released(path)
        super().__init__(len(self.items), {"file": str(path)})

    def ws(self, scene: Scene) -> Float[Tensor, "sources num_ws w_dim"]:
        """Return the latents; ValueError: another size than the generator's."""
        generator = scene.generator
        check_size(self.path, self.items, generator.num_ws, generator.w_dim)
        return self.items.to(scene.device)


class Photos(Sources):
    """Pictures, checked and their faces found at construction.

    They are read again where they are needed, so that a thousand photos need no more memory than
    one. Results have the names of their files.

    Args:
        finder: None: the pictures are aligned already.
        face: which one of each photo, 0 being the largest.

    Raises:
        FileNotFoundError, ValueError: as `read_picture` and `face_quad`.
    """

    def __init__(
        self, paths: Sequence[Path], finder: FaceFinder | None, face: int, console: Console
    ) -> None:
        self.paths = list(paths)
        self.names = unique_names(path.stem for path in paths)
        self.facts = {"sources": [str(path) for path in paths]}
        self.quads: list[Float[ndarray, "4 2"]] = []
        self.aligns = finder is not None
        for path in paths:
            picture = read_picture(path)
            check_shows(picture, str(path), console)
            if finder is not None:
                self.quads.append(face_quad(finder, picture, face, str(path)))
                self.facts["face"] = face

    def squares(self, size: int, count: int | None = None) -> Iterator[Image.Image]:
        """Return the pictures to invert, or the first so many."""
        for i, path in enumerate(self.paths[:count]):
            picture = read_picture(path)
            yield align(picture, self.quads[i], size) if self.aligns else picture

    def latents(self, scene: Scene) -> Latents:
        size, shown = scene.generator.resolution, range(min(len(self.paths), MAX_SHOWN))
        ws = torch.cat([*inverted(scene, self.squares(size))])
        rows = {
            "sources": [*self.squares(size, len(shown))],
            "sources, inverted": tensor_to_pictures(scene.render(ws[: len(shown)])),
        }
        return Latents(scored=ws, shown=shown, rows=rows)

    def write(
        self, out: OutputFolder, edited: Iterable[Image.Image], latents: Latents, edits: Edits
    ) -> dict[str, Any]:
        """Write edited_NAME.png and, of photos, photo_NAME.png."""
        if not self.aligns:
            return super().write(out, edited, latents, edits)
        photos = [f"photo_{name}.png" for name in self.names]

        def pasted() -> Iterator[Image.Image]:
            given = zip(edited, self.paths, self.quads, photos, strict=True)
            for face, path, quad, photo in given:
                write_picture(paste_back(read_picture(path), face, quad), out.take(photo))
                yield face

        return {**super().write(out, pasted(), latents, edits), "photos": photos}

    def shown(
        self,
        out: OutputFolder,
        latents: Latents,
        results: Sequence[Image.Image],
        notes: Sequence[str],
    ) -> Iterator[Shown]:
        """Yield squares beside their results; each follows its whole photo, if there is one."""
        faces = super().shown(out, latents, results, notes)
        if not self.aligns:
            yield from faces
            return
        for face, path, name in zip(faces, self.paths, self.names, strict=False):
            photo = f"photo_{name}.png"
            with Image.open(out.path / photo) as edited:
                yield Shown(name, path, edited.convert("RGB"), photo, whole=True)
            yield replace(face, name=f"{name}: the face")


# Clips


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

    def named(self, latents: Latents) -> list[tuple[str, str | None]]:
        """Return frames by their numbers, and the files of a folder."""
        numbers = [latents.facts["scored_frames"][place] for place in latents.shown]
        is_folder = self.frames.path.is_dir()
        files = [f"{FRAMES}/frame_{n:06d}.png" if is_folder else None for n in numbers]
        return [(f"frame {n}", file) for n, file in zip(numbers, files, strict=True)]
