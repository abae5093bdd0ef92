"""The layout of rosinality's stylegan2-pytorch, in two containers: `.pt` and `.safetensors`.

Knows that layout's names and shapes, in both directions. The shapes give all sizes. Errors do not
name the file: `load_generator` does.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from targetclip.generators.stylegan2 import (
    StyleGAN2,
    StyleGAN2Config,
    blur_kernel,
    build_network,
    shortened,
    take_blur,
)
from targetclip.weights import save_tensors

EXPECTED = 'a rosinality StyleGAN2 checkpoint {"g_ema": ..., "latent_avg": ...}'
MEAN_SAMPLES = 4096  # the mean is then within 2 % of the spread of w
MEAN_SEED = 0
NOISE_SEED = 0
PARALLEL = "module."  # torch.nn.DataParallel puts it before every name

logger = logging.getLogger(__name__)


def rosinality_names(config: StyleGAN2Config) -> dict[str, str]:
    """Map our name of every parameter and buffer to rosinality's."""
    names = {"const": "input.input", "mapping_network.w_avg": "latent_avg"}
    for layer in range(config.mapping_layers):
        for leaf in ("weight", "bias"):
            names[f"mapping_network.layers.{layer}.{leaf}"] = f"style.{layer + 1}.{leaf}"
    for index in range(config.num_ws - 1):
        ours, theirs = f"convs.{index}", f"convs.{index - 1}" if index > 0 else "conv1"
        names[f"{ours}.bias"] = f"{theirs}.activate.bias"
        names[f"{ours}.noise_strength"] = f"{theirs}.noise.weight"
        names[f"{ours}.noise"] = f"noises.noise_{index}"
        names |= _modulated_names(ours, theirs)
    for level in range(len(config.channels)):
        ours, theirs = f"to_rgbs.{level}", f"to_rgbs.{level - 1}" if level > 0 else "to_rgb1"
        names[f"{ours}.bias"] = f"{theirs}.bias"
        names |= _modulated_names(ours, theirs)
    return names


def _modulated_names(ours: str, theirs: str) -> dict[str, str]:
    return {
        f"{ours}.weight": f"{theirs}.conv.weight",
        f"{ours}.affine.weight": f"{theirs}.conv.modulation.weight",
        f"{ours}.affine.bias": f"{theirs}.conv.modulation.bias",
    }


def _kernel_names(config: StyleGAN2Config) -> list[str]:
    """Return the names of the low-pass filters: constants, but the layout stores them."""
    levels = range(len(config.channels) - 1)
    return [f"convs.{2 * level}.conv.blur.kernel" for level in levels] + [
        f"to_rgbs.{level}.upsample.kernel" for level in levels
    ]


def _config(state: dict[str, Tensor], conv_clamp: float | None) -> StyleGAN2Config:
    """Read the sizes off the shapes; `build_network` checks that everything fits them."""
    mapping_layers = sum(k.startswith("style.") and k.endswith(".weight") for k in state)
    levels = 1 + sum(k.startswith("to_rgbs.") and k.endswith(".conv.weight") for k in state)
    to_rgbs = ["to_rgb1", *(f"to_rgbs.{level}" for level in range(levels - 1))]
    try:
        return StyleGAN2Config(
            resolution=4 * 2 ** (levels - 1),
            w_dim=state["to_rgb1.conv.modulation.weight"].shape[1],
            z_dim=state["style.1.weight"].shape[1],
            mapping_layers=mapping_layers,
            channels=tuple(state[f"{name}.conv.weight"].shape[2] for name in to_rgbs),
            conv_clamp=conv_clamp,
        )
    except KeyError as error:
        raise ValueError(f"expected {EXPECTED}, found none of the key {error}") from error
    except IndexError as error:
        raise ValueError(f"expected {EXPECTED}, found tensors with too few axes") from error


def _one_row(latent_avg: Tensor, w_dim: int) -> Float[Tensor, " w_dim"]:
    """Return the average w, stored as [w_dim], [1, w_dim] or repeated [num_ws, w_dim]."""
    if latent_avg.ndim not in (1, 2) or latent_avg.shape[-1] != w_dim or latent_avg.numel() == 0:
        raise ValueError(
            f"expected latent_avg of shape [{w_dim}] or [num_ws, {w_dim}], "
            f"found {list(latent_avg.shape)}"
        )
    rows = latent_avg.reshape(-1, w_dim)
    if not torch.allclose(rows, rows[:1].expand_as(rows), equal_nan=True):
        raise ValueError(
            f"expected latent_avg to be one w vector, repeated or not, found {len(rows)} different "
            "ones: an average that differs along W+ is not supported"
        )
    return rows[0]


