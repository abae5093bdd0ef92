"""Show the numbers of report.json to people: tables in Markdown, and charts.

Knows numbers by their names; nothing of how they were found. Charts need matplotlib, the extra
`eval`.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from eval.judging import RELEASED_STRENGTH, SCORES
from eval.methods import METHODS
from eval.results import SECONDS
from eval.sets import ADVERSARIAL, FOLDER, HELD_OUT_STYLES, IN_RANGE, STYLES
from eval.trials import REFERENCE, RIGHT_ANSWER

COLOUR_OF = {name: i for i, name in enumerate((*METHODS, RIGHT_ANSWER))}  # places in PALETTE
PALETTE = "tab20"  # matplotlib's pairs of a dark and a light colour
ABOUT = {
    IN_RANGE: "What the generator can show",
    STYLES: "Avatars of the other styles that networks were trained on",
    HELD_OUT_STYLES: "Avatars of styles that no network has seen",
    ADVERSARIAL: "Pictures that bring no essence, or none that a source lacks",
    FOLDER: "Pictures of your own",
}
INSTALL = 'pip install "targetclip[eval]"'
MAIN = ("transfer", "consistency", "essence", "identity")
BARS = ("mapper", "identity", "consistent", "ridge", RIGHT_ANSWER)
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
targets. Every method edits the same sources at strength 1; only `clip-blending` has used them.

- transfer score: cosine of edited sources to the target in the embedder's space.
- consistency: mean cosine of the shifts of two sources there. Additivity weighs the shifts by their
  lengths: it is the part of the shift that is the same for all sources.
- essence acquired: the part of the way from source to target that the target's essence attributes
  went, by the attribute reader; 1 is all of it. Of targets in another style than the generator's
  those are glasses, beard, hat and the colour of hair. Identity kept: 1 is all of it, 0 as little
  as between two sources. Same person is the cosine of the identity model, which the recipe
  `identity` optimizes and which trained the mapper if its recipe has an identity weight. For these
  two only the reader, another network, is independent.
- second judge: transfer score in another embedder's space. The target's person: cosine of edited
  sources to the target by the identity model. Sharpness kept: how fine edges are, as a part of the
  unedited sources'; below 1 they are blurred.
- change outside: mean change of the picture's left and right border, of the range of values.
  Perceived outside is the same as a network (the reader) measures it: the distance of an unedited
  picture from itself with the edit's border, as in LPIPS, but without learned weights.
- FID and KID, by torchmetrics: of all edited images of a table's targets against {references}
  unedited ones, by {features}.
  FID is biased by the number of images: compare it within a table alone.
- seconds are of a new target, from its picture to its direction. Those with a star are means over a
  set's targets: `auto` takes one after another, in fp32, as the product does, and the other
  searches several at once. Those without are of one target alone, after a warm-up.
- `clip-blending` searches for every source on its own: its seconds are of a target and
  {sources} sources, and new sources cost as much again.
- `one-direction` is the mapper without its correction for each source. `own-mapper` is trained for
  one target by the recipe `identity`, and reads the source: StyleCLIP has such a mapper for each
  text. Its edits are those of the sources above alone, so the released protocol leaves it out.
- `right-answer` cannot be reached by any direction: each source drawn with its own identity and the
  target's essence, in the generator's style, then inverted.
"""


# Tables


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many digits after the point; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def with_bounds(score: Mapping[str, Any] | None) -> str:
    """Return a mean and its interval (see `interval`); empty for None."""
    if score is None:
        return ""
    mean = number(score["mean"])
    return mean if score["low"] is None else f"{mean} [{score['low']:.3f}, {score['high']:.3f}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def bullets(texts: Sequence[str]) -> list[str]:
    """Return the lines of a list, and an empty one after it; nothing where there is no text."""
    return [*(f"- {text}" for text in texts), *([""] if texts else [])]


# report.md of the comparison


