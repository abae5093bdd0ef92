"""Charts as pictures, drawn with Pillow: points, lines and bars with a legend.

Knows numbers, names and colours; nothing of what they mean.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Told apart by most eyes; the order is that in which they are given out.
COLOURS: tuple[Colour, ...] = (
    (213, 45, 45),
    (240, 140, 30),
    (20, 100, 190),
    (90, 180, 230),
    (110, 110, 190),
    (120, 120, 120),
    (190, 160, 90),
    (30, 150, 90),
    (200, 110, 180),
    (140, 80, 40),
    (150, 190, 40),
    (20, 160, 160),
    (230, 110, 110),
    (40, 40, 40),
)
INK, FAINT = (40, 40, 40), (225, 225, 225)
SCALE = 2  # drawn so much larger, then averaged: smooth edges
WIDTH, HEIGHT = 1000, 600
LEFT, TOP, RIGHT, BOTTOM = 80, 44, 250, 60  # margins; the legend is on the right
SLANTED = 110  # room for slanted labels
TICKS = 6  # about


@dataclass(frozen=True)
class Series:
    """Points under a name."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: Colour
    spans: Sequence[tuple[float, float]] = ()
    """A lower and an upper y for each point, or none at all."""
    joined: bool = False
    """Draw a line through the points."""
    hollow: bool = False


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    """Pixels of `low` and `high`."""
    log: bool = False

    def at(self, value: float) -> float:
        low, high, place = self.low, self.high, value
        if self.log:
            low, high, place = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (place - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            # Whole powers of ten, unless the axis is too short for some of them.
            factors = (1,) if len(powers) > 4 else (1, 2, 5)
            found = [factor * 10.0**power for power in powers for factor in factors]
            return [value for value in found if self.low <= value <= self.high]
        step = tick_step(self.high - self.low)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def tick_step(length: float) -> float:
    """1, 2 or 5 times a power of ten, some TICKS of which are `length`."""
    rough = length / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def axis_of(values: Iterable[float], start: float, end: float, log: bool = False) -> Axis:
    """An axis that shows all values, with some room around them."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        return Axis(low / 1.6, high * 1.6, start, end, True)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
    return Axis(low - room, high + room, start, end)


def font_of(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size * SCALE)


def short(value: float) -> str:
    """A tick's label."""
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}"


