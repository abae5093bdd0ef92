"""Sources: named by seeds and nothing else."""

import pytest
import torch

from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.sources import generated_sources, source_bank
from targetclip.scene import random_latents
from targetclip.seeds import BANK, seed_of


@pytest.fixture(scope="module")
def generator() -> StyleGAN2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StyleGAN2(StyleGAN2Config(16, 8, 8, 2, (8, 8, 8))).requires_grad_(False)


def test_a_seed_depends_on_every_part_and_on_no_machine() -> None:
    assert seed_of("source", 0, 1) == 26411325901598597
    seeds = {seed_of(*parts) for parts in [("a", 1, 2), ("a", 2, 1), ("b", 1, 2), ("a", 12), ()]}
    assert len(seeds) == 5 and all(0 <= seed < 2**56 for seed in seeds)


def test_a_smaller_bank_is_the_start_of_a_larger_one(generator: StyleGAN2) -> None:
    # A mapping of other rows beside it rounds differently, no more.
    few, all_of_it = source_bank(generator, 0.7, 3), source_bank(generator, 0.7)
    assert torch.allclose(few, all_of_it[:3], atol=1e-5)
    assert len(all_of_it) == BANK


def test_generated_sources_are_none_of_the_bank(generator: StyleGAN2) -> None:
    bank, sources = source_bank(generator, 1.0), generated_sources(generator, 1.0, 16, seed=1)
    assert (bank[:, None] - sources[None]).abs().amax(dim=(2, 3)).min() > 1e-3
    assert torch.allclose(sources[:5], generated_sources(generator, 1.0, 5, seed=1), atol=1e-5)
    assert not torch.allclose(sources, generated_sources(generator, 1.0, 16, seed=2), atol=1e-3)


def test_a_latent_depends_on_its_own_seed_alone(generator: StyleGAN2) -> None:
    together = random_latents(generator, [5, 6, 7])
    assert torch.allclose(together[1], random_latents(generator, [6])[0], atol=1e-5)
