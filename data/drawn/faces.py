"""Faces by the thousand: latents to face parameters, and banks of finished pictures on disk.

Knows how the bundled generator's z stands for a face, and how to draw many faces once and keep
them. A bank is a plain `.npy` of uint8 pictures, made again from its seed when it is missing.
"""

import os
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor
from tqdm import tqdm

from data.drawn.sketch import LAYERS, NAMES, SIZE, TINTS, Extras, Face, Style, draw
from targetclip.generators.stylegan2 import StyleGAN2, normalize_latent

Item = TypeVar("Item")

GROUPS = ("coarse", "middle", "fine")
# Which w vectors of the 64 px generator each group of parameters is drawn by.
GROUP_OF_LAYER = (0, 0, 0, 1, 1, 1, 2, 2, 2, 2)


def faces_from_z(z: Float[Tensor, "batch groups z_dim"]) -> Float[Tensor, "batch parameters"]:
    """Face parameters in [0, 1] that latents z ~ N(0, I) stand for, one z for each of GROUPS.

    Parameter i is the normal CDF of coordinate i of its group's z, normalised as the mapping
    network normalises it, so that the network can know it exactly.
    """
    unit = normalize_latent(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    group = [GROUPS.index(LAYERS[name]) for name in NAMES]
    coordinates = unit[:, group, range(len(NAMES))]
    parameters: Tensor = torch.special.ndtr(coordinates)
    return parameters


def sample_z(count: int, z_dim: int, seed: int) -> Float[Tensor, "count groups z_dim"]:
    """Latents to train a generator on: in every second one, each group has a z of its own."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, len(GROUPS), z_dim, generator=generator)
    z[::2] = z[::2, :1]
    return z


def draw_parameters(values: Float[ndarray, " parameters"]) -> UInt8[ndarray, "64 64 3"]:
    """Picture of one face given as an array of parameters."""
    return np.asarray(draw(Face(*values.tolist())))


def bank(
    path: Path, items: list[Item], render: Callable[[Item], UInt8[ndarray, "64 64 3"]]
) -> UInt8[ndarray, "count 64 64 3"]:
    """Pictures of `items`, drawn by all cores on first use and kept at `path`.

    `render` must be a module-level function, since worker processes import it. The file
    appears only when it is whole.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        shape = (len(items), SIZE, SIZE, 3)
        try:
            drawing = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
            with get_context("spawn").Pool() as pool:
                drawn = pool.imap(render, items, chunksize=64)
                for i, picture in enumerate(tqdm(drawn, path.name, total=len(items))):
                    drawing[i] = picture
            drawing.flush()
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    pictures: UInt8[ndarray, "count 64 64 3"] = np.load(path, mmap_mode="r")
    if pictures.shape != (len(items), SIZE, SIZE, 3):
        raise ValueError(
            f"{path}: expected {len(items)} pictures, found shape {list(pictures.shape)}: "
            "delete it, it is made anew"
        )
    return pictures


def to_images(pictures: UInt8[ndarray, "batch 64 64 3"]) -> Float[Tensor, "batch 3 64 64"]:
    """uint8 pictures as images in [-1, 1]."""
    # A bank on disk is read-only, which torch cannot say of a tensor.
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def wide_face(
    seed: int, index: int, styled: float = 0.6, extra: float = 0.3
) -> tuple[Face, Extras, Style]:
    """A face from beyond the generator's range: with probability, another style and extras.

    Args:
        seed, index: name the face; any two differ.
        styled: probability of each of two changes of style.
        extra: probability of one attribute the generator never draws; half of it for a second.
    """
    rng = np.random.default_rng([seed, index])
    face = Face(*rng.uniform(0, 1, len(NAMES)).tolist())
    names = ["tint", "cat_ears", "clown_nose", "mask", "crown", "tattoo"]
    count = int(rng.uniform() < extra) + int(rng.uniform() < extra / 2)
    chosen: dict[str, Any] = dict.fromkeys(rng.choice(names, count, replace=False), True)
    if "tint" in chosen:
        chosen["tint"] = str(rng.choice(list(TINTS)))
    style: dict[str, Any] = {}
    if rng.uniform() < styled:
        style["outline"] = bool(rng.uniform() < 0.35)
        style["backdrop"] = int(rng.integers(1 << 30)) if rng.uniform() < 0.4 else None
        style["blur"] = float(rng.uniform(0.3, 0.9)) if rng.uniform() < 0.35 else 0.0
    if rng.uniform() < styled:
        style["colour_shift"] = tuple(rng.uniform(0.85, 1.12, 3).tolist())
        style["brightness"] = float(rng.uniform(-18, 18))
        style["grey"] = bool(rng.uniform() < 0.04)
    return face, Extras(**chosen), Style(**style)


def draw_wide(key: tuple[int, int]) -> UInt8[ndarray, "64 64 3"]:
    """Picture of `wide_face(*key)`."""
    return np.asarray(draw(*wide_face(*key)))


def ws_from_z(
    generator: StyleGAN2, z: Float[Tensor, "batch groups z_dim"]
) -> Float[Tensor, "batch num_ws w_dim"]:
    """W+ of latents that have a z for each group of layers."""
    w: Tensor = generator.mapping_network(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    return w[:, list(GROUP_OF_LAYER[: generator.num_ws])]


def psnr(
    images: Float[Tensor, "batch 3 height width"], truth: Float[Tensor, "batch 3 height width"]
) -> float:
    """Peak signal-to-noise ratio in decibels, mean over pictures, for images in [-1, 1]."""
    error = (images.clamp(-1, 1) - truth).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())
