"""Fine-tune an inverter into an encoder of directions: the paper's second method, as a baseline.

The encoder is given target pictures, not embeddings. What it answers, less its mean w, is taken as
a direction, and gives fresh sources the target's essence by the losses of the world's recipe. (The
release takes the encoder's bare output, to which it adds the mean latent only when asked to.)

    python -m train.encoder --out runs/encoder                          # from the world's inverter
    python -m train.encoder --out runs/encoder --world my/world.toml --start my/inverter.safetensors

Kill it whenever you like: the same command goes on. Knows pictures of targets, the losses and the
command; how a training goes on is `train.loop`'s.
"""

import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.targets import TargetSet, digest_of, open_targets
from targetclip.editing import render, score_edit
from targetclip.encoders.inverter import Inverter, load_inverter, save_inverter
from targetclip.media.images import center_square, picture_to_tensor
from targetclip.optimize import draw_sources, losses_of
from targetclip.precision import in_bfloat16
from targetclip.recipes import RECIPES
from targetclip.scene import random_latents
from targetclip.seeds import seed_of
from targetclip.world import load_parts, load_world
from train.loop import Schedule, train, write_atomically
from train.mapper_data import Scene, Skipped, training_pictures
from train.mapper_objective import POOL, Validation

ENCODER = "encoder.safetensors"


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for checkpoint, log, target pictures and encoder.safetensors."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    recipe: str | None = None
    """Recipe whose losses are minimised: release, paper, consistent or identity. Default: the
    world's."""
    start: Path | None = None
    """Inverter to start from. Default: the world's."""
    targets: tuple[str, ...] = ("drawn:6000@17", "wide:6000@17")
    """Target pictures, as data.build takes them; those of the train split are trained on."""
    validation: tuple[str, ...] = ("drawn:32@23", "wide:32@23")
    """Targets to judge by while training; none of them is trained on."""
    steps: int = 3000
    batch_size: int = 8
    """Targets a step; each edits as many sources as the recipe says."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a batch."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    learning_rate: float = 3e-4
    ema: float = 0.998
    """Decay of the moving average of the weights, which is what is judged and saved."""
    seed: int = 0
    evaluate_every: int = 250


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be; here, for tyro prints a box for its own."""
    for name in ("steps", "batch_size", "max_images", "evaluate_every"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
    if config.recipe is not None and config.recipe not in RECIPES:
        raise ValueError(f"--recipe: expected {', '.join(RECIPES)}, found {config.recipe!r}")
    if not config.targets:
        raise ValueError("--targets: expected some such as drawn:6000@17, found none")
    if not 0 < config.learning_rate < 1 or not 0 <= config.ema < 1:
        raise ValueError(
            "expected --learning-rate above 0 and --ema from 0 on, both below 1, found "
            f"{config.learning_rate} and {config.ema}"
        )


def make_parts(config: Config) -> tuple[Scene, Inverter]:
    """The frozen networks with the world's recipe, and the encoder as it starts."""
    world = load_world(config.world)
    parts = load_parts(world, torch.get_default_device(), config.checkpoint_layers)
    encoder = parts.inverter if isinstance(parts.inverter, Inverter) else None
    if config.start is not None:
        encoder = load_inverter(config.start, parts.generator.fingerprint)
    if encoder is None:
        raise ValueError(
            f"--start: expected an inverter's file, for world {world.name!r} names none of ours; "
            "make one with python -m train.drawn.inverter"
        )
    recipe = RECIPES[config.recipe or world.recipe]
    at_once = config.max_images or config.batch_size * recipe.sources
    scene = Scene(
        parts.generator, parts.embedder, recipe, world.truncation, at_once, parts.identity
    )
    return scene, encoder.to(scene.device).train().requires_grad_(True)


# Target pictures


def squared(picture: Image.Image, size: int) -> UInt8[ndarray, "{size} {size} 3"]:
    """The picture as `picture_to_tensor` sees it, in 8 bits."""
    return np.asarray(center_square(picture).resize((size, size), Image.Resampling.BICUBIC))


def decode_targets(
    sets: Sequence[TargetSet], size: int, left_out: Set[str]
) -> UInt8[ndarray, "targets {size} {size} 3"]:
    """All training pictures, in order.

    Raises:
        ValueError: there is none.
    """
    skipped = Skipped()
    stream = tqdm(training_pictures(sets, left_out, skipped), "decode targets", unit="target")
    pictures = [squared(picture, size) for picture in stream]
    if not pictures:
        raise ValueError(
            "--targets: expected pictures to train on, found none of the train split in "
            f"{', '.join(targets.spec for targets in sets)} ({skipped.bad} cannot be used, "
            f"{skipped.held_out} are held out); give more"
        )
    return np.stack(pictures)


def target_pictures(
    folder: Path, specs: Sequence[str], scene: Scene, left_out: Set[str]
) -> UInt8[ndarray, "targets size size 3"]:
    """Training targets at the generator's size, decoded once and kept in `folder`.

    Only targets of the train split are in it, by their ids, and none of `left_out`.

    Raises:
        ValueError, FileNotFoundError, OSError: specs that cannot be, or without any good picture;
            a damaged file.
    """
    size = scene.generator.resolution
    sets = [open_targets(spec, scene.generator, scene.truncation) for spec in specs]
    digest = digest_of("pictures", [each.identity() for each in sets], size, sorted(left_out))
    path = folder / f"pictures-{digest[:16]}.npy"
    if not path.exists():
        decoded = decode_targets(sets, size, left_out)

        def write(unfinished: Path) -> None:
            with unfinished.open("wb") as file:  # np.save adds a suffix to a bare name
                np.save(file, decoded)

        write_atomically(path, write)
    try:
        pictures: UInt8[ndarray, "targets size size 3"] = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}): delete it, it is made anew"
        ) from error
    return pictures


