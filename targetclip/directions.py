"""Direction files: one direction and where it comes from, as safetensors.

Knows the file and the checks a reader must make; nothing of how directions are found.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from targetclip.generators import Generator

FORMAT = "targetclip-direction/1"


@dataclass(frozen=True)
class DirectionFile:
    """A direction and its record: method, recipe, seed, fingerprints and what else was noted."""

    direction: Float[Tensor, "num_ws w_dim"]
    record: dict[str, Any]


def direction_bytes(
    direction: Float[Tensor, "num_ws w_dim"], generator: Generator, record: dict[str, Any]
) -> bytes:
    """Content of a direction file: float32, the generator's fingerprint, and `record` as JSON."""
    metadata = {
        "format": FORMAT,
        "generator": generator.fingerprint,
        "record": json.dumps(record, sort_keys=True),
    }
    tensor = direction.detach().float().cpu().contiguous()
    content: bytes = save({"direction": tensor}, metadata)
    return content


def parse_record(text: str, path: Path) -> dict[str, Any]:
    """The record of a direction file."""
    try:
        record = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: the record is damaged; find the direction again")
    return record


def load_direction(path: str | Path, generator: Generator) -> DirectionFile:
    """Read a direction file and check that it belongs to `generator`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a direction file, a damaged one, one of another generator, or values that
            are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such direction file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    if metadata.get("format") != FORMAT or "direction" not in tensors:
        raise ValueError(
            f"{path}: expected format {FORMAT}, found {metadata.get('format')}: "
            "make one with targetclip optimize"
        )
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
    return DirectionFile(direction, parse_record(metadata.get("record", "{}"), path))
