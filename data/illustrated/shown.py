"""What an avatar shows, in one vocabulary for all styles, known from the options it was drawn from.

Knows which variants of which style are glasses, beards, hats, hair and mouths, and the names of
colours; and asks a style for avatars with or without something.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from data.illustrated.avatars import Options, definition

# Words for what is shown, by kind; every style's variants are read as one of these.
WORDS = {
    "glasses": ("glasses", "round glasses", "sunglasses"),
    "beard": ("beard", "long beard", "goatee"),
    "moustache": ("moustache",),
    "hat": ("hat", "cap", "beanie", "turban", "hijab"),
    "hair": (
        "bald", "balding", "short hair", "long hair", "curly hair", "wavy hair", "spiky hair",
        "afro", "bun", "bob", "dreadlocks", "braids", "ponytail", "pigtails", "mohawk", "quiff",
        "flowers",
    ),
    "mouth": ("smile", "open mouth", "frown", "serious mouth", "tongue", "bared teeth"),
    "extra": (
        "eyepatch", "freckles", "rosy cheeks", "cat ears", "clown nose", "face mask", "tiara",
        "sleep mask",
    ),
}  # fmt: skip
KIND_OF = {word: kind for kind, words in WORDS.items() for word in words}
UNCLEAR = "unclear"  # a variant that people would not agree about: never drawn

# For each style and component, patterns of variants and what they show; the first match counts.
RULES: dict[str, dict[str, dict[str, str]]] = {
    "avataaars": {
        "accessories": {
            "eyepatch": "eyepatch", "round": "round glasses", "prescription": "glasses",
            ".": "sunglasses",
        },
        "facialHair": {"beardMaj": "long beard", "beard": "beard", "moustache": "moustache"},
        "top": {
            "hat": "hat", "hijab": "hijab", "turban": "turban", "winterHat": "beanie",
            "dreads02": "spiky hair", "dreads01|short|theCaesar|shaggy$": "short hair",
            "dreads": "dreadlocks", "fro": "afro", "frida": "flowers", "frizzle": "quiff",
            "bun": "bun", "bob|mia|longBut": "bob", "curly": "curly hair", "curvy": "wavy hair",
            "sides": "balding", "shaggyMullet|shaved|bigHair|straight": "long hair",
        },
        "mouth": {
            "smile|twinkle|default": "smile", "sad|concerned|disbelief": "frown",
            "serious": "serious mouth", "scream": "open mouth", "grimace": "bared teeth",
            "tongue": "tongue", ".": UNCLEAR,
        },
    },
    "adventurer": {
        "glasses": {".*01": "sunglasses", ".": "glasses"},
        "details": {"mus": "moustache", "blush": "rosy cheeks", "freckles": "freckles"},
        "hair": {"long": "long hair", "short": "short hair"},
        "mouth": {
            ".*(02|05|22|23|25|26|27|28|29|30)": "smile", ".*(13|14|15|18|24)": "open mouth",
            ".*(12|16)": "tongue", ".*(07|09|11)": "serious mouth",
        },
    },
    "big-ears": {
        "details": {".*0[12]": "freckles", ".": "rosy cheeks"},
        "hair": {"long": "long hair", "short": "short hair"},
        "mouth": {
            "variant(02|070[12378])": "smile", "variant0[14]": "open mouth",
            "variant(05|070[456])": "frown",
        },
    },
    "big-smile": {
        "accessories": {
            "glasses": "round glasses", "sunglasses": "sunglasses", "mustache": "moustache",
            "catEars": "cat ears", "clown": "clown nose", "faceMask": "face mask",
            "sailor": "tiara", "sleep": "sleep mask",
        },
        "hair": {
            "bunHair|froBun": "bun", "braids": "braids", "curlyBob|wavy": "wavy hair",
            "curlyShort": "curly hair", "mohawk": "mohawk", "bowl|shaved|short": "short hair",
            "bangs|straight": "long hair",
        },
        "mouth": {
            "opened|gap|braces|teeth|kawaii": "smile", "openSad": "open mouth",
            "awkward": "bared teeth", "unimpressed": "serious mouth",
        },
    },
    "croodles": {
        "eyes": {".*(09)": "sunglasses", ".*14": "round glasses", ".*1[35]": "glasses",
                 ".*10": "eyepatch", ".*12": UNCLEAR},
        "top": {
            ".*2[0234]": "hat", ".*25": "cap", ".*21": "beanie", ".*28": "bald",
            ".*2[67]": "balding", ".*1[2347]": "long hair", ".*15": "ponytail", ".*16": "pigtails",
            ".*(05|10|11|18)": "curly hair", ".": "short hair",
        },
        "beard": {".*03": UNCLEAR, ".*04": "long beard", ".*0[25]": "goatee", ".": "beard"},
        "mustache": {".": "moustache"},
    },
    "dylan": {
        "facialHair": {".": "beard"},
        "hair": {
            "bangs|roundBob": "bob", "buns": "bun", "longCurls|shortCurls": "curly hair",
            "spiky": "spiky hair", "wavy": "wavy hair", ".": "short hair",
        },
        "mood": {"happy|superHappy|hopeful": "smile", "angry|sad": "frown",
                 "neutral": "serious mouth"},
    },
    "miniavs": {
        "glasses": {".": "round glasses"},
        "mustache": {"pencilThinBeard": UNCLEAR, ".": "moustache"},
        "blush": {".": "rosy cheeks"},
        "hair": {
            "bald": "bald", "slaughter": "balding", "curly": "curly hair", "long": "long hair",
            "pony": "ponytail", ".": "short hair",
        },
        "mouth": {".": "smile"},
    },
    "notionists": {
        "beard": {".*0[12]": "beard", ".*(08|11|12)": "goatee", ".*04": UNCLEAR,
                  ".": "moustache"},
        "glasses": {".*11": "round glasses", ".*0[38]": "glasses", ".": "sunglasses"},
        "hair": {
            "hat": "cap", ".*14": "hat", ".*61": "turban", ".*6[23]": "hijab",
            ".*(29|48|57|59)": "bun", ".*(09|20|22)": "curly hair", ".*54": "balding",
            ".*(02|08|10|23|28|36|37|41|58)": "long hair", ".*4[567]": "ponytail",
            ".*5[01]": "spiky hair", ".": "short hair",
        },
    },
    "pixel-art": {
        "beard": {".*0[124]": UNCLEAR, ".": "beard"},
        "glasses": {"dark": "sunglasses", "light": "glasses"},
        "hat": {".*0[2678]": "cap", ".": "beanie"},
        "hair": {"long": "long hair", "short": "short hair"},
        "mouth": {"happy": "smile", "sad": "frown"},
    },
    "toon-head": {
        "beard": {"chin$": "goatee", "moustache": "moustache", "long": "long beard", ".": "beard"},
        "rearHair": {".": "long hair"},
        "hair": {"bun": "bun", "spiky": "spiky hair", ".": "short hair"},
        "mouth": {"laugh|smile": "smile", "agape": "open mouth", ".": "frown"},
    },
    "voxel-art": {
        "beard": {"full": "beard", "goatee": "goatee", "must": "moustache", ".": UNCLEAR},
        "glasses": {"shades": "sunglasses", "visor": UNCLEAR, "round": "round glasses",
                    ".": "glasses"},
        "top": {
            "cap": "cap", "beanie": "beanie", "animal|bunny": "hat", "spiky": "spiky hair",
            "curly": "curly hair", "mohawk": "mohawk", "bun": "bun", "pony": "ponytail",
            "twin": "pigtails", "bob": "bob", "braids": "braids", "longWavy": "wavy hair",
            "shoulder|long|parted": "long hair", "afro": "afro", ".": "short hair",
        },
        "mouth": {
            "smile|big|smirk|laugh|wide": "smile", "ooh": "open mouth", "tongue": "tongue",
            "flat": "serious mouth", "frown": "frown", "grin": "bared teeth",
        },
    },
    "personas": {
        "eyes": {"glasses": "glasses", "sunglasses": "sunglasses"},
        "facialHair": {"beard": "beard", "goatee": "goatee", "pyramid|walrus": "moustache",
                       ".": UNCLEAR},
        "hair": {
            "beanie": "beanie", "cap": "cap", "bald$": "bald", "balding": "balding",
            "bob": "bob", "bun|curlyBun|straightBun": "bun", "curlyHigh": "curly hair",
            "curly": "afro", "extra|long|side": "long hair", "mohawk": "mohawk",
            "pig": "pigtails", ".": "short hair",
        },
        "mouth": {"bigSmile|smile|smirk": "smile", "frown": "frown", "surprise": "open mouth"},
    },
    "micah": {
        "glasses": {"round": "round glasses", ".": "glasses"},
        "facialHair": {"beard": "beard", ".": UNCLEAR},
        "hair": {
            "turban": "turban", "mrClean": "bald", "doug": "bald", "mrT": "mohawk",
            "full": "long hair", ".": "short hair",
        },
        "mouth": {"laughing|smile|smirk": "smile", "frown|sad": "frown",
                  "surprised": "open mouth", "nervous": "bared teeth"},
    },
    "open-peeps": {
        "accessories": {"eyepatch": "eyepatch", "sun": "sunglasses", ".": "glasses"},
        "facialHair": {"goatee": "goatee", "full3": "long beard", "full": "beard",
                       "chin": "beard", ".": "moustache"},
        "head": {
            "hatBeanie": "beanie", "hatHip": "hat", "hijab": "hijab", "turban": "turban",
            "noHair3": "balding", "noHair": "bald", "bear": UNCLEAR, "afro|longAfro": "afro",
            "bun|grayBun": "bun", "dreads": "dreadlocks", "cornrows": "braids",
            "mohawk": "mohawk", "longCurly": "curly hair", "long|medium": "long hair",
            "bangs": "bob", ".": "short hair",
        },
    },
    "lorelei": {
        "glasses": {".*01": "round glasses", ".*02": "sunglasses", ".": "glasses"},
        "beard": {".": "long beard"},
        "mouth": {"happy": "smile", "sad": "frown"},
    },
}  # fmt: skip
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

# Names of colours, each with the hex values that stand for it.
COLOURS = {
    "black": ("#231c1c", "#101010"), "brown": ("#6b4028", "#4a312c", "#8a5c38", "#3a2418"),
    "auburn": ("#a55728", "#99501f"), "blonde": ("#e0b860", "#d6b370", "#c9a552", "#f3dc7e"),
    "white": ("#f3efe8", "#ffffff"), "grey": ("#979797", "#6f7377", "#b4b4b4"),
    "red": ("#c8281e", "#e03c3c", "#b01818"), "orange": ("#f28322", "#e06c10", "#f7a14a"),
    "pink": ("#f46fae", "#f7a3c4", "#ff488e"), "purple": ("#8547c4", "#a97be0", "#592454"),
    "blue": ("#3f74d8", "#65b0f0", "#203f88"), "green": ("#3fa84c", "#7cc95a", "#238d70"),
}  # fmt: skip
Wish = Literal["glasses", "beard", "hat"]
KINDS_OF_WISH: dict[Wish, tuple[str, ...]] = {
    "glasses": ("glasses",),
    "beard": ("beard", "moustache"),
    "hat": ("hat",),
}


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


def word_of(style: str, component: str, variant: str) -> str:
    """Return what a variant shows, in the words of WORDS; "" if it shows nothing of these."""
    for pattern, word in RULES[style].get(component, {}).items():
        if re.match(pattern, variant):
            return word
    return ""


@cache
def lab(colour: str) -> tuple[float, float, float]:
    """Return lightness and two opponent colours of a hex colour (CIELAB, D65)."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / np.array([0.9505, 1.0, 1.089]), 1e-4))
    return float(116 * y - 16), float(500 * (x - y)), float(200 * (y - z))


