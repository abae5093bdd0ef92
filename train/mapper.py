"""Train the mapper of a world: target embeddings to directions, in one pass.

    python -m train.mapper --out runs/mapper                                  # without a teacher
    accelerate launch -m train.mapper --out runs/mapper --pairs runs/pairs \\
        --schedule pairs:1000 transfer:4000                                   # one GPU
    accelerate launch --multi_gpu --num_processes 8 -m train.mapper ...       # eight

Kill it whenever you like: the same command goes on, as if nothing had been. Every process draws
its own batches, so a checkpoint of another number of processes is refused.

Knows the command and how the parts make a training: `mapper_data` is what is learned from,
`mapper_objective` what is minimised, `mapper_loop` how it goes on.
"""

import copy
import json
import math
import sys
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from jaxtyping import Float32
from numpy import ndarray
from tqdm import tqdm

from data.targets import digest_of
from data.worker import Stop, Stopped
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.report import versions
from targetclip.encoders.identity import feature_model
from targetclip.media.images import write_picture
from targetclip.recipes import RECIPES
from targetclip.seeds import seed_of
from targetclip.world import load_parts, load_world
from train.loop import LOG, write_atomically
from train.mapper_data import (
    Pairs,
    Scene,
    embedded_sources,
    open_pairs,
    scale_of_latents,
    scale_of_pairs,
    target_bank,
    whitening_of,
)
from train.mapper_loop import Course, Training, trim_log
from train.mapper_objective import Draws, Objective, Stage, Validation, parse_schedule, stage_at

MAPPER = "mapper.safetensors"
WHITENED = 20_000  # targets of the bank that say how embeddings vary


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for checkpoint, log, pictures and mapper.safetensors, shared by all processes."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    schedule: tuple[str, ...] = ("differences:1000", "transfer:4000")
    """Stages NAME[+NAME...]:STEPS, one after the other: transfer is the teacher's own objective,
    pairs its directions, differences those between random latents."""
    targets: tuple[str, ...] = (
        "drawn:20000@17",
        "wide:20000@17",
        "generated:5000@17",
        "mixed:5000@17",
    )
    """Target pictures of the transfer term, as data.build takes them; beside those of the pairs."""
    pairs: Path | None = None
    """Dataset made by data.build; its train split alone is read."""
    num_pairs: int | None = None
    """Use so many of the pairs, the first by their ids. Default: all."""
    validation: tuple[str, ...] = ("drawn:32@23", "wide:32@23")
    """Targets to judge by while training; none of them is trained on."""
    bank: Path | None = None
    """Folder where embeddings of targets are kept, to share between runs. Default: --out."""
    recipe: str | None = None
    """Recipe of the transfer term: release, paper, consistent or identity. Default: the world's."""
    direction_decay: float | None = None
    """Weight decay of directions in the transfer term. Default: the recipe's."""
    identity_weight: float | None = None
    """Of the identity loss in the transfer term. Default: the recipe's."""
    weight_transfer: float = 1.0
    weight_pairs: float = 1.0
    weight_differences: float = 1.0
    """Of the terms; 0 switches one off."""
    noise: float = 0.0
    """Length of the noise added to the unit embeddings that the mapper is given."""
    width: int = 512
    depth: int = 3
    """Of the mapper: residual blocks of so many features."""
    rank: int | None = None
    """Of the mapper: directions are mixtures of so many learned ones, which makes it quicker.
    Default: each of their numbers is free."""
    batch_size: int = 16
    """Targets a step and process in the transfer term."""
    sources: int | None = None
    """Sources edited for each of them. Default: the recipe's."""
    pairs_batch_size: int = 256
    differences_batch_size: int = 64
    """Pairs and differences a step and process."""
    accumulate: int = 1
    """Batches a step and process whose gradients are averaged."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a batch."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    learning_rate: float = 5e-4
    """At its highest: it warms up over 100 steps and falls as a cosine to the end."""
    weight_decay: float = 0.01
    """Of AdamW."""
    clip: float = 1.0
    """Longest gradient; a longer one is cut to it."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what is judged and saved."""
    seed: int = 0
    evaluate_every: int = 500
    checkpoint_seconds: float = 60.0
    licence: str = "See the licences of the generator, the embedder and the target pictures."
    """What the mapper's file says of its use."""


