"""From a world to an EssenceTransfer with all its parts.

Knows what a world file names; nothing of what is done with it.
"""

from pathlib import Path

import torch

from predictor.mapper import load_mapper
from predictor.text import TextTargets
from predictor.transfer import EssenceTransfer
from targetclip.recipes import RECIPES
from targetclip.world import World, load_parts


def load_essence(
    world: World,
    device: torch.device,
    mapper: Path | None = None,
    max_images: int = 64,
    checkpoint_layers: bool = False,
) -> EssenceTransfer:
    """Load a world's networks and its mapper, or another mapper's file.

    `checkpoint_layers`: see `StyleGAN2`; it matters where the optimizer searches.

    Raises:
        FileNotFoundError, ValueError: as the readers of the parts do; a mapper of other networks.
    """
    parts = load_parts(world, device, checkpoint_layers)
    found, path = None, mapper or world.mapper
    if path is not None:
        found, _ = load_mapper(path, parts.generator.fingerprint, parts.embedder.fingerprint)
        found.to(device)
    texts = TextTargets(parts.embedder, world.neutral) if world.neutral else None
    return EssenceTransfer(
        parts.generator,
        parts.embedder,
        parts.inverter,
        found,
        texts,
        parts.identity,
        world.truncation,
        max_images,
        recipe=RECIPES[world.recipe],
    )
