"""Charts of a comparison: which settings are shown together, and where."""

from typing import Any

from eval.recipe_charts import families, family_of, recipe_charts


def scores(identity: float, essence: float) -> dict[str, Any]:
    by_strength = {
        str(s): {"identity": identity / s, "essence_in_range": essence * s} for s in (0.5, 1.0)
    }
    return {"by_strength": by_strength}


def test_settings_that_change_the_same_thing_are_a_family() -> None:
    assert [family_of(n) for n in ("1 fixed source", "3 fresh sources", "decay 0", "75 steps")] == [
        "sources",
        "sources",
        "decay",
        "steps",
    ]
    names = ["consistent", "1 fixed source", "decay 0", "3 fresh sources", "tied layers"]
    assert families(names) == {"sources": ["consistent", "1 fixed source", "3 fresh sources"]}


def test_every_family_has_a_chart_and_what_has_no_strengths_is_left_out() -> None:
    report = {
        "drawn answer": {"identity": 0.6},
        "consistent": scores(0.2, 0.6),
        "decay 0": scores(0.1, 0.7),
        "decay 1": scores(0.4, 0.1),
    }
    charts = recipe_charts(report)
    assert list(charts) == ["decay"] and charts["decay"].size == (1000, 600)
    moved = recipe_charts({**report, "decay 1": scores(0.4, 0.3)})
    assert moved["decay"].tobytes() != charts["decay"].tobytes()
    del report["consistent"]
    assert recipe_charts(report) == {}
