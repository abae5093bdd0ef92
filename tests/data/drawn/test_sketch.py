"""The drawing: deterministic, continuous, and what each parameter is said to be."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from data.drawn import sketch
from data.drawn.sketch import (
    ESSENCE,
    GLASSES_COLOURS,
    HAIR_COLOURS,
    HAT_COLOURS,
    IDENTITY,
    LAYERS,
    NAMES,
    THRESHOLDS,
    TINTS,
    Extras,
    Face,
    Style,
    amount,
    draw,
    stepped,
    stepped_name,
)

PLAIN = replace(
    Face(**dict.fromkeys(NAMES, 0.5)), hat=0.0, glasses=0.0, beard=0.0, moustache=0.0, fringe=0.3
)  # fmt: skip
# On the right face every parameter shows.
SHOWING = {
    "hat_shape": {"hat": 1.0},
    "hat_colour": {"hat": 1.0},
    "glasses_shape": {"glasses": 1.0},
    "glasses_colour": {"glasses": 1.0},
    "lens": {"glasses": 1.0},
}


def pixels(face: Face, extras: Extras | None = None, style: Style | None = None) -> np.ndarray:
    return np.asarray(draw(face, extras, style), dtype=float)


def along(name: str) -> Callable[[float], np.ndarray]:
    """Pictures of a face that shows a parameter, by that parameter."""
    face = replace(PLAIN, **SHOWING.get(name, {}))
    return lambda value: pixels(replace(face, **{name: value}))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean change of a pixel beyond one level of 255, which rounding alone may make."""
    return float(np.maximum(abs(a - b) - 1, 0).mean())


def largest_jump(picture: Callable[[float], np.ndarray], width: float = 5e-4) -> float:
    """Look ever closer where the picture changes most; what change is left at `width`.

    As a part of the change over the whole scale. Of a continuous drawing little is left (edges lie
    on quarters of a pixel), of a jump all of it.
    """
    edges = [i / 10 for i in range(11)]
    shown = [picture(edge) for edge in edges]
    at = int(np.argmax([distance(a, b) for a, b in pairwise(shown)]))
    low, high, first, last = edges[at], edges[at + 1], shown[at], shown[at + 1]
    while high - low > width:
        middle = (low + high) / 2
        between = picture(middle)
        if distance(first, between) > distance(between, last):
            high, last = middle, between
        else:
            low, first = middle, between
    return distance(first, last) / distance(shown[0], shown[-1])


def test_a_face_has_31_parameters_each_essence_or_identity_and_owned_by_some_layers() -> None:
    assert len(NAMES) == 31 and set(ESSENCE) | set(IDENTITY) == set(NAMES)
    assert not set(ESSENCE) & set(IDENTITY) and set(LAYERS.values()) == {"coarse", "middle", "fine"}
    assert set(THRESHOLDS) <= set(ESSENCE)
    np.testing.assert_array_equal(PLAIN.values()[NAMES.index("fringe")], 0.3)


def test_the_same_face_is_drawn_the_same() -> None:
    style = Style(outline=True, backdrop=3, blur=0.5, colour_shift=(0.9, 1.0, 1.1), brightness=5.0)
    arguments = (replace(PLAIN, hat=0.7), Extras(tint="blue", crown=True), style)
    picture = draw(*arguments)
    assert picture.mode == "RGB" and picture.size == (64, 64)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(draw(*arguments)))


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_changes_with_every_parameter_but_never_jumps(name: str) -> None:
    picture = along(name)
    assert distance(picture(0.0), picture(1.0)) > 0.05
    assert largest_jump(picture) < 0.25


@pytest.mark.parametrize("name", [*THRESHOLDS, "hair_colour", "hat_colour", "glasses_colour"])
def test_a_parameter_that_switched_would_be_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sketch, "smoothstep", lambda x, low, high: float(x > (low + high) / 2))
    assert largest_jump(along(name)) > 0.4


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_every_scale_can_be_drawn(value: float) -> None:
    assert draw(Face(**dict.fromkeys(NAMES, value))).size == (64, 64)


@pytest.mark.parametrize("name", list(THRESHOLDS))
def test_an_attribute_fades_in_around_its_threshold(name: str) -> None:
    threshold = THRESHOLDS[name]
    amounts = [amount(replace(PLAIN, **{name: threshold + d}), name) for d in (-0.04, 0, 0.04)]
    assert amounts == pytest.approx([0, 0.5, 1])
    picture = along(name)
    assert np.array_equal(picture(0.0), picture(threshold - 0.04))
    assert not np.array_equal(picture(0.0), picture(threshold))


@pytest.mark.parametrize("palette", [HAIR_COLOURS, HAT_COLOURS, GLASSES_COLOURS])
def test_a_colour_is_called_by_the_palette_colour_it_is_nearest_to(
    palette: dict[str, tuple[float, float, float]],
) -> None:
    colours = np.array(list(palette.values()))
    for value in np.linspace(0, 1, 501).tolist():
        place = value * len(palette)
        if abs(place - round(place)) < 0.01:
            continue  # on the border of two names
        distances = np.linalg.norm(colours - stepped(list(palette.values()), value), axis=1)
        at = list(palette).index(stepped_name(palette, value))
        # Of its two neighbours on the scale; some third colour may lie between them.
        neighbours = [i for i in (at - 1, at, at + 1) if 0 <= i < len(palette)]
        assert min(neighbours, key=lambda i: float(distances[i])) == at


@pytest.mark.parametrize(
    "extras",
    [Extras(**{name: True}) for name in ("cat_ears", "clown_nose", "mask", "crown", "tattoo")]
    + [Extras(tint=tint) for tint in TINTS],
)
def test_every_extra_shows(extras: Extras) -> None:
    assert abs(pixels(PLAIN, extras) - pixels(PLAIN)).mean() > 0.1


@pytest.mark.parametrize(
    "style",
    [
        Style(outline=True),
        Style(grey=True),
        Style(backdrop=1),
        Style(blur=0.8),
        Style(colour_shift=(0.9, 1.0, 1.1)),
        Style(brightness=10.0),
    ],
)
def test_every_style_shows_and_a_plain_style_changes_nothing(style: Style) -> None:
    assert abs(pixels(PLAIN, None, style) - pixels(PLAIN)).mean() > 0.5
    np.testing.assert_array_equal(pixels(PLAIN, Extras(), Style()), pixels(PLAIN))


def test_a_grey_picture_has_no_colour() -> None:
    grey = pixels(PLAIN, None, Style(grey=True))
    assert (grey == grey[..., :1]).all()
