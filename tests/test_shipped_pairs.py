"""The pairs that ship: whole, and of the bundled world."""

from pathlib import Path

from data.card import CARD
from data.dataset import verify
from targetclip import load_generator, load_world

PAIRS = Path(__file__).parents[1] / "data" / "sketch64"


def test_the_shipped_pairs_are_as_they_were_made() -> None:
    assert verify(PAIRS) == []


def test_the_shipped_pairs_are_the_bundled_generators() -> None:
    generator = load_generator(load_world("sketch64").generator)
    assert generator.fingerprint in (PAIRS / CARD).read_text("utf-8")
