"""Sources: latents of the generator's own samples, each named by a seed.

Every source depends on its own seed alone, so a bank is the same whatever its size, its order, the
batch or the machine's number of processes. Knows nothing of what is done with them.
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from targetclip.generators import Generator

BANK = 256  # sources a recipe with fresh sources draws from
BANK_SEED = 1 << 40  # far from the small seeds people choose for sources of their own


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and nothing else, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def random_latents(
    generator: Generator, seeds: Sequence[int], truncation: float = 0.7
) -> Float[Tensor, "batch num_ws w_dim"]:
    """One truncated latent for each seed; seeds alone decide, not their order or number."""
    z = torch.stack(
        [torch.randn(generator.z_dim, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    with torch.no_grad():
        return generator.mapping(z.to(generator.mean_w.device), truncation)


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
