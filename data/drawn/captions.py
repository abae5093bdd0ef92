"""Faces in words: captions that name essence and never identity.

Knows the vocabulary that the bundled CLIP model learns. Wording, order and completeness vary, as
captions people write do.
"""

from collections.abc import Callable

import numpy as np

from data.drawn.sketch import (
    GLASSES_COLOURS,
    HAIR_COLOURS,
    HAT_COLOURS,
    THRESHOLDS,
    Extras,
    Face,
    stepped_name,
)

Choose = Callable[[list[str]], str]

OPENINGS = [
    "a face with",
    "a person with",
    "a portrait of someone with",
    "a drawing of a face with",
]


def has(face: Face, name: str) -> bool:
    """Whether an attribute that fades in is more there than not."""
    return bool(getattr(face, name) > THRESHOLDS[name])


def hair_phrase(face: Face, choose: Choose) -> str:
    length = "short" if face.hair_length < 0.35 else "long" if face.hair_length > 0.6 else ""
    big = "big" if face.hair_volume > 0.7 and not has(face, "hat") else ""
    words = [big, length, stepped_name(HAIR_COLOURS, face.hair_colour), "hair"]
    return " ".join(word for word in words if word)


def glasses_phrase(face: Face, choose: Choose, brief: bool) -> str:
    dark = ["sunglasses", "dark glasses", "shades"]
    kind = choose(dark if has(face, "lens") else ["glasses", "spectacles", "glasses"])
    if brief:
        return kind
    shape = "round" if face.glasses_shape < 0.5 else "square"
    return f"{shape} {stepped_name(GLASSES_COLOURS, face.glasses_colour)} {kind}"


def hat_phrase(face: Face, choose: Choose, brief: bool) -> str:
    if brief:
        return "a hat"
    kinds = ["beanie", "woolly hat"] if face.hat_shape < 0.5 else ["top hat", "tall hat"]
    return f"a {stepped_name(HAT_COLOURS, face.hat_colour)} {choose(kinds)}"


def mouth_phrase(face: Face, choose: Choose) -> str:
    opened = face.mouth_open > 0.67
    if face.smile > 0.62:
        return choose(
            ["a laughing mouth", "a big open smile"] if opened else ["a smile", "a smiling mouth"]
        )
    if face.smile < 0.38:
        return choose(
            ["an open frown", "a sad open mouth"] if opened else ["a frown", "a sad mouth"]
        )
    return "an open mouth" if opened else ""


def present_phrases(face: Face, choose: Choose, brief: bool) -> list[str]:
    """A phrase for each essence attribute that is there; `brief` ones leave out its kind."""
    phrases = [hair_phrase(face, choose), mouth_phrase(face, choose)]
    if face.fringe > 0.55 and not has(face, "hat"):
        phrases.append(choose(["a fringe", "bangs"]))
    if has(face, "glasses"):
        phrases.append(glasses_phrase(face, choose, brief))
    if has(face, "hat"):
        phrases.append(hat_phrase(face, choose, brief))
    if has(face, "beard"):
        phrases.append(
            choose(["a long beard", "a full beard"] if face.beard > 0.83 else ["a beard"])
        )
    if has(face, "moustache"):
        phrases.append(choose(["a moustache", "a mustache"]))
    if has(face, "lipstick"):
        phrases.append(choose(["red lipstick", "red lips"]))
    if has(face, "blush"):
        phrases.append(choose(["rosy cheeks", "blush"]))
    if has(face, "face_paint"):
        phrases.append(choose(["white face paint", "a white painted face"]))
    return [phrase for phrase in phrases if phrase]


def absent_phrases(face: Face, choose: Choose) -> list[str]:
    """Phrases that say what is not there; people write one now and then."""
    phrases = []
    if not has(face, "glasses"):
        phrases.append("no glasses")
    if not has(face, "hat"):
        phrases.append(choose(["no hat", "a bare head"]))
    if not has(face, "beard"):
        phrases.append(choose(["no beard", "a shaven chin"]))
    return phrases


def extra_phrases(extras: Extras) -> list[str]:
    """A phrase for each attribute the bundled generator does not draw."""
    named = {
        "cat ears": extras.cat_ears,
        "a red clown nose": extras.clown_nose,
        "a black mask": extras.mask,
        "a golden crown": extras.crown,
        "a tattoo on the cheek": extras.tattoo,
    }
    tint = [f"{extras.tint} skin"] if extras.tint else []
    return tint + [phrase for phrase, there in named.items() if there]


def caption(face: Face, extras: Extras, rng: np.random.Generator, complete: bool = False) -> str:
    """One caption of a face.

    Args:
        rng: chooses wording, order and, unless `complete`, which attributes are left out.
        complete: name every essence attribute that is there.
    """

    def choose(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    brief = not complete and bool(rng.uniform() < 0.3)
    phrases = present_phrases(face, choose, brief) + extra_phrases(extras)
    if not complete:
        keep = rng.uniform(0.5, 1.2)
        phrases = [p for p in phrases if rng.uniform() < keep] or phrases[:1]
        phrases += [p for p in absent_phrases(face, choose) if rng.uniform() < 0.4]
    rng.shuffle(phrases)
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return listed if rng.uniform() < 0.2 else f"{choose(OPENINGS)} {listed}"