# What may change between a run and its continuation, or is in its settings by its content.
FREE = {"out", "world", "pairs", "bank", "targets", "validation", "recipe", "licence"}
FREE |= {"evaluate_every", "checkpoint_seconds", "checkpoint_layers"}


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be; here, for tyro prints a box for its own."""
    for name, value in vars(config).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"{flag}: expected 1 or more, found {value}")
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"{flag}: expected a number from 0 on, found {value}")
    if min(config.learning_rate, config.clip) == 0 or config.ema >= 1:
        raise ValueError(
            "expected --learning-rate and --clip above 0 and --ema below 1, found "
            f"{config.learning_rate}, {config.clip} and {config.ema}"
        )
    if config.recipe is not None and config.recipe not in RECIPES:
        raise ValueError(f"--recipe: expected {', '.join(RECIPES)}, found {config.recipe!r}")
    if config.num_pairs is not None and config.pairs is None:
        raise ValueError("--num-pairs: expected a dataset by --pairs as well, found none")


def weights_of(config: Config) -> dict[str, float]:
    """The terms' weights by their names."""
    return {
        "transfer": config.weight_transfer,
        "pairs": config.weight_pairs,
        "differences": config.weight_differences,
    }


def stages_of(config: Config) -> tuple[Stage, ...]:
    """The schedule, if what its terms need is given; a ValueError if not."""
    stages = parse_schedule(config.schedule, weights_of(config))
    used = {term for stage in stages for term in stage.terms}
    if "pairs" in used and config.pairs is None:
        raise ValueError("--schedule: a stage of pairs needs --pairs, a folder made by data.build")
    if "transfer" in used and not config.targets and config.pairs is None:
        raise ValueError("--targets: expected some for a stage of transfer, found none")
    if config.identity_weight is not None and "transfer" not in used:
        raise ValueError("--identity-weight: it is of the transfer term, which has no stage")
    return stages


# What it takes


def make_scene(config: Config, device: torch.device) -> tuple[str, Scene]:
    """The name of the recipe, and the world's networks with its settings."""
    world = load_world(config.world)
    parts = load_parts(world, device, config.checkpoint_layers)
    name = config.recipe or world.recipe
    recipe = RECIPES[name]
    decay = recipe.weight_decay if config.direction_decay is None else config.direction_decay
    weight = recipe.identity_weight if config.identity_weight is None else config.identity_weight
    recipe = replace(
        recipe,
        sources=config.sources or recipe.sources,
        weight_decay=decay,
        identity_weight=weight,
    )
    feature_model(parts.embedder, parts.identity, weight)  # before hours are spent
    at_once = config.max_images or config.batch_size * recipe.sources
    return name, Scene(
        parts.generator, parts.embedder, recipe, world.truncation, at_once, parts.identity
    )


def make_mapper(
    config: Config,
    scene: Scene,
    targets: Float32[ndarray, "targets embed"] | None,
    pairs: Pairs | None,
) -> Mapper:
    """A fresh mapper, the same for the same seed, with its centre, whitening and scale."""
    generator, embedder = scene.generator, scene.embedder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("mapper", config.seed))
        mapper = Mapper(
            MapperConfig(
                embedder.embed_dim,
                generator.num_ws,
                generator.w_dim,
                generator.fingerprint,
                embedder.fingerprint,
                config.width,
                config.depth,
                config.rank,
            )
        )
    sources = embedded_sources(scene)
    mapper.centre.copy_(sources.mean(dim=0))
    every = 1 if targets is None else -(-len(targets) // WHITENED)
    seen = [] if targets is None else [torch.from_numpy(targets[::every].copy())]
    seen += [] if pairs is None else [pairs.embeddings]
    mapper.whitening.copy_(whitening_of(torch.cat(seen) if seen else sources.cpu()))
    # A teacher's directions are what is to be answered, and differ in size from layer to layer.
    # Without them latents tell at least which coordinates of w the generator uses how far.
    mapper.scale.copy_(scale_of_latents(scene) if pairs is None else scale_of_pairs(pairs))
    return mapper.to(scene.device)


def save_bank(path: Path, embeddings: Float32[ndarray, "targets embed"]) -> None:
    """Write embeddings as .npy, whole or not at all."""

    def write(unfinished: Path) -> None:
        with unfinished.open("wb") as file:  # np.save adds a suffix to a bare name
            np.save(file, embeddings)

    write_atomically(path, write)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, default=str) + "\n"
    write_atomically(path, lambda unfinished: unfinished.write_text(text))


def settings_of(
    config: Config,
    accelerator: Accelerator,
    scene: Scene,
    recipe_name: str,
    bank: str | None,
    pairs: Pairs | None,
    left_out: Set[str],
) -> dict[str, Any]:
    """Everything a run's weights depend on, in values that JSON and a checkpoint hold."""
    named = {name: value for name, value in asdict(config).items() if name not in FREE}
    named["schedule"] = list(config.schedule)
    return named | {
        "generator": scene.generator.fingerprint,
        "embedder": scene.embedder.fingerprint,
        "identity": scene.identity.fingerprint
        if scene.identity is not None and scene.recipe.identity_weight
        else None,
        "truncation": scene.truncation,
        "recipe_name": recipe_name,
        "recipe": asdict(scene.recipe),
        "targets": bank,
        "pairs": None if pairs is None else pairs.digest,
        "left_out": digest_of(sorted(left_out)),
        "processes": accelerator.num_processes,
        "precision": accelerator.mixed_precision,
    }


