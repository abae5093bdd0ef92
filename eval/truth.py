"""What targets show: known faces and avatars of any style, as the attribute reader would read them.

Knows what avatars are drawn from, and which of it the bundled generator can draw: the face of a
source with the essence of a target. Knows the files that say what pictures show, and how to tell
whether a picture is in the generator's style.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from data.illustrated.codes import (
    ATTRIBUTES,
    HAIR_COLOURS,
    HAT_COLOURS,
    NONE,
    SIZE,
    STYLE,
    draw_face,
    one_hot,
    visible,
)
from data.illustrated.shown import Shown, colours, kinds, word_of
from eval.reader import NAMES, OUTPUTS, PRESENT, SPANS, AvatarReader, with_presence
from targetclip.command import did_you_mean
from targetclip.media.images import picture_to_tensor

Content = tuple[int, ...] | Shown
"""Index of a value for each attribute, of faces in the generator's style; else words."""
HAT_NAMES = {"blonde": "yellow", "brown": "black", "auburn": "red", "orange": "yellow"}
FILES = ("truth.json", "truth.csv")
SAID = tuple(field.name for field in fields(Shown))
NEEDED = ("glasses", "beard", "hat", "hair_colour")
OTHER_COLUMNS = ("file", "style", "held_out")
# Drawn again from its reading, a face of the bundled generator differs by 0.04 of the range of
# values at most, and its drawing by nothing; of 15 styles with other parts and colours none by less
# than 0.1 (30 of the generator's and 90 avatars, seed 5).
SAME = 0.06


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


# Files


def row_shown(place: str, row: Mapping[str, Any]) -> Shown:
    """Return what a row of a file says that a picture shows.
    ValueError: an attribute is missing or unknown, or has a value that is none of its words."""
    if missing := [name for name in NEEDED if row.get(name) is None]:
        raise ValueError(
            f"{place}: expected {', '.join(NEEDED)}, found no {missing[0]}; what is not there is "
            "an empty text"
        )
    if unknown := [name for name in row if name not in (*SAID, *OTHER_COLUMNS)]:
        hint = did_you_mean(str(unknown[0]), SAID)
        raise ValueError(f"{place}: unknown attribute {unknown[0]!r}{hint}")
    said = {name: row[name] for name in SAID if name in row}
    for name, word in said.items():
        words = [known for known, kind in kinds().items() if kind == name]
        if name.endswith("_colour"):
            words = list(colours())
        if word != "" and word not in words:
            hint = did_you_mean(str(word), words)
            raise ValueError(
                f"{place}: {name}: expected an empty text or one of {', '.join(words)}, found "
                f"{word!r}{hint}"
            )
    return Shown(**said)


def read_truth(folder: Path) -> tuple[dict[str, Shown], frozenset[str]]:
    """Return what a folder's truth.json or truth.csv says that its pictures show, by file name; and
    the names of those that it marks as held out.

    truth.json: {"joker.png": {"glasses": "", "beard": "goatee", ...}}; truth.csv: a column `file`
    and one for each attribute. Empty where there is neither file.

    ValueError: both are there, or one that is not such a file. OSError: it cannot be read.
    """
    paths = [path for name in FILES if (path := folder / name).is_file()]
    if not paths:
        return {}, frozenset()
    if len(paths) > 1:
        raise ValueError(f"{folder}: expected {' or '.join(FILES)}, found both: remove one")
    [path] = paths
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text("utf-8-sig"))
        else:
            with path.open(encoding="utf-8-sig", newline="") as lines:
                rows = {row.get("file"): row for row in csv.DictReader(lines)}
    except (ValueError, csv.Error) as error:  # of JSON and of Unicode, too
        raise ValueError(f"{path}: not a table of what pictures show: {error}") from error
    if not isinstance(rows, dict) or not all(n and isinstance(r, dict) for n, r in rows.items()):
        raise ValueError(f"{path}: expected the attributes of each picture, by its file name")
    held_out = (name for name, row in rows.items() if str(row.get("held_out")).lower() == "true")
    return {n: row_shown(f"{path}: {n}", row) for n, row in rows.items()}, frozenset(held_out)


def face_of(reader: AvatarReader, picture: Image.Image) -> tuple[int, ...] | None:
    """Read a face in the generator's style; None for another picture, which is not to be trusted.

    A reading is right if the face that it stands for, drawn, is the picture (SAME).

    ValueError: the extra that draws avatars is missing.
    """
    image = picture_to_tensor(picture, SIZE)
    with torch.no_grad():
        values = reader.values(image.to(next(reader.parameters()).device))[0].tolist()
    drawn = picture_to_tensor(Image.fromarray(draw_face(values)[0]), SIZE)
    return tuple(values) if (image - drawn).abs().mean() / 2 <= SAME else None


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
    top = content.hat or content.hair
    if not top and kinds().get(word_of(STYLE, "top", own["top"])) == "hat":
        top = "short hair"
    words = {"accessories": content.glasses, "facialHair": content.beard or content.moustache}
    words |= {name: word for name, word in {"top": top, "mouth": content.mouth}.items() if word}
    wanted = own | {name: value_for(name, own[name], word) for name, word in words.items()}
    if content.hair_colour:
        wanted["hairColor"] = HAIR_COLOURS[content.hair_colour]
    if content.hat_colour:
        name = HAT_NAMES.get(content.hat_colour, content.hat_colour)
        wanted["hatColor"] = HAT_COLOURS[name]
    return tuple(a.values.index(wanted[a.name]) for a in ATTRIBUTES)
