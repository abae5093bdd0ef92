"""The faces of the bundled world: 31 numbers in [0, 1] to a 64 px picture.

Knows how a face is drawn and which of its attributes are essence (a caption names them) and which
are identity (no caption ever does). Knows nothing of networks. `captions.py` puts faces in words.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # pixels of a finished picture
SCALE = 4  # drawn this much larger, then averaged: smooth edges

Colour = tuple[float, float, float]
Point = tuple[float, float]

HAIR_COLOURS: dict[str, Colour] = {
    "black": (34, 30, 36),
    "brown": (104, 66, 40),
    "ginger": (208, 98, 34),
    "blonde": (240, 204, 104),
    "white": (240, 240, 240),
    "pink": (246, 134, 186),
    "purple": (142, 72, 182),
    "blue": (48, 92, 214),
    "green": (46, 170, 84),
}
HAT_COLOURS: dict[str, Colour] = {
    "black": (40, 40, 46),
    "red": (206, 44, 48),
    "yellow": (246, 200, 52),
    "green": (52, 146, 76),
    "blue": (44, 84, 190),
}
GLASSES_COLOURS: dict[str, Colour] = {
    "black": (24, 24, 28),
    "red": (208, 36, 44),
    "gold": (226, 176, 52),
}
SKIN_TONES: Sequence[Colour] = (
    (255, 226, 204),
    (240, 196, 160),
    (206, 152, 110),
    (150, 100, 68),
    (98, 64, 46),
)
EYE_COLOURS: Sequence[Colour] = ((84, 52, 30), (78, 128, 74), (70, 132, 204))
BACKGROUNDS: Sequence[Colour] = (
    (166, 206, 236),
    (176, 224, 196),
    (246, 232, 190),
    (246, 204, 176),
    (206, 190, 232),
)
CLOTHES: Sequence[Colour] = (
    (36, 52, 104),
    (32, 112, 116),
    (116, 124, 52),
    (172, 84, 48),
    (122, 48, 100),
)
TINTS: dict[str, Colour] = {"blue": (86, 140, 226), "green": (104, 190, 96)}


def coarse(essence: bool) -> Any:
    """A parameter that the generator's 4 and 8 px layers own."""
    return field(metadata={"layers": "coarse", "essence": essence})


def middle(essence: bool) -> Any:
    """A parameter that the generator's 16 px layers own."""
    return field(metadata={"layers": "middle", "essence": essence})


def fine(essence: bool) -> Any:
    """A parameter that the generator's 32 and 64 px layers own."""
    return field(metadata={"layers": "fine", "essence": essence})


@dataclass(frozen=True)
class Face:
    """Everything a generator's face is made of; each value is uniform in [0, 1].

    Amounts fade in: below `absent` an attribute is not there, above `present` it is wholly there.
    """

    turn: float = coarse(essence=False)
    face_width: float = coarse(essence=False)
    face_length: float = coarse(essence=False)
    jaw: float = coarse(essence=False)
    hair_length: float = coarse(essence=True)
    hair_volume: float = coarse(essence=True)
    fringe: float = coarse(essence=True)
    hat: float = coarse(essence=True)
    hat_shape: float = coarse(essence=True)
    beard: float = coarse(essence=True)
    eye_size: float = middle(essence=False)
    eye_spacing: float = middle(essence=False)
    brow_tilt: float = middle(essence=False)
    brow_thickness: float = middle(essence=False)
    nose: float = middle(essence=False)
    glasses: float = middle(essence=True)
    glasses_shape: float = middle(essence=True)
    lens: float = middle(essence=True)
    moustache: float = middle(essence=True)
    smile: float = middle(essence=True)
    mouth_open: float = middle(essence=True)
    skin: float = fine(essence=False)
    eye_colour: float = fine(essence=False)
    background: float = fine(essence=False)
    clothes: float = fine(essence=False)
    hair_colour: float = fine(essence=True)
    hat_colour: float = fine(essence=True)
    glasses_colour: float = fine(essence=True)
    lipstick: float = fine(essence=True)
    blush: float = fine(essence=True)
    face_paint: float = fine(essence=True)

    def values(self) -> Float[ndarray, " parameters"]:
        """The parameters as one array, in the order of NAMES."""
        return np.array([getattr(self, name) for name in NAMES])


