"""Avatars in words: captions that name essence and never identity.

Knows the phrases for what an avatar shows (`data.illustrated.shown`). Wording, order and
completeness vary, as captions people write do.
"""

import re
from collections.abc import Sequence

import numpy as np

from data.illustrated.shown import Shown, tables


class Speaker:
    """Chooses words with one generator of random numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def choose(self, words: Sequence[str]) -> str:
        """Draw one of several ways to say the same."""
        return words[int(self.rng.integers(len(words)))]

    def chance(self, part: float) -> bool:
        """Draw whether something of this probability happens."""
        return bool(self.rng.uniform() < part)

    def say(self, word: str, colour: str = "", first: bool = False) -> str:
        """Return a phrase for a word of `shown`; the most telling one if `first`."""
        named = tables()["colour_words"].get(colour, (colour,))
        spoken = named[0] if first else self.choose(named)
        ways: list[str] = tables()["phrases"][word]
        phrase = ways[0] if first else self.choose(ways)
        phrase = phrase.format(c=f"{spoken} " if spoken else "")
        return re.sub(r"\ba (?=afro|auburn|orange)", "an ", phrase)


def present_phrases(shown: Shown, speaker: Speaker, complete: bool) -> list[str]:
    """Return a phrase for each thing an avatar shows; colours are left out now and then."""

    def colour(name: str) -> str:
        return name if complete or speaker.chance(0.85) else ""

    phrases = []
    if shown.hat:
        worn = tables()["hat_colour_words"].get(shown.hat_colour, shown.hat_colour)
        phrases.append(speaker.say(shown.hat, colour(worn), complete))
    elif shown.hair or shown.hair_colour:
        phrases.append(speaker.say(shown.hair, colour(shown.hair_colour), complete))
    for word in (shown.glasses, shown.beard, shown.moustache, shown.mouth, shown.extra):
        if word:
            phrases.append(speaker.say(word, first=complete))
    return phrases


def absent_phrases(shown: Shown, speaker: Speaker) -> list[str]:
    """Return phrases that say what is not there; people write one now and then."""
    there = {**vars(shown), "beard": shown.beard or shown.moustache}
    return [speaker.choose(words) for kind, words in tables()["absent"].items() if not there[kind]]


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
    whole = listed if speaker.chance(0.2) else f"{speaker.choose(tables()['openings'])} {listed}"
    return whole.replace("with without", "without")
