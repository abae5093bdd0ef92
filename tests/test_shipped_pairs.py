"""The pairs that ship: whole, and of the bundled world."""

from pathlib import Path

from data.dataset import networks_of, verify
from targetclip.world import load_scene, load_world

PAIRS = Path(__file__).parents[1] / "data" / "avatars"


def test_the_shipped_pairs_are_as_they_were_made() -> None:
    assert verify(PAIRS) == []


def test_the_shipped_pairs_are_of_the_bundled_world() -> None:
    scene = load_scene(load_world("avatars"))
    assert networks_of(PAIRS) == (scene.generator.fingerprint, scene.embedder.fingerprint)
