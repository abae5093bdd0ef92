"""The bundled world as it ships: whole, and good enough to carry an essence without a mapper."""

import dataclasses
from pathlib import Path

import torch

from targetclip.media.images import read_picture
from targetclip.recipes import RECIPES
from targetclip.scene import random_latents
from targetclip.world import load_scene, load_world

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_few_steps_bring_unseen_sources_to_the_target() -> None:
    scene = load_scene(load_world("avatars"), torch.device("cpu"))
    recipe = dataclasses.replace(RECIPES["identity"], steps=15, sources=4, render_size=64)
    target = [read_picture(EXAMPLES / "joker.png")]
    bank = random_latents(scene.generator, range(1000, 1016), 1.0)
    embedding = scene.embed_targets(target, recipe)
    (direction,) = scene.search(
        embedding, recipe, scene.initial(target, "zero", [0]), [0], bank=bank
    ).directions
    sources = scene.sources(8, seed=3)
    scores = scene.score(embedding, sources, direction[None])
    assert float(scores.transfer) > float(scores.target_before.mean()) + 0.2
    # Green hair: over the crown of every head, green rises against red.
    crown = slice(28, 40)
    after = scene.edit(sources, direction)[:, :, crown, 52:76].mean(dim=(2, 3))
    plain = scene.render(sources)[:, :, crown, 52:76].mean(dim=(2, 3))
    greener = (after[:, 1] - after[:, 0]) > (plain[:, 1] - plain[:, 0])
    assert greener.float().mean() > 0.8
