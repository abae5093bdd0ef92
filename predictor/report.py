"""What the `targetclip` command leaves behind: reports, pictures, files whole or not there.

Knows what was asked for and what came of it; nothing of how directions are found.
"""

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from predictor.direction import Direction
from predictor.transfer import EssenceTransfer
from targetclip.editing import Scores
from targetclip.media.images import labelled_grid, write_picture
from targetclip.world import World


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 4)


def make_folder(out: Path) -> None:
    """Make the output folder and see that it can be written into, before any work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out: cannot write into {out}: {error.strerror}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("targetclip", "torch", "open_clip_torch", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Wanted:
    """A target, as it is asked for."""

    name: str
    """The picture's path, or the text."""
    target: Image.Image | str
    weight: float


@dataclass
class Found:
    """A direction, how it came about, and whether Ctrl-C cut the search short."""

    direction: Direction
    record: dict[str, Any]
    each: list[Direction]
    """Of every target; none where the direction is a file's."""
    interrupted: bool = False


def report_scores(scores: Scores) -> dict[str, Any]:
    """Scores as report.json holds them: means, then each source."""
    return {
        "transfer": scores.transfer,
        "consistency": scores.consistency,
        "target_similarity_before": float(scores.target_before.mean()),
        "target_similarity_after": float(scores.target_after.mean()),
        "source_similarity_after": float(scores.source_after.mean()),
        "each": {
            "target_similarity_before": scores.target_before.tolist(),
            "target_similarity_after": scores.target_after.tolist(),
            "source_similarity_after": scores.source_after.tolist(),
        },
    }


def base_report(
    essence: EssenceTransfer, found: Found, world: World, watch: Stopwatch
) -> dict[str, Any]:
    """What the reports of both commands say."""
    return {
        **found.record,
        "method": found.direction.method,
        "world": world.name,
        "direction_norm": float(found.direction.vector.norm()),
        "interrupted": found.interrupted,
        "seconds": watch.seconds,
        "versions": versions(),
        "fingerprints": {
            "generator": essence.generator.fingerprint,
            "embedder": essence.embedder.fingerprint,
        },
    }


def write_report(out: Path, report: dict[str, Any]) -> None:
    """report.json, indented for people."""
    write_file(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())


def report_targets(wanted: Sequence[Wanted], found: Found) -> list[dict[str, Any]]:
    """What each target asked for and what was found for it."""
    rows: list[dict[str, Any]] = []
    for i, one in enumerate(wanted):
        kind = "text" if isinstance(one.target, str) else "picture"
        rows.append({"target": one.name, "kind": kind, "weight": one.weight})
        if found.each:
            facts = {k: v for k, v in vars(found.each[i]).items() if k != "vector"}
            rows[-1]["direction"] = facts
    return rows


def write_pictures(out: Path, what: str, pictures: Iterable[Image.Image]) -> list[str]:
    """Numbered pictures, whose names are returned."""
    names = []
    for i, picture in enumerate(pictures):
        names.append(f"{what}_{i:03d}.png")
        write_picture(picture, out / names[-1])
    return names


def write_grid(
    out: Path,
    wanted: Sequence[Wanted],
    before: Mapping[str, Sequence[Image.Image]],
    edited: Sequence[Image.Image],
    strength: float,
) -> None:
    """Targets, sources and edited pictures in one."""
    rows: dict[str, Sequence[Image.Image]] = {}
    shown = [one.target for one in wanted if isinstance(one.target, Image.Image)]
    if len(shown) > 1:
        rows["targets"] = shown
    texts = [f'"{one.name}"' for one in wanted if isinstance(one.target, str)]
    label = ", ".join([*texts, f"strength {strength:.3g}"])
    rows |= {**before, f"results, {label}": edited}
    grid = labelled_grid(shown[0] if len(shown) == 1 else None, rows)
    write_picture(grid, out / "grid.png")


def tell(wanted: Sequence[Wanted], each: Sequence[Scores], found: Found, out: Path) -> None:
    """What came of it, in a line a target."""
    for one, scores in zip(wanted, each, strict=True):
        name = f"{one.name}: " if len(wanted) > 1 else ""
        before = float(scores.target_before.mean())
        print(f"{name}transfer score {before:.3f} -> {scores.transfer:.3f}")
    print(f"direction by {found.direction.method}; look at {out / 'grid.png'}")