@dataclass
class Sheet:
    """A canvas in units of the finished picture's pixels."""

    canvas: Image.Image
    draw: ImageDraw.ImageDraw

    @staticmethod
    def new(title: str) -> "Sheet":
        canvas = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        sheet = Sheet(canvas, ImageDraw.Draw(canvas))
        sheet.text((LEFT, 14), title, 16, "la")
        return sheet

    def text(self, at: tuple[float, float], words: str, size: int, anchor: str) -> None:
        self.draw.text((at[0] * SCALE, at[1] * SCALE), words, INK, font_of(size), anchor=anchor)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(scaled, colour, round(width * SCALE), joint="curve")

    def dashes(self, start: tuple[float, float], end: tuple[float, float], colour: Colour) -> None:
        length = math.dist(start, end)
        for done in range(0, int(length), 12):
            ends = [min(done + offset, length) / length for offset in (0, 6)]
            points = [
                (start[0] + t * (end[0] - start[0]), start[1] + t * (end[1] - start[1]))
                for t in ends
            ]
            self.line(points, colour, 1.2)

    def dot(self, x: float, y: float, colour: Colour, hollow: bool, radius: float = 5) -> None:
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE]
        fill = (255, 255, 255) if hollow else colour
        self.draw.ellipse([*box, (y + radius) * SCALE], fill, colour, round(1.8 * SCALE))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self.draw.rectangle([v * SCALE for v in (left, top, right, bottom)], colour)

    def turned(self, words: str, size: int, angle: float) -> Image.Image:
        """Words turned to the left by so many degrees, as a mask to paste ink through."""
        font = font_of(size)
        left, top, right, bottom = font.getbbox(words)
        label = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
        ImageDraw.Draw(label).text((4 - left, 4 - top), words, 255, font)
        return label.rotate(angle, Image.Resampling.BICUBIC, expand=True)

    def upright_axis(self, y: Axis, label: str) -> None:
        """The y axis, its ticks and its label."""
        right = WIDTH - RIGHT
        for value in y.ticks():
            self.line([(LEFT, y.at(value)), (right, y.at(value))], FAINT, 1)
            self.text((LEFT - 8, y.at(value)), short(value), 13, "rm")
        self.line([(LEFT, y.end), (LEFT, y.start), (right, y.start)], INK, 1.2)
        turned = self.turned(label, 14, 90)
        middle = int((y.start + y.end) / 2 * SCALE)
        self.canvas.paste(INK, (8 * SCALE, middle - turned.height // 2), turned)

    def level_axis(self, x: Axis, label: str) -> None:
        """The x axis's ticks and its label."""
        bottom = HEIGHT - BOTTOM
        for value in x.ticks():
            self.line([(x.at(value), TOP), (x.at(value), bottom)], FAINT, 1)
            self.text((x.at(value), bottom + 8), short(value), 13, "ma")
        self.text(((x.start + x.end) / 2, HEIGHT - 30), label, 14, "ma")

    def slanted(self, x: float, y: float, words: str) -> None:
        """A label that ends below a place of the x axis."""
        turned = self.turned(words, 12, 40)
        self.canvas.paste(INK, (int(x * SCALE) - turned.width + 8, int(y * SCALE)), turned)

    def legend(self, number: int, name: str, colour: Colour, hollow: bool = False) -> None:
        x, y = WIDTH - RIGHT + 24, TOP + 10 + 24 * number
        self.dot(x, y, colour, hollow)
        self.text((x + 14, y), name, 13, "lm")

    def finished(self) -> Image.Image:
        return self.canvas.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_x: bool = False,
    levels: Mapping[str, float] | None = None,
    diagonal: bool = False,
) -> Image.Image:
    """Points and lines.

    Args:
        levels: dashed horizontal lines by their names.
        diagonal: draw y = x, dashed, with one scale for both axes.

    Raises:
        ValueError: there is no point.
    """
    points = [point for each in series for point in each.points]
    if not points:
        raise ValueError(f"expected points for the chart {title!r}, found none")
    levels = levels or {}
    xs = [x for x, _ in points]
    ys = [y for _, y in points] + [y for each in series for span in each.spans for y in span]
    ys += list(levels.values())
    if diagonal:
        xs = ys = xs + ys
    x = axis_of(xs, LEFT, WIDTH - RIGHT, log_x)
    y = axis_of(ys, HEIGHT - BOTTOM, TOP)
    sheet = Sheet.new(title)
    sheet.level_axis(x, x_label)
    sheet.upright_axis(y, y_label)
    for name, level in levels.items():
        sheet.dashes((LEFT, y.at(level)), (WIDTH - RIGHT, y.at(level)), INK)
        sheet.text((LEFT + 6, y.at(level) - 3), name, 12, "ls")
    if diagonal:
        sheet.dashes((x.start, y.start), (x.end, y.end), INK)
    for number, each in enumerate(series):
        places = [(x.at(a), y.at(b)) for a, b in each.points]
        if each.joined and len(places) > 1:
            sheet.line(places, each.colour, 2)
        if each.spans:
            for (across, _), (low, high) in zip(places, each.spans, strict=True):
                sheet.line([(across, y.at(low)), (across, y.at(high))], each.colour, 1.6)
        for place in places:
            sheet.dot(*place, each.colour, each.hollow)
        sheet.legend(number, each.name, each.colour, each.hollow)
    return sheet.finished()


def bars(
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, Colour],
    y_label: str,
) -> Image.Image:
    """A bar for each value, side by side: `groups[name][kind]`, kinds along the axis.

    Raises:
        ValueError: there is no value.
    """
    kinds = list(dict.fromkeys(kind for values in groups.values() for kind in values))
    if not kinds:
        raise ValueError(f"expected values for the chart {title!r}, found none")
    heights = [value for values in groups.values() for value in values.values()]
    y = axis_of([0.0, *heights], HEIGHT - SLANTED, TOP)
    sheet = Sheet.new(title)
    sheet.upright_axis(y, y_label)
    room = (WIDTH - RIGHT - LEFT) / len(kinds)
    width = 0.8 * room / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        for place, kind in enumerate(kinds):
            if kind in values:
                left = LEFT + room * (place + 0.1) + width * number
                top, bottom = sorted((y.at(values[kind]), y.at(0.0)))
                sheet.box(left, top, left + width - 1, bottom, colours[name])
        sheet.legend(number, name, colours[name])
    for place, kind in enumerate(kinds):
        sheet.slanted(LEFT + room * (place + 0.5), HEIGHT - SLANTED + 4, kind.replace("_", " "))
    return sheet.finished()
