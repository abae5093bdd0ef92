"""Texts as targets, in a space where it is known what texts and pictures share."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from predictor.text import NOISE, TextTargets, among_pictures

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


def pictures(green: float = 0.5, count: int = 64) -> Tensor:
    """Embeddings of sources that differ in how green they are, and hardly in anything else."""
    random = torch.Generator().manual_seed(0)
    greens = green * torch.randn(count, 1, generator=random)
    rest = 1e-3 * torch.randn(count, 8, generator=random)
    return 2 * (PICTURE + greens * GREEN + rest)


def target(text: str, sources: Tensor | None = None) -> Tensor:
    return TextTargets(Words(), NEUTRAL).embed(text, pictures() if sources is None else sources)


def test_a_text_lands_among_the_pictures_it_describes() -> None:
    found = target("green hair")
    picture = F.normalize(PICTURE + 0.5 * GREEN, dim=0)
    assert found.norm() == pytest.approx(1)
    assert found @ picture > 0.97
    # The text itself is nearer to any other text than to the picture.
    text = F.normalize(KNOWN["green hair"], dim=0)
    assert text @ picture < 0.3 < text @ F.normalize(KNOWN["red hair"], dim=0)
    assert target("red hair") @ GREEN < 0 < found @ GREEN


def test_a_text_is_measured_from_the_mean_of_the_neutral_ones() -> None:
    units = {name: F.normalize(raw, dim=0) for name, raw in KNOWN.items()}
    said = units["green hair"] - (units["a face"] + units["a drawn face"]) / 2
    sources = pictures()
    expected = F.normalize(sources, dim=1).mean(dim=0) + among_pictures(
        F.normalize(sources, dim=1), said
    )
    torch.testing.assert_close(target("green hair", sources), F.normalize(expected, dim=0))


def test_what_no_two_pictures_differ_in_is_left_out() -> None:
    """Texts differ in what they share with neutral ones as well: TEXT, which no picture has."""
    said = F.normalize(KNOWN["green hair"], dim=0) - TEXT
    assert said @ TEXT < -0.05
    kept = among_pictures(F.normalize(pictures(), dim=1), said)
    assert abs(kept @ TEXT) < 1e-3 and kept @ GREEN == pytest.approx(float(said @ GREEN), rel=0.1)
    # Where pictures differ evenly, nothing is preferred.
    even = torch.cat([torch.eye(8), -torch.eye(8)])
    torch.testing.assert_close(among_pictures(even, said), said / (1 + NOISE), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found an empty one"):
        target(text)


def test_a_text_that_says_what_the_neutral_one_says_is_refused() -> None:
    with pytest.raises(ValueError, match="'the face' says no more than 'a face'"):
        TextTargets(Words(), ("a face",)).embed("the face", pictures())


def test_texts_need_a_neutral_one() -> None:
    with pytest.raises(ValueError, match="neutral"):
        TextTargets(Words(), ())
