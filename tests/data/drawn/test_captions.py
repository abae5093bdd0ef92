"""Captions: all of the essence that is there, and nothing of the identity."""

from dataclasses import replace

import numpy as np
import pytest

from data.drawn.captions import caption
from data.drawn.faces import wide_face
from data.drawn.sketch import (
    GLASSES_COLOURS,
    HAIR_COLOURS,
    HAT_COLOURS,
    IDENTITY,
    NAMES,
    THRESHOLDS,
    Extras,
    Face,
)

COUNT = 100
PLAIN = replace(
    Face(**dict.fromkeys(NAMES, 0.5)), hat=0.0, glasses=0.0, beard=0.0, moustache=0.0, fringe=0.3
)  # fmt: skip
WORDS = {
    "glasses": ("glasses", "spectacles", "shades"),
    "hat": ("beanie", "woolly hat", "top hat", "tall hat"),
    "beard": ("beard",),
    "moustache": ("moustache", "mustache"),
    "lipstick": ("red lipstick", "red lips"),
    "blush": ("rosy cheeks", "blush"),
    "face_paint": ("white face paint", "white painted face"),
}


def faces() -> list[tuple[Face, Extras]]:
    return [wide_face(0, i, extra=0.5)[:2] for i in range(COUNT)]


def caption_of(
    face: Face, extras: Extras | None = None, seed: int = 0, complete: bool = True
) -> str:
    return caption(face, extras or Extras(), np.random.default_rng(seed), complete)


def says(text: str, *words: str) -> bool:
    return any(word in text for word in words)


def colour(palette: dict[str, tuple[float, float, float]], value: float) -> str:
    return list(palette)[min(int(value * len(palette)), len(palette) - 1)]


@pytest.mark.parametrize("complete", [True, False])
def test_identity_changes_no_word(complete: bool) -> None:
    rng = np.random.default_rng(1)
    for seed, (face, extras) in enumerate(faces()):
        other = replace(face, **{name: float(rng.uniform()) for name in IDENTITY})
        assert caption_of(face, extras, seed, complete) == caption_of(other, extras, seed, complete)


def test_a_complete_caption_names_what_is_worn_and_nothing_else() -> None:
    for seed, (face, _) in enumerate(faces()):
        text = caption_of(face, seed=seed)
        for name, words in WORDS.items():
            there = getattr(face, name) > THRESHOLDS[name]
            assert says(text, *words) == there, (name, text)


def test_a_complete_caption_names_colours_and_shapes() -> None:
    for seed, (face, _) in enumerate(faces()):
        text = caption_of(face, seed=seed)
        assert f"{colour(HAIR_COLOURS, face.hair_colour)} hair" in text
        hat, glasses = (getattr(face, n) > THRESHOLDS[n] for n in ("hat", "glasses"))
        assert says(text, "short ") == (face.hair_length < 0.35)
        assert says(text, "big ") >= (face.hair_volume > 0.7 and not hat)
        assert says(text, "fringe", "bangs") == (face.fringe > 0.55 and not hat)
        if hat:
            assert f"a {colour(HAT_COLOURS, face.hat_colour)} " in text
            assert says(text, "beanie", "woolly hat") == (face.hat_shape < 0.5)
        if glasses:
            shape = "round" if face.glasses_shape < 0.5 else "square"
            assert f"{shape} {colour(GLASSES_COLOURS, face.glasses_colour)} " in text
        dark = glasses and face.lens > THRESHOLDS["lens"]
        assert says(text, "sunglasses", "dark glasses", "shades") == dark


@pytest.mark.parametrize(
    ("smile", "mouth_open", "words"),
    [
        (0.9, 0.1, ("smile", "smiling")),
        (0.9, 0.9, ("laughing", "open smile")),
        (0.1, 0.1, ("frown", "sad")),
        (0.1, 0.9, ("open frown", "sad open")),
        (0.5, 0.9, ("an open mouth",)),
    ],
)
def test_a_complete_caption_names_the_mouth(
    smile: float, mouth_open: float, words: tuple[str, ...]
) -> None:
    face = replace(PLAIN, smile=smile, mouth_open=mouth_open)
    assert all(says(caption_of(face, seed=seed), *words) for seed in range(20))
    closed = replace(PLAIN, smile=0.5, mouth_open=0.1)
    assert not any(
        says(caption_of(closed, seed=seed), "mouth", "smile", "frown") for seed in range(20)
    )


def test_a_complete_caption_names_every_extra() -> None:
    extras = Extras("green", cat_ears=True, clown_nose=True, mask=True, crown=True, tattoo=True)
    words = ("green skin", "cat ears", "clown nose", "mask", "crown", "tattoo")
    text = caption_of(PLAIN, extras)
    assert all(word in text for word in words)
    assert not says(caption_of(PLAIN), *words)


def test_a_caption_is_decided_by_its_seed_and_wording_varies() -> None:
    texts = [caption_of(PLAIN, seed=seed, complete=False) for seed in range(40)]
    assert texts == [caption_of(PLAIN, seed=seed, complete=False) for seed in range(40)]
    assert len(set(texts)) > 10


def test_an_incomplete_caption_says_something_and_never_what_is_not_so() -> None:
    left_out = 0
    for seed, (face, extras) in enumerate(faces()):
        text = caption_of(face, extras, seed, complete=False)
        assert text.strip() and not text.endswith(("with ", "and "))
        for name in ("glasses", "hat", "beard"):
            there = getattr(face, name) > THRESHOLDS[name]
            assert not (there and f"no {name}" in text)
            left_out += there and not says(text, *WORDS[name])
            positive = text.replace("no hat", "").replace("no glasses", "").replace("no beard", "")
            assert there or not says(positive, *WORDS[name]), text
    assert left_out > 5
