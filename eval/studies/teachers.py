"""Compare settings of the optimizer on the bundled world, on sources that none of them edited.

Targets are drawn faces that no network was trained on; half of them with attributes and styles the
generator cannot draw. Every setting runs twice, with other sources and other random starts: what
two runs agree on is the target's, the rest is chance. A table and sheets of pictures come out.

    python -m eval.studies.teachers --out runs/recipes                 # the named recipes
    python -m eval.studies.teachers --out runs/recipes --variants all  # all settings, in hours
"""

import dataclasses
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.drawn.faces import wide_face
from data.drawn.readings import readings_of
from data.drawn.sketch import Face, draw
from eval.methods import drawn_answer
from eval.metrics import essence_acquired, identity_kept, transfer_scores
from eval.reader import load_reader
from eval.recipe_charts import recipe_charts
from predictor.report import make_folder, write_file
from predictor.transfer import EssenceTransfer
from targetclip.editing import render
from targetclip.losses import consistency_loss
from targetclip.media.images import labelled_grid, tensor_to_pictures, write_picture
from targetclip.optimize import Optimized, optimize_directions
from targetclip.precision import in_bfloat16
from targetclip.recipes import RECIPES, Recipe, stored_recipe
from targetclip.sources import generated_sources
from targetclip.seeds import BANK, seed_of
from targetclip.world import load_parts, load_world

HELD_OUT_SEED = 1  # of the sources that judge, as in trainings
TARGET_SEED = 2_000_003  # validation: not those of training, not those of the final evaluation


# What is weighed for the `consistent` recipe, one change at a time.
CHANGES: dict[str, dict[str, Any]] = {
    "start inversion": {"initial": "inversion"},
    "start random": {"initial": "random"},
    "1 fixed source": {"sources": 1, "fresh_sources": False},
    "2 fixed sources": {"sources": 2, "fresh_sources": False},
    "4 fixed sources": {"sources": 4, "fresh_sources": False},
    "6 fixed sources": {"sources": 6, "fresh_sources": False},
    "8 fixed sources": {"sources": 8, "fresh_sources": False},
    "3 fresh sources": {"sources": 3},
    "12 fresh sources": {"sources": 12},
    "75 steps": {"steps": 75},
    "150 steps": {"steps": 150},
    "300 steps": {"steps": 300},
    "600 steps": {"steps": 600},
    "rate 0.05": {"learning_rate": 0.05},
    "rate 0.2": {"learning_rate": 0.2},
    "decay 0": {"weight_decay": 0.0},
    "decay 3e-3": {"weight_decay": 3e-3},
    "decay 1e-2": {"weight_decay": 1e-2},
    "decay 2e-2": {"weight_decay": 2e-2},
    "decay 4e-2": {"weight_decay": 4e-2},
    "consistency 0": {"consistency_weight": 0.0},
    "consistency 0.2": {"consistency_weight": 0.2},
    "consistency 0.5": {"consistency_weight": 0.5},
    "consistency 1": {"consistency_weight": 1.0},
    "consistency 2": {"consistency_weight": 2.0},
    "raw differences": {"differences": "raw"},
    "release preprocessing": {"preprocess": "release"},
    "tied layers": {"tied_layers": True},
    "identity 0.5": {"identity_weight": 0.5},
    "identity 0.15, decay 2e-3": {"identity_weight": 0.15, "weight_decay": 2e-3},
    "6 fixed sources, coefficients": {
        "sources": 6,
        "fresh_sources": False,
        "coefficients": True,
    },
}


def variants() -> dict[str, Recipe]:
    """The named recipes, and `consistent` with one change each."""
    base = RECIPES["consistent"]
    changed = {name: dataclasses.replace(base, **change) for name, change in CHANGES.items()}
    return RECIPES | {name: recipe for name, recipe in changed.items() if recipe != base}


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
    strengths: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """How far along the direction to judge, besides 1."""
    twice: bool = True
    """Run everything a second time, to see what two runs agree on."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the optimizer; scores are always in float32."""
    max_steps: int | None = None
    """Cut every recipe to so many steps."""
    seed: int = 0


@dataclass(frozen=True)
class Targets:
    """Target pictures and what they show."""

    pictures: list[Image.Image]
    faces: list[Face]
    readings: Float[Tensor, "targets outputs"]
    seen: Bool[Tensor, "targets outputs"]