def present(scores: Iterable[str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the scores that some row has, in their order."""
    return [score for score in scores if any(score in row for row in rows.values())]


def score_tables(scored: Mapping[str, Any], block: str) -> list[str]:
    """Return two tables of a block of means: the main scores, and the rest."""
    means = scored[block]
    have = present(SCORES, means)
    main = [score for score in have if score in MAIN]
    rest = [score for score in have if score not in MAIN]
    main_rows, rest_rows = [], []
    for name, row in means.items():
        method = scored["methods"][name]
        star = "*" if method.get("timing") == "share" else ""
        seconds = f"{method['seconds']:.3g}{star}" if "seconds" in method else ""
        main_rows.append([name, *(with_bounds(row.get(score)) for score in main), seconds])
        sizes = [f"{row['fid']:.3g}", f"{row['kid']:.3g}", str(row["images"])]
        rest_rows.append([name, *(with_bounds(row.get(score)) for score in rest), *sizes])
    main_heads = ["method", *(SCORES[score] for score in main), "s a target"]
    rest_heads = ["method", *(SCORES[score] for score in rest), "FID", "KID", "images"]
    return table(main_heads, main_rows) + table(rest_heads, rest_rows)


def difference_table(scored: Mapping[str, Any]) -> list[str]:
    """Return the table of the reference less each other method; nothing where there is no other."""
    others = scored["differences"]
    if not others:
        return []
    have = present(MAIN, others)
    rows = [
        [name, str(row["transfer"]["count"]), *(with_bounds(row.get(score)) for score in have)]
        for name, row in others.items()
    ]
    head = f"`{scored['reference']}` less each other method, paired by target:"
    return [head, "", *table(["other", "targets", *(SCORES[score] for score in have)], rows)]


def counted_notes(method: Mapping[str, Any]) -> str:
    """Return how often each note was made; empty if none was."""
    notes = [note for note in method.get("notes", []) if note]
    return ", ".join(f"{note} {notes.count(note)}" for note in sorted(set(notes)))


def set_section(name: str, scored: Mapping[str, Any]) -> list[str]:
    """Return the section of a set."""
    count = len(scored["targets"])
    lines = [f"## {name}: {count} targets", ""]
    lines += [f"{ABOUT[name]}. Transfer score of unedited sources: {scored['unedited']:.3f}.", ""]
    lines += score_tables(scored, "all")
    if scored["first"]:
        fewer = min(method["count"] for method in scored["methods"].values())
        lines += [f"Of the first {fewer} alone, which every method answered:", ""]
        lines += score_tables(scored, "first")
    lines += difference_table(scored)
    for method, row in scored["methods"].items():
        if words := counted_notes(row):
            lines.append(f"- `{method}` on these targets: {words}")
    return [*lines, ""]


def released_section(released: Mapping[str, Any], people: str | None) -> list[str]:
    """Return the section of the released evaluation; nothing where no method has directions."""
    methods = released["methods"]
    if not methods:
        return []
    source = f"Identity is by {people}. " if people else ""
    targets = f"{released['targets']} targets (the first of each set)"
    return [
        "## By the released evaluation's protocol",
        "",
        f"{released['sources']} sources, strength {RELEASED_STRENGTH}, {targets}: means over "
        f"sources, then mean and deviation over targets; cosines times 100. {source}As released, "
        "sources are shown in [-1, 1] and results in [0, 1]; corrected, all in [-1, 1]. FID is of "
        "each target's results against unedited images. None of the sources was optimized on; of "
        "the released ones four are.",
        "",
        *released_table(methods),
    ]


def released_table(methods: Mapping[str, Any]) -> list[str]:
    """Return the table of the released evaluation: mean and deviation over targets."""
    have = present(RELEASED, methods)
    rows = [
        [name, *(f"{row[score]['mean']:.1f} ± {row[score]['deviation']:.1f}" for score in have)]
        for name, row in methods.items()
    ]
    return table(["method", *(RELEASED[score] for score in have)], rows)


def report_text(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    seeds, judges, given = report["seeds"], report["judges"], report["config"]["sources"]
    origin = f"latents of {given}" if seeds["sources"] is None else f"seed {seeds['sources']}"
    lines = [
        f"# Methods compared on {report['world']}",
        "",
        f"{report['sources']} sources ({origin}), targets of seed "
        f"{seeds['targets']}, draws of seed {seeds['draws']}; searches in {report['precision']}, "
        f"scores in fp32; commit {report['commit'] or 'unknown'}.",
        "",
    ]
    lines += bullets([f"left out: {words}" for words in report["left_out"]])
    for name, scored in report["sets"].items():
        lines += set_section(name, scored)
    lines += released_section(report["released"], judges["people"])
    reading = READING.format(
        references=report["references"], features=judges["features"], sources=report["sources"]
    )
    return "\n".join(lines) + "\n" + reading


# The release's evaluation by itself

PROTOCOL_READING = """## How to read it

Every number is a mean over sources, then mean ± deviation over targets. Cosines are times 100.

- semantic: cosine of a result to its target by the world's embedder. Second judge: by that of
  --judge.
- identity: cosine of a result to its source, by {people}. As released, sources are shown to it in
  [-1, 1] and results in [0, 1]; corrected, all in [-1, 1].
- identity to the target: cosine of a result to its target by that model.
- FID: of a target's results against the pictures of --references, by
  {features}. The paper's is by an Inception network: the two
  cannot be compared.
"""


def protocol_text(report: Mapping[str, Any]) -> str:
    """Return report.md of `eval.referee --protocol targetclip`."""
    references = report["references"]
    facts = (
        f"{len(report['sources'])} sources, {len(report['targets'])} targets, strength "
        f"{report['strength']}"
    )
    lines = [
        f"# The release's evaluation in the world {report['world']}",
        "",
        facts + (f", {references} pictures to compare with." if references else "."),
        "",
        *bullets(report["notes"]),
        *released_table(report["methods"]),
    ]
    reading = PROTOCOL_READING.format(
        people=report["people"] or "nothing here", features=report["features"]
    )
    return "\n".join(lines) + "\n" + reading


# Charts


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points under a name."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int | None = None
    """Place in PALETTE. None: the dark colours, in the order of the series."""
    spans: Sequence[tuple[float, float]] = ()
    """A lower and an upper y for each point, or none at all."""
    joined: bool = False
    """Draw a line through the points."""
    hollow: bool = False


def check_charts() -> None:
    """Raise a ValueError where matplotlib is missing; called before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"charts need matplotlib, which is not installed: {INSTALL}")


def new_chart(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    """Return a figure of 1000 x 600 pixels, drawn without a screen, and its axes."""
    check_charts()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def colour_at(place: int) -> Any:
    """Return a colour of PALETTE, which begins anew after its last."""
    from matplotlib import colormaps

    palette = colormaps[PALETTE]
    return palette(place % palette.N)


def picture_of(figure: Any, axes: Any) -> Image.Image:
    """Draw a figure with a legend on the right."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    levels: Mapping[str, float] | None = None,
    diagonal: bool = False,
) -> Image.Image:
    """Draw points and lines.

    Args:
        levels: dashed horizontal lines, by their names.
        diagonal: draw y = x, dashed, over the range of both axes.

    Raises:
        ValueError: there is no point, or no matplotlib.
    """
    if not any(line.points for line in series):
        raise ValueError(f"expected points for the chart {title!r}, found none")
    figure, axes = new_chart(title, x_label, y_label)
    for i, line in enumerate(series):
        x, y = np.reshape(line.points, (-1, 2)).T
        colour = colour_at(2 * i if line.colour is None else line.colour)
        style = {"color": colour, "marker": "o", "linestyle": "-" if line.joined else "none"}
        if line.hollow:
            style["markerfacecolor"] = "white"
        reach = np.abs(np.transpose(line.spans) - y) if line.spans else None
        axes.errorbar(x, y, reach, label=line.name, **style)
    for name, level in (levels or {}).items():
        axes.axhline(level, color="0.2", linestyle="--", linewidth=1)
        axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom")
    if diagonal:
        values = np.concatenate([np.ravel(line.points) for line in series])
        ends = (values.min(), values.max())
        axes.plot(ends, ends, color="0.2", linestyle="--", linewidth=1)
    if log_x:
        axes.set_xscale("log")
    return picture_of(figure, axes)


def bar_chart(title: str, groups: Mapping[str, Mapping[str, float]], y_label: str) -> Image.Image:
    """Draw a bar for each value, side by side: `groups[name][kind]`, kinds along the axis.

    Groups named as methods have the methods' colours.

    ValueError: there is no value, or no matplotlib.
    """
    kinds = list(dict.fromkeys(kind for values in groups.values() for kind in values))
    if not kinds:
        raise ValueError(f"expected values for the chart {title!r}, found none")
    figure, axes = new_chart(title, "", y_label)
    width = 0.8 / len(groups)
    for i, (name, values) in enumerate(groups.items()):
        places = [kinds.index(kind) + (i + 0.5) * width - 0.4 for kind in values]
        colour = colour_at(COLOUR_OF.get(name, 2 * i))
        axes.bar(places, list(values.values()), width, label=name, color=colour)
    labels = [kind.replace("_", " ") for kind in kinds]
    axes.set_xticks(range(len(kinds)), labels, rotation=40, ha="right", rotation_mode="anchor")
    return picture_of(figure, axes)


# Charts of the comparison


def seconds_chart(name: str, scored: Mapping[str, Any]) -> Image.Image | None:
    """Draw transfer score against seconds; None where no method was timed.

    Hollow points are of methods that answered the first targets alone.
    """
    series = []
    for method, row in scored["methods"].items():
        if "seconds" not in row:
            continue
        whole = method in scored["all"]
        score = scored["all" if whole else "first"][method]["transfer"]
        line = Series(
            name=method if whole else f"{method} (first {row['count']})",
            points=[(row["seconds"], score["mean"])],
            colour=COLOUR_OF[method],
            spans=[] if score["low"] is None else [(score["low"], score["high"])],
            hollow=not whole,
        )
        series.append(line)
    levels = {"unedited": scored["unedited"]}
    if RIGHT_ANSWER in scored["all"]:
        levels["right answer"] = scored["all"][RIGHT_ANSWER]["transfer"]["mean"]
    if not series:
        return None
    title = f"{name}: transfer score against seconds for a new target"
    y_label = SCORES["transfer"]
    return line_chart(title, series, "seconds a target", y_label, log_x=True, levels=levels)


def strength_chart(report: Mapping[str, Any]) -> Image.Image | None:
    """Draw identity against essence, or against transfer without a reader, by strength.

    None where nothing measures identity.
    """
    rows = [row for by_strength in report["sweep"].values() for row in by_strength]
    across = next((s for s in ("identity", "person") if all(s in row for row in rows)), None)
    upward = "essence" if all("essence" in row for row in rows) else "transfer"
    if not rows or across is None:
        return None
    series = [
        Series(
            name=name,
            points=[(row[across], row[upward]) for row in by_strength],
            colour=COLOUR_OF[name],
            joined=True,
        )
        for name, by_strength in report["sweep"].items()
    ]
    strengths = sorted({row["strength"] for row in rows})
    title = f"Strength from {strengths[0]:g} to {strengths[-1]:g}, first {report['first']} targets"
    return line_chart(f"{title} in range", series, SCORES[across], SCORES[upward])


def attribute_charts(name: str, scored: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Draw essence acquired and identity kept of each attribute."""
    pictures = {}
    for kind in ("essence", "identity"):
        groups = {
            method: scored["methods"][method]["attributes"][kind]
            for method in BARS
            if method in scored["all"] and kind in scored["methods"][method]["attributes"]
        }
        if groups:
            title = f"{name}: {SCORES[kind]} by attribute"
            pictures[f"{name} {kind}"] = bar_chart(title, groups, SCORES[kind])
    return pictures


def expected_chart(report: Mapping[str, Any]) -> Image.Image | None:
    """Draw the score that the mapper expects against the one it reaches, for every target."""
    series = []
    for name, scored in report["sets"].items():
        row = scored["methods"].get(REFERENCE)
        if row is not None and row["expected"] is not None:
            points = list(zip(row["expected"], row["scores"]["transfer"], strict=True))
            series.append(Series(name=name, points=points))
    if not series:
        return None
    title = "The transfer score that the mapper expects: a point for each target"
    return line_chart(title, series, "expected score", SCORES["transfer"], diagonal=True)


def charts(report: Mapping[str, Any]) -> dict[str, Image.Image]:
    """Draw all charts that there are numbers for, by their files' names."""
    pictures = {"strength": strength_chart(report), "expected": expected_chart(report)}
    for name, scored in report["sets"].items():
        pictures |= {f"{name} seconds": seconds_chart(name, scored)}
        pictures |= attribute_charts(name, scored)
    return {name: picture for name, picture in pictures.items() if picture is not None}


# The referee's report

REFEREE = {  # in the order of tables
    "identity": "identity kept",
    "identity_by_attribute": "identity kept, by attributes",
    "target_identity": "target's identity",
    "essence": "essence acquired, by attributes",
    "clip": "CLIP score",
    "second": "second judge",
    "consistency": "consistency",
    "outside": "change outside",
    "sharpness": "sharpness kept",
}
REFEREE_READING = """## How to read it

Scores are means over sources, then over targets; brackets hold 95 % of bootstrap means over
targets. Every picture is judged by its middle square, in its own size.

- identity kept: cosine of a result to its source by the identity model; 1 is the same person.
- target's identity: cosine of a result to its target by that model. What rises above the first
  row, the unedited sources, is identity that leaked from the target.
- CLIP score: cosine of a result to its target by the world's embedder. Second judge: the same by
  the embedder of --judge.
- consistency: mean cosine of the shifts of two sources in the embedder's space.
- change outside: mean change of the left and right border, of the range of values. It says
  something where results are aligned as their sources are.
- sharpness kept: how fine a result's edges are, as a part of its source's; below 1 it is blurred.
- FID and KID: of all results of a folder against the sources, by
  {features}. Both depend on the numbers of images, FID most: compare
  it between equal ones alone.
- seconds a result: as the folder's {seconds} says.
"""
ATTRIBUTE_READING = """\
- essence acquired, by attributes: the part of the way from source to target that the attribute
  reader's readings went, of what the target shows; 1 is all of it. {truth}.
- identity kept, by attributes: 1 is all of what the reader sees of the source, 0 as little as
  between two sources. Results are taken to be in the style of their sources.
- A single attribute is taken over all targets that show it together, so that each target counts by
  what was to be changed.
"""


def referee_text(report: Mapping[str, Any]) -> str:
    """Return report.md of the referee."""
    results, unedited = report["results"], report["unedited"]
    have = [score for score in REFEREE if any(score in row for row in results.values())]
    heads = ["results", *(REFEREE[score] for score in have), "s a result"]
    rows = [["sources, unedited", *(number(unedited.get(score)) for score in have), ""]]
    rows += [
        [name, *(with_bounds(row.get(score)) for score in have), number(row["seconds"])]
        for name, row in results.items()
    ]
    sizes = [
        [name, number(row["fid"], 1), number(row["kid"]), str(row["images"]),
         str(row["references"])]
        for name, row in results.items()
    ]  # fmt: skip
    lines = [
        f"# Results judged in the world {report['world']}",
        "",
        f"{len(report['sources'])} sources, {len(report['targets'])} targets, seed "
        f"{report['seed']} of the bootstrap.",
        "",
        *bullets(report["notes"]),
        *table(heads, rows),
        *table(["results", "FID", "KID", "results", "sources"], sizes),
    ]
    if report["held_out"]:
        apart = [
            [name, *(with_bounds(row["held_out"].get(score)) for score in have)]
            for name, row in results.items()
        ]
        count = f"{len(report['held_out'])} of {len(report['targets'])}"
        lines += [f"Over the held-out targets alone, {count}:", ""]
        lines += table(["results", *(REFEREE[score] for score in have)], apart)
    pairs = [
        [f"{one} less {other}", *(with_bounds(row.get(score)) for score in have)]
        for one, others in report["differences"].items()
        for other, row in others.items()
    ]
    if pairs:
        lines += ["Paired differences, over the targets and sources that both have:", ""]
        lines += table(["difference", *(REFEREE[score] for score in have)], pairs)
    lines += attribute_tables(results)
    reading = REFEREE_READING.format(features=report["features"], seconds=SECONDS)
    if report["truth"]:
        reading += ATTRIBUTE_READING.format(truth=truth_counts(report["truth"]))
    return "\n".join(lines) + "\n" + reading


def truth_counts(truth: Mapping[str, str | None]) -> str:
    """Return of how many targets a file or the reader says what they show."""
    ways = {"given": "a file says", "read": "the reader says", None: "nobody says"}
    known = [*truth.values()]
    counts = [f"{words} for {known.count(way)}" for way, words in ways.items() if way in known]
    return f"What targets show, {', '.join(counts)}"


def attribute_tables(results: Mapping[str, Any]) -> list[str]:
    """Return a table of essence and one of identity by attribute; nothing without a reader."""
    lines: list[str] = []
    heads = {"essence": "Essence acquired", "identity": "Identity kept"}
    for kind, head in heads.items():
        rows = {name: row["by_attribute"].get(kind, {}) for name, row in results.items()}
        names = list(dict.fromkeys(attribute for row in rows.values() for attribute in row))
        if names:
            cells = [[n, *(with_bounds(row.get(a)) for a in names)] for n, row in rows.items()]
            lines += [f"{head} by attribute:", "", *table(["results", *names], cells)]
    return lines


def referee_chart(report: Mapping[str, Any]) -> Image.Image:
    """Draw the CLIP score of each tool against the identity that it keeps."""
    series = [
        Series(
            name=name,
            points=[(row["identity"]["mean"], row["clip"]["mean"])],
            spans=[] if row["clip"]["low"] is None else [(row["clip"]["low"], row["clip"]["high"])],
        )
        for name, row in report["results"].items()
    ]
    unedited = Series(
        name="sources, unedited", points=[(1.0, report["unedited"]["clip"])], hollow=True
    )
    title = f"Essence against identity, {report['world']}"
    return line_chart(title, [*series, unedited], REFEREE["identity"], REFEREE["clip"])
