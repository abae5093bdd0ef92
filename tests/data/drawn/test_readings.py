"""Readings: what a picture shows of a face, and what of it can be seen."""

from dataclasses import replace

import numpy as np
import pytest

from data.drawn.faces import wide_face
from data.drawn.readings import OUTPUTS, READINGS, readings_of, shown, truth_of, visible
from data.drawn.sketch import ESSENCE, FADE, NAMES, THRESHOLDS, Face, draw

PLAIN = replace(
    Face(**dict.fromkeys(NAMES, 0.5)), hat=0.0, glasses=0.0, beard=0.0, moustache=0.0, fringe=0.3,
    face_paint=0.0,
)  # fmt: skip
HAT = {"hat": 1.0}
GLASSES = {"glasses": 1.0, "lens": 0.0}
SHADES = {"glasses": 1.0, "lens": 1.0}
# What hides a parameter, and what shows it.
RULES: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "hat_shape": ({}, HAT),
    "hat_colour": ({}, HAT),
    "glasses_shape": ({}, GLASSES),
    "glasses_colour": ({}, GLASSES),
    "lens": ({}, GLASSES),
    "fringe": (HAT, {}),
    "hair_volume": (HAT, {}),
    "eye_colour": (SHADES, {}),
    "eye_size": (SHADES, GLASSES),
    "brow_tilt": (HAT, {}),
    "brow_thickness": ({"fringe": 0.9}, {}),
    "skin": ({"face_paint": 1.0}, {}),
    "jaw": ({"beard": 1.0}, {}),
    "face_length": ({"beard": 1.0}, {}),
}
# What is not worn is not drawn; of what is covered something may look out.
NOT_DRAWN = ("hat_shape", "hat_colour", "glasses_shape", "glasses_colour", "lens")
COVERED = ("fringe", "eye_colour", "eye_size", "brow_thickness", "skin")


def change(name: str, dressed: dict[str, float]) -> float:
    """How much of the picture a parameter decides, on a face so dressed."""
    low, high = (replace(PLAIN, **{**dressed, name: value}) for value in (0.1, 0.9))
    return float(np.abs(np.asarray(draw(low), float) - np.asarray(draw(high), float)).mean())


def test_readings_cover_the_outputs_one_after_another() -> None:
    assert [reading.name for reading in READINGS] == list(NAMES)
    places = [place for reading in READINGS for place in range(OUTPUTS)[reading.span]]
    assert places == list(range(OUTPUTS))
    assert {reading.name for reading in READINGS if reading.essence} == set(ESSENCE)
    colours = {reading.name for reading in READINGS if reading.size == 3}
    assert colours == {
        "hair_colour", "hat_colour", "glasses_colour", "skin", "eye_colour", "background",
        "clothes",
    }  # fmt: skip


def test_every_reading_is_in_range_and_in_its_place() -> None:
    for i in range(8):
        face = wide_face(0, i)[0]
        values, seen = readings_of(face)
        assert values.shape == seen.shape == (OUTPUTS,)
        assert values.min() >= 0 and values.max() <= 1
        for reading in READINGS:
            assert values[reading.span].tolist() == shown(face, reading.name)
            assert set(seen[reading.span].tolist()) == {visible(face, reading.name)}


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_every_scale_have_readings(value: float) -> None:
    values, _ = readings_of(Face(**dict.fromkeys(NAMES, value)))
    assert values.min() >= 0 and values.max() <= 1


def test_a_colour_is_read_as_the_pixels_show_it() -> None:
    face = replace(PLAIN, background=0.3)
    corner = np.asarray(draw(face))[0, 0] / 255
    np.testing.assert_allclose(shown(face, "background"), corner, atol=0.005)


def test_readings_are_presence_for_what_fades_in_and_growth_for_a_beard() -> None:
    def beard(value: float) -> float:
        return shown(replace(PLAIN, beard=value), "beard")[0]

    assert beard(0.0) == 0 and beard(1.0) == 1
    assert beard(THRESHOLDS["beard"]) == pytest.approx(0.25)
    assert 0.5 < beard(0.8) < beard(0.9) < 1
    assert shown(replace(PLAIN, hat=0.9), "hat") == [1.0] and shown(PLAIN, "hat") == [0.0]
    assert shown(replace(PLAIN, nose=0.3), "nose") == [0.3]


def test_readings_stand_still_where_the_drawing_does() -> None:
    for name, (one, other) in {"smile": (0.0, 0.15), "mouth_open": (0.8, 1.0)}.items():
        a, b = (replace(PLAIN, **{name: value}) for value in (one, other))
        assert shown(a, name) == shown(b, name)
        np.testing.assert_array_equal(np.asarray(draw(a)), np.asarray(draw(b)))


@pytest.mark.parametrize("name", list(RULES))
def test_what_hides_a_parameter_makes_it_unseen(name: str) -> None:
    hiding, showing = RULES[name]
    assert not visible(replace(PLAIN, **hiding), name)
    assert visible(replace(PLAIN, **showing), name)


@pytest.mark.parametrize("name", [*NOT_DRAWN, *COVERED])
def test_what_is_called_unseen_leaves_little_trace_in_the_picture(name: str) -> None:
    hiding, showing = RULES[name]
    left = change(name, hiding) / change(name, showing)
    assert left == 0 if name in NOT_DRAWN else left < 0.6


def test_everything_else_can_always_be_seen() -> None:
    everything = {**HAT, **SHADES, "beard": 1.0, "face_paint": 1.0, "fringe": 1.0}
    for dressed in ({}, everything):
        face = replace(PLAIN, **dressed)
        assert all(visible(face, name) for name in NAMES if name not in RULES)


def test_what_is_only_half_there_neither_hides_nor_shows() -> None:
    half = replace(PLAIN, hat=THRESHOLDS["hat"], glasses=1.0, lens=THRESHOLDS["lens"])
    for name in ("hat_shape", "fringe", "eye_colour"):
        assert not visible(half, name)
    assert visible(replace(PLAIN, hat=THRESHOLDS["hat"] - FADE - 0.001), "fringe")


def test_the_truth_of_many_faces_is_that_of_each() -> None:
    faces = [wide_face(0, i)[0] for i in range(5)]
    values, seen = truth_of(np.stack([face.values() for face in faces]))
    assert values.dtype == np.float32 and seen.dtype == np.bool_
    for face, row, row_seen in zip(faces, values, seen, strict=True):
        expected, expected_seen = readings_of(face)
        np.testing.assert_allclose(row, expected, atol=1e-6)
        np.testing.assert_array_equal(row_seen, expected_seen)
