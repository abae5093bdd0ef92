"""Files of TargetCLIP's release: directions and latents, as `.npy` and `.pt`.

Knows their containers and shapes; nothing of generators or of how directions are found. They carry
no fingerprint: only their size says which generator they could be of. What is in them:

- dirs/*.npy, and the direction0.npy that a run of the released code leaves: one direction
  [1, num_ws, w_dim]. The release learns a coefficient for each of its own sources and saves the
  direction without any: what is read here is strength 1. The release itself edits with 1.2, its
  first version with 0.5 to 1. The search may start at an absolute latent (|w+| about 50), but what
  it ends with is used as an offset all the same, and is shorter (6 to 14): nothing is subtracted.
- opt_latents.pt [4, 18, 512], celebs.pt and w_plus.npy [68, 18, 512]: latents of faces, absolute
  and not offsets from the mean w. A file of a single latent cannot be told from a direction.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SUFFIXES = (".npy", ".pt")


def load_content(path: Path) -> Any:
    """What a file holds, read without running code from it; raises nearly anything if damaged."""
    # Both libraries warn of oddities in files; the array is either read or refused.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".npy":
            return np.load(file, allow_pickle=False)
        return torch.load(file, map_location="cpu", weights_only=True)


def arrays_in(content: Any) -> list[Any]:
    """The arrays of a file: itself, those of a list, the only tensor of a dict.

    Raises:
        ValueError: a dict with no tensor or several, an empty list.
    """
    if isinstance(content, dict):
        tensors = [value for value in content.values() if isinstance(value, Tensor)]
        if len(tensors) != 1:
            raise ValueError(
                f"expected one tensor, found a dict with {len(tensors)}; "
                "save the one that is wanted alone"
            )
        return tensors
    if not isinstance(content, list | tuple):
        return [content]
    if not content:
        raise ValueError("expected tensors, found an empty list")
    return list(content)


def as_float32(array: Any) -> Tensor:
    """A numpy array or a tensor as a float32 tensor; ValueError for anything else."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what does not fit becomes infinity, which is refused
            return torch.from_numpy(array.astype(np.float32))
    # Sparse and meta tensors pass for tensors of numbers, and have none to look at.
    plain = isinstance(array, Tensor) and array.layout is torch.strided
    if plain and array.is_floating_point() and not array.is_meta and not array.is_nested:
        tensor: Tensor = array.detach().float()
        return tensor
    kind = f"{type(array).__name__} {getattr(array, 'dtype', '')}".strip()
    raise ValueError(f"expected an array of floating-point numbers, found {kind}")


def as_items(tensor: Tensor) -> Float[Tensor, "items num_ws w_dim"]:
    """[num_ws, w_dim], after any axes of length 1 and at most one of another length."""
    several = [size for size in tensor.shape[:-2] if size != 1]
    if tensor.ndim < 2 or len(several) > 1 or not tensor.numel():
        raise ValueError(
            "expected an array [num_ws, w_dim] or [items, num_ws, w_dim], "
            f"found {list(tensor.shape)}"
        )
    return tensor.reshape(-1, *tensor.shape[-2:])


def join(parts: list[Tensor]) -> Float[Tensor, "items num_ws w_dim"]:
    """The items of all parts; ValueError where their sizes differ."""
    sizes = {tuple(part.shape[1:]) for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"expected tensors of one size, found {sorted(map(list, sizes))}")
    joined = torch.cat(parts)
    if not joined.isfinite().all():
        raise ValueError("expected finite float32 numbers, found NaN or infinity")
    return joined


def read_released(path: str | Path) -> Float[Tensor, "items num_ws w_dim"]:
    """Read directions or latents from a `.npy` or a `.pt` file, as float32 on the CPU.

    A `.pt` may hold a tensor, a list or tuple of them, or a dict with one. Arrays are [num_ws,
    w_dim] or [items, num_ws, w_dim], with any further axes of length 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, a damaged file, one that asks to run code, other shapes, numbers
            that are not floating-point or not finite.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{str(path)!r}: expected a file name ending in {' or '.join(SUFFIXES)}, "
            f"found {path.suffix!r}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no file at {str(path)!r}; check the path")
    try:
        content = load_content(path)
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(
            f"{str(path)!r}: expected an array that is read without running code, found a file "
            f"that is not ({type(error).__name__}): it is damaged, or asks to run code"
        ) from error
    try:
        return join([as_items(as_float32(array)) for array in arrays_in(content)])
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error}") from error


def expect(
    path: str | Path, items: Float[Tensor, "items layers width"], num_ws: int, w_dim: int
) -> None:
    """Raise a ValueError unless what `path` holds is of the generator's size."""
    if tuple(items.shape[1:]) != (num_ws, w_dim):
        raise ValueError(
            f"{str(path)!r}: expected [{num_ws}, {w_dim}], the generator's W+, found "
            f"{list(items.shape[1:])}; give a file made with this generator"
        )


def released_direction(path: str | Path, num_ws: int, w_dim: int) -> Float[Tensor, "num_ws w_dim"]:
    """The direction of a released file, of strength 1: no coefficient is in it.

    Raises:
        FileNotFoundError, ValueError: as `read_released` does; another size than the generator's;
            several items, which are latents or the starts of several searches.
    """
    items = read_released(path)
    expect(path, items, num_ws, w_dim)
    if len(items) != 1:
        raise ValueError(
            f"{str(path)!r}: expected one direction, found {len(items)} items; "
            "a file of several holds latents, or is to be split"
        )
    return items[0]


def released_latents(
    path: str | Path, num_ws: int, w_dim: int
) -> Float[Tensor, "items num_ws w_dim"]:
    """The latents of a released file: absolute in W+, as a generator takes them.

    Raises:
        FileNotFoundError, ValueError: as `read_released` does; another size than the generator's.
    """
    items = read_released(path)
    expect(path, items, num_ws, w_dim)
    return items
