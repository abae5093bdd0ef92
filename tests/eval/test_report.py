"""Charts show their numbers; tables leave out what there is not."""

import sys

import numpy as np
import pytest
from PIL import Image

from eval.report import Series, bar_chart, colour_at, line_chart, number, table, with_bounds

BLUE, ORANGE = 0, 2  # places in the palette


def where(picture: Image.Image, place: int) -> np.ndarray:
    """Return [pixels, 2] rows and columns of a colour, left of the legend."""
    colour = np.round(255 * np.array(colour_at(place)[:3]))
    close = np.abs(np.asarray(picture).astype(int) - colour).max(axis=2) < 40
    return np.argwhere(close[:, :920])


def test_points_lie_where_their_numbers_are() -> None:
    series = [
        Series(name="a", points=[(0.01, 1.0)], spans=[(0.9, 1.2)]),
        Series(name="b", points=[(10.0, 2.0)], hollow=True),
        Series(name="none", points=[]),
    ]
    picture = line_chart("c", series, "x", "y", log_x=True, levels={"level": 1.5})
    assert picture.size == (1000, 600)
    low, high = where(picture, BLUE), where(picture, ORANGE)
    assert len(low) > len(high) > 0
    assert low[:, 1].max() < high[:, 1].min()
    assert low[:, 0].min() > high[:, 0].max()  # upwards is more


def test_joined_points_have_a_line_and_the_diagonal_one_scale() -> None:
    points = [(0.0, 0.0), (1.0, 1.0)]
    single = line_chart("c", [Series(name="a", points=points)], "x", "y")
    joined = line_chart("c", [Series(name="a", points=points, joined=True)], "x", "y")
    assert len(where(joined, BLUE)) > 2 * len(where(single, BLUE))
    narrow = [Series(name="a", points=[(0.0, 0.4), (1.0, 0.6)])]
    free = where(line_chart("c", narrow, "x", "y"), BLUE)
    scaled = where(line_chart("c", narrow, "x", "y", diagonal=True), BLUE)
    assert np.ptp(scaled[:, 0]) < 0.5 * np.ptp(free[:, 0])


def test_a_bar_is_as_long_as_its_number() -> None:
    groups = {"a": {"hat": 1.0, "beard": 1.0}, "b": {"hat": 0.5, "beard": -0.25}}
    picture = bar_chart("c", groups, "y")
    ratio = len(where(picture, BLUE)) / len(where(picture, ORANGE))
    assert ratio == pytest.approx(2 / 0.75, rel=0.1)


def test_a_chart_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="found none"):
        line_chart("empty", [Series(name="a", points=[])], "x", "y")
    with pytest.raises(ValueError, match="found none"):
        bar_chart("empty", {"a": {}}, "y")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"targetclip\[eval\]"):
        line_chart("c", [Series(name="a", points=[(0.0, 0.0)])], "x", "y")


def test_tables_leave_out_what_there_is_not() -> None:
    assert number(None) == "" and number(0.12345) == "0.123" and number(1.25, 1) == "1.2"
    assert with_bounds(None) == "" and with_bounds({"mean": 0.5, "low": None}) == "0.500"
    assert with_bounds({"mean": 0.5, "low": 0.4, "high": 0.6}) == "0.500 [0.400, 0.600]"
    assert table(["a", "b"], [["1", ""]]) == ["| a | b |", "|---|---|", "| 1 |  |", ""]
