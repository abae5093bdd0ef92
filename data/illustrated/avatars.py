"""Avatars by outside illustrators: options in, RGB pictures and what they show out.

Knows the DiceBear styles that show human faces, which of them no network may be trained on, and
how to render one at any size. Needs the extra `avatars`.
"""

import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

Options = dict[str, Any]

TRAINED = (
    "avataaars", "adventurer", "big-ears", "big-smile", "croodles", "dylan", "miniavs",
    "notionists", "pixel-art", "toon-head", "voxel-art",
)  # fmt: skip
# Whole styles that no network is ever trained on.
HELD_OUT = ("personas", "micah", "open-peeps", "lorelei")


@dataclass(frozen=True)
class Credit:
    """Who drew a style, and under which licence."""

    style: str
    illustrator: str
    licence: str
    source: str


@cache
def definition(style: str) -> dict[str, Any]:
    """Return a style's definition: components, variants, colours and credits.

    Raises:
        ImportError: the extra `avatars` is not installed.
        ValueError: not one of the human styles.
    """
    if style not in TRAINED + HELD_OUT:
        raise ValueError(f"unknown style {style!r}: expected {', '.join(TRAINED + HELD_OUT)}")
    text = files("dicebear_styles").joinpath(f"{style}.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def drawable(style: str) -> Any:
    """Return a style as DiceBear draws it; parsed once."""
    from dicebear import Style

    return Style(definition(style))


def credit(style: str) -> Credit:
    """Return who drew a style, from its own definition."""
    meta = definition(style)["meta"]
    source = meta.get("source", {}).get("url") or meta["creator"].get("url", "")
    return Credit(style, meta["creator"]["name"], meta["license"]["name"], source)


def draw(style: str, options: Options) -> tuple[str, Options]:
    """Return the SVG of one avatar, and every option that was drawn, chosen by its seed or given.

    Equal options give the same avatar on every machine.
    """
    from dicebear import Avatar

    drawn = Avatar(drawable(style), options).to_json()
    return drawn["svg"], drawn["options"]


def render(svg: str, size: int) -> UInt8[ndarray, "size size 3"]:
    """Render an SVG as an RGB picture of `size` by `size` pixels; white where nothing is drawn."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    picture: UInt8[ndarray, "size size 3"] = np.array(
        Image.open(io.BytesIO(bytes(png))).convert("RGB")
    )
    return picture
