"""The bundled world as it ships: whole, and good enough to carry an essence."""

import dataclasses

import torch

from data.drawn.sketch import NAMES, Face, draw
from predictor import EssenceTransfer
from targetclip import RECIPES, load_parts, load_world
from targetclip.optimize import optimize_directions
from targetclip.scene import random_latents


def test_a_few_steps_bring_unseen_sources_to_the_target() -> None:
    world = load_world("sketch64")
    parts = load_parts(world, torch.device("cpu"))
    essence = EssenceTransfer(
        parts.generator, parts.embedder, parts.inverter, truncation=world.truncation
    )
    recipe = RECIPES["consistent"]
    # Green hair, white face paint, red lips; nothing else out of the ordinary.
    joker = dict.fromkeys(NAMES, 0.5) | dict.fromkeys(("hat", "beard", "glasses", "moustache"), 0.0)
    joker |= {"hair_colour": 0.95, "face_paint": 1.0, "lipstick": 1.0, "blush": 0.0}
    target = draw(Face(**joker))
    found = optimize_directions(
        parts.generator,
        parts.embedder,
        essence.embed_target(target, recipe)[None],
        random_latents(parts.generator, range(1000, 1032), 1.0),
        dataclasses.replace(recipe, steps=25, sources=4),
        torch.zeros(1, parts.generator.num_ws, parts.generator.w_dim),
        [0],
    )
    sources = essence.generated_sources(8, seed=3)
    before = essence.edit(sources, found.directions[0], 0.0)
    scores = essence.score(target, before, essence.edit(sources, found.directions[0]))
    assert scores.transfer > float(scores.target_before.mean()) + 0.2
    # Green hair: over the crown of every head, green rises against red.
    crown = slice(14, 20)
    after = essence.edit(sources, found.directions[0])[:, :, crown, 26:38].mean(dim=(2, 3))
    plain = before[:, :, crown, 26:38].mean(dim=(2, 3))
    greener = (after[:, 1] - after[:, 0]) > (plain[:, 1] - plain[:, 0])
    assert greener.float().mean() > 0.8
