"""Captions: essence in varied words, colours by name, identity never."""

import numpy as np
import pytest

from data.illustrated.captions import caption
from data.illustrated.shown import Shown, kinds, tables

RICH = Shown(glasses="sunglasses", beard="beard", hair="afro", mouth="smile", hair_colour="auburn")


def captions(shown: Shown, count: int = 60, complete: bool = False) -> list[str]:
    rng = np.random.default_rng(0)
    return [caption(shown, rng, complete) for _ in range(count)]


def test_there_is_a_phrase_for_every_word() -> None:
    assert set(kinds()) <= set(tables()["phrases"])


def test_a_complete_caption_names_everything_that_is_there() -> None:
    for text in captions(RICH, complete=True):
        for word in ("an auburn afro", "sunglasses", "beard", "smile"):
            assert word in text


def test_wording_and_completeness_vary() -> None:
    drawn = captions(RICH)

    assert len(set(drawn)) > 50
    assert any("sunglasses" not in text and "glasses" not in text for text in drawn)


def test_a_caption_never_says_that_something_there_is_missing() -> None:
    for text in captions(RICH):
        assert "no glasses" not in text and "no beard" not in text


def test_what_is_missing_is_said_now_and_then() -> None:
    drawn = captions(Shown(hair="long hair", hair_colour="blonde"))

    assert any("no glasses" in text for text in drawn)
    assert any("no hat" in text or "bare head" in text for text in drawn)


def test_a_hat_is_spoken_of_and_the_hair_under_it_is_not() -> None:
    for text in captions(Shown(hat="beanie", hat_colour="blonde", glasses="glasses")):
        assert "hair" not in text and "blonde" not in text
    assert tables()["hat_colour_words"]["blonde"] == "yellow"


@pytest.mark.parametrize("shown", [Shown(), Shown(mouth="frown")])
def test_an_avatar_that_shows_little_has_a_caption_too(shown: Shown) -> None:
    assert all(captions(shown))
