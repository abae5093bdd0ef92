"""The content of a run's results: the entries of report.json in facts and in words, and the sheet.

Knows what was requested and what came of it; nothing of how directions are found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from predictor.cli.options import LAYERS, Request
from predictor.direction import RECORDED, Direction
from predictor.inputs import Text
from targetclip.command import Stopwatch, versions
from targetclip.media.images import center_square, labelled_grid
from targetclip.scene import Scene
from targetclip.scores import Scores

WIDEST = 8192  # pixels of a sheet, if its pictures then keep MIN_TILE
MIN_TILE, MAX_TILE = 128, 512
IN_A_ROW = 16  # sources, before the sheet of one result begins another row
MAX_TARGETS = 64  # rows of the sheet of several targets
SCORE = "how alike CLIP finds pictures and target, 1 at most, on average"
IDENTITY = "1 is the same person"
METHODS = {
    "mapper": "instant: the mapper's answer, in one pass",
    "refined": "refined: the mapper's answer, refined by the optimizer",
    "optimizer": "optimized: found by the optimizer",
    "released": "a direction of TargetCLIP's release",
}


@dataclass(frozen=True)
class NamedTarget:
    """A target that was requested."""

    name: str
    """The picture's path, or the text."""
    content: Image.Image | Text
    weight: float
    layers: Mapping[str, float] = field(default_factory=dict)
    """Factors of groups of its layers, in a mixture."""

    @property
    def label(self) -> str:
        """The name for people: a text in quotes, the name of a picture's file."""
        return f'"{self.name}"' if isinstance(self.content, Text) else Path(self.name).name


@dataclass(frozen=True)
class Outcome:
    """A direction, its record, and whether Ctrl-C cut the search short."""

    direction: Direction
    record: dict[str, Any]
    parts: list[Direction]
    """The direction of each target; none where the direction is a file's."""
    interrupted: bool = False


# Entries of report.json


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
    if scores.identity is not None:
        cosines["identity"] = scores.identity
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
        kind = "text" if isinstance(target.content, Text) else "picture"
        rows.append({"target": target.name, "kind": kind, "weight": target.weight, **target.layers})
        if outcome.parts:
            facts = {name: getattr(outcome.parts[i], name) for name in RECORDED}
            if facts["keep_identity"] is None:
                del facts["keep_identity"]
            rows[-1]["direction"] = facts
    return rows


def weight_words(row: Mapping[str, Any]) -> str:
    """Return a target's weight, and the factors of its layers where it has some."""
    layers = [f"{group} layers {row[group]:g}" for group in LAYERS if group in row]
    return ", ".join([f"{row['target']} {row['weight']:.3g}", *layers])


def run_facts(request: Request, scene: Scene, watch: Stopwatch) -> dict[str, Any]:
    """Return the entries of every report on the run itself."""
    return {
        "world": request.world.name,
        "seconds": dict(watch.seconds),
        "versions": versions(),
        "fingerprints": {
            "generator": scene.generator.fingerprint,
            "embedder": scene.embedder.fingerprint,
        },
    }


def search_facts(request: Request) -> dict[str, Any]:
    """Return the entries on how directions are searched for, of the report of several targets."""
    facts: dict[str, Any] = {"mode": request.mode, "seed": request.seed}
    if request.mode != "instant":
        facts |= {"recipe": request.recipe_name, "settings": asdict(request.recipe)}
    return facts


# Words, for those who look at the results


def method_words(method: str) -> str:
    """Return how a direction was found; a method that is not known as it is."""
    return "; ".join(METHODS.get(one, one) for one in method.split(" + "))


def score_words(scores: Mapping[str, float]) -> str:
    """Return the transfer score before and after the edit."""
    before, after = scores["target_similarity_before"], scores["target_similarity_after"]
    return f"{before:.3f} before, {after:.3f} after"


