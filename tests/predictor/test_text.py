"""Texts as targets, in a space where it is known what texts and pictures share."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.text import TextTargets

NEUTRAL = ("a face", "a drawn face")


def axis(i: int) -> Tensor:
    return torch.eye(8)[i]


# What all texts share, what all pictures share, what both call green, and what tells neutrals apart
TEXT, PICTURE, GREEN, DRAWN = (axis(i) for i in range(4))


# Raw embeddings, of any length
KNOWN = {
    "a face": TEXT - 0.1 * DRAWN,
    "a drawn face": 3 * TEXT + 0.3 * DRAWN,
    "the face": 2 * TEXT - 0.2 * DRAWN,
    "green hair": 5 * TEXT + 2 * GREEN,
    "red hair": 4 * TEXT - 2 * GREEN,
}


class Words:
    """An embedder of a few texts."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([KNOWN[text] for text in texts])


def target(text: str, gain: float = 1.0, centre: Tensor = PICTURE) -> Tensor:
    return TextTargets(Words(), NEUTRAL, gain).embed(text, centre)


def test_a_text_lands_among_the_pictures_it_describes() -> None:
    found = target("green hair", gain=2.0)
    picture = F.normalize(PICTURE + 0.5 * GREEN, dim=0)
    assert found.norm() == pytest.approx(1)
    assert found @ picture > 0.97
    # The text itself is nearer to any other text than to the picture.
    text = F.normalize(KNOWN["green hair"], dim=0)
    assert text @ picture < 0.3 < text @ F.normalize(KNOWN["red hair"], dim=0)


def test_a_text_is_measured_from_the_mean_of_the_neutral_ones() -> None:
    units = {name: F.normalize(raw, dim=0) for name, raw in KNOWN.items()}
    said = units["green hair"] - (units["a face"] + units["a drawn face"]) / 2
    centre = 0.7 * PICTURE
    expected = F.normalize(centre + 1.5 * said, dim=0)
    torch.testing.assert_close(target("green hair", 1.5, centre), expected)


def test_without_gain_a_text_is_the_centre_and_with_more_it_is_further_off() -> None:
    found = [target("green hair", gain) for gain in (0.0, 0.5, 1.0, 2.0)]
    torch.testing.assert_close(found[0], PICTURE)
    greens = [float(each @ GREEN) for each in found]
    assert greens == sorted(greens) and greens[-1] > greens[0] + 0.3


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found an empty one"):
        target(text)


def test_a_text_that_says_what_the_neutral_one_says_is_refused() -> None:
    with pytest.raises(ValueError, match="'the face' says no more than 'a face'"):
        TextTargets(Words(), ("a face",)).embed("the face", PICTURE)


def test_texts_need_a_neutral_one() -> None:
    with pytest.raises(ValueError, match="neutral"):
        TextTargets(Words(), ())