def colour_name(colour: str) -> str:
    """Return the name in COLOURS nearest to a hex colour."""
    found = lab(colour[:7].lower())
    distances = {
        name: min(sum((a - b) ** 2 for a, b in zip(found, lab(value), strict=True)) for value in v)
        for name, v in COLOURS.items()
    }
    return min(distances, key=distances.__getitem__)


def shown(style: str, drawn: Options) -> Shown:
    """Return what an avatar shows, from the options it was drawn from."""
    words: dict[str, str] = {}
    for component in RULES[style]:
        variant = drawn.get(f"{component}Variant")
        word = word_of(style, component, variant) if variant else ""
        if word in KIND_OF:
            words.setdefault(KIND_OF[word], word)
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
    return any(
        KIND_OF.get(word) == wish for rules in RULES[style].values() for word in rules.values()
    )


def constrain(style: str, wishes: dict[Wish, bool]) -> Options:
    """Return options that force things on or off; what is not wished for stays to the seed.

    Raises:
        ValueError: the style has no variant of what is to be on.
    """
    for wish, there in wishes.items():
        if there and not can_show(style, wish):
            raise ValueError(f"{style} draws no {wish}: leave it out, or take another style")
    options: Options = dict(QUIET.get(style, {}))
    components = definition(style)["components"]
    for component in RULES[style]:
        if component not in components:
            continue
        words = {v: word_of(style, component, v) for v in components[component]["variants"]}
        allowed = [v for v, word in words.items() if word != UNCLEAR]
        for wish, there in wishes.items():
            kinds = KINDS_OF_WISH[wish]
            if there and any(KIND_OF.get(words[v]) == wish for v in allowed):
                allowed = [v for v in allowed if KIND_OF.get(words[v]) == wish]
                options[f"{component}Probability"] = 100
            elif not there:
                left = [v for v in allowed if KIND_OF.get(words[v]) not in kinds]
                if not left:
                    options[f"{component}Probability"] = 0
                allowed = left or allowed
        options[f"{component}Variant"] = allowed
    return options


