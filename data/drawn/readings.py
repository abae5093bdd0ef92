"""What can be seen of a face: parameters as they show in a picture.

Knows where the drawing saturates, which parameters show as colours, and what hides what. A network
can be asked for these readings; the parameters themselves cannot all be seen.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from data.drawn.sketch import (
    BACKGROUNDS,
    CLOTHES,
    ESSENCE,
    EYE_COLOURS,
    FADE,
    GLASSES_COLOURS,
    HAIR_COLOURS,
    HAT_COLOURS,
    NAMES,
    SKIN_TONES,
    THRESHOLDS,
    Face,
    along,
    amount,
    smoothstep,
    stepped,
)

# Parameters that show as a colour are read as red, green and blue in [0, 1].
STEPPED = {
    "hair_colour": list(HAIR_COLOURS.values()),
    "hat_colour": list(HAT_COLOURS.values()),
    "glasses_colour": list(GLASSES_COLOURS.values()),
}
EVEN = {
    "skin": SKIN_TONES,
    "eye_colour": EYE_COLOURS,
    "background": BACKGROUNDS,
    "clothes": CLOTHES,
}
# Parameters whose middle alone shows: the drawing saturates outside of these bounds.
SATURATING = {
    "smile": (0.15, 0.85),
    "mouth_open": (0.55, 0.8),
    "fringe": (0.35, 0.75),
    "glasses_shape": (0.35, 0.65),
    "hat_shape": (0.35, 0.65),
}


@dataclass(frozen=True)
class Reading:
    """One attribute as it shows: where it stands among the reader's outputs."""

    name: str
    start: int
    size: int
    """1, or 3 for a colour."""
    essence: bool

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)


def list_readings() -> tuple[Reading, ...]:
    """A reading for each parameter of a face, in order."""
    readings, start = [], 0
    for name in NAMES:
        size = 3 if name in STEPPED or name in EVEN else 1
        readings.append(Reading(name, start, size, name in ESSENCE))
        start += size
    return tuple(readings)


READINGS = list_readings()
OUTPUTS = READINGS[-1].start + READINGS[-1].size


def shown(face: Face, name: str) -> list[float]:
    """One attribute as it shows, each value in [0, 1]."""
    value = getattr(face, name)
    if name in STEPPED:
        return [channel / 255 for channel in stepped(STEPPED[name], value)]
    if name in EVEN:
        return [channel / 255 for channel in along(EVEN[name], value)]
    if name in SATURATING:
        return [smoothstep(value, *SATURATING[name])]
    if name == "beard":
        # Presence is the first half of the scale, growth the second.
        return [0.5 * amount(face, name) + 0.5 * smoothstep(value, THRESHOLDS["beard"], 1.0)]
    if name in THRESHOLDS:
        return [amount(face, name)]
    return [value]


def visible(face: Face, name: str) -> bool:
    """Whether an attribute can be seen at all: a hat hides the fringe, shades hide the eyes."""

    def worn(item: str) -> bool:
        return bool(getattr(face, item) > THRESHOLDS[item] + FADE)

    def not_worn(item: str) -> bool:
        return bool(getattr(face, item) < THRESHOLDS[item] - FADE)

    if name in ("hat_shape", "hat_colour"):
        return worn("hat")
    if name in ("glasses_shape", "glasses_colour", "lens"):
        return worn("glasses")
    if name in ("fringe", "hair_volume"):
        return not_worn("hat")
    if name in ("eye_colour", "eye_size"):
        return not_worn("glasses") or not_worn("lens")
    if name in ("brow_tilt", "brow_thickness"):
        return not_worn("hat") and (not_worn("glasses") or not_worn("lens")) and face.fringe < 0.6
    if name == "skin":
        return not_worn("face_paint")
    if name in ("jaw", "face_length"):
        return not_worn("beard")
    return True


def readings_of(
    face: Face,
) -> tuple[Float[ndarray, " outputs"], Bool[ndarray, " outputs"]]:
    """The true readings of a face, and which of them its picture shows."""
    values = [value for reading in READINGS for value in shown(face, reading.name)]
    seen = [visible(face, reading.name) for reading in READINGS for _ in range(reading.size)]
    return np.array(values), np.array(seen)


def truth_of(
    parameters: Float[ndarray, "batch parameters"],
) -> tuple[Float[ndarray, "batch outputs"], Bool[ndarray, "batch outputs"]]:
    """True readings of faces given as parameters, and which of them show."""
    pairs = [readings_of(Face(*row)) for row in parameters.tolist()]
    values, seen = (np.stack(column) for column in zip(*pairs, strict=True))
    return values.astype(np.float32), seen
