"""The bundled world as it ships: whole, and good enough to carry an essence."""

import dataclasses

import torch

from data.drawn.sketch import NAMES, Face, draw
from targetclip.recipes import RECIPES
from targetclip.scene import random_latents
from targetclip.world import load_scene, load_world


def test_a_few_steps_bring_unseen_sources_to_the_target() -> None:
    scene = load_scene(load_world("sketch64"), torch.device("cpu"))
    recipe = dataclasses.replace(RECIPES["consistent"], steps=25, sources=4)
    # Green hair, white face paint, red lips; nothing else out of the ordinary.
    joker = dict.fromkeys(NAMES, 0.5) | dict.fromkeys(("hat", "beard", "glasses", "moustache"), 0.0)
    joker |= {"hair_colour": 0.95, "face_paint": 1.0, "lipstick": 1.0, "blush": 0.0}
    target = [draw(Face(**joker))]
    bank = random_latents(scene.generator, range(1000, 1032), 1.0)
    embedding = scene.embed_targets(target, recipe)
    (direction,) = scene.search(
        embedding, recipe, scene.initial(target, "zero", [0]), [0], bank=bank
    ).directions
    sources = scene.sources(8, seed=3)
    scores = scene.score(embedding, sources, direction[None])
    assert float(scores.transfer) > float(scores.target_before.mean()) + 0.2
    # Green hair: over the crown of every head, green rises against red.
    crown = slice(14, 20)
    after = scene.edit(sources, direction)[:, :, crown, 26:38].mean(dim=(2, 3))
    plain = scene.render(sources)[:, :, crown, 26:38].mean(dim=(2, 3))
    greener = (after[:, 1] - after[:, 0]) > (plain[:, 1] - plain[:, 0])
    assert greener.float().mean() > 0.8