def wishes_of(style: str, rng: np.random.Generator) -> dict[Wish, bool]:
    """Draw whether glasses, beard and hat are on or off, as often as training needs them."""
    chances: dict[Wish, float] = {"glasses": 0.4, "beard": 0.35, "hat": 0.3}
    wishes = {w: bool(rng.uniform() < p) for w, p in chances.items() if can_show(style, w)}
    if wishes.get("beard") is False and rng.uniform() < 0.4:
        del wishes["beard"]  # moustaches come with the seed
    return wishes


def colour_near(name: str, rng: np.random.Generator) -> str:
    """Draw a hex colour that has a name."""
    while True:
        value = str(rng.choice(COLOURS[name]))
        rgb = np.array([int(value[i : i + 2], 16) for i in (1, 3, 5)])
        jittered = np.clip(rgb + rng.integers(-14, 15, 3), 0, 255)
        colour = "#" + "".join(f"{channel:02x}" for channel in jittered)
        if colour_name(colour) == name:
            return colour


def sample(
    style: str, seed: int, index: int, wishes: dict[Wish, bool] | None = None, hair: str = ""
) -> Options:
    """Draw options of one avatar; any two (seed, index) differ.

    Args:
        wishes: what must be there, or must not; None: drawn as training needs it.
        hair: name of the hair's colour; "": drawn.
    """
    rng = np.random.default_rng([seed, index])
    drawn_wishes = wishes_of(style, rng)
    options = constrain(style, drawn_wishes if wishes is None else wishes)
    natural = not hair and rng.uniform() < 0.3
    colour = colour_near(hair or str(rng.choice(list(COLOURS))), rng)
    option = HAIR_OPTION.get(style, "hairColor")
    if option is not None and not natural:
        options[option] = [colour]
        if "facialHair" in definition(style).get("colors", {}):
            options["facialHairColor"] = [colour]
    if "hat" in definition(style).get("colors", {}):
        options["hatColor"] = [colour_near(str(rng.choice(list(COLOURS))), rng)]
    # One colour, or two that run into each other.
    ends = rng.integers(60, 256, (2, 3))
    background = ["#" + "".join(f"{int(c):02x}" for c in end) for end in ends]
    fill = "linear" if rng.uniform() < 0.3 else "solid"
    return options | {
        "seed": f"{seed}-{index}",
        "backgroundColor": background if fill == "linear" else background[:1],
        "backgroundColorFill": fill,
    }
