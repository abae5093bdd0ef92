"""Files of tensors with a record: directions, inverters, identity models, readers, mappers.

Knows safetensors and what a reader must check; nothing of what the tensors mean. The same content
gives the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from targetclip.command import write_file
from targetclip.media.images import refuse_picture
from targetclip.recipes import Recipe

GET_AGAIN = "get the file again"


def digest_of_weights(header: str, state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a text and of named tensors, as float32, in the order of the names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file; the order of the metadata is that of its keys."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    content: bytes = save(plain, dict(metadata))
    # The library writes metadata in the order of a hash table, another one in each process.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.
    FileNotFoundError, OSError: it cannot be written."""
    write_file(path, tensor_bytes(tensors, metadata))


def save_half(path: Path, module: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write the weights of a module in half precision."""
    save_tensors(path, {name: t.half() for name, t in module.state_dict().items()}, metadata)


def read_tensors(
    path: str | Path, kind: str, formats: Sequence[str], make: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file of one of some formats: its metadata, and its tensors.

    Args:
        kind: what the file is, for messages: "inverter".
        formats: values of the metadata's `format` that are read.
        make: how to get such a file, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file, a damaged one, or one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {kind} file: {make}")
    refuse_picture(path, f"a safetensors file ({kind})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    if metadata.get("format") not in formats:
        raise ValueError(
            f"{path}: expected format {' or '.join(formats)}, found {metadata.get('format')}: "
            f"{make}"
        )
    return metadata, tensors


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Put every weight of a file into a module, as float32.
    ValueError: other names or shapes, values that are no floats or not finite."""
    floats = {name: t.to(torch.float32, copy=True) for name, t in state.items()}
    try:
        if any(tensor.dtype not in (torch.float32, torch.float16) for tensor in state.values()):
            raise ValueError("expected floats")
        module.load_state_dict(floats, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: the weights do not fit the config: {GET_AGAIN}") from error
    if not all(tensor.isfinite().all() for tensor in floats.values()):
        raise ValueError(f"{path}: the weights hold NaN or infinity: {GET_AGAIN}")


def stored_recipe(settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a file's settings, with defaults for settings it does not have.
    ValueError: a setting is unknown or has an impossible value."""
    try:
        return Recipe(**settings)
    except TypeError as error:
        raise ValueError(f"a recipe unknown here: {error}") from error
