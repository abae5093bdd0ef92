"""Fine-tune an inverter into an encoder of directions: the paper's second method, as a baseline.

The encoder is given target pictures, not embeddings. What it answers, less its mean w, is taken as
a direction, and gives fresh sources the target's essence by the losses of the world's recipe. (The
release takes the encoder's bare output, to which it adds the mean latent only when asked to.)

    python -m train.encoder --out runs/encoder                          # from the world's inverter
    python -m train.encoder --out runs/encoder --world my/world.toml --start my/inverter.safetensors

Kill it whenever you like: the same command goes on. Knows pictures of targets, the losses and the
command; the steps are `train.loop`'s.
"""

import shlex
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from targetclip import command
from targetclip.command import (
    Precision,
    Stop,
    Tracker,
    choose_device,
    choose_precision,
    in_precision,
    make_folder,
    say,
    say_next,
    start,
)
from targetclip.recipes import RECIPES, Recipe, recipe_named
from targetclip.seeds import TRAINING_TARGETS, VALIDATION_TARGETS, seed_of
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for checkpoint, log, target pictures and encoder.safetensors."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    recipe: str | None = None
    """Recipe whose losses are minimised: release, paper, consistent or identity. Default: the
    world's."""
    start: Path | None = None
    """Inverter to start from. Default: the world's."""
    targets: tuple[str, ...] | None = None
    """Target pictures, as data.build takes them; those of the train split are trained on. Default:
    12,000 avatars for the bundled world; 12,000 samples of its own generator for any other."""
    validation: tuple[str, ...] | None = None
    """Targets to judge by while training; none of them is trained on. Default: 64 avatars for
    the bundled world; 64 samples of its own generator for any other world."""
    steps: int = 3000
    batch_size: int = 8
    """Targets a step; each edits as many sources as the recipe says."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a batch."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    precision: Precision | None = None
    """Precision of a step. Default: accelerate's, or else bf16."""
    learning_rate: float = 3e-4
    seed: int = 0
    evaluate_every: int = 250
    """Steps between two lines of the log."""
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files in --out) or wandb.
    It needs the package of that name."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.encoder", Config)

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.targets import check_trainable, default_targets, digest_of, open_targets
from targetclip.encoders.inverter import Inverter, load_inverter, save_inverter
from targetclip.media.images import center_square
from targetclip.optimize import draw_sources, losses_of
from targetclip.scene import Scene
from targetclip.tracking import check_tracker
from targetclip.weights import digest_of_weights
from train.loop import LOG, Schedule, train
from train.mapper_data import (
    Validation,
    embed_unit,
    kept_array,
    settings_of_scene,
    training_pictures,
)
from train.mapper_objective import POOL

ENCODER = "encoder.safetensors"
EMA = 0.998


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be."""
    check_tracker(config.tracker)
    command.check_least(config, steps=1, batch_size=1, max_images=1, evaluate_every=1)
    if config.recipe is not None:
        recipe_named(config.recipe)
    if config.targets == ():
        raise ValueError("--targets: expected some such as avataaars:6000@17, found none")
    if not 0 < config.learning_rate < 1:
        raise ValueError(
            f"--learning-rate: expected a number between 0 and 1, found {config.learning_rate}"
        )


def targets_of(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return specs of targets to train on and to judge by: the world's own where none are given."""
    world = load_world(config.world)
    trained, judged = config.targets, config.validation
    if trained is None:
        trained = default_targets(world, TRAINING_TARGETS, 6000)
    if judged is None:
        judged = default_targets(world, VALIDATION_TARGETS, 32)
    check_trainable(trained)
    check_trainable(judged, "--validation")
    return trained, judged


def make_parts(config: Config) -> tuple[Scene, Recipe, Inverter]:
    """Return the frozen networks, the recipe, and the encoder as it starts.
    FileNotFoundError, ValueError: see `load_scene` and `load_inverter`; no inverter is given."""
    world = load_world(config.world)
    recipe = RECIPES[config.recipe or world.recipe]
    scene = load_scene(
        world,
        choose_device(),
        # Not None: how many are rendered without gradients decides the last bits of a training.
        max_images=config.max_images or config.batch_size * recipe.sources,
        checkpoint_layers=config.checkpoint_layers,
    )
    encoder = scene.inverter if isinstance(scene.inverter, Inverter) else None
    if config.start is not None:
        encoder = load_inverter(config.start, scene.generator.fingerprint)
    if encoder is None:
        raise ValueError(
            f"--start: expected an inverter's file, for world {world.name!r} names none of ours; "
            "for the bundled world make one with python -m train.world.inverter"
        )
    return scene, recipe, encoder.to(scene.device).train().requires_grad_(True)


# Target pictures


def squared(picture: Image.Image, size: int) -> UInt8[ndarray, "{size} {size} 3"]:
    """Return the picture in 8 bits, cut and scaled as by `picture_to_tensor`."""
    return np.asarray(center_square(picture).resize((size, size), Image.Resampling.BICUBIC))


