"""NVIDIA's stylegan2-ada-pytorch pickles, read without executing anything in them.

Such a file holds its own Python source, which NVIDIA's loader runs. The unpickler here knows a few
names, each replaced by inert code of this module or a plain container; any other name is refused,
and the source stays text. Protocols 2 to 5 are read: Python 3.7, which that repository asks for,
writes protocol 3. Knows StyleGAN2 only. Errors do not name the file: `load_generator` does.
"""

import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from targetclip.generators.stylegan2 import (
    MAPPING_LR_MULTIPLIER,
    StyleGAN2,
    StyleGAN2Config,
    build_network,
    take_blur,
)

EXPECTED = 'a StyleGAN2 pickle of NVIDIA\'s stylegan2-ada-pytorch with a network "G_ema"'
# Modules of the standard library that hold data; functions of the others can do anything.
DATA_MODULES = ("argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions")
NUMBER_FORMATS = {"f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q", "b1": "<?"}


class _RefusedError(ValueError):
    """The file can be read, but is not supported."""


@dataclass
class _Module:
    """A pickled network or layer: the name of its class and its attributes, without code."""

    name: str
    attributes: dict[str, Any] = field(repr=False)

    @property
    def children(self) -> dict[str, "_Module"]:
        return {k: v for k, v in self.attributes["_modules"].items() if v is not None}

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter and buffer with its name in `state_dict()`."""
        for kind in ("_parameters", "_buffers"):
            for key, tensor in self.attributes[kind].items():
                if tensor is not None:
                    yield prefix + key, tensor
        for key, child in self.children.items():
            yield from child.tensors(f"{prefix}{key}.")

    def layers(self, prefix: str = "") -> Iterator[tuple[str, "_Module"]]:
        """Yield every submodule with its dotted name."""
        for key, child in self.children.items():
            yield prefix + key, child
            yield from child.layers(f"{prefix}{key}.")


class _EasyDict(dict[str, Any]):
    """Replaces dnnlib's dictionary with attributes."""


class _NumberType:
    """Replaces numpy.dtype, for the few plain numbers that a network stores."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, _: object) -> None:
        """The byte order and padding that numpy would set; these files are little-endian."""


def _module(meta: dict[str, Any]) -> _Module:
    """Replace the function that executes the embedded source `meta["module_src"]`."""
    return _Module(meta["class_name"], meta["state"])


def _number(kind: _NumberType, data: bytes) -> float:
    value: float = struct.unpack(NUMBER_FORMATS[kind.code], data)[0]
    return value


def _storage(data: bytes) -> torch.storage.TypedStorage:
    """Replace a PyTorch function that unpickles without limits."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    # The bytes can also hold one of PyTorch's own functions, which the pickle could then call.
    if not isinstance(storage, torch.storage.TypedStorage):
        raise _RefusedError(f"expected the numbers of a tensor, found a {type(storage).__name__}")
    return storage


def _tensor(
    storage: torch.storage.TypedStorage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_: object,
) -> Tensor:
    flat = torch.empty(0, dtype=storage.dtype).set_(storage)
    return flat.as_strided(size, stride, offset)  # raises if it would reach beyond the storage


def _parameter(tensor: Tensor, *_: object) -> Tensor:
    return tensor


def _bytes(text: str, encoding: str = "") -> bytes:
    """Replace the codec by which protocol 2 stores bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError(f"expected bytes stored as latin1, found the encoding {encoding!r}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,  # protocols 2 and 3 have no code of their own for it
    ("__builtin__", "set"): set,
    ("_codecs", "encode"): _bytes,
    ("dnnlib.util", "EasyDict"): _EasyDict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _NumberType,
    ("numpy._core.multiarray", "scalar"): _number,
    ("numpy.core.multiarray", "scalar"): _number,  # the same, written by NumPy 1
}


def _can_do_anything(module: str) -> bool:
    """Tell whether functions of a module can reach beyond the file."""
    root = module.split(".")[0]
    names = {*sys.stdlib_module_names, "__builtin__", "commands"} - {*DATA_MODULES}
    return root in names


class _Unpickler(pickle.Unpickler):
    """An unpickler that can name only what is in `ALLOWED`."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("dnnlib.tflib"):
            raise _RefusedError(
                f"this is a TensorFlow pickle ({module}.{name}): expected {EXPECTED}; "
                "convert it with legacy.py of stylegan2-ada-pytorch"
            )
        if (module, name) not in ALLOWED:
            why = "is not part of such a file: it is of another network, or of another version"
            if _can_do_anything(module):
                why = "means that this file asks to run code: do not load it anywhere"
            raise _RefusedError(f"refused global {module}.{name}, which {why}; expected {EXPECTED}")
        return ALLOWED[module, name]


