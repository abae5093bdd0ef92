"""Captions that name what an avatar shows and never who it is; wording and order vary."""

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
        lists = tables()["colour_words"].get(colour, (colour,)), tables()["phrases"][word]
        spoken, phrase = (words[0] if first else self.choose(words) for words in lists)
        phrase = phrase.format(c=f"{spoken} " if spoken else "")
        return re.sub(r"\ba (?=afro|auburn|orange)", "an ", phrase)


def present_phrases(shown: Shown, speaker: Speaker, complete: bool) -> list[str]:
    """Return a phrase for each thing an avatar shows; colours are left out now and then."""
    top, colour = shown.hair, shown.hair_colour
    if shown.hat:
        top = shown.hat
        colour = tables()["hat_colour_words"].get(shown.hat_colour, shown.hat_colour)
    phrases = []
    if top or colour:
        named = complete or speaker.chance(0.85)
        phrases.append(speaker.say(top, colour if named else "", complete))
    rest = (shown.glasses, shown.beard, shown.moustache, shown.mouth, shown.extra)
    return phrases + [speaker.say(word, first=complete) for word in rest if word]


def caption(shown: Shown, rng: np.random.Generator, complete: bool = False) -> str:
    """Return one caption, with everything that is there in the most telling words if `complete`."""
    speaker = Speaker(rng)
    phrases = present_phrases(shown, speaker, complete)
    if not complete:
        keep = rng.uniform(0.4, 1.2)
        phrases = [p for p in phrases if speaker.chance(keep)] or phrases[:1]
        there = {**vars(shown), "beard": shown.beard or shown.moustache}
        missing = [speaker.choose(ways) for k, ways in tables()["absent"].items() if not there[k]]
        phrases += [p for p in missing if speaker.chance(0.3)]
    rng.shuffle(phrases)
    if not phrases:
        return "a face"
    listed = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
    whole = listed if speaker.chance(0.2) else f"{speaker.choose(tables()['openings'])} {listed}"
    return whole.replace("with without", "without")
