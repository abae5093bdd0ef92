"""The report for people: tables in Markdown and figures, from what report.json holds.

Knows numbers by their names; nothing of how they were found.
"""

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from eval.charts import COLOURS, Colour, Series, bars, chart
from eval.compare_judge import DRAWN_ANSWER, REFERENCE
from eval.judging import RELEASED_STRENGTH, SCORES
from eval.methods import METHODS
from eval.sets import ADVERSARIAL, FOLDER, IN_RANGE, OUT_OF_RANGE, EvalSet
from targetclip.command import versions
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.scene import Scene
from targetclip.seeds import VALIDATION_SOURCES

COLOUR_OF: dict[str, Colour] = dict(zip((*METHODS, DRAWN_ANSWER), COLOURS, strict=True))
ABOUT = {
    IN_RANGE: "What the generator can show",
    OUT_OF_RANGE: "Faces in another style that also have something the generator never draws",
    ADVERSARIAL: "Pictures that bring no essence, or none that a source lacks",
    FOLDER: "Pictures of your own",
}
MEMORY_SETTINGS = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")
MAIN = ("transfer", "consistency", "essence", "identity")
BARS = ("mapper", "identity", "consistent", "ridge", DRAWN_ANSWER)
RELEASED = {
    "semantic": "semantic",
    "second": "semantic, second judge",
    "identity_released": "identity, as released",
    "identity": "identity, corrected",
    "target_identity": "identity to the target",
    "fid": "FID",
}
READING = """## How to read it

Scores are means over sources, then over targets; brackets hold 95 % of bootstrap means over
targets. Every method edits the same sources at strength 1; none but `clip-blending` has seen them.

- transfer score: cosine of edited sources to the target in the embedder's space.
- consistency: mean cosine of the shifts of two sources there. Additivity weighs them by their
  lengths: the part of the shift that is the same for all sources.
- essence acquired: how much of the way from source to target the target's essence attributes went,
  by the attribute reader; 1 is all of it. Identity kept: 1 is all of it, 0 as little as between two
  sources. Same person is the identity model's cosine: of the model that the recipe `identity` is
  optimized by, and a mapper that it taught. There only the reader, another network, judges freely.
- second judge: transfer score in another embedder's space.
- change outside: mean change of the picture's left and right border, of the range of values.
  Perceived outside is the same to the eyes of a network (the reader's): how differently it sees an
  unedited picture with the edit's border, as LPIPS measures it, but without learned weights.
- FID and KID, by torchmetrics: of all edited images of a table's targets against {references}
  unedited ones, by {features}.
  FID is biased by the number of images: compare it within a table alone. Drawn pictures are sharper
  than any the generator makes, which counts against `drawn-answer`.
- seconds are of a new target, from its picture to its direction. Those with a star are means over a
  set's targets, of which `auto` takes one after another, in fp32, as the product does, and the
  other searches several at once; those without are of one target alone, after a warm-up.
- `clip-blending` searches for every source on its own: its seconds are of a target and
  {sources} sources, and new sources cost as much again.
- `drawn-answer` is what no direction can reach: each source drawn with its own identity and the
  target's essence, but none of its style or of what the generator never draws.
"""


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_bounds(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A mean and its interval; empty where there is no such score."""
    if found is None:
        return ""
    mean = number(found["mean"], digits)
    if found["low"] is None:
        return mean
    return f"{mean} [{number(found['low'], digits)}, {number(found['high'], digits)}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def seconds_of(method: Mapping[str, Any]) -> str:
    if "seconds" not in method:
        return ""
    return f"{method['seconds']:.3g}{'*' if method['timing'] == 'share' else ''}"


def score_tables(found: Mapping[str, Any], block: str) -> list[str]:
    """Two tables of a block of means: what matters most, and the rest."""
    means = found[block]
    have = [score for score in SCORES if any(score in row for row in means.values())]
    main = [score for score in have if score in MAIN]
    rest = [score for score in have if score not in MAIN]
    lines = table(
        ["method", *(SCORES[score] for score in main), "s a target"],
        [
            [name, *(with_bounds(row.get(s)) for s in main), seconds_of(found["methods"][name])]
            for name, row in means.items()
        ],
    )
    return lines + table(
        ["method", *(SCORES[score] for score in rest), "FID", "KID", "images"],
        [
            [
                name,
                *(with_bounds(row.get(score)) for score in rest),
                f"{row['fid']:.3g}",
                f"{row['kid']:.3g}",
                str(row["images"]),
            ]
            for name, row in means.items()
        ],
    )


def difference_table(found: Mapping[str, Any]) -> list[str]:
    """The reference less each other method; nothing where there is no other."""
    others = found["differences"]
    if not others:
        return []
    have = [score for score in MAIN if any(score in row for row in others.values())]
    rows = [
        [name, str(row["transfer"]["count"]), *(with_bounds(row.get(score)) for score in have)]
        for name, row in others.items()
    ]
    head = f"`{found['reference']}` less each other method, paired by target:"
    return [head, "", *table(["other", "targets", *(SCORES[score] for score in have)], rows)]


def answered_by(method: Mapping[str, Any]) -> str:
    """How often each note was made; empty if none was."""
    notes = [note for note in method.get("notes", []) if note]
    counts = {note: notes.count(note) for note in sorted(set(notes))}
    return ", ".join(f"{note} {count}" for note, count in counts.items())


def set_section(name: str, found: Mapping[str, Any]) -> list[str]:
    """All that is said of a set."""
    count = len(found["targets"])
    lines = [f"## {name}: {count} targets", ""]
    lines += [f"{ABOUT[name]}. Transfer score of unedited sources: {found['unedited']:.3f}.", ""]
    lines += score_tables(found, "all")
    if found["first"]:
        fewer = min(method["count"] for method in found["methods"].values())
        lines += [f"Of the first {fewer} alone, which every method answered:", ""]
        lines += score_tables(found, "first")
    lines += difference_table(found)
    noted = {m: answered_by(row) for m, row in found["methods"].items() if answered_by(row)}
    return lines + [f"- `{m}` on these targets: {words}" for m, words in noted.items()] + [""]


def released_section(found: Mapping[str, Any], people: str | None) -> list[str]:
    """The released evaluation's table."""
    have = [s for s in RELEASED if any(s in row for row in found["methods"].values())]
    rows = []
    for name, row in found["methods"].items():
        spreads = [row[score] for score in have]
        cells = [f"{spread['mean']:.1f} ± {spread['deviation']:.1f}" for spread in spreads]
        rows.append([name, *cells])
    if not rows:
        return []
    who = f"Who is who says {people}. " if people else ""
    targets = f"{found['targets']} targets (the first of each set)"
    return [
        "## By the released evaluation's protocol",
        "",
        f"{found['sources']} sources, strength {RELEASED_STRENGTH}, {targets}: means over sources, "
        f"then mean and deviation over targets; cosines times 100. {who}As released, it is shown "
        "sources in [-1, 1] and results in [0, 1]; corrected, all alike. FID is each target's "
        "results against unedited images. None of the sources was optimized on; of the released "
        "ones four are.",
        "",
        *table(["method", *(RELEASED[score] for score in have)], rows),
    ]


def report_text(report: Mapping[str, Any]) -> str:
    """report.md."""
    seeds, judges = report["seeds"], report["judges"]
    lines = [
        f"# Methods compared on {report['world']}",
        "",
        f"{report['sources']} sources (seed {seeds['sources']}), targets of seed "
        f"{seeds['targets']}, draws of seed {seeds['draws']}; searches in {report['precision']}, "
        f"scores in fp32; commit {report['commit'] or 'unknown'}.",
        "",
    ]
    lines += [f"- left out: {words}" for words in report["left_out"]]
    lines += [""] if report["left_out"] else []
    for name, found in report["sets"].items():
        lines += set_section(name, found)
    lines += released_section(report["released"], judges["people"])
    reading = READING.format(
        references=report["references"], features=judges["features"], sources=report["sources"]
    )
    return "\n".join(lines) + "\n" + reading


# Figures


def seconds_figure(name: str, found: Mapping[str, Any]) -> Image.Image | None:
    """Transfer score against seconds; hollow where a method answered the first targets alone."""
    series = []
    for method, row in found["methods"].items():
        if "seconds" not in row:
            continue
        whole = method in found["all"]
        score = found["all" if whole else "first"][method]["transfer"]
        spans = [] if score["low"] is None else [(score["low"], score["high"])]
        label = method if whole else f"{method} (first {row['count']})"
        points = [(row["seconds"], score["mean"])]
        series.append(Series(label, points, COLOUR_OF[method], spans, hollow=not whole))
    levels = {"unedited": found["unedited"]}
    if DRAWN_ANSWER in found["all"]:
        levels["drawn answer"] = found["all"][DRAWN_ANSWER]["transfer"]["mean"]
    if not series:
        return None
    title = f"{name}: transfer score against seconds for a new target"
    return chart(title, series, "seconds a target", SCORES["transfer"], True, levels)


def strength_figure(report: Mapping[str, Any]) -> Image.Image | None:
    """Identity against essence as the strength grows, or against transfer without a reader."""
    rows = [row for each in report["sweep"].values() for row in each]
    across = next((s for s in ("identity", "person") if all(s in row for row in rows)), None)
    upward = "essence" if all("essence" in row for row in rows) else "transfer"
    if not rows or across is None:
        return None
    series = [
        Series(name, [(row[across], row[upward]) for row in each], COLOUR_OF[name], joined=True)
        for name, each in report["sweep"].items()
    ]
    strengths = sorted({row["strength"] for row in rows})
    title = f"Strength from {strengths[0]:g} to {strengths[-1]:g}, first {report['first']} targets"
    return chart(f"{title} in range", series, SCORES[across], SCORES[upward])


def attribute_figures(name: str, found: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Essence acquired and identity kept, attribute by attribute."""
    pictures = {}
    for kind in ("essence", "identity"):
        groups = {
            method: found["methods"][method]["attributes"][kind]
            for method in BARS
            if method in found["all"] and kind in found["methods"][method]["attributes"]
        }
        if groups:
            title = f"{name}: {SCORES[kind]} by attribute"
            pictures[f"{name} {kind}"] = bars(title, groups, COLOUR_OF, SCORES[kind])
    return pictures


def expected_figure(report: Mapping[str, Any]) -> Image.Image | None:
    """The score a mapper expects against the one it reaches, for every target."""
    series = []
    for colour, (name, found) in zip(COLOURS, report["sets"].items(), strict=False):
        row = found["methods"].get(REFERENCE)
        if row is not None and row["expected"] is not None:
            points = list(zip(row["expected"], row["scores"]["transfer"], strict=True))
            series.append(Series(name, points, colour))
    if not series:
        return None
    title = "Does the mapper know? Each dot is a target"
    return chart(title, series, "score it expects", SCORES["transfer"], diagonal=True)


def figures(report: Mapping[str, Any]) -> dict[str, Image.Image]:
    """All figures that there are numbers for, by their files' names."""
    found = {"strength": strength_figure(report), "expected": expected_figure(report)}
    pictures = {name: picture for name, picture in found.items() if picture is not None}
    for name, each in report["sets"].items():
        shown = seconds_figure(name, each)
        pictures |= attribute_figures(name, each)
        pictures |= {} if shown is None else {f"{name} seconds": shown}
    return pictures


# Of the studies


def sheet(
    scene: Scene, targets: EvalSet, directions: Float[Tensor, "targets num_ws w_dim"]
) -> Image.Image:
    """Return nine sources, then for each target a row: its picture, and the sources edited."""
    sources = scene.sources(9, VALIDATION_SOURCES)
    unedited = tensor_to_pictures(scene.render(sources))
    rows = {"sources": [Image.new("RGB", unedited[0].size, "white"), *unedited]}
    for i, (picture, direction) in enumerate(zip(targets.pictures, directions, strict=True)):
        edited = tensor_to_pictures(scene.edit(sources, direction))
        rows[f"target {i} and sources with its essence"] = [picture, *edited]
    return labelled_grid(None, rows)


def earlier_report(path: Path, comparison: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier run of the same comparison reported, or a report of nothing yet.

    Raises:
        ValueError: the file is of another comparison, or damaged.
    """
    same = json.loads(json.dumps(comparison))  # tuples become lists, as in the file
    if not path.exists():
        return {"comparison": same}
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--out: {str(path)!r} is damaged ({error}): delete it") from error
    if report.get("comparison") != same:
        raise ValueError(
            f"--out: {str(path)!r} is of another comparison: expected {same}, found "
            f"{report.get('comparison')}; give the same options, or another folder"
        )
    return report


def machine() -> dict[str, Any]:
    """Return the machine that timings belong to: processor, threads, memory settings, versions."""
    return {
        "processor": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_settings": {key: os.environ[key] for key in MEMORY_SETTINGS if key in os.environ},
        "versions": versions(),
    }


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