NAMES: tuple[str, ...] = tuple(f.name for f in fields(Face))
ESSENCE: tuple[str, ...] = tuple(f.name for f in fields(Face) if f.metadata["essence"])
IDENTITY: tuple[str, ...] = tuple(f.name for f in fields(Face) if not f.metadata["essence"])
LAYERS: dict[str, str] = {f.name: f.metadata["layers"] for f in fields(Face)}

# How common each attribute is: its amount must pass this value of the uniform parameter.
THRESHOLDS: dict[str, float] = {
    "hat": 0.68,
    "beard": 0.66,
    "glasses": 0.6,
    "moustache": 0.72,
    "lens": 0.6,
    "lipstick": 0.7,
    "blush": 0.7,
    "face_paint": 0.76,
}
FADE = 0.035  # half the width of the band in which an attribute fades in


@dataclass(frozen=True)
class Extras:
    """What the bundled generator never draws: for targets out of its range."""

    tint: str | None = None  # a key of TINTS: blue or green skin
    cat_ears: bool = False
    clown_nose: bool = False
    mask: bool = False
    crown: bool = False
    tattoo: bool = False


@dataclass(frozen=True)
class Style:
    """How a picture is drawn, apart from who is on it."""

    outline: bool = False
    grey: bool = False
    backdrop: int | None = None  # seed of a textured background, None: plain
    blur: float = 0.0  # pixels
    colour_shift: tuple[float, float, float] = (1.0, 1.0, 1.0)  # factor of each channel
    brightness: float = 0.0  # added, of 255