def target_pictures(
    folder: Path,
    specs: Sequence[str],
    scene: Scene,
    left_out: Set[str],
    check: Callable[[], None] = lambda: None,
) -> tuple[str, UInt8[ndarray, "targets size size 3"]]:
    """Return training targets at the generator's size, decoded once and kept in `folder`; and the
    name of their file, which differs for other targets.

    Only targets of the train split are in it, by their ids, and none of `left_out`.

    ValueError, FileNotFoundError, OSError: specs that cannot be, or without any good picture; a
    damaged file.
    """
    size = scene.generator.resolution
    sets = [open_targets(spec, scene.generator, scene.truncation) for spec in specs]
    digest = digest_of("pictures", [s.identity() for s in sets], size, sorted(left_out))

    def decode() -> UInt8[ndarray, "targets size size 3"]:
        pictures = []
        for picture in training_pictures(sets, left_out, "decode targets"):
            check()
            pictures.append(squared(picture, size))
        return np.stack(pictures)

    path = folder / f"pictures-{digest[:16]}.npy"
    return path.name, kept_array(path, decode, check)


# Directions and their loss


def directions_of(
    encoder: Inverter, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch num_ws w_dim"]:
    """Return the encoder's answers to target pictures in [-1, 1], as offsets from its mean w."""
    directions: Tensor = encoder(images) - encoder.mean_w
    return directions


def essence_loss(
    encoder: Inverter,
    scene: Scene,
    recipe: Recipe,
    pictures: UInt8[ndarray, "batch size size 3"],
    seed: int,
    precision: Precision = "bf16",
) -> Float[Tensor, ""]:
    """Return the recipe's mean loss for targets on fresh sources, drawn from the seed alone."""
    count = max(POOL, recipe.sources)
    pool = scene.latents([seed_of("encoder source", seed, i) for i in range(count)])
    random = torch.Generator().manual_seed(seed)
    chosen = draw_sources(count, recipe.sources, True, [random] * len(pictures)).to(scene.device)
    targets = embed_unit(scene, [Image.fromarray(picture) for picture in pictures], recipe)
    # A file's pictures are read-only, which torch cannot say of a tensor.
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    images = pixels.to(scene.device).float() / 127.5 - 1
    with in_precision(scene.device, precision):
        directions = directions_of(encoder, images).float()
        with torch.no_grad():
            before = scene.features(pool, recipe.preprocess, recipe.identity_weight)[chosen]
        edited = (pool[chosen] + directions[:, None]).flatten(0, 1)
        after = scene.features(edited, recipe.preprocess, recipe.identity_weight)
    loss = losses_of(recipe, before, after.unflatten(0, chosen.shape), targets).loss
    # As the optimizer's weight decay of a direction.
    loss = loss + recipe.weight_decay / 2 * directions.square().sum(dim=(1, 2))
    return loss.mean()


@torch.no_grad()
def figures(encoder: Inverter, validation: Validation) -> dict[str, float]:
    """Return scores on held-out targets and sources in full precision, means over targets."""
    images = validation.scene.images_of(validation.pictures)
    return validation.figures(directions_of(encoder, images))


def run(config: Config, stop: Stop | None = None) -> Inverter:
    """Train, save and return the average of the weights.

    Args:
        stop: None: one that listens to the signals of this process.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: the loss or its gradient is not finite.
        Stopped: a signal came; the same command goes on from here.
    """
    check_config(config)
    precision = choose_precision(config.precision, default="bf16")
    stop = stop or Stop()
    stop.listen()
    make_folder(config.out)
    say(f"loading world {config.world}", error=True)
    scene, recipe, encoder = make_parts(config)
    specs, judged = targets_of(config)
    validation = Validation.open(judged, scene, recipe)
    name, pictures = target_pictures(config.out, specs, scene, validation.ids, stop.check)

    def loss_at(step: int) -> Tensor:
        seed = seed_of("encoder", config.seed, step)
        random = torch.Generator().manual_seed(seed_of("encoder targets", seed))
        chosen = torch.randint(len(pictures), (config.batch_size,), generator=random)
        batch = pictures[chosen.numpy()]
        return essence_loss(encoder, scene, recipe, batch, seed, precision)

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        ema=EMA,
        evaluate_every=config.evaluate_every,
    )
    settings = {
        **settings_of_scene(scene, recipe),
        **{n: getattr(config, n) for n in ("steps", "batch_size", "max_images", "seed")},
        "learning_rate": config.learning_rate,
        "start": digest_of_weights("", encoder.state_dict()),
        "targets": name,
        "precision": precision,
    }

    def evaluate(average: Inverter) -> dict[str, float]:
        return figures(average, validation)

    # Chunks of images are computed again in the backward pass, by the attention of `in_precision`.
    unfused = scene.device.type == "cpu" and precision == "bf16"
    average = train(
        encoder,
        loss_at,
        config.out,
        schedule,
        evaluate,
        settings,
        stop=stop,
        in_backward=partial(sdpa_kernel, SDPBackend.MATH) if unfused else nullcontext,
        tracker=config.tracker,
    )
    save_inverter(average, config.out / ENCODER)
    encoder_file = shlex.quote(str(config.out / ENCODER))
    then = f"python -m eval.compare --out REPORT --encoder {encoder_file}"
    say_next(config.out, f"{ENCODER}, {LOG}", then)
    return average
