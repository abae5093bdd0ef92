"""What one pass costs: seconds of a prediction, an edit and the optimizer, as ratios in one run.

    python -m eval.studies.speed --out runs/speed
    python -m eval.studies.speed --out runs/speed --world ffhq.toml --mapper ffhq-mapper.safetensors

Three ratios: target picture to direction against one encoding of a picture; target picture to one
edited image against one encoding and one rendering; the optimizer against target picture to
direction. Quick things are timed in turns, so that what else the machine does falls on all of them.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from eval.studies.benchmark import machine
from predictor.cli import choose_device
from predictor.load import load_essence
from predictor.report import make_folder, write_file
from predictor.transfer import EssenceTransfer
from targetclip.editing import render
from targetclip.media.images import tensor_to_pictures
from targetclip.recipes import RECIPES, Recipe
from targetclip.world import load_world

TARGET_SEED = 7  # of the generated picture that stands in for a target


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper file. Default: the world's."""
    rounds: int = 200
    """How often each of the quick things is timed; the median counts."""
    steps: int | None = None
    """Steps of the optimizer that are timed, scaled to the recipe's number. Default: all."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("rounds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected 1 or more, found {value}")


def finished(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    finished(device)
    start = time.perf_counter()
    work()
    finished(device)
    return time.perf_counter() - start


def in_turns(
    works: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, timed one after another in every round, after a round to warm up."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in tqdm(range(rounds + 1), desc="quick", unit="round"):
        for name, work in works.items():
            seconds = seconds_of(work, device)
            if turn:
                found[name].append(seconds)
    return {name: median(each) for name, each in found.items()}


def quick_works(essence: EssenceTransfer, target: Image.Image) -> dict[str, Callable[[], object]]:
    """One picture encoded, one latent rendered, one direction, one edited image."""
    ws = essence.generated_sources(1)
    direction = essence.predict(target).vector

    def edited() -> object:
        return essence.edit(ws, essence.predict(target).vector)

    return {
        "encoding": lambda: essence.embedder.embed_pictures([target]),
        "rendering": lambda: essence.edit(ws, direction),
        "direction": lambda: essence.predict(target),
        "edited image": edited,
    }


def optimizer_seconds(
    essence: EssenceTransfer, target: Image.Image, recipe: Recipe, steps: int | None
) -> float:
    """Seconds of the optimizer for one target, scaled where only some of its steps are taken."""
    ends: list[float] = []
    start = time.perf_counter()

    def on_step(progress: object) -> None:
        finished(essence.generator.mean_w.device)
        ends.append(time.perf_counter())
        bar.update()

    wanted = recipe.steps if steps is None else min(steps, recipe.steps)
    changed = Recipe(**{**asdict(recipe), "steps": wanted})
    with tqdm(total=wanted, desc="optimizer", unit="step") as bar:
        essence.optimize(target, changed, on_step=on_step)
    # What precedes the first step is paid once, whatever the number of steps.
    before = ends[0] - start
    return before + (ends[-1] - ends[0]) / max(1, wanted - 1) * (recipe.steps - 1)


def ratios_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """What the project aims at: at most 1.1, at most 1.2, at least 1,000."""
    both = seconds["encoding"] + seconds["rendering"]
    return {
        "direction to encoding": seconds["direction"] / seconds["encoding"],
        "edited image to encoding and rendering": seconds["edited image"] / both,
        "optimizer to direction": seconds["optimizer"] / seconds["direction"],
    }


def run(config: Config) -> dict[str, Any]:
    """Time everything and write report.json.

    Raises:
        FileNotFoundError, ValueError: parts that are missing or do not fit.
    """
    world = load_world(config.world)
    make_folder(config.out)
    device = choose_device(config.device)
    essence = load_essence(world, device, config.mapper)
    sample = essence.generated_sources(1, TARGET_SEED)
    [target] = tensor_to_pictures(render(essence.generator, sample))
    seconds = in_turns(quick_works(essence, target), config.rounds, device)
    recipe = RECIPES[world.recipe]
    seconds["optimizer"] = optimizer_seconds(essence, target, recipe, config.steps)
    ratios = ratios_of(seconds)
    report = {
        "seconds": seconds,
        "ratios": ratios,
        "recipe": world.recipe,
        "machine": machine(),
    }
    write_file(config.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    for name, value in seconds.items():
        print(f"{name:40} {1000 * value:12.2f} ms")
    for name, value in ratios.items():
        print(f"{name:40} {value:12.2f}")
    return report


def main() -> None:
    """Errors of input and of files are one line."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