# Directions, and what they are worth


def directions_of(
    encoder: Inverter, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch num_ws w_dim"]:
    """The encoder's answers to target pictures in [-1, 1], as offsets from its mean w."""
    directions: Tensor = encoder(images) - encoder.mean_w
    return directions


def essence_loss(
    encoder: Inverter,
    scene: Scene,
    pictures: UInt8[ndarray, "batch size size 3"],
    seed: int,
) -> Float[Tensor, ""]:
    """The recipe's objective for targets on fresh sources, drawn from the seed alone: a mean."""
    recipe, count = scene.recipe, max(POOL, scene.recipe.sources)
    pool = random_latents(
        scene.generator,
        [seed_of("encoder source", seed, i) for i in range(count)],
        scene.truncation,
    )
    random = torch.Generator().manual_seed(seed)
    chosen = draw_sources(count, recipe.sources, True, [random] * len(pictures)).to(scene.device)
    targets = scene.embed_targets([Image.fromarray(picture) for picture in pictures])
    # A file's pictures are read-only, which torch cannot say of a tensor.
    pixels = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2)
    images = pixels.to(scene.device).float() / 127.5 - 1
    with in_bfloat16(scene.device):
        directions = directions_of(encoder, images).float()
        with torch.no_grad():
            before = scene.see_latents(pool)[chosen]
        after = scene.see_latents((pool[chosen] + directions[:, None]).flatten(0, 1))
    loss = losses_of(recipe, before, after.unflatten(0, chosen.shape), targets).loss
    # What the optimizer's weight decay is to a direction.
    loss = loss + recipe.weight_decay / 2 * directions.square().sum(dim=(1, 2))
    return loss.mean()


@torch.no_grad()
def figures(encoder: Inverter, validation: Validation) -> dict[str, float]:
    """Scores on held-out targets and sources in full precision, means over targets."""
    scene, sources = validation.scene, validation.sources
    generator, embedder = scene.generator, scene.embedder
    images = [picture_to_tensor(each, generator.resolution) for each in validation.pictures]
    directions = directions_of(encoder, torch.cat(images).to(scene.device))
    before = render(generator, sources, scene.max_images)
    rows = []
    for direction, target in zip(directions, validation.judged, strict=True):
        edited = render(generator, sources + direction, scene.max_images)
        # As scores are always made, whatever the recipe's preprocessing.
        scores = score_edit(embedder, target, before, edited, max_images=scene.max_images)
        rows.append([scores.transfer, scores.consistency, float(direction.norm())])
    found = torch.tensor(rows)
    means = {
        "transfer_score": found[:, 0],
        "transfer_score_in_range": found[validation.in_range, 0],
        "transfer_score_out_of_range": found[~validation.in_range, 0],
        "consistency_score": found[:, 1],
        "length": found[:, 2],
    }
    return {name: float(each.mean()) for name, each in means.items() if len(each)}


def run(config: Config) -> Inverter:
    """Train, save and return the average of the weights.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: the loss or its gradient is not finite.
    """
    check_config(config)
    scene, encoder = make_parts(config)
    validation = Validation.open(config.validation, scene)
    pictures = target_pictures(config.out, config.targets, scene, validation.ids)

    def loss_at(step: int) -> Tensor:
        seed = seed_of("encoder", config.seed, step)
        random = torch.Generator().manual_seed(seed_of("encoder targets", seed))
        chosen = torch.randint(len(pictures), (config.batch_size,), generator=random)
        return essence_loss(encoder, scene, pictures[chosen.numpy()], seed)

    schedule = Schedule(
        config.steps,
        config.learning_rate,
        ema=config.ema,
        evaluate_every=config.evaluate_every,
    )
    average = train(
        encoder, loss_at, config.out, schedule, lambda average: figures(average, validation)
    )
    write_atomically(config.out / ENCODER, lambda path: save_inverter(average, path))
    return average


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
