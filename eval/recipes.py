"""Compare recipes of the optimizer on the bundled world, on sources that none of them edited.

Targets are drawn faces that no network was trained on; half of them with attributes and styles the
generator cannot draw. A table and a sheet of pictures come out.

    python -m eval.recipes --out runs/recipes                      # the named recipes
    python -m eval.recipes --out runs/recipes --variants all       # and what was weighed
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data.faces import wide_face
from data.readings import readings_of
from data.sketch import draw
from eval.metrics import essence_acquired, identity_kept, transfer_scores
from eval.reader import load_reader
from predictor.transfer import EssenceTransfer
from targetclip.editing import render
from targetclip.generators import Generator
from targetclip.images import labelled_grid, tensor_to_pictures
from targetclip.losses import consistency_loss
from targetclip.optimize import optimize_directions
from targetclip.recipes import RECIPES, Recipe
from targetclip.sources import seed_of, source_bank
from targetclip.world import load_parts, load_world

TARGET_SEED = 2_000_003  # validation: not those of training, not those of the final evaluation


def variants() -> dict[str, Recipe]:
    """What was weighed for the `consistent` recipe, one change at a time."""
    base = RECIPES["consistent"]
    changes: dict[str, dict[str, object]] = {
        "fixed 6 sources": {"fresh_sources": False},
        "150 steps": {"steps": 150},
        "600 steps": {"steps": 600},
        "rate 0.05": {"learning_rate": 0.05},
        "rate 0.2": {"learning_rate": 0.2},
        "decay 1e-3": {"weight_decay": 1e-3},
        "decay 1e-2": {"weight_decay": 1e-2},
        "decay 3e-2": {"weight_decay": 3e-2},
        "consistency 0": {"consistency_weight": 0.0},
        "consistency 1": {"consistency_weight": 1.0},
        "tied layers": {"tied_layers": True},
        "3 sources": {"sources": 3},
        "start inversion": {"initial": "inversion"},
    }
    return {name: dataclasses.replace(base, **change) for name, change in changes.items()}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json and one sheet of pictures a recipe."""
    world: str = "sketch64"
    variants: Literal["named", "all"] = "named"
    """The named recipes, or variants of `consistent` as well."""
    only: tuple[str, ...] = ()
    """Run these alone, by name."""
    targets: int = 12
    held_out: int = 16
    """Sources that no recipe edits while it optimizes."""
    max_steps: int | None = None
    """Cut every recipe to so many steps."""
    seed: int = 0


@dataclass(frozen=True)
class Targets:
    """Target pictures and what they show."""

    pictures: list[Image.Image]
    readings: Float[Tensor, "targets outputs"]
    seen: Float[Tensor, "targets outputs"]


def draw_targets(count: int) -> Targets:
    """Every second one plain, the others in another style or with extras."""
    triples = [wide_face(TARGET_SEED, i, styled=i % 2, extra=i % 2) for i in range(count)]
    values, seen = zip(*(readings_of(face) for face, _, _ in triples), strict=True)
    return Targets(
        [draw(*triple) for triple in triples],
        torch.from_numpy(np.stack(values)).float(),
        torch.from_numpy(np.stack(seen)),
    )


def run_recipe(
    essence: EssenceTransfer, recipe: Recipe, targets: Targets, config: Config
) -> tuple[dict[str, float], Float[Tensor, "targets sources num_ws w_dim"]]:
    """Directions of all targets at once, and their scores on held-out sources."""
    generator, embedder = essence.generator, essence.embedder
    pictures = targets.pictures
    embeddings = torch.stack([essence.embed_target(p, recipe) for p in pictures])
    initial = torch.stack([essence.initial(p, recipe.initial, config.seed) for p in pictures])
    seeds = [seed_of("recipes", config.seed, i) for i in range(len(pictures))]
    start = time.perf_counter()
    found = optimize_directions(
        generator,
        embedder,
        embeddings,
        source_bank(generator, essence.truncation),
        recipe,
        initial,
        seeds,
        max_images=512,
    )
    seconds = (time.perf_counter() - start) / len(pictures)
    sources = essence.generated_sources(config.held_out, seed=1)
    ws = sources[None] + found.directions[:, None]

    judged = embedder.embed_pictures(pictures)
    reader = load_reader()
    with torch.no_grad():
        before = render(generator, sources)
        edited = render(generator, ws.flatten(0, 1)).unflatten(0, ws.shape[:2])
        embedded = embedder.embed_images(edited.flatten(0, 1)).unflatten(0, ws.shape[:2])
        unedited = embedder.embed_images(before).expand(len(ws), -1, -1)
        read = reader(edited.flatten(0, 1).clamp(-1, 1)).unflatten(0, ws.shape[:2])
        read_before = reader(before.clamp(-1, 1))
    plain = torch.arange(len(pictures)) % 2 == 0
    transfer = transfer_scores(embedded, judged).mean(dim=1)
    acquired = essence_acquired(read, read_before, targets.readings, targets.seen)
    consistency = 1 - consistency_loss(unedited, embedded, "unit")
    kept = identity_kept(read, read_before)
    return {
        "transfer": float(transfer.mean()),
        "transfer_in_range": float(transfer[plain].mean()),
        "transfer_out_of_range": float(transfer[~plain].mean()),
        "own_transfer": 1 - float(found.transfer.mean()),
        "consistency": float(consistency.mean()),
        "essence_in_range": float(acquired[plain].mean()),
        "essence_out_of_range": float(acquired[~plain].mean()),
        "identity": float(kept.mean()),
        "norm": float(found.directions.flatten(1).norm(dim=1).mean()),
        "seconds_per_target": seconds,
    }, ws


def save_sheet(
    generator: Generator,
    targets: Targets,
    ws: Float[Tensor, "targets sources num_ws w_dim"],
    path: Path,
) -> None:
    """A row a target: the target itself, then sources with its essence."""
    rows = {}
    for i, (picture, edited) in enumerate(zip(targets.pictures, ws, strict=True)):
        rows[f"target {i} and sources with its essence"] = [
            picture,
            *tensor_to_pictures(render(generator, edited[:9])),
        ]
    labelled_grid(None, rows).save(path)


def run(config: Config) -> None:
    world = load_world(config.world)
    parts = load_parts(world, torch.get_default_device())
    essence = EssenceTransfer(parts.generator, parts.embedder, parts.inverter, world.truncation)
    targets = draw_targets(config.targets)
    recipes = RECIPES | (variants() if config.variants == "all" else {})
    chosen = {name: r for name, r in recipes.items() if not config.only or name in config.only}
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "report.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    for name, recipe in chosen.items():
        if config.max_steps is not None:
            recipe = dataclasses.replace(recipe, steps=min(recipe.steps, config.max_steps))
        if name in report:  # an interrupted comparison goes on
            continue
        figures, ws = run_recipe(essence, recipe, targets, config)
        report[name] = {**figures, "settings": dataclasses.asdict(recipe)}
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{name:18}" + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()), flush=True)
        save_sheet(essence.generator, targets, ws, config.out / f"{name.replace(' ', '_')}.png")


def main() -> None:
    run(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
