"""Shim."""

from jaxtyping import Float
from torch import Tensor

from targetclip.generators import Generator
from targetclip.scene import random_latents
from targetclip.seeds import BANK, BANK_SEED, seed_of


def source_bank(
    generator: Generator, truncation: float, count: int = BANK
) -> Float[Tensor, "bank num_ws w_dim"]:
    """The sources that directions are optimized on; a smaller bank is the start of a larger one."""
    return random_latents(generator, range(BANK_SEED, BANK_SEED + count), truncation)


def generated_sources(
    generator: Generator, truncation: float, count: int, seed: int = 0
) -> Float[Tensor, "sources num_ws w_dim"]:
    """Sources of a seed, none of which is in the bank; source i of a seed is always the same."""
    return random_latents(generator, [seed_of("source", seed, i) for i in range(count)], truncation)
