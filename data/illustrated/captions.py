"""Avatars in words: captions that name essence and never identity.

Knows the phrases for what an avatar shows (`data.illustrated.shown`). Wording, order and
completeness vary, as captions people write do.
"""

import numpy as np

from data.illustrated.shown import Shown

OPENINGS = (
    "a face with", "a person with", "a portrait of someone with", "an avatar with",
    "a drawing of a person with", "a cartoon face with", "someone with", "a picture of a face with",
)  # fmt: skip
# {c} is a colour followed by a space, or nothing.
PHRASES = {
    "glasses": ("glasses", "spectacles", "eyeglasses", "glasses"),
    "round glasses": ("round glasses", "glasses", "round spectacles"),
    "sunglasses": ("sunglasses", "dark glasses", "shades", "black glasses"),
    "beard": ("a {c}beard", "a full {c}beard", "a {c}beard"),
    "long beard": ("a long {c}beard", "a big {c}beard", "a {c}beard"),
    "goatee": ("a {c}goatee", "a {c}chin beard", "a {c}beard"),
    "moustache": ("a {c}moustache", "a {c}mustache"),
    "hat": ("a {c}hat",),
    "cap": ("a {c}cap", "a {c}hat"),
    "beanie": ("a {c}beanie", "a {c}woolly hat", "a {c}winter hat", "a {c}hat"),
    "turban": ("a {c}turban", "a {c}turban", "a {c}hat"),
    "hijab": ("a {c}hijab", "a {c}headscarf"),
    "bald": ("a bald head", "no hair", "a shaved head"),
    "balding": ("balding {c}hair", "thin {c}hair", "a bald head with {c}hair on the sides"),
    "short hair": ("short {c}hair", "{c}hair"),
    "long hair": ("long {c}hair", "{c}hair"),
    "curly hair": ("curly {c}hair", "{c}curls"),
    "wavy hair": ("wavy {c}hair", "{c}waves"),
    "spiky hair": ("spiky {c}hair", "wild {c}hair"),
    "afro": ("a {c}afro", "a big {c}afro", "big curly {c}hair"),
    "bun": ("a {c}bun", "{c}hair in a bun", "{c}hair tied up"),
    "bob": ("a {c}bob", "a {c}bob cut", "{c}hair"),
    "dreadlocks": ("{c}dreadlocks", "{c}dreads"),
    "braids": ("{c}braids", "braided {c}hair"),
    "ponytail": ("a {c}ponytail", "{c}hair in a ponytail"),
    "pigtails": ("{c}pigtails", "{c}hair in two tails"),
    "mohawk": ("a {c}mohawk", "a {c}mohawk haircut"),
    "quiff": ("a {c}quiff", "{c}hair combed up"),
    "flowers": ("flowers in {c}hair", "{c}hair and a crown of flowers"),
    "": ("{c}hair",),
    "smile": ("a smile", "a smiling mouth", "a happy mouth"),
    "open mouth": ("an open mouth", "a mouth wide open"),
    "frown": ("a frown", "a sad mouth"),
    "serious mouth": ("a serious mouth", "a straight mouth"),
    "tongue": ("a tongue sticking out", "the tongue out"),
    "bared teeth": ("bared teeth", "a toothy grimace"),
    "eyepatch": ("an eyepatch", "an eye patch"),
    "freckles": ("freckles",),
    "rosy cheeks": ("rosy cheeks", "blush"),
    "cat ears": ("cat ears",),
    "clown nose": ("a red clown nose",),
    "face mask": ("a face mask", "a white mask"),
    "tiara": ("a golden tiara", "a golden headband"),
    "sleep mask": ("a sleep mask",),
}  # fmt: skip
COLOUR_WORDS = {
    "auburn": ("auburn", "reddish brown"), "blonde": ("blonde", "blond", "yellow"),
    "grey": ("grey", "gray"), "red": ("red",), "white": ("white",),
}  # fmt: skip
HAT_WORDS = {"blonde": "yellow", "auburn": "brown"}
ABSENT = {
    "glasses": ("no glasses", "without glasses"),
    "hat": ("no hat", "a bare head"),
    "beard": ("no beard", "a shaven chin"),
}


class Speaker:
    """Chooses words with one generator of random numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def choose(self, words: tuple[str, ...]) -> str:
        """Draw one of several ways to say the same."""
        return words[int(self.rng.integers(len(words)))]

    def chance(self, part: float) -> bool:
        """Draw whether something of this probability happens."""
        return bool(self.rng.uniform() < part)

    def say(self, word: str, colour: str = "", first: bool = False) -> str:
        """Return a phrase for a word of `shown`; the most telling one if `first`."""
        named = COLOUR_WORDS.get(colour, (colour,))
        spoken = named[0] if first else self.choose(named)
        phrase = PHRASES[word][0] if first else self.choose(PHRASES[word])
        phrase = phrase.format(c=f"{spoken} " if spoken else "")
        return (
            phrase.replace("a afro", "an afro")
            .replace("a auburn", "an auburn")
            .replace("a orange", "an orange")
        )


def present_phrases(shown: Shown, speaker: Speaker, complete: bool) -> list[str]:
    """Return a phrase for each thing an avatar shows; colours are left out now and then."""

    def colour(name: str) -> str:
        return name if complete or speaker.chance(0.85) else ""

    phrases = []
    if shown.hat:
        worn = HAT_WORDS.get(shown.hat_colour, shown.hat_colour)
        phrases.append(speaker.say(shown.hat, colour(worn), complete))
    elif shown.hair or shown.hair_colour:
        phrases.append(speaker.say(shown.hair, colour(shown.hair_colour), complete))
    for word in (shown.glasses, shown.beard, shown.moustache, shown.mouth, shown.extra):
        if word:
            phrases.append(speaker.say(word, first=complete))
    return phrases


def absent_phrases(shown: Shown, speaker: Speaker) -> list[str]:
    """Return phrases that say what is not there; people write one now and then."""
    phrases = []
    for kind, words in ABSENT.items():
        there = getattr(shown, kind) or (kind == "beard" and shown.moustache)
        if not there:
            phrases.append(speaker.choose(words))
    return phrases


def caption(shown: Shown, rng: np.random.Generator, complete: bool = False) -> str:
    """Return one caption of an avatar.

    Args:
        rng: chooses wording, order and, unless `complete`, which things are left out.
        complete: name everything that is there, in the most telling words.
    """
    speaker = Speaker(rng)
    phrases = present_phrases(shown, speaker, complete)
    if not complete:
        keep = rng.uniform(0.4, 1.2)
        phrases = [p for p in phrases if speaker.chance(keep)] or phrases[:1]
        phrases += [p for p in absent_phrases(shown, speaker) if speaker.chance(0.3)]
    rng.shuffle(phrases)
    if not phrases:
        return "a face"
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    return listed if speaker.chance(0.2) else f"{speaker.choose(OPENINGS)} {listed}"
