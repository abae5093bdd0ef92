"""What avatars show: the truth from options, and forcing things on and off."""

import numpy as np
import pytest

pytest.importorskip("dicebear", reason="needs the extra avatars")

from data.illustrated.avatars import HELD_OUT, TRAINED, definition, draw
from data.illustrated.shown import (
    KINDS_OF_WISH,
    UNCLEAR,
    Wish,
    can_show,
    colour_name,
    colour_near,
    colours,
    constrain,
    hair_colour,
    kinds,
    rules,
    sample,
    shown,
)

STYLES = TRAINED + HELD_OUT
WISHES: tuple[Wish, ...] = ("glasses", "beard", "hat")


@pytest.mark.parametrize("style", STYLES)
def test_every_rule_is_of_a_component_the_style_has_and_says_a_known_word(style: str) -> None:
    components = definition(style)["components"]

    assert set(rules(style)) <= set(components)
    words = {word for patterns in rules(style).values() for word in patterns.values()}
    assert words <= set(kinds()) | {UNCLEAR}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wish", WISHES)
def test_what_is_forced_off_is_not_there(style: str, wish: Wish) -> None:
    for index in range(3):
        found = shown(style, draw(style, sample(style, 0, index, {wish: False}))[1])

        assert not any(getattr(found, kind) for kind in KINDS_OF_WISH[wish])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wish", WISHES)
def test_what_is_forced_on_is_there(style: str, wish: Wish) -> None:
    if not can_show(style, wish):
        pytest.skip(f"{style} draws no {wish}")
    for index in range(3):
        assert getattr(shown(style, draw(style, sample(style, 0, index, {wish: True}))[1]), wish)


def test_everything_can_be_forced_at_once() -> None:
    wishes: dict[Wish, bool] = {"glasses": True, "beard": True, "hat": False}
    found = shown("personas", draw("personas", sample("personas", 0, 1, wishes, "green"))[1])

    assert found.glasses and found.beard and not found.hat
    assert found.hair_colour in ("green", "")


def test_what_a_style_does_not_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="big-ears draws no glasses"):
        constrain("big-ears", {"glasses": True})


def test_equal_seeds_give_the_same_avatar() -> None:
    first, again = (draw("micah", sample("micah", 3, 4))[0] for _ in range(2))

    assert first == again != draw("micah", sample("micah", 3, 5))[0]


def test_ink_hair_is_black_whatever_was_asked_for() -> None:
    assert hair_colour("notionists", {"hairColor": ["#3fa84c"]}) == "black"
    assert hair_colour("open-peeps", {"headVariant": "afro", "headContrastColor": ["#3fa84c"]}) == (
        "black"
    )


def test_a_colour_drawn_for_a_name_has_that_name() -> None:
    rng = np.random.default_rng(0)

    for name in colours():
        assert {colour_name(colour_near(name, rng)) for _ in range(10)} == {name}


def test_a_hat_hides_the_colour_of_hair() -> None:
    found = shown("avataaars", {"topVariant": "winterHat02", "hairColor": ["#3fa84c"]})

    assert found.hat == "beanie" and found.hair == found.hair_colour == ""
