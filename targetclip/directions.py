"""Files of directions: the project's own, and those of TargetCLIP's release.

Knows containers, shapes and the checks of a reader; nothing of how directions are found.

A direction file is safetensors. Its tensor `direction` [num_ws, w_dim], float32, is what is added
to the latents of any source. Its metadata hold the fingerprint of its generator and a record. There
may be further tensors, named `correction.*`: what a mapper adds to the direction for each source
(`predictor.correction`). Whoever reads `direction` alone has one direction for all sources.

Files of the release are `.npy` and `.pt`. They carry no fingerprint: only their size says which
generator they could be of.

- dirs/*.npy, and the direction0.npy that a run of the released code leaves: one direction
  [1, num_ws, w_dim]. The release learns a coefficient for each of its own sources and saves the
  direction without any, so the direction read here has strength 1. The release edits with strength
  1.2, its first version with 0.5 to 1. Its search may start at an absolute latent (|w+| about 50),
  but uses its result (6 to 14) as an offset all the same: nothing is subtracted here.
- opt_latents.pt [4, 18, 512], celebs.pt and w_plus.npy [68, 18, 512]: latents of faces, absolute
  and not offsets from the mean w. `looks_like_latent` tells a single one from a direction.
"""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from targetclip.generators import Generator
from targetclip.media.images import refuse_picture
from targetclip.weights import read_tensors, tensor_bytes

FORMAT = "targetclip-direction/1"
MAKE = "make one with targetclip optimize"
RELEASED_SUFFIXES = (".npy", ".pt")
CORRECTION = "correction."  # begins the names of a correction's tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DirectionFile:
    """A direction and its record: method, recipe, seed, fingerprints and other notes."""

    direction: Float[Tensor, "num_ws w_dim"]
    record: dict[str, Any]
    correction: dict[str, Tensor]
    """Tensors of the correction for each source, as they are; empty where there is none."""


