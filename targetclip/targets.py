"""What the optimizer is given of target pictures: embeddings, and where to start.

Knows how a recipe wants both; nothing of where the pictures come from.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from targetclip.embedder import ImageEmbedder
from targetclip.encoders.inverter import LatentInverter
from targetclip.generators import Generator
from targetclip.media.images import picture_to_tensor
from targetclip.recipes import Initial, Recipe
from targetclip.scene import random_latents


def embed_targets(
    generator: Generator, embedder: ImageEmbedder, pictures: Sequence[Image.Image], recipe: Recipe
) -> Float[Tensor, "targets embed"]:
    """Raw embeddings of RGB target pictures, preprocessed as the recipe wants them."""
    if recipe.target_preprocess == "encoder":
        return embedder.embed_pictures(pictures)
    images = torch.cat([picture_to_tensor(p, generator.resolution) for p in pictures])
    with torch.no_grad():
        return embedder.embed_images(images.to(generator.mean_w.device), recipe.preprocess)


def invert(
    generator: Generator, inverter: LatentInverter | None, pictures: Sequence[Image.Image]
) -> Float[Tensor, "pictures num_ws w_dim"]:
    """Latents of RGB pictures.

    Raises:
        ValueError: there is no inverter.
    """
    if inverter is None:
        raise ValueError(
            "this world has no inverter, so pictures have no latents: "
            "use generated sources (--num-sources), and a recipe that does not invert"
        )
    images = torch.cat([picture_to_tensor(p, generator.resolution) for p in pictures])
    with torch.no_grad():
        return inverter(images.to(generator.mean_w.device))


def initial_directions(
    generator: Generator,
    inverter: LatentInverter | None,
    pictures: Sequence[Image.Image],
    kind: Initial,
    seeds: Sequence[int],
) -> Float[Tensor, "targets num_ws w_dim"]:
    """Where optimizations start (release: absolute latents, not offsets); one seed a target.

    Raises:
        ValueError: the inversion is wanted and there is no inverter.
    """
    if kind == "inversion":
        return invert(generator, inverter, pictures)
    if kind == "random":
        return random_latents(generator, seeds)
    return torch.zeros_like(generator.mean_w).repeat(len(pictures), generator.num_ws, 1)