def draw_targets(count: int) -> Targets:
    """Every second one plain, the others in another style or with extras."""
    triples = [wide_face(TARGET_SEED, i, styled=i % 2, extra=i % 2) for i in range(count)]
    values, seen = zip(*(readings_of(face) for face, _, _ in triples), strict=True)
    return Targets(
        [draw(*triple) for triple in triples],
        [face for face, _, _ in triples],
        torch.from_numpy(np.stack(values)).float(),
        torch.from_numpy(np.stack(seen)),
    )


def find_directions(
    essence: EssenceTransfer, recipe: Recipe, targets: Targets, seed: int, half: bool
) -> tuple[Optimized, float]:
    """Directions of all targets at once, and seconds a target; other seeds have other sources."""
    pictures = targets.pictures
    embeddings = torch.stack([essence.embed_target(p, recipe) for p in pictures])
    initial = torch.stack(
        [essence.initial(p, recipe.initial, seed_of(seed, i)) for i, p in enumerate(pictures)]
    )
    bank = generated_sources(essence.generator, essence.truncation, BANK, seed_of("bank", seed))
    seeds = [seed_of("recipes", seed, i) for i in range(len(pictures))]
    start = time.perf_counter()
    with in_bfloat16(bank.device) if half else nullcontext():
        found = optimize_directions(
            essence.generator,
            essence.embedder,
            embeddings,
            bank,
            recipe,
            initial,
            seeds,
            max_images=512,
            identity=essence.identity,
        )
    return found, (time.perf_counter() - start) / len(pictures)


def scores_of(
    essence: EssenceTransfer,
    targets: Targets,
    before: Float[Tensor, "sources 3 height width"],
    edited: Float[Tensor, "targets sources 3 height width"],
) -> dict[str, float]:
    """Means over the targets, of images before and after an edit."""
    embedder, reader = essence.embedder, load_reader()
    judged = embedder.embed_pictures(targets.pictures)
    shape = edited.shape[:2]
    with torch.no_grad():
        embedded = embedder.embed_images(edited.flatten(0, 1)).unflatten(0, shape)
        unedited = embedder.embed_images(before).expand(len(edited), -1, -1)
        read = reader(edited.flatten(0, 1).clamp(-1, 1)).unflatten(0, shape)
        read_before = reader(before.clamp(-1, 1))
    plain = torch.arange(len(edited)) % 2 == 0
    transfer = transfer_scores(embedded, judged).mean(dim=1)
    acquired = essence_acquired(read, read_before, targets.readings, targets.seen)
    return {
        "transfer": float(transfer.mean()),
        "transfer_in_range": float(transfer[plain].mean()),
        "transfer_out_of_range": float(transfer[~plain].mean()),
        "consistency": float((1 - consistency_loss(unedited, embedded, "unit")).mean()),
        "essence_in_range": float(acquired[plain].mean()),
        "essence_out_of_range": float(acquired[~plain].mean()),
        "identity": float(identity_kept(read, read_before).mean()),
    }


def judge(
    essence: EssenceTransfer,
    targets: Targets,
    sources: Float[Tensor, "sources num_ws w_dim"],
    edits: Float[Tensor, "targets num_ws w_dim"],
) -> dict[str, float]:
    """Scores of edits on sources that no direction was optimized on."""
    before = render(essence.generator, sources)
    edited = render(essence.generator, (sources[None] + edits[:, None]).flatten(0, 1))
    return scores_of(essence, targets, before, edited.unflatten(0, (len(edits), len(sources))))


def drawn_scores(essence: EssenceTransfer, targets: Targets, count: int) -> dict[str, float]:
    """Scores of the right answer, which no direction can reach."""
    before, edited = drawn_answer(targets.faces, essence.generator.z_dim, count, HELD_OUT_SEED)
    return scores_of(essence, targets, before, edited)


def run_recipe(
    essence: EssenceTransfer, recipe: Recipe, targets: Targets, config: Config
) -> tuple[dict[str, Any], Float[Tensor, "targets num_ws w_dim"]]:
    """Directions of all targets, and their scores on held-out sources."""
    half = config.precision == "bf16"
    found, seconds = find_directions(essence, recipe, targets, config.seed, half)
    directions = found.directions
    sources = essence.generated_sources(config.held_out, HELD_OUT_SEED)
    figures: dict[str, Any] = {
        **judge(essence, targets, sources, directions),
        "own_transfer": 1 - float(found.transfer.mean()),
        "norm": float(directions.flatten(1).norm(dim=1).mean()),
        "seconds_per_target": seconds,
        "by_strength": {
            strength: judge(essence, targets, sources, strength * directions)
            for strength in config.strengths
        },
    }
    if config.twice:
        again, _ = find_directions(essence, recipe, targets, config.seed + 1, half)
        scores = judge(essence, targets, sources, again.directions)
        both = torch.stack([directions, again.directions]).flatten(2)
        figures["agreement"] = float(F.cosine_similarity(both[0], both[1], dim=1).mean())
        figures["again"] = scores
    return figures, directions