def direction_bytes(
    direction: Float[Tensor, "num_ws w_dim"],
    generator: Generator | str,
    record: dict[str, Any],
    correction: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Return the content of a direction file: float32, with `record` as JSON.

    Args:
        generator: itself, or its fingerprint.
        correction: tensors of the correction for each source.
    """
    tensors = {CORRECTION + name: tensor for name, tensor in (correction or {}).items()}
    metadata = {
        "format": FORMAT,
        "generator": generator if isinstance(generator, str) else generator.fingerprint,
        "record": json.dumps(record, sort_keys=True),
    }
    return tensor_bytes({"direction": direction.detach().float(), **tensors}, metadata)


def load_direction(path: str | Path, generator: Generator) -> DirectionFile:
    """Read a direction file and check that it belongs to `generator`.
    FileNotFoundError: no such file. ValueError: not a direction file, a damaged one, one of another
    generator, or values that are not finite."""
    path = Path(path)
    metadata, tensors = read_tensors(path, "direction", [FORMAT], MAKE)
    if "direction" not in tensors:
        raise ValueError(f"{path}: expected a direction as in {FORMAT}, found none: {MAKE}")
    direction = tensors["direction"]
    expected = (generator.num_ws, generator.w_dim)
    if direction.shape != expected or metadata.get("generator") != generator.fingerprint:
        raise ValueError(
            f"{path} is a direction {list(direction.shape)} of generator "
            f"{metadata.get('generator', '')[:12]}, but the generator loaded is "
            f"{generator.fingerprint[:12]} {list(expected)}: "
            "find one for it with targetclip optimize"
        )
    if direction.dtype != torch.float32 or not direction.isfinite().all():
        raise ValueError(
            f"{path}: expected finite float32 values, found {direction.dtype} or NaN or infinity; "
            "find the direction again"
        )
    try:
        record = json.loads(metadata.get("record", "{}"))
    except (json.JSONDecodeError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: the record is damaged; find the direction again")
    names = [name for name in tensors if name.startswith(CORRECTION)]
    correction = {name.removeprefix(CORRECTION): tensors[name] for name in names}
    return DirectionFile(direction, record, correction)


# Files of the release


def arrays_in(content: Any) -> list[Any]:
    """Return the arrays of a file: its only one, those of a list, or the only tensor of a dict.
    ValueError: a dict with no tensor or several, an empty list."""
    if isinstance(content, dict):
        tensors = [value for value in content.values() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise ValueError(
                f"expected one tensor, found a dict with {len(tensors)}; save one of them alone"
            )
        return tensors
    if not isinstance(content, list | tuple):
        return [content]
    if not content:
        raise ValueError("expected tensors, found an empty list")
    return list(content)


def as_items(array: Any) -> Float[Tensor, "items num_ws w_dim"]:
    """Return an array [num_ws, w_dim], or one with axes before these, as float32.
    ValueError: no floating-point numbers; more than one axis before the last two that is longer
    than 1."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # a number too large becomes infinity, which is refused
            tensor = torch.from_numpy(array.astype(np.float32))
    elif (
        isinstance(array, Tensor)
        and array.is_floating_point()
        and array.layout is torch.strided  # sparse, meta and nested tensors hold no plain numbers
        and not (array.is_meta or array.is_nested)
    ):
        tensor = array.detach().float()
    else:
        kind = f"{type(array).__name__} {getattr(array, 'dtype', '')}".strip()
        raise ValueError(f"expected an array of floating-point numbers, found {kind}")
    long_axes = [size for size in tensor.shape[:-2] if size != 1]
    if tensor.ndim < 2 or len(long_axes) > 1 or not tensor.numel():
        raise ValueError(
            "expected an array [num_ws, w_dim] or [items, num_ws, w_dim], "
            f"found {list(tensor.shape)}"
        )
    return tensor.reshape(-1, *tensor.shape[-2:])


def read_released(path: str | Path) -> Float[Tensor, "items num_ws w_dim"]:
    """Read directions or latents from a `.npy` or a `.pt` file, as float32 on the CPU.

    A `.pt` may hold a tensor, a list or tuple of them, or a dict with one. Arrays are [num_ws,
    w_dim] or [items, num_ws, w_dim], with any further axes of length 1.

    FileNotFoundError: no such file. ValueError: another suffix, a damaged file, one that asks to
    run code, other shapes, numbers that are not floating-point or not finite.
    """
    path = Path(path)
    refuse_picture(path, "an array")
    if path.suffix not in RELEASED_SUFFIXES:
        raise ValueError(
            f"{str(path)!r}: expected a file name ending in {' or '.join(RELEASED_SUFFIXES)}, "
            f"found {path.suffix!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file at {str(path)!r}; check the path")
    try:
        # Neither library runs code from the file. Both warn of oddities; the array is either read
        # or refused.
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.suffix == ".npy":
                content = np.load(file, allow_pickle=False)
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(
            f"{str(path)!r}: expected an array that is read without running code, found a file "
            f"that is not ({type(error).__name__}): it is damaged, or asks to run code"
        ) from error
    try:
        parts = [as_items(array) for array in arrays_in(content)]
        if len(sizes := {tuple(part.shape[1:]) for part in parts}) > 1:
            raise ValueError(f"expected tensors of one size, found {sorted(map(list, sizes))}")
        items = torch.cat(parts)
        if not items.isfinite().all():
            raise ValueError("expected finite float32 numbers, found NaN or infinity")
        return items
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def check_size(
    path: str | Path, items: Float[Tensor, "items layers size"], num_ws: int, w_dim: int
) -> None:
    """Raise a ValueError where directions or latents of a file are not of a generator's size."""
    if tuple(items.shape[1:]) != (num_ws, w_dim):
        raise ValueError(
            f"{str(path)!r}: expected [{num_ws}, {w_dim}], the generator's W+, found "
            f"{list(items.shape[1:])}; give a file made with this generator"
        )


def released_latents(
    path: str | Path, num_ws: int, w_dim: int
) -> Float[Tensor, "items num_ws w_dim"]:
    """Read the latents of a released file: absolute in W+, as a generator takes them.
    FileNotFoundError, ValueError: as `read_released`; another size than the generator's."""
    items = read_released(path)
    check_size(path, items, num_ws, w_dim)
    return items


def released_direction(path: str | Path, num_ws: int, w_dim: int) -> Float[Tensor, "num_ws w_dim"]:
    """Read the direction of a released file, of strength 1: no coefficient is in it.
    FileNotFoundError, ValueError: as `released_latents`; several items, which are latents or the
    starts of several searches."""
    items = released_latents(path, num_ws, w_dim)
    if len(items) != 1:
        raise ValueError(
            f"{str(path)!r}: expected one direction, found {len(items)} items; "
            "a file of several holds latents, or is to be split"
        )
    return items[0]


def looks_like_latent(vector: Float[Tensor, "num_ws w_dim"], generator: Generator) -> bool:
    """Tell whether a vector is an absolute latent: its layers are nearer to the mean w than to 0.

    The length tells less: latents have |w+| of 45 to 50 at 1024 px, directions 6 to 14, but both
    depend on the generator. Where the mean w is short beside what latents differ in, as in the
    world avatars, none looks like a latent: a latent is an offset there, which adds its picture.
    """
    mean_w = generator.mean_w.to(vector.device)
    w = vector.mean(dim=0)
    return bool((w - mean_w).norm() < min(w.norm(), 2 * mean_w.norm()))


def warn_of_latent(
    path: str | Path, vector: Float[Tensor, "num_ws w_dim"], generator: Generator
) -> None:
    """Log a warning if the direction of a file looks like a latent: as an offset it is no use."""
    if looks_like_latent(vector, generator):
        logger.warning(
            "%r looks like a latent, not like a direction: its length is %.1f and it lies near the "
            "generator's mean w; a direction is the difference of two latents",
            str(path),
            float(vector.norm()),
        )