def _require(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise _RefusedError(f"{name} is {value!r}, but only {expected!r} is supported")


def _one_clamp(synthesis: _Module) -> float | None:
    """Return the bound on every layer's output, which the file states for each layer."""
    clamps = {
        m.attributes["conv_clamp"] for _, m in synthesis.layers() if "conv_clamp" in m.attributes
    }
    if len(clamps) != 1:
        raise _RefusedError(f"expected one conv_clamp for all layers, found {clamps or 'none'}")
    clamp = clamps.pop()
    return None if clamp is None else float(clamp)


def _check_architecture(generator: _Module) -> None:
    """Refuse a network that loads, but for which ours would render other images."""
    if generator.attributes["c_dim"] != 0:
        raise _RefusedError(
            f"this generator is conditional (c_dim {generator.attributes['c_dim']}): "
            "only unconditional ones are supported"
        )
    for name, module in generator.layers():
        attributes = module.attributes
        if module.name == "SynthesisBlock":
            _require(f"architecture of {name}", attributes["architecture"], "skip")
        elif module.name == "SynthesisLayer":
            _require(f"activation of {name}", attributes["activation"], "lrelu")
        elif module.name == "FullyConnectedLayer" and name.startswith("mapping."):
            _require(f"activation of {name}", attributes["activation"], "lrelu")
            _require(f"lr_multiplier of {name}", attributes["bias_gain"], MAPPING_LR_MULTIPLIER)


def _config(tensors: dict[str, Tensor], conv_clamp: float | None) -> StyleGAN2Config:
    mapping_layers = sum(k.startswith("mapping.fc") and k.endswith(".weight") for k in tensors)
    levels = sum(k.endswith(".torgb.weight") for k in tensors)
    sizes = [4 * 2**level for level in range(levels)]
    return StyleGAN2Config(
        resolution=sizes[-1],
        w_dim=tensors["synthesis.b4.torgb.affine.weight"].shape[1],
        z_dim=tensors["mapping.fc0.weight"].shape[1],
        mapping_layers=mapping_layers,
        channels=tuple(tensors[f"synthesis.b{size}.torgb.weight"].shape[1] for size in sizes),
        conv_clamp=conv_clamp,
    )


def nvidia_names(config: StyleGAN2Config) -> dict[str, str]:
    """Map our name of every parameter and buffer to NVIDIA's."""
    names = {"const": "synthesis.b4.const", "mapping_network.w_avg": "mapping.w_avg"}
    for layer in range(config.mapping_layers):
        for leaf in ("weight", "bias"):
            names[f"mapping_network.layers.{layer}.{leaf}"] = f"mapping.fc{layer}.{leaf}"
    modulated = ("weight", "bias", "affine.weight", "affine.bias")
    for index in range(config.num_ws - 1):
        # Block 4 has conv1 alone; every later block has conv0, which upsamples, then conv1.
        size, conv = 4 * 2 ** ((index + 1) // 2), "conv0" if index % 2 else "conv1"
        for leaf in (*modulated, "noise_strength"):
            names[f"convs.{index}.{leaf}"] = f"synthesis.b{size}.{conv}.{leaf}"
        names[f"convs.{index}.noise"] = f"synthesis.b{size}.{conv}.noise_const"
    for level in range(len(config.channels)):
        for leaf in modulated:
            names[f"to_rgbs.{level}.{leaf}"] = f"synthesis.b{4 * 2**level}.torgb.{leaf}"
    return names


def _network(data: bytes) -> StyleGAN2:
    # Checked before unpickling, because the unpickler would take StyleGAN3's arrays for hostile.
    if b"SynthesisInput" in data:
        raise _RefusedError(f"this is a StyleGAN3 pickle: expected {EXPECTED}")
    checkpoint = _Unpickler(io.BytesIO(data)).load()
    # The network may also be pickled alone.
    generator = checkpoint.get("G_ema") if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(generator, _Module):
        keys = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else "none"
        raise _RefusedError(
            f"expected {EXPECTED}, found {type(checkpoint).__name__} with keys: {keys}"
        )
    _require("the class of G_ema", generator.name, "Generator")
    _check_architecture(generator)
    tensors = dict(generator.tensors())
    config = _config(tensors, _one_clamp(generator.children["synthesis"]))
    try:
        for name in [name for name in tensors if name.endswith("resample_filter")]:
            take_blur(tensors, name, gain=1.0, tolerance=1e-4)
        return build_network(config, nvidia_names(config), tensors)
    except ValueError as error:
        raise _RefusedError(str(error)) from error


def read_nvidia(path: Path) -> StyleGAN2:
    """Read the "G_ema" of a stylegan2-ada-pytorch `.pkl`, or such a network pickled alone.

    Nothing in the file is executed. Layers for float16 (`num_fp16_res`) and weights in float16 run
    in float32; `conv_clamp` is kept.

    ValueError: a file that names foreign code, a StyleGAN3, TensorFlow or conditional network, or a
    damaged file.
    """
    data = path.read_bytes()
    try:
        return _network(data)
    except _RefusedError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        raise ValueError(
            f"expected {EXPECTED}, found a file that cannot be read as one "
            f"({type(error).__name__}): it may be damaged"
        ) from error
