"""What an avatar shows, in the words of words.toml, from the options it was drawn from; and the
options to ask a style for, so that an avatar has something or has it not.
"""

import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from PIL import ImageColor

from data.illustrated.avatars import HELD_OUT, TRAINED, Options, definition

UNCLEAR = "unclear"  # a variant that people would not agree about: never drawn
# Other people's parts than faces: never drawn, and parts that move.
QUIET: dict[str, Options] = {
    "avataaars": {"clothesVariant": ["hoodie", "overall", "shirtCrewNeck", "shirtVNeck"]},
    "notionists": {"gestureProbability": 0},
    "voxel-art": {"animationVariant": "none", "topProbability": 100},
    "open-peeps": {"maskProbability": 0},
}
# The option that sets the colour of hair; None: drawn in black ink, whatever is asked for.
HAIR_OPTION: dict[str, str | None] = {
    "croodles": "topColor", "open-peeps": "headContrastColor", "notionists": None,
}  # fmt: skip
# Heads of open-peeps that show their colour at all; the others are black ink.
COLOURED_HEADS = r"bangs$|cornrows$|gray|mediumBangs2|mohawk|noHair3|short4"

Wish = Literal["glasses", "beard", "hat"]
KINDS_OF_WISH: dict[Wish, tuple[str, ...]] = {
    "glasses": ("glasses",),
    "beard": ("beard", "moustache"),
    "hat": ("hat",),
}
CHANCES: dict[Wish, float] = {"glasses": 0.4, "beard": 0.35, "hat": 0.3}  # that training needs


@dataclass(frozen=True)
class Shown:
    """What one avatar shows. A kind that is not there, or that a style does not tell, is ""."""

    glasses: str = ""
    beard: str = ""
    moustache: str = ""
    hat: str = ""
    hair: str = ""
    mouth: str = ""
    extra: str = ""
    hair_colour: str = ""
    """"" where a hat hides it or the head is bald."""
    hat_colour: str = ""


@cache
def tables() -> dict[str, Any]:
    """Return the tables of words.toml: variants, words, colours and phrases."""
    return tomllib.loads((Path(__file__).parent / "words.toml").read_text("utf-8"))


def rules(style: str) -> dict[str, dict[str, str]]:
    """Return patterns of variants, by component, and what they show; the first match counts."""
    return dict(tables()["variants"][style])


@cache
def kinds() -> dict[str, str]:
    """Return the kind of every word, such as "hat" for "beanie"."""
    return {word: kind for kind, words in tables()["words"].items() for word in words}


def colours() -> dict[str, list[str]]:
    """Return the names of colours, each with the hex values that stand for it."""
    return dict(tables()["colours"])


def word_of(style: str, component: str, variant: str) -> str:
    """Return what a variant shows, in the words of words.toml; "" if it shows nothing of these."""
    patterns = rules(style).get(component, {}).items()
    return next((word for pattern, word in patterns if re.match(pattern, variant)), "")


@cache
def lab(colour: str) -> tuple[float, float, float]:
    """Return lightness and two opponent colours of a hex colour (CIELAB, D65)."""
    rgb = np.array(ImageColor.getrgb(colour)) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]), 1e-4))
    return float(116 * y - 16), float(500 * (x - y)), float(200 * (y - z))


def colour_name(colour: str) -> str:
    """Return the name in `colours` nearest to a hex colour."""
    known, found = colours(), lab(colour[:7].lower())
    return min(known, key=lambda name: min(math.dist(found, lab(value)) for value in known[name]))


def shown(style: str, drawn: Options) -> Shown:
    """Return what an avatar shows, from the options it was drawn from."""
    words: dict[str, str] = {}
    for component in rules(style):
        word = word_of(style, component, drawn.get(f"{component}Variant", ""))
        if word in kinds():
            words.setdefault(kinds()[word], word)
    if style == "avataaars" and "topVariant" not in drawn:
        words["hair"] = "bald"
    if words.get("hat"):
        words.pop("hair", None)
        for option in ("hatColor", "topColor"):
            if option in drawn and style != "voxel-art":
                words["hat_colour"] = colour_name(drawn[option][0])
    elif words.get("hair") != "bald":
        words["hair_colour"] = hair_colour(style, drawn)
    return Shown(**words)