def result_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what the page of one result says of the edit, by what it is.

    Args:
        facts: the content of report.json.
    """
    words = {"Method": method_words(facts["method"])}
    if facts["direction"] is not None:
        words["Direction"] = f"from the file {facts['direction']}"
    rows = facts["targets"]
    if len(rows) > 1 and facts["direction"] is None:
        words["Weights"] = "; ".join(weight_words(row) for row in rows)
    strength = [f"{facts['strength']:.3g}"]
    strength += [f"{group} layers {facts[group]:g}" for group in LAYERS if group in facts]
    if "identity_floor" in facts:
        strength.append(f"lowered to keep an identity of {facts['identity_floor']:g}")
    words["Strength"] = ", ".join(strength)
    for row in rows:
        of = "" if len(rows) == 1 else f" for {row['target']}"
        words[f"Transfer score{of}: {SCORE}"] = score_words(row["scores"])
    if "identity" in rows[0]["scores"]:
        words[f"Identity kept: {IDENTITY}"] = f"{rows[0]['scores']['identity']:.3f}"
    return words


def doubts(facts: Mapping[str, Any]) -> list[str]:
    """Return the warnings of a run, and whether it was stopped."""
    stopped = ["the run was stopped: this is what it had found so far"]
    return [*facts["warnings"], *(stopped if facts["interrupted"] else ())]


def source_words(scores: Mapping[str, Any], place: int) -> str:
    """Return the scores of one source."""
    each = scores["each"]
    before, after = (each[f"target_similarity_{when}"][place] for when in ("before", "after"))
    words = f"transfer score {before:.2f} before, {after:.2f} after"
    return words + (f"; identity kept {each['identity'][place]:.2f}" if "identity" in each else "")


# The sheet


def tiles(pictures: Sequence[Image.Image], columns: int) -> list[Image.Image]:
    """Return squares small enough that so many of them stand side by side."""
    most = min(max(WIDEST // columns - 12, MIN_TILE), MAX_TILE)
    squares = [center_square(picture) for picture in pictures]
    return [s if s.width <= most else s.resize((most, most)) for s in squares]


def sheet(
    targets: Sequence[NamedTarget],
    before: Mapping[str, Sequence[Image.Image]],
    edited: Sequence[Image.Image],
    strength: float,
) -> Image.Image:
    """Return the sheet of one result: targets, rows of sources, and edited pictures."""
    pictures = [t.content for t in targets if isinstance(t.content, Image.Image)]
    rows: dict[str, Sequence[Image.Image]] = {"targets": pictures} if len(pictures) > 1 else {}
    texts = [target.label for target in targets if isinstance(target.content, Text)]
    label = ", ".join([*texts, f"strength {strength:.3g}"])
    columns = min(len(edited), IN_A_ROW) + 1
    for start in range(0, len(edited), IN_A_ROW):
        part = slice(start, start + IN_A_ROW)
        which = f" ({start + 1} to {start + len(edited[part])})" if len(edited) > IN_A_ROW else ""
        for name, row in {**before, f"results, {label}": edited}.items():
            rows[name + which] = tiles(row[part], columns)
    target = tiles(pictures, columns)[0] if len(pictures) == 1 else None
    return labelled_grid(target, rows)


def sheet_of_targets(
    targets: Sequence[NamedTarget],
    results: Sequence[Sequence[Image.Image]],
    sources: Sequence[Image.Image],
) -> Image.Image:
    """Return the sheet of several targets: a row of sources, then a row for each target.

    Args:
        results: the edited pictures of each target.
    """
    columns = len(sources) + 1
    blank = Image.new("RGB", (MIN_TILE, MIN_TILE), "white")
    rows = {"sources": [blank, *tiles(sources, columns)]}
    for target, row in list(zip(targets, results, strict=True))[:MAX_TARGETS]:
        picture = blank if isinstance(target.content, Text) else target.content
        label = target.label
        while label in rows:  # the same target once more
            label += " "
        rows[label] = [*tiles([picture], columns), *row]
    return labelled_grid(None, rows)
