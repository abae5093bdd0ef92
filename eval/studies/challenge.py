"""Edit the challenge's sources by methods of this project, for the referee to score.

    python -m eval.studies.challenge --out runs/challenge --pairs data/avatars

Writes METHOD/TARGET/SOURCE.png. The methods are those of eval.compare, by their names there, and
`unedited`: the sources as the generator shows them, inverted and not edited, which bounds what any
of its edits can keep. Strength is 1. Answers are kept in --out: the same command goes on after an
interruption, and searches again only where parts or settings have changed. To search on another
machine, copy OUT/answers from it, and give the same options and --precision on both. Then:

    python -m eval.referee --sources data/challenge/sources --targets data/challenge/targets \\
        --results runs/challenge/mapper --world avatars --out runs/challenge/referee
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from targetclip import command
from targetclip.command import Precision, start
from targetclip.world import DEFAULT_WORLD, load_world

UNEDITED = "unedited"


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for a folder of pictures of each method, and for answers."""
    challenge: Path = Path("data/challenge")
    """Folder with the folders targets and sources."""
    methods: tuple[str, ...] = (UNEDITED, "mapper", "one-direction", "nearest-neighbour")
    """Methods of eval.compare whose edits reach any source, by name, or unedited."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    pairs: Path | None = None
    """Dataset made by data.build, for methods that are fitted to pairs."""
    max_steps: int | None = None
    """Cut every search to so many steps; its folder's name says so."""
    precision: Precision | None = None
    """Of methods that search. Default: accelerate's, or else bf16 where the device has it."""
    seed: int = 0
    """Of searches."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.challenge", Config, exclusive=True)

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.targets import picture_id
from eval import compare
from eval.answers import answer_of
from eval.methods import METHODS, Bench
from eval.results import by_name
from eval.sets import EvalSet
from targetclip.media.images import read_picture, tensor_to_pictures, write_picture

KNOWN = (*(name for name, method in METHODS.items() if not method.per_source), UNEDITED)


def pictures_in(folder: Path, flag: str) -> dict[str, Image.Image]:
    """Return the pictures of a folder, by their names without suffix."""
    return {name: read_picture(path) for name, path in by_name(flag, folder).items()}


def folder_of(config: Config, name: str) -> Path:
    """Return where a method's pictures belong."""
    searches = name != UNEDITED and METHODS[name].optimizes
    steps = f"-{config.max_steps}-steps" if searches and config.max_steps else ""
    return config.out / f"{name}{steps}"


def edits_of(
    config: Config, name: str, bench: Bench, targets: EvalSet
) -> Float[Tensor, "targets sources num_ws w_dim"]:
    """Return what a method adds to the latent of each source, for each target."""
    if name == UNEDITED:
        return torch.zeros(len(targets), *bench.sources.shape)
    folder = config.out / "answers"
    command.make_folder(folder)
    return answer_of(folder, name, bench, targets).on(bench.sources.cpu())


def write_edits(
    folder: Path,
    bench: Bench,
    edits: Float[Tensor, "targets sources num_ws w_dim"],
    sources: Mapping[str, Image.Image],
    targets: Mapping[str, Image.Image],
) -> None:
    """Write TARGET/SOURCE.png of every target and source."""
    for target, edit in zip(tqdm(targets, folder.name, unit="target"), edits, strict=True):
        images = bench.scene.edit(bench.sources, edit.to(bench.sources.device))
        command.make_folder(folder / target)
        for source, picture in zip(sources, tensor_to_pictures(images), strict=True):
            write_picture(picture, folder / target / f"{source}.png")


def run(config: Config) -> None:
    """Edit all sources by all methods.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: a search whose loss stopped being finite.
    """
    if unknown := [name for name in config.methods if name not in KNOWN]:
        hint = command.did_you_mean(unknown[0], KNOWN)
        raise ValueError(
            f"--methods: expected some of {', '.join(KNOWN)}, found {unknown[0]!r}{hint}"
        )
    command.check_least(config, max_steps=1)
    sources = pictures_in(config.challenge / "sources", "--challenge")
    targets = pictures_in(config.challenge / "targets", "--challenge")
    world, device = load_world(config.world), command.choose_device()
    command.say(f"loading world {world.name}", error=True)
    options = compare.Config(
        out=config.out,
        world=config.world,
        pairs=config.pairs,
        only=config.methods,
        precision=config.precision,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    bench = compare.make_bench(options, world, device)
    compare.choose_methods(options, bench)  # refuses those whose parts are missing
    bench = replace(bench, sources=bench.scene.invert([*sources.values()]))
    pictures = tuple(targets.values())
    goals = EvalSet(
        name="challenge",
        ids=tuple(map(picture_id, pictures)),
        origins=tuple(targets),
        pictures=pictures,
    )
    for name in config.methods:
        edits = edits_of(config, name, bench, goals)
        write_edits(folder_of(config, name), bench, edits, sources, targets)
    made = ", ".join(folder_of(config, name).name for name in config.methods)
    command.say_next(config.out, made, "python -m eval.referee --help")