def hair_colour(style: str, drawn: Options) -> str:
    """Return the name of the colour of the hair that shows; "" if none is drawn."""
    option = HAIR_OPTION.get(style, "hairColor")
    head = drawn.get("headVariant", "")
    if option is None or (style == "open-peeps" and not re.match(COLOURED_HEADS, head)):
        return "black"
    return colour_name(drawn[option][0]) if option in drawn else ""


def can_show(style: str, wish: Wish) -> bool:
    """Whether a style has variants of something: big-ears, for one, has no glasses."""
    words = [word for patterns in rules(style).values() for word in patterns.values()]
    return any(kinds().get(word) == wish for word in words)


def constrain(style: str, wishes: dict[Wish, bool]) -> Options:
    """Return options that force things on or off; what is not wished for stays to the seed.
    ValueError: the style has no variant of what is to be on."""
    for wish, there in wishes.items():
        if there and not can_show(style, wish):
            raise ValueError(f"{style} draws no {wish}: leave it out, or take another style")
    options: Options = dict(QUIET.get(style, {}))
    for component in rules(style):
        variants = definition(style)["components"][component]["variants"]
        words = {v: word_of(style, component, v) for v in variants}
        kind = {v: kinds().get(word, "") for v, word in words.items()}
        allowed = [v for v in variants if words[v] != UNCLEAR]
        for wish, there in wishes.items():
            off = KINDS_OF_WISH[wish]
            fit = [v for v in allowed if (kind[v] == wish if there else kind[v] not in off)]
            if there == bool(fit):  # else this component has no part in the wish, or a free choice
                options[f"{component}Probability"] = 100 if there else 0
            allowed = fit or allowed
        options[f"{component}Variant"] = allowed
    return options


def hex_of(rgb: Int64[ndarray, "3"]) -> str:
    """Return a colour of three values from 0 to 255 as #rrggbb."""
    return "#" + rgb.astype(np.uint8).tobytes().hex()


def colour_near(name: str, rng: np.random.Generator) -> str:
    """Draw a hex colour that has a name."""
    while True:
        rgb = ImageColor.getrgb(str(rng.choice(colours()[name])))
        colour = hex_of(np.clip(rgb + rng.integers(-14, 15, 3), 0, 255))
        if colour_name(colour) == name:
            return colour


def sample(
    style: str, seed: int, index: int, wishes: dict[Wish, bool] | None = None, hair: str = ""
) -> Options:
    """Draw options of one avatar; any two (style, seed, index) differ.

    `wishes` says what must be there or must not, `hair` names its colour; without, they are drawn.
    """
    rng = np.random.default_rng([seed, index, (TRAINED + HELD_OUT).index(style)])
    drawn = {w: bool(rng.uniform() < p) for w, p in CHANCES.items() if can_show(style, w)}
    if drawn.get("beard") is False and rng.uniform() < 0.4:
        del drawn["beard"]  # moustaches come with the seed
    options = constrain(style, drawn if wishes is None else wishes)
    natural = not hair and rng.uniform() < 0.3
    colour = colour_near(hair or str(rng.choice(list(colours()))), rng)
    option, coloured = HAIR_OPTION.get(style, "hairColor"), definition(style).get("colors", {})
    if option is not None and not natural:
        options[option] = [colour]
        if "facialHair" in coloured:
            options["facialHairColor"] = [colour]
    if "hat" in coloured:
        options["hatColor"] = [colour_near(str(rng.choice(list(colours()))), rng)]
    # One colour, or two that run into each other.
    background = [hex_of(end) for end in rng.integers(60, 256, (2, 3))]
    fill = "linear" if rng.uniform() < 0.3 else "solid"
    return options | {
        "seed": f"{seed}-{index}",
        "backgroundColor": background if fill == "linear" else background[:1],
        "backgroundColorFill": fill,
    }