def record_of(config: Config, settings: dict[str, Any], stages: tuple[Stage, ...]) -> MapperRecord:
    """What the mapper's file says of its making, without paths of this machine."""
    used = {term for stage in stages for term in stage.terms}
    specs = [spec if ":" in spec else Path(spec).name for spec in config.targets]
    trained_on = [f"targets {', '.join(specs)}"] if settings["targets"] else []
    if config.pairs is not None:
        count = "all" if config.num_pairs is None else f"the first {config.num_pairs}"
        trained_on += [f"{count} training pairs of {config.pairs.resolve().name}"]
    if "differences" in used:
        trained_on += ["differences between samples of the generator"]
    return MapperRecord(
        # In training the expected score is learned by the transfer term alone.
        recipe={**settings, "name": settings["recipe_name"], "expects": "transfer" in used},
        calibration={},
        licence=config.licence,
        trained_on="; ".join(trained_on),
        version=versions()["targetclip"],
    )


def prepare(config: Config, accelerator: Accelerator, stop: Stop) -> tuple[Training, Validation]:
    """Everything a training needs, at the step where it stands."""
    stages = stages_of(config)
    recipe_name, scene = make_scene(config, accelerator.device)
    validation = Validation.open(config.validation, scene)
    pairs = None
    if config.pairs is not None:
        pairs = open_pairs(config.pairs, config.num_pairs, scene, validation.ids)
    name, targets = None, None
    if config.targets and any("transfer" in stage.terms for stage in stages):
        write = save_bank if accelerator.is_main_process else None
        folder = config.bank or config.out
        name, targets = target_bank(
            folder, config.targets, scene, validation.ids, write, stop.check
        )
    mapper = make_mapper(config, scene, targets, pairs)
    draws = Draws(
        weights_of(config),
        config.noise,
        config.batch_size,
        scene.recipe.sources,
        config.pairs_batch_size,
        config.differences_batch_size,
    )
    average = copy.deepcopy(mapper).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        mapper.parameters(), betas=(0.9, 0.99), weight_decay=config.weight_decay
    )
    objective = Objective(mapper, scene, draws, targets, pairs)
    settings = settings_of(config, accelerator, scene, recipe_name, name, pairs, validation.ids)
    course = Course(
        config.out,
        stages,
        config.learning_rate,
        config.clip,
        config.ema,
        config.accumulate,
        config.seed,
        config.evaluate_every,
        config.checkpoint_seconds,
    )
    training = Training(
        course,
        accelerator,
        *(accelerator.prepare(objective), mapper, average, accelerator.prepare(optimizer)),
        settings,
        stop,
    )
    training.restore()
    return training, validation


def evaluate(training: Training, validation: Validation) -> None:
    """Judge the averaged mapper: a line in the log, and a picture."""
    out = training.course.out
    stage = stage_at(training.course.stages, training.step - 1)
    figures = {**training.running, **validation.figures(training.average)}
    line = {"step": training.step, "stage": "+".join(stage.terms), **figures}
    with (out / LOG).open("a") as log:
        log.write(json.dumps(line) + "\n")
    write_picture(validation.grid(training.average), out / "grid.png")
    tqdm.write(f"step {training.step} " + " ".join(f"{k} {v:.4g}" for k, v in figures.items()))


def run(config: Config) -> Mapper:
    """Train, and return the average of the weights, which the main process has saved.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: the loss or its gradient is not finite.
        Stopped: a signal came; the same command goes on from here.
    """
    check_config(config)
    stop = Stop()
    stop.listen()
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulate)
    if accelerator.mixed_precision not in ("no", "bf16"):
        # The scaling of gradients that fp16 needs takes infinite ones for granted.
        raise ValueError(
            f"--mixed_precision: expected no or bf16, found {accelerator.mixed_precision}"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    training, validation = prepare(config, accelerator, stop)
    record = record_of(config, training.settings, training.course.stages)
    if accelerator.is_main_process:
        trim_log(config.out / LOG, training.step)
        content = {"config": asdict(config), "settings": training.settings}
        write_json(config.out / "config.json", {**content, "versions": versions()})
    training.run(partial(evaluate, training, validation))
    if accelerator.is_main_process:
        save_mapper(training.average, config.out / MAPPER, record)
    accelerator.end_training()
    return training.average


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    code = 0
    try:
        run(tyro.cli(Config, description=__doc__))
    except (Stopped, KeyboardInterrupt):
        code = 130
        print("stopped; the same command goes on from here", file=sys.stderr)
    except torch.OutOfMemoryError:
        code = 1
        print(
            "error: out of memory: lower --batch-size or --max-images, or add --checkpoint-layers",
            file=sys.stderr,
        )
    except (ValueError, OSError, FloatingPointError) as error:
        code = 1
        print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