def _add_noise(state: dict[str, Tensor], config: StyleGAN2Config) -> None:
    """Add the noise images, drawn from a seed, to a file that has none: early ones drew them anew.

    A file with some of them is damaged; `build_network` names what is missing.
    """
    names = [f"noises.noise_{index}" for index in range(config.num_ws - 1)]
    if any(name in state for name in names):
        return
    logger.warning(
        "the checkpoint has no noise buffers: images get noise drawn from seed %d", NOISE_SEED
    )
    random = torch.Generator().manual_seed(NOISE_SEED)
    for index, name in enumerate(names):
        side = 4 * 2 ** ((index + 1) // 2)
        state[name] = torch.randn(1, 1, side, side, generator=random)


def _network(
    state: dict[str, Tensor], latent_avg: Tensor | None, conv_clamp: float | None = None
) -> StyleGAN2:
    config = _config(state, conv_clamp)
    tensors = dict(state)
    for name in _kernel_names(config):
        if name not in tensors:
            raise ValueError(f"missing key {name}: expected {EXPECTED}")
        take_blur(tensors, name, gain=4.0, tolerance=1e-3)
    _add_noise(tensors, config)
    tensors["latent_avg"] = (
        torch.zeros(config.w_dim) if latent_avg is None else _one_row(latent_avg, config.w_dim)
    )
    network = build_network(config, rosinality_names(config), tensors)
    if latent_avg is None:
        logger.warning(
            "the checkpoint has no latent_avg: truncation pulls towards the mean w of %d samples "
            "(seed %d)",
            MEAN_SAMPLES,
            MEAN_SEED,
        )
        random = torch.Generator().manual_seed(MEAN_SEED)
        z = torch.randn(MEAN_SAMPLES, network.z_dim, generator=random)
        network.mean_w.copy_(network.mapping_network(z).mean(dim=0))
    return network


def read_checkpoint(path: Path, expected: str, allowed: Sequence[Callable[..., Any]] = ()) -> Any:
    """Load a file of torch.save without running code from it.

    Args:
        expected: what the file should be, for messages.
        allowed: harmless classes that the file may name beside tensors.

    Raises:
        ValueError: a damaged file, or one that asks to run code.
    """
    with path.open("rb") as file:
        try:
            with torch.serialization.safe_globals(list(allowed)):
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes raise nearly anything
            raise ValueError(
                f"expected {expected}, found a file that torch.load(weights_only=True) refuses "
                f"({type(error).__name__}): it is damaged, or asks to run code; get it again"
            ) from error


def _averaged_weights(checkpoint: Any) -> dict[str, Tensor]:
    """Return "g_ema" of a checkpoint; a ValueError says what another file is."""
    keys = list(map(str, checkpoint)) if isinstance(checkpoint, dict) else []
    state = checkpoint.get("g_ema") if isinstance(checkpoint, dict) else None
    if isinstance(state, dict):
        return state
    inner = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if isinstance(inner, dict) and any(str(key).startswith("encoder.") for key in inner):
        raise ValueError(
            f"expected {EXPECTED}, found an encoder of pSp or e4e: give the generator that it was "
            "trained with, and name this file as the world's inverter"
        )
    if "g" in keys:
        raise ValueError(
            f'expected {EXPECTED}, found "g", the weights of the last step, without "g_ema", '
            "their average: get a checkpoint with it, or save g under the name g_ema"
        )
    found = f"keys {shortened(keys)}" if keys else "no keys"
    raise ValueError(f"expected {EXPECTED}, found {type(checkpoint).__name__} with {found}")


def read_rosinality(path: Path) -> StyleGAN2:
    """Read a rosinality `.pt`, converted from NVIDIA's weights or trained with that repository.

    A file without `latent_avg` gets the mean of 4096 mapped samples, one without noise buffers gets
    noise from a seed, and the log says so. The names may begin with DataParallel's "module.".

    ValueError: any other file; the message says what it is.
    """
    # Files of rosinality's training hold its options, which are plain attributes.
    checkpoint = read_checkpoint(path, EXPECTED, [argparse.Namespace])
    state = _averaged_weights(checkpoint)
    latent_avg = checkpoint.get("latent_avg")
    if not all(isinstance(key, str) for key in state) or not all(
        isinstance(value, Tensor) for value in (*state.values(), latent_avg) if value is not None
    ):
        raise ValueError(f"expected {EXPECTED}, found values that are not tensors")
    return _network({key.removeprefix(PARALLEL): state[key] for key in state}, latent_avg)


def read_safetensors(path: Path) -> StyleGAN2:
    """Read a file of `save_safetensors`. Raises ValueError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            conv_clamp = (file.metadata() or {}).get("conv_clamp")
            clamp = None if conv_clamp is None else float(conv_clamp)
    except Exception as error:  # its own error class has no public name
        raise ValueError(
            f"expected a .safetensors file with rosinality's g_ema names and latent_avg, found one "
            f"that cannot be read ({error})"
        ) from error
    return _network(state, state.pop("latent_avg", None), clamp)


def rosinality_state(network: StyleGAN2) -> dict[str, Tensor]:
    """Return the weights under rosinality's g_ema names and shapes, and `latent_avg`."""
    own = network.state_dict()
    state = {}
    for ours, theirs in rosinality_names(network.config).items():
        tensor = own[ours]
        if theirs.endswith("conv.weight"):
            tensor = tensor[None]  # the layout has an axis for the batch
        elif theirs.endswith("noise.weight"):
            tensor = tensor.reshape(1)
        elif ours.startswith("to_rgbs.") and ours.endswith(".bias") and "affine" not in ours:
            tensor = tensor.reshape(1, 3, 1, 1)
        state[theirs] = tensor
    for name in _kernel_names(network.config):
        state[name] = blur_kernel(4.0)
    return state


def save_safetensors(network: StyleGAN2, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a network as `.safetensors` in rosinality's names; float16 halves the file.
    FileNotFoundError, OSError: it cannot be written. ValueError: `dtype` cannot hold a weight
    (float16 ends at 65504)."""
    state = {name: tensor.to(dtype) for name, tensor in rosinality_state(network).items()}
    lost = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if lost:
        raise ValueError(f"{path}: {lost[0]} does not fit {dtype}: save it as torch.float32")
    clamp = network.config.conv_clamp
    save_tensors(path, state, {} if clamp is None else {"conv_clamp": str(clamp)})
