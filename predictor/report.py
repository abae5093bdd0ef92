"""The results of the `targetclip` command: report.json and pictures.

Knows what was requested and what came of it; nothing of how directions are found.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from predictor.direction import RECORDED, Direction
from predictor.inputs import Text
from predictor.options import Request
from targetclip.command import Stopwatch, versions, write_json
from targetclip.media.images import labelled_grid, write_picture
from targetclip.scene import Scene, Scores


@dataclass(frozen=True)
class NamedTarget:
    """A target that was requested."""

    name: str
    """The picture's path, or the text."""
    content: Image.Image | Text
    weight: float


@dataclass(frozen=True)
class Outcome:
    """A direction, its record, and whether Ctrl-C cut the search short."""

    direction: Direction
    record: dict[str, Any]
    parts: list[Direction]
    """The direction of each target; none where the direction is a file's."""
    interrupted: bool = False


def inversion_facts(request: Request) -> dict[str, Any]:
    """Return the entries on how pictures are inverted, of records and reports."""
    return {"align": request.align, "invert_steps": request.invert_steps}


def edit_facts(request: Request) -> dict[str, Any]:
    """Return the entries on how a direction is applied, beside its strength, of a report."""
    facts = {group: factor for group, factor in request.layers.items() if factor != 1}
    if request.identity_floor is not None:
        facts["identity_floor"] = request.identity_floor
    return facts


def score_facts(scores: Scores) -> dict[str, Any]:
    """Return the entry on scores: means, then the cosines of each source."""
    cosines = {
        "target_similarity_before": scores.target_before,
        "target_similarity_after": scores.target_after,
        "source_similarity_after": scores.source_after,
    }
    return {
        "transfer": float(scores.transfer),
        "consistency": float(scores.consistency),
        **{name: float(values.mean()) for name, values in cosines.items()},
        "each": {name: values.tolist() for name, values in cosines.items()},
    }


def target_facts(targets: Sequence[NamedTarget], outcome: Outcome) -> list[dict[str, Any]]:
    """Return an entry for each target and its direction."""
    rows: list[dict[str, Any]] = []
    for i, target in enumerate(targets):
        kind = "text" if isinstance(target.content, str) else "picture"
        rows.append({"target": target.name, "kind": kind, "weight": target.weight})
        if outcome.parts:
            facts = {name: getattr(outcome.parts[i], name) for name in RECORDED}
            rows[-1]["direction"] = facts
    return rows


def write_report(
    request: Request, scene: Scene, outcome: Outcome, watch: Stopwatch, facts: Mapping[str, Any]
) -> None:
    """Write report.json: the entries of every report, then `facts`."""
    report = {
        **outcome.record,
        "method": outcome.direction.method,
        "world": request.world.name,
        "direction_norm": float(outcome.direction.vector.norm()),
        "interrupted": outcome.interrupted,
        "seconds": watch.seconds,
        "versions": versions(),
        "fingerprints": {
            "generator": scene.generator.fingerprint,
            "embedder": scene.embedder.fingerprint,
        },
    }
    write_json(request.out / "report.json", {**report, **facts})


def write_pictures(out: Path, stem: str, pictures: Iterable[Image.Image]) -> list[str]:
    """Write pictures with numbered names, and return the names."""
    names = []
    for i, picture in enumerate(pictures):
        names.append(f"{stem}_{i:03d}.png")
        write_picture(picture, out / names[-1])
    return names


def write_grid(
    out: Path,
    targets: Sequence[NamedTarget],
    before: Mapping[str, Sequence[Image.Image]],
    edited: Sequence[Image.Image],
    strength: float,
) -> None:
    """Write grid.png: targets, rows of sources, and edited pictures."""
    rows: dict[str, Sequence[Image.Image]] = {}
    pictures = [t.content for t in targets if isinstance(t.content, Image.Image)]
    if len(pictures) > 1:
        rows["targets"] = pictures
    texts = [f'"{target.name}"' for target in targets if isinstance(target.content, str)]
    label = ", ".join([*texts, f"strength {strength:.3g}"])
    rows |= {**before, f"results, {label}": edited}
    grid = labelled_grid(pictures[0] if len(pictures) == 1 else None, rows)
    write_picture(grid, out / "grid.png")


def print_scores(
    targets: Sequence[NamedTarget], scores: Sequence[Scores], outcome: Outcome, out: Path
) -> None:
    """Print a line for each target, and one on the direction."""
    for target, its in zip(targets, scores, strict=True):
        name = f"{target.name}: " if len(targets) > 1 else ""
        before, after = float(its.target_before.mean()), float(its.transfer)
        print(f"{name}transfer score {before:.3f} -> {after:.3f}")
    print(f"direction by {outcome.direction.method}; look at {out / 'grid.png'}")
