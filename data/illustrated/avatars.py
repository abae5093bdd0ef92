"""Avatars by outside illustrators, drawn by DiceBear (extra `avatars`): options to RGB pictures."""

import importlib.util
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from targetclip.command import whole_file, write_file
from targetclip.seeds import seed_of

Options = dict[str, Any]
Drawn = tuple[UInt8[ndarray, "size size 3"], dict[str, str]]  # a picture, and what it shows
Key = TypeVar("Key")
Made = TypeVar("Made")

TRAINED = (
    "avataaars", "adventurer", "big-ears", "big-smile", "croodles", "dylan", "miniavs",
    "notionists", "pixel-art", "toon-head", "voxel-art",
)  # fmt: skip
# Whole styles that no network is ever trained on.
HELD_OUT = ("personas", "micah", "open-peeps", "lorelei")
AT_ONCE = 64  # keys that a process takes at a time
INSTALL = 'pip install "targetclip[avatars]"'


@dataclass(frozen=True)
class Credit:
    """Who drew a style, and under which licence."""

    style: str
    illustrator: str
    licence: str
    source: str


def check_dicebear(what: str) -> None:
    """Raise a ValueError where the packages that draw avatars are missing."""
    if not all(map(importlib.util.find_spec, ("dicebear", "dicebear_styles", "resvg_py"))):
        raise ValueError(f"{what} is drawn by DiceBear, which is not installed: {INSTALL}")


@cache
def definition(style: str) -> dict[str, Any]:
    """Return a style's definition: components, variants, colours and credits.
    ValueError: not one of the human styles; the extra `avatars` is not installed."""
    if style not in TRAINED + HELD_OUT:
        raise ValueError(f"unknown style {style!r}: expected {', '.join(TRAINED + HELD_OUT)}")
    check_dicebear(f"style {style!r}")
    found: dict[str, Any] = json.loads((files("dicebear_styles") / f"{style}.json").read_bytes())
    return found


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
    """Return the SVG of one avatar, and every option it was drawn from: given, or of the seed."""
    from dicebear import Avatar

    drawn = Avatar(drawable(style), options).to_json()
    return drawn["svg"], drawn["options"]


def render(svg: str, size: int) -> UInt8[ndarray, "size size 3"]:
    """Render an SVG as an RGB picture of `size` by `size` pixels; white where nothing is drawn."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return np.array(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def by_all_cores(function: Callable[[Key], Made], keys: Sequence[Key], name: str) -> Iterator[Made]:
    """Yield the values of a function of a module in the order of `keys`, by a process per core."""
    if len(keys) <= AT_ONCE:  # one process would take them all, and takes seconds to start
        yield from map(function, tqdm(keys, name))
        return
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from tqdm(pool.imap(function, keys, chunksize=AT_ONCE), name, total=len(keys))


def bank(
    folder: Path, name: str, keys: Sequence[Key], made_of: Callable[[Key], Drawn], size: int
) -> tuple[UInt8[Tensor, "count size size 3"], list[dict[str, str]]]:
    """Return the pictures of `keys` and what they show, made on first use (see `by_all_cores`).

    Files in `folder`, named by the keys too, keep both; pictures are read when they are asked for.
    """
    path = folder / f"{name}-{size}px-{seed_of(*keys):014x}.npy"
    shape, known = (len(keys), size, size, 3), path.with_suffix(".json")
    if not (path.exists() and known.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished:
            drawing = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            truths = []
            for i, (picture, truth) in enumerate(by_all_cores(made_of, keys, name)):
                drawing[i] = picture
                truths.append(truth)
            drawing.flush()
            write_file(known, json.dumps(truths))
    # Copied where written to, which nobody does: torch takes no array that is read-only.
    return torch.from_numpy(np.load(path, mmap_mode="c")), json.loads(known.read_text("utf-8"))


def to_images(pictures: UInt8[Tensor, "batch size size 3"]) -> Float[Tensor, "batch 3 size size"]:
    """Return uint8 pictures as images in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
