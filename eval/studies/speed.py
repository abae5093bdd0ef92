"""Time a prediction, an edit and the optimizer, and give ratios of seconds of one run.

    python -m eval.studies.speed --out runs/speed
    python -m eval.studies.speed --out runs/speed --world ffhq.toml --mapper ffhq-mapper.safetensors

Three ratios: target picture to direction against one encoding of a picture; target picture to one
edited image against one encoding and one rendering; the optimizer against target picture to
direction. Quick operations are timed in turns, so that other load on the machine falls on all.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from targetclip import command
from targetclip.command import Precision, choose_precision, in_precision, start
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import VALIDATION_SOURCES
from targetclip.world import DEFAULT_WORLD, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper file. Default: the world's."""
    rounds: int = 200
    """How often each quick operation is timed; the median counts."""
    steps: int | None = None
    """Steps of the optimizer that are timed, scaled to the recipe's number. Default: all."""
    precision: Precision | None = None
    """Of all that is timed. Default: accelerate's, or else fp32."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.speed", Config, exclusive=True)

import torch
from PIL import Image
from tqdm import tqdm

from eval.costs import machine, seconds_of, wait_for
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.media.images import tensor_to_pictures


def median_seconds(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Time each call once a round, after a round to warm up, and return medians."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in tqdm(range(rounds + 1), desc="quick", unit="round"):
        for name, work in works.items():
            taken = seconds_of(work, device)
            if turn:
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def quick_works(essence: EssenceTransfer, target: Image.Image) -> dict[str, Callable[[], object]]:
    """Return the operations timed in turns: encoding, rendering, direction and edited image."""
    ws = essence.scene.sources(1)
    direction = essence.predict(target)
    return {
        "encoding": lambda: essence.scene.embedder.embed_pictures([target]),
        "rendering": lambda: essence.edit(ws, direction),
        "direction": lambda: essence.predict(target),
        "edited image": lambda: essence.edit(ws, essence.predict(target)),
    }


def optimizer_seconds(
    essence: EssenceTransfer, target: Image.Image, recipe: Recipe, steps: int | None
) -> float:
    """Return the seconds of the optimizer for one target, scaled where `steps` cuts the recipe."""
    ends: list[float] = []
    start = time.perf_counter()

    def on_step(progress: object) -> None:
        wait_for(essence.scene.device)
        ends.append(time.perf_counter())
        bar.update()

    count = recipe.steps if steps is None else min(steps, recipe.steps)
    with tqdm(total=count, desc="optimizer", unit="step") as bar:
        essence.optimize(target, replace(recipe, steps=count), on_step=on_step)
    # The time before the first step does not grow with the number of steps.
    before = ends[0] - start
    return before + (ends[-1] - ends[0]) / max(1, count - 1) * (recipe.steps - 1)


def ratios_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the three ratios; the project's aims are 1.1 and 1.2 at most, and 1,000 or more."""
    both = seconds["encoding"] + seconds["rendering"]
    return {
        "direction to encoding": seconds["direction"] / seconds["encoding"],
        "edited image to encoding and rendering": seconds["edited image"] / both,
        "optimizer to direction": seconds["optimizer"] / seconds["direction"],
    }


def run(config: Config) -> dict[str, Any]:
    """Time everything, write report.json, print a table and return the report.

    Raises:
        FileNotFoundError, ValueError: options that cannot be, parts that are missing or do not fit.
    """
    command.check_least(config, rounds=1, steps=1)
    world, precision = load_world(config.world), choose_precision(config.precision)
    command.make_folder(config.out)
    command.say(f"loading world {world.name}", error=True)
    device = command.choose_device(config.device)
    essence = load_essence(world, device, config.mapper)
    scene, recipe = essence.scene, RECIPES[world.recipe]
    [target] = tensor_to_pictures(scene.render(scene.sources(1, VALIDATION_SOURCES)))
    with in_precision(device, precision):
        seconds = median_seconds(quick_works(essence, target), config.rounds, device)
        seconds["optimizer"] = optimizer_seconds(essence, target, recipe, config.steps)
    report = {
        "seconds": seconds,
        "ratios": ratios_of(seconds),
        "recipe": world.recipe,
        "precision": precision,
        "machine": machine(),
    }
    command.write_json(config.out / "report.json", report)
    for name, value in seconds.items():
        print(f"{name:40} {1000 * value:12.2f} ms")
    for name, value in ratios_of(seconds).items():
        print(f"{name:40} {value:12.2f}")
    command.say_next(config.out, "report.json", "the same on another machine", error=True)
    return report
