"""Charts of a comparison of recipes: what is won in essence, and what it costs in identity.

Knows the report of `eval.studies.teachers`; nothing of how it came about.
"""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from eval.charts import COLOURS, Series, chart

BASE = "consistent"


def family_of(name: str) -> str:
    """What a setting changes: "sources" of "4 fixed sources", "decay" of "decay 0"."""
    words = name.split()
    return words[-1].rstrip("s") + "s" if words[0].isdigit() else words[0]


def families(names: list[str]) -> dict[str, list[str]]:
    """Settings that change the same thing, at least two together, each family with the base."""
    found: dict[str, list[str]] = {}
    for name in names:
        if name != BASE:
            found.setdefault(family_of(name), []).append(name)
    return {kind: [BASE, *each] for kind, each in found.items() if len(each) > 1}


def essence_and_identity(
    report: Mapping[str, Mapping[str, Any]], names: list[str], title: str
) -> Image.Image:
    """A line a setting: its strengths, from little essence and much identity to the opposite."""
    series = []
    for name, colour in zip(names, COLOURS, strict=False):
        strengths = sorted(report[name]["by_strength"].items(), key=lambda each: float(each[0]))
        points = [(scores["identity"], scores["essence_in_range"]) for _, scores in strengths]
        series.append(Series(name, points, colour, joined=True))
    return chart(title, series, "identity kept", "essence acquired")


def recipe_charts(report: Mapping[str, Mapping[str, Any]]) -> dict[str, Image.Image]:
    """A chart for each family of settings in a report; the base must be in it."""
    names = [name for name, figures in report.items() if "by_strength" in figures]
    if BASE not in names:
        return {}
    return {
        kind: essence_and_identity(report, each, f"Essence and identity by strength: {kind}")
        for kind, each in families(names).items()
    }
