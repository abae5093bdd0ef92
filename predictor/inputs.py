"""Pictures, targets and settings as people give them in Python.

Knows how paths, Pillow images, arrays and tensors become RGB pictures, and which names there are;
nothing of networks.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from predictor import Mode
from targetclip.command import did_you_mean
from targetclip.media.images import (
    is_picture,
    on_white,
    read_picture,
    tensor_to_pictures,
    upright,
    with_alpha,
)
from targetclip.recipes import Recipe, recipe_named

OVERSHOOT = 1.5  # of generators' images; pictures normalised for an encoder go further

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
"""One picture:

- a path of a file, as a str or a Path, read by `read_picture`;
- a Pillow image of any mode except F, whose range is not known;
- an array [height, width, 3] of uint8, or of floats in [0, 1];
- a tensor [3, height, width] of floats in [-1, 1], as generators render it.
"""
Pictures = Picture | Sequence[Picture]
"""Pictures: one, a sequence of them, or an array or tensor of several along a first axis."""


class Text(str):
    """A target in words. A plain str is the path of a picture."""

    __slots__ = ()


Target = Picture | Text


def in_rgb(picture: Image.Image) -> Image.Image:
    """Return a Pillow image as people see it: upright, 8-bit RGB, transparency on white."""
    plain = type(picture) is Image.Image and picture.mode == "RGB"  # no file, which may be turned
    if plain and picture.info.keys() <= {"icc_profile"}:
        return picture
    if picture.mode == "F":
        raise ValueError(
            "expected a picture of 8 or 16 bits, found mode 'F' of unknown range: "
            "convert it, or give an array of floats in [0, 1]"
        )
    layer = with_alpha(upright(picture, "a picture"), 8)
    if layer.mode == "RGBA" and layer.getchannel("A").getbbox() is None:
        raise ValueError("expected a picture, found one that is wholly transparent")
    return on_white(layer)


def array_to_pictures(array: NDArray[Any]) -> list[Image.Image]:
    """Return RGB pictures of an array; for its shape and range see `Picture`."""
    if array.ndim not in (3, 4) or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            "expected an array [height, width, 3] or [pictures, height, width, 3], found "
            f"{list(array.shape)}: put the channels last, or give a tensor"
        )
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # so that NaN fails too
            raise ValueError(
                f"expected floats in [0, 1], found {array.min():g} to {array.max():g}: rescale "
                "them, or give uint8"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"expected an array of uint8 or of floats, found {array.dtype}")
    return [Image.fromarray(pixels) for pixels in array.reshape(-1, *array.shape[-3:])]


def tensor_pictures(images: Tensor) -> list[Image.Image]:
    """Return RGB pictures of a tensor; for its shape and range see `Picture`.

    A tensor without a number below 0 is refused: it could as well be in [0, 1].
    """
    fits = images.ndim in (3, 4) and images.shape[-3] == 3 and images.numel() > 0
    if not fits or not images.is_floating_point():
        raise ValueError(
            "expected a tensor of floats [3, height, width] or [pictures, 3, height, width], found "
            f"{images.dtype} {list(images.shape)}: give other layouts as an array"
        )
    images = images.detach()
    low, high = float(images.min()), float(images.max())
    if not (-OVERSHOOT <= low < 0 and high <= OVERSHOOT):  # so that NaN fails too
        raise ValueError(
            f"expected a tensor in [-1, 1], found {low:g} to {high:g}: "
            "of pictures in [0, 1] give 2 * pictures - 1"
        )
    return tensor_to_pictures(images.reshape(-1, *images.shape[-3:]))


def as_pictures(given: Pictures) -> list[Image.Image]:
    """Return RGB pictures of one picture or of several; see `Picture`.
    FileNotFoundError: no file at a path. TypeError: something that is no picture. ValueError: as
    `read_picture`; a shape, a type or a range that is not of pictures."""
    if isinstance(given, str | Path):
        if not os.path.exists(given):
            path = str(given)
            raise FileNotFoundError(
                f"no picture at {path!r}: check the path, or give words as text={path!r}"
            )
        return [read_picture(given)]
    if isinstance(given, Image.Image):
        return [in_rgb(given)]
    if isinstance(given, np.ndarray):
        return array_to_pictures(given)
    if isinstance(given, Tensor):
        return tensor_pictures(given)
    if isinstance(given, Iterable):
        return [picture for item in given for picture in as_pictures(item)]
    raise TypeError(
        "expected a picture (a path, a Pillow image, an array or a tensor), found "
        f"{type(given).__name__}"
    )


def as_target(target: Target | None, text: str | None = None) -> Image.Image | Text:
    """Return a target as an RGB picture or a text.
    FileNotFoundError, TypeError: as `as_pictures`. ValueError: as `as_pictures`; both a target and
    a text, or neither; several pictures; a text that names a picture."""
    if (target is None) == (text is None):
        raise ValueError("expected a picture, or words as text=, found both or neither")
    words = target if isinstance(target, Text) else text
    if words is not None:
        if is_picture(Path(words)):
            raise ValueError(f"text={str(words)!r} names a picture: give it without text=")
        return Text(words)
    assert target is not None
    pictures = as_pictures(target)
    if len(pictures) != 1:
        raise ValueError(
            f"expected one target, found {len(pictures)}: find the direction of each, and mix "
            "them: 0.5 * first + 0.5 * second"
        )
    return pictures[0]


def check_mode(mode: str) -> None:
    """Raise a ValueError that names the nearest mode, if there is no such mode."""
    if mode not in (known := get_args(Mode)):
        hint = did_you_mean(str(mode), known)
        raise ValueError(f"mode: expected one of {', '.join(known)}, found {mode!r}{hint}")


def as_recipe(recipe: Recipe | str | None, default: Recipe) -> Recipe:
    """Return a recipe by itself or its name; None: the default. ValueError: no such name."""
    return recipe_named(recipe, "recipe") if isinstance(recipe, str) else recipe or default