def smoothstep(x: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    t = min(max((x - low) / (high - low), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def amount(face: Face, name: str) -> float:
    """How much of an attribute that fades in is there: 0 absent, 1 wholly there."""
    threshold = THRESHOLDS[name]
    return smoothstep(getattr(face, name), threshold - FADE, threshold + FADE)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """From `a` (t = 0) to `b` (t = 1)."""
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def along(colours: Sequence[Colour], u: float) -> Colour:
    """Colour at `u` of an even, linear palette."""
    x = u * (len(colours) - 1)
    i = min(int(x), len(colours) - 2)
    return mix(colours[i], colours[i + 1], x - i)


def stepped(colours: Sequence[Colour], u: float) -> Colour:
    """Colour at `u` of a palette with a plateau for each colour and short smooth passages.

    Plateaus keep most colours nameable; passages keep the picture continuous in `u`.
    """
    x = u * len(colours) - 0.5
    i = min(max(math.floor(x), 0), len(colours) - 2)
    return mix(colours[i], colours[i + 1], smoothstep(x - i, 0.36, 0.64))


def stepped_name(palette: dict[str, Colour], u: float) -> str:
    """Name of the colour that `stepped` is nearest to at `u`."""
    return list(palette)[min(int(u * len(palette)), len(palette) - 1)]


def between(low: float, high: float, u: float) -> float:
    """Linear from `low` (u = 0) to `high` (u = 1)."""
    return low + (high - low) * u


class Pencil:
    """Draws in 64 px units on an enlarged canvas."""

    def __init__(self, image: Image.Image, outline: bool) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.outline = outline

    def shape(self, points: Sequence[Point], colour: Colour) -> None:
        """Filled polygon."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.polygon(scaled, fill=ink(colour))
        if self.outline:
            self.draw.line([*scaled, scaled[0]], fill=(20, 16, 24), width=SCALE, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        """Filled ellipse around (x, y)."""
        box = ((x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE)
        edge = (20, 16, 24) if self.outline else None
        self.draw.ellipse(box, fill=ink(colour), outline=edge, width=SCALE if self.outline else 0)

    def line(self, points: Sequence[Point], colour: Colour, width: float) -> None:
        """Line with round ends and joints."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, fill=ink(colour), width=round(width * SCALE), joint="curve")
        r = width * SCALE / 2
        for x, y in (scaled[0], scaled[-1]):
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=ink(colour))

    def faded(self, visible: float, draw: Callable[["Pencil"], None]) -> None:
        """Draw something with opacity `visible`."""
        if visible <= 0:
            return
        if visible >= 1:
            draw(self)
            return
        layer = self.image.copy()
        draw(Pencil(layer, self.outline))
        self.image.paste(Image.blend(self.image, layer, visible))


def ink(colour: Colour) -> tuple[int, int, int]:
    """A colour as Pillow takes it."""
    return (round(colour[0]), round(colour[1]), round(colour[2]))


def superellipse(
    x: float, y: float, rx: float, ry: float, power: float, start: float, stop: float, n: int
) -> list[Point]:
    """Points of |dx/rx|^power + |dy/ry|^power = 1 between two angles (0 right, 90 down)."""
    points = []
    for k in range(n + 1):
        t = math.radians(start + (stop - start) * k / n)
        c, s = math.cos(t), math.sin(t)
        r = (abs(c) ** power + abs(s) ** power) ** (-1 / power)
        points.append((x + rx * r * c, y + ry * r * s))
    return points


@dataclass(frozen=True)
class Layout:
    """Where things are, in pixels, once the identity of a face is known."""

    x: float  # middle of the head
    y: float  # level just under the eyes
    features: float  # middle of the features: moves further than the head when it turns
    rx: float  # half the width of the head
    top: float  # height of the skull above y
    chin: float  # height of the lower face below y
    jaw: float  # 2 is round, more is square
    eye: float  # half the distance of the eyes
    volume: float  # how far hair stands off the head

    @staticmethod
    def of(face: Face) -> "Layout":
        turn = between(-1, 1, face.turn)
        return Layout(
            x=32 + 1.2 * turn,
            y=34,
            features=32 + 4.2 * turn,
            rx=between(12.5, 16.5, face.face_width),
            top=15.5,
            chin=between(14.0, 18.5, face.face_length),
            jaw=between(1.75, 3.0, face.jaw),
            eye=between(5.6, 7.8, face.eye_spacing),
            volume=between(1.5, 6.5, face.hair_volume),
        )


def head_outline(at: Layout) -> list[Point]:
    upper = superellipse(at.x, at.y, at.rx, at.top, 2.2, 180, 360, 16)
    lower = superellipse(at.x, at.y, at.rx, at.chin, at.jaw, 0, 180, 24)
    return upper + lower


def draw_back_hair(pencil: Pencil, at: Layout, face: Face, colour: Colour) -> None:
    bottom = between(at.y - 3, 61, face.hair_length)
    rx = at.rx + at.volume
    dome = superellipse(at.x, at.y, rx, at.top + at.volume, 2.2, 180, 360, 20)
    pencil.shape(
        [*dome, (at.x + rx + 0.5, bottom - 2), (at.x + rx - 2, bottom),
         (at.x - rx + 2, bottom), (at.x - rx - 0.5, bottom - 2)],
        mix(colour, (0, 0, 0), 0.18),
    )  # fmt: skip


def draw_body(pencil: Pencil, at: Layout, skin: Colour, face: Face) -> None:
    clothes = along(CLOTHES, face.clothes)
    shoulders = superellipse(32, 68, 25, 15, 2.6, 180, 360, 20)
    pencil.shape(shoulders, clothes)
    shade = mix(skin, (60, 20, 20), 0.22)
    pencil.shape([(26.5, 46), (37.5, 46), (38, 55), (32, 60), (26, 55)], shade)


def draw_head(pencil: Pencil, at: Layout, skin: Colour, face: Face) -> None:
    ear = mix(skin, (120, 40, 40), 0.12)
    for side in (-1, 1):
        pencil.ellipse(at.x + side * at.rx, at.y + 1.5, 2.6, 4.0, ear)
    pencil.shape(head_outline(at), skin)

    def blush(layer: Pencil) -> None:
        for side in (-1, 1):
            layer.ellipse(at.features + side * (at.eye + 1.6), at.y + 6.2, 3.4, 2.6, (240, 92, 110))

    pencil.faded(0.8 * amount(face, "blush"), blush)


def draw_beard(pencil: Pencil, at: Layout, face: Face, colour: Colour) -> None:
    growth = smoothstep(face.beard, THRESHOLDS["beard"], 1.0)

    def beard(layer: Pencil) -> None:
        lower = superellipse(
            at.x, at.y, at.rx + 0.4, at.chin + 1 + 5.5 * growth, at.jaw, 8, 172, 24
        )
        upper = [
            (at.x + t * (at.rx + 0.2), at.y + 10.5 - 8.5 * t * t + 2 * (1 - abs(t)))
            for t in (k / 8 - 1 for k in range(17))
        ]
        layer.shape([*lower, *upper], mix(colour, (0, 0, 0), 0.1))

    pencil.faded(amount(face, "beard"), beard)


def draw_mouth(pencil: Pencil, at: Layout, face: Face, skin: Colour) -> None:
    x, y = at.features, at.y + 10.5
    smile = between(-2.6, 3.4, smoothstep(face.smile, 0.15, 0.85))
    opening = 5.0 * smoothstep(face.mouth_open, 0.55, 0.8)
    lips = mix(mix(skin, (150, 50, 50), 0.5), (206, 16, 46), amount(face, "lipstick"))
    width = 5.4
    steps = [k / 6 - 1 for k in range(13)]
    upper = [(x + t * width, y + smile * (0.4 - t * t)) for t in steps]
    lower = [(px, py + opening * (1 - t * t)) for (px, py), t in zip(upper, steps, strict=True)]
    if opening > 0.2:
        pencil.shape([*upper, *reversed(lower)], (92, 20, 30))
        teeth = [
            (px, py + min(1.8, opening / 2) * (1 - t * t))
            for (px, py), t in zip(upper, steps, strict=True)
        ]
        pencil.shape([*upper, *reversed(teeth)], (250, 248, 240))
    thickness = between(1.7, 2.6, amount(face, "lipstick"))
    pencil.line(upper, lips, thickness)
    if opening > 0.2:
        pencil.line(lower, lips, thickness)

    def moustache(layer: Pencil) -> None:
        hair = mix(stepped(list(HAIR_COLOURS.values()), face.hair_colour), (0, 0, 0), 0.1)
        for side in (-1, 1):
            layer.shape(
                [(x, at.y + 6.4), (x + side * 4, at.y + 6.2), (x + side * 7.4, at.y + 9.8),
                 (x + side * 3.5, at.y + 9.2), (x, at.y + 8.8)], hair)  # fmt: skip

    pencil.faded(amount(face, "moustache"), moustache)


def draw_nose(pencil: Pencil, at: Layout, face: Face, skin: Colour) -> None:
    size = between(1.5, 2.9, face.nose)
    x = at.features + (at.features - 32) * 0.25
    pencil.ellipse(x, at.y + 4.4, size, size * 0.8, mix(skin, (150, 50, 40), 0.3))


def draw_eyes(pencil: Pencil, at: Layout, face: Face) -> None:
    size = between(2.5, 3.8, face.eye_size)
    colour = along(EYE_COLOURS, face.eye_colour)
    for side in (-1, 1):
        x = at.features + side * at.eye
        pencil.ellipse(x, at.y - 1, size + 0.7, size, (252, 252, 252))
        pencil.ellipse(x, at.y - 0.8, size * 0.68, size * 0.78, colour)
        pencil.ellipse(x, at.y - 0.8, size * 0.34, size * 0.4, (16, 14, 18))


def draw_brows(pencil: Pencil, at: Layout, face: Face, colour: Colour) -> None:
    tilt = between(-1.6, 1.6, face.brow_tilt)
    width = between(1.5, 2.7, face.brow_thickness)
    for side in (-1, 1):
        x = at.features + side * at.eye
        inner, outer = (x - side * 3.2, at.y - 6.6 + tilt), (x + side * 3.6, at.y - 6.6 - tilt)
        pencil.line([inner, outer], mix(colour, (30, 20, 20), 0.45), width)


def draw_glasses(pencil: Pencil, at: Layout, face: Face) -> None:
    frame = stepped(list(GLASSES_COLOURS.values()), face.glasses_colour)
    power = between(2.0, 5.0, smoothstep(face.glasses_shape, 0.35, 0.65))
    tint = amount(face, "lens")

    def glasses(layer: Pencil) -> None:
        for side in (-1, 1):
            x = at.features + side * (at.eye + 0.2)
            rim = superellipse(x, at.y - 0.8, 6.0, 5.4, power, 0, 360, 28)
            pane = superellipse(x, at.y - 0.8, 5.0, 4.4, power, 0, 360, 28)
            layer.faded(0.88 * tint, lambda lens, pane=pane: lens.shape(pane, (30, 30, 44)))  # type: ignore[misc]
            layer.line([*rim, rim[1]], frame, 2.0)
            layer.line([(x + side * 6, at.y - 1.5), (at.x + side * at.rx, at.y - 2)], frame, 1.8)
        layer.line(
            [(at.features - at.eye + 5.6, at.y - 1.6), (at.features + at.eye - 5.6, at.y - 1.6)],
            frame, 2.0)  # fmt: skip

    pencil.faded(amount(face, "glasses"), glasses)


def draw_front_hair(pencil: Pencil, at: Layout, face: Face, colour: Colour) -> None:
    hairline = at.y - at.top + between(4.0, 10.0, smoothstep(face.fringe, 0.35, 0.75))
    rx, ry = at.rx + at.volume * 0.75, at.top + at.volume
    outer = superellipse(at.x, at.y, rx, ry, 2.2, 186, 354, 24)
    steps = [k / 10 - 1 for k in range(21)]
    inner = [
        (at.x + t * at.rx * 0.98, hairline + (at.y - 1 - hairline) * abs(t) ** 3.5)
        for t in reversed(steps)
    ]
    pencil.shape([*outer, *inner], colour)
    gleam = superellipse(at.x, at.y, rx * 0.72, ry * 0.8, 2.2, 222, 282, 10)
    pencil.line(gleam, mix(colour, (255, 255, 255), 0.3), 1.8)


def draw_hat(pencil: Pencil, at: Layout, face: Face) -> None:
    colour = stepped(list(HAT_COLOURS.values()), face.hat_colour)
    tall = smoothstep(face.hat_shape, 0.35, 0.65)  # 0 a beanie, 1 a top hat
    base = at.y - 9.5
    rx = at.rx + between(1.6, 0.4, tall) + at.volume * 0.3

    def hat(layer: Pencil) -> None:
        height = between(14, 20, tall)
        crown = superellipse(at.x, base, rx, height, between(2.2, 7, tall), 180, 360, 24)
        layer.shape(crown, colour)
        band = mix(mix(colour, (255, 255, 255), 0.45), mix(colour, (0, 0, 0), 0.45), tall)
        layer.shape(
            [
                (at.x - rx, base - 4.2),
                (at.x + rx, base - 4.2),
                (at.x + rx, base),
                (at.x - rx, base),
            ],
            band,
        )
        brim = rx + between(0.6, 8.0, tall)
        layer.line(
            [(at.x - brim + 1.6, base), (at.x + brim - 1.6, base)], mix(band, colour, tall), 3.4
        )

    pencil.faded(amount(face, "hat"), hat)


def draw_extras(pencil: Pencil, at: Layout, extras: Extras, hair: Colour) -> None:
    top = at.y - at.top - at.volume
    if extras.cat_ears:
        for side in (-1, 1):
            x = at.x + side * at.rx * 0.75
            tip = (x + side * 4, top - 6)
            pencil.shape([(x - 6, top + 7), tip, (x + 6, top + 8)], hair)
            pencil.shape(
                [(x - 3, top + 5), (tip[0], tip[1] + 4), (x + 3, top + 6)], (250, 160, 180)
            )
    if extras.crown:
        base = at.y - at.top + 2
        xs = [at.x + (k / 4 - 1) * (at.rx + 1) for k in range(9)]
        tips = [(x, base - (12 if k % 2 == 0 else 5)) for k, x in enumerate(xs)]
        pencil.shape([(xs[0], base), *tips, (xs[-1], base)], (250, 206, 50))
        for x in xs[1::2]:
            pencil.ellipse(x, base - 2, 1.2, 1.2, (210, 30, 60))
    if extras.mask:
        eyes = superellipse(at.features, at.y - 1, at.eye + 7, 6, 2.6, 0, 360, 28)
        pencil.shape(eyes, (30, 30, 40))
        for side in (-1, 1):
            pencil.ellipse(at.features + side * at.eye, at.y - 1, 3.0, 2.2, (250, 250, 250))
            pencil.ellipse(at.features + side * at.eye, at.y - 1, 1.4, 1.6, (20, 20, 24))
    if extras.tattoo:
        x, y = at.features + at.eye + 1, at.y + 6
        pencil.line([(x - 2.5, y - 2.5), (x + 2.5, y + 2.5)], (30, 40, 110), 1.8)
        pencil.line([(x - 2.5, y + 2.5), (x + 2.5, y - 2.5)], (30, 40, 110), 1.8)
    if extras.clown_nose:
        pencil.ellipse(at.features, at.y + 4.2, 3.8, 3.8, (226, 24, 36))
        pencil.ellipse(at.features - 1.2, at.y + 3, 1.0, 1.0, (255, 200, 200))


def backdrop(seed: int) -> Image.Image:
    """A soft random texture with the feel of a photograph out of focus, at drawing size."""
    rng = np.random.default_rng([20, seed])
    cells = int(rng.choice([3, 5, 9, 24]))
    noise = rng.uniform(30, 235, (cells, cells, 3)).astype(np.uint8)
    side = SIZE * SCALE
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def draw(face: Face, extras: Extras | None = None, style: Style | None = None) -> Image.Image:
    """Draw a face: RGB, 64 x 64. Deterministic; continuous in every parameter of the face."""
    extras, style = extras or Extras(), style or Style()
    side = SIZE * SCALE
    if style.backdrop is None:
        image = Image.new("RGB", (side, side), ink(along(BACKGROUNDS, face.background)))
    else:
        image = backdrop(style.backdrop)
    pencil = Pencil(image, style.outline)
    at = Layout.of(face)
    hair = stepped(list(HAIR_COLOURS.values()), face.hair_colour)
    skin = along(SKIN_TONES, face.skin) if extras.tint is None else TINTS[extras.tint]
    painted = mix(skin, (250, 250, 252), 0.92 * amount(face, "face_paint"))

    draw_back_hair(pencil, at, face, hair)
    draw_body(pencil, at, skin, face)
    draw_head(pencil, at, painted, face)
    draw_beard(pencil, at, face, hair)
    draw_mouth(pencil, at, face, painted)
    draw_nose(pencil, at, face, painted)
    draw_eyes(pencil, at, face)
    draw_brows(pencil, at, face, hair)
    draw_front_hair(pencil, at, face, hair)
    draw_glasses(pencil, at, face)
    draw_hat(pencil, at, face)
    draw_extras(pencil, at, extras, hair)
    return restyle(image.reduce(SCALE), style)


def restyle(image: Image.Image, style: Style) -> Image.Image:
    """Colour and focus of a finished picture."""
    if style.colour_shift != (1.0, 1.0, 1.0) or style.brightness:
        shifted = np.asarray(image, np.float32) * np.array(style.colour_shift, np.float32)
        image = Image.fromarray((shifted + style.brightness).clip(0, 255).round().astype(np.uint8))
    if style.grey:
        image = image.convert("L").convert("RGB")
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    return image
