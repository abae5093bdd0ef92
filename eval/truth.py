"""What targets show: known faces and avatars of any style, as the attribute reader would read them.

Knows what avatars are drawn from, and which of it the bundled generator can draw: the face of a
source with the essence of a target.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.illustrated.codes import (
    ATTRIBUTES,
    HAIR_COLOURS,
    HAT_COLOURS,
    NONE,
    STYLE,
    one_hot,
    visible,
)
from data.illustrated.shown import Shown, kinds, word_of
from eval.reader import NAMES, OUTPUTS, PRESENT, SPANS, with_presence

Content = tuple[int, ...] | Shown
"""Index of a value for each attribute, of faces in the generator's style; else words."""
HAT_NAMES = {"blonde": "yellow", "brown": "black", "auburn": "red", "orange": "yellow"}


@dataclass(frozen=True)
class Truth:
    """What targets show."""

    contents: tuple[Content, ...]
    readings: Float[Tensor, "targets outputs"]
    """As the attribute reader would read them: ones and zeros."""
    seen: Bool[Tensor, "targets outputs"]
    """Which readings count: the picture shows them, and the reader has a value for them."""

    def part(self, span: slice) -> "Truth":
        """Return the truth of some of the targets."""
        return Truth(self.contents[span], self.readings[span], self.seen[span])


def truth_of(contents: Sequence[Content]) -> Truth:
    """Return what targets show.

    Of faces in the generator's style every attribute counts that the picture shows; of other
    avatars whether glasses, beard and hat are there, and the colour of hair. Whether there is a
    beard does not count where there is a moustache alone.
    """
    readings = torch.zeros(len(contents), OUTPUTS)
    seen = torch.zeros(len(contents), OUTPUTS, dtype=torch.bool)
    for row, content in enumerate(contents):
        if isinstance(content, Shown):
            for kind in PRESENT:
                there = bool(getattr(content, kind))
                readings[row, SPANS[kind].start + there] = 1
                seen[row, SPANS[kind]] = there or kind != "beard" or not content.moustache
            if content.hair_colour:
                place = list(HAIR_COLOURS).index(content.hair_colour)
                readings[row, SPANS["hairColor"].start + place] = 1
                seen[row, SPANS["hairColor"]] = True
        else:
            indices = torch.tensor([content])
            readings[row] = with_presence(one_hot(indices))[0]
            for name, shows in zip(NAMES, visible(indices)[0], strict=True):
                seen[row, SPANS[name]] = shows
    return Truth(tuple(contents), readings, seen)


# The right answer


def value_for(attribute: str, own: str, word: str) -> str:
    """Return the value of an attribute that shows a word: the own one if it does, else the first.

    Where the style has no such value: the own one, if it is of the same kind, else the first of
    that kind, and short hair for hair.
    """
    if word in ("", "bald"):
        return NONE
    values = next(a.values for a in ATTRIBUTES if a.name == attribute)
    words = {value: word_of(STYLE, attribute, value) for value in values if value != NONE}
    same = [value for value, said in words.items() if said == word]
    kind = kinds()[word]
    alike = same or [value for value, said in words.items() if kinds().get(said) == kind]
    if own in alike:
        return own
    return alike[0] if same or kind != "hair" else value_for(attribute, own, "short hair")


def with_essence(face: Sequence[int], content: Content) -> tuple[int, ...]:
    """Return a face with its own identity and the essence of a target.

    As near as the bundled generator can draw it: what its style has no value for stays as it was,
    or becomes the nearest of its kind.
    """
    if not isinstance(content, Shown):
        pairs = zip(ATTRIBUTES, face, content, strict=True)
        return tuple(theirs if a.essence else own for a, own, theirs in pairs)
    own = {a.name: a.values[i] for a, i in zip(ATTRIBUTES, face, strict=True)}
    wanted = dict(own)
    wanted["accessories"] = value_for("accessories", own["accessories"], content.glasses)
    facial = content.beard or content.moustache
    wanted["facialHair"] = value_for("facialHair", own["facialHair"], facial)
    if content.hat or content.hair:
        wanted["top"] = value_for("top", own["top"], content.hat or content.hair)
    elif kinds().get(word_of(STYLE, "top", own["top"])) == "hat":
        wanted["top"] = value_for("top", own["top"], "short hair")
    if content.mouth:
        wanted["mouth"] = value_for("mouth", own["mouth"], content.mouth)
    if content.hair_colour:
        wanted["hairColor"] = HAIR_COLOURS[content.hair_colour]
    if content.hat_colour:
        name = HAT_NAMES.get(content.hat_colour, content.hat_colour)
        wanted["hatColor"] = HAT_COLOURS[name]
    return tuple(a.values.index(wanted[a.name]) for a in ATTRIBUTES)