def save_sheet(
    essence: EssenceTransfer,
    targets: Targets,
    directions: Float[Tensor, "targets num_ws w_dim"],
    path: Path,
) -> None:
    """The sources, then a row a target: the target itself, and sources with its essence."""
    sources = essence.generated_sources(9, seed=1)
    unedited = tensor_to_pictures(render(essence.generator, sources))
    rows = {"sources": [Image.new("RGB", unedited[0].size, "white"), *unedited]}
    for i, (picture, direction) in enumerate(zip(targets.pictures, directions, strict=True)):
        edited = tensor_to_pictures(render(essence.generator, sources + direction))
        rows[f"target {i} and sources with its essence"] = [picture, *edited]
    labelled_grid(None, rows).save(path)


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as a table in Markdown."""
    columns = {
        "transfer": "transfer score",
        "transfer_out_of_range": "out of range",
        "own_transfer": "on its own sources",
        "consistency": "consistency",
        "essence_in_range": "essence acquired",
        "identity": "identity kept",
        "agreement": "agreement of two runs",
        "norm": "length",
        "seconds_per_target": "s a target",
    }
    lines = [f"| setting | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in report.items():
        cells = [f"{figures[key]:.3g}" if key in figures else "" for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def chosen_recipes(config: Config) -> dict[str, Recipe]:
    """The recipes to run, by name; a ValueError for a name there is not."""
    recipes = variants() if config.variants == "all" else RECIPES
    if unknown := sorted(set(config.only) - recipes.keys()):
        raise ValueError(
            f"--only: expected names among {', '.join(recipes)}, found {', '.join(unknown)}"
        )
    chosen = {name: r for name, r in recipes.items() if not config.only or name in config.only}
    if config.max_steps is None:
        return chosen
    cut = config.max_steps
    return {n: dataclasses.replace(r, steps=min(r.steps, cut)) for n, r in chosen.items()}


def open_report(path: Path, config: Config) -> dict[str, Any]:
    """What an earlier run of the same comparison found; a ValueError if it was of another one."""
    same = {
        name: getattr(config, name)
        for name in ("world", "targets", "held_out", "strengths", "precision", "seed")
    }
    same = json.loads(json.dumps(same))
    if not path.exists():
        return {"comparison": same}
    report: dict[str, Any] = json.loads(path.read_text())
    if report.get("comparison") != same:
        raise ValueError(
            f"--out: {str(path)!r} is of another comparison: expected {same}, found "
            f"{report.get('comparison')}; give the same options, or another folder"
        )
    return report


def run(config: Config) -> None:
    """Run what is missing in the report, and write it after every recipe.

    Raises:
        ValueError: an unknown recipe, or a report of other options.
    """
    recipes = chosen_recipes(config)
    path = config.out / "report.json"
    report = open_report(path, config)
    world = load_world(config.world)
    parts = load_parts(world, torch.get_default_device())
    essence = EssenceTransfer(
        parts.generator,
        parts.embedder,
        parts.inverter,
        identity=parts.identity,
        truncation=world.truncation,
    )
    for name in [name for name, recipe in recipes.items() if recipe.identity_weight]:
        if parts.identity is None and name not in config.only:
            del recipes[name]
            print(f"left out: {name}: the world has no identity model", flush=True)
    targets = draw_targets(config.targets)
    make_folder(config.out)

    def save() -> None:
        write_file(path, (json.dumps(report, indent=2) + "\n").encode())

    if "drawn answer" not in report:
        report["drawn answer"] = drawn_scores(essence, targets, config.held_out)
        save()
    for name, recipe in recipes.items():
        settings = dataclasses.asdict(recipe)
        # An interrupted comparison goes on; a recipe that has changed since is run again.
        if name in report and stored_recipe(report[name]["settings"]) == recipe:
            continue
        figures, directions = run_recipe(essence, recipe, targets, config)
        report[name] = {**figures, "settings": settings}
        save()
        shown = {key: value for key, value in figures.items() if isinstance(value, float)}
        print(f"{name:22}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)
        save_sheet(essence, targets, directions, config.out / f"{name.replace(' ', '_')}.png")
    found = {name: figures for name, figures in report.items() if name != "comparison"}
    write_file(config.out / "report.md", table(found).encode())
    for kind, picture in recipe_charts(found).items():
        write_picture(picture, config.out / f"chart_{kind}.png")


def main() -> None:
    """Errors of input and of files are one line."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
