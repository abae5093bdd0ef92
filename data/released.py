"""A dataset of pairs made of published directions: the release's `.npy` files and their pictures.

    python -m data.released --out runs/released --directions dirs --targets dirs/targets \\
        --world ffhq.toml

A direction belongs to the picture of the same name, whatever the case: joker.npy to Joker.jpg. What
is without the other is listed and left out, as is what cannot be read. Knows how such files become
rows, and how they are scored in a world; nothing of how the directions were found, so what only
their makers could tell is 0 in every row, and `coefficients` is empty.

The folder is as `data.build` leaves one, and is checked by its `--only verify`. It appears whole or
not at all.
"""

import json
import logging
import secrets
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from data import build
from data.card import DatasetInfo
from data.finish import merge_all, verify_build
from data.pairs import Failure, Pair, chunk_bytes, features
from data.plan import Plan, describe, make_plan
from data.publish import publish_file, sync_folder
from data.targets import FolderTargets, Target, one_line, open_folder, printable
from data.worker import Teacher, chunk_name
from targetclip.optimize import Optimized
from targetclip.recipes import RECIPES
from targetclip.released import released_direction
from targetclip.world import Parts, World, load_parts, load_world

logger = logging.getLogger(__name__)

RECIPE = "released"
SUFFIX = ".npy"  # a .pt beside the release's directions is a latent
CHUNK = 16  # targets that are scored together

UNKNOWN = (
    "those of the release, unknown here: loss, transfer, consistency, steps, seconds and seed are "
    "0, coefficients empty"
)
LICENCE = (
    "Directions and pictures are the work of those who published them, and TargetCLIP's come "
    "without a licence: do not pass this dataset on unless theirs, the generator's and the "
    "embedder's allow it."
)

Named = dict[str, list[str]]
"""File names by what they are called, without case and suffix."""


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder of the dataset; it must not be there, or be empty."""
    directions: Path
    """Folder of published directions, one in each .npy."""
    targets: Path
    """Folder of their target pictures; a picture is called as its direction is."""
    world: str
    """World of the generator they were found on: a bundled one's name, or a .toml file's path."""
    held_out: int = 16
    """Sources that every direction is scored on."""
    max_images: int = 16
    """Images rendered at once."""


def as_build(config: Config) -> build.Config:
    """What a build that scores alike would be given; ValueError for a flag that cannot be."""
    built = build.Config(
        out=config.out, world=config.world, held_out=config.held_out, max_images=config.max_images
    )
    build.check_config(built)
    return built


def by_name(names: Sequence[str]) -> Named:
    """Names of files, or origins of targets, by what they are called."""
    found: Named = defaultdict(list)
    for name in names:
        found[Path(printable(name)).stem.lower()].append(name)
    return dict(found)


def open_directions(folder: Path) -> FolderTargets:
    """The direction files right in a folder: names, size and hash as those of pictures are.

    Raises:
        ValueError: there is none.
        OSError: the folder is missing or may not be read.
    """
    names = [
        path.name
        for path in folder.iterdir()
        if path.suffix == SUFFIX and not path.name.startswith(".")
    ]
    if not names:
        raise ValueError(f"--directions: expected {SUFFIX} files in {str(folder)!r}, found none")
    return FolderTargets(str(folder), tuple(sorted(names)))


@dataclass(frozen=True)
class Published:
    """Which files are called alike, and so belong together."""

    folder: Path
    """Of the directions."""
    directions: Named
    """File names."""
    pictures: Named
    """Origins, as the plan's targets have them."""

    @staticmethod
    def of(directions: FolderTargets, pictures: FolderTargets) -> "Published":
        folder = Path(pictures.spec).resolve().name
        origins = [printable(f"{folder}/{name}") for name in pictures.names]
        return Published(Path(directions.spec), by_name(directions.names), by_name(origins))

    def shown(self, name: str) -> str:
        """A direction file as failures name it: where it lies on this machine is left out."""
        return printable(f"{self.folder.resolve().name}/{name}")

    def without_picture(self) -> list[Failure]:
        """The directions that no picture is called as."""
        alone = self.directions.keys() - self.pictures.keys()
        reason = "no picture in --targets is called so; give it the direction's name"
        return [
            Failure("", self.shown(name), "decode", reason)
            for key in sorted(alone)
            for name in self.directions[key]
        ]

    def direction(self, origin: str, num_ws: int, w_dim: int) -> Float[Tensor, "num_ws w_dim"]:
        """The direction of a target picture; ValueError or OSError where there is not just one."""
        name = Path(origin).stem
        pictures, found = self.pictures[name.lower()], self.directions.get(name.lower(), [])
        if not found:
            raise ValueError(f"no direction in --directions is called {name + SUFFIX!r}")
        for kind, names in (("pictures", pictures), ("directions", found)):
            if len(names) > 1:
                raise ValueError(f"{len(names)} {kind} of one name: {', '.join(names)}; keep one")
        path = self.folder / found[0]
        try:
            return released_direction(path, num_ws, w_dim)
        except (ValueError, OSError) as error:
            said = str(error).replace(repr(str(path)), repr(self.shown(found[0])))
            raise ValueError(one_line(said)) from error


def rows_of(
    plan: Plan, chunk: int, teacher: Teacher, published: Published
) -> tuple[list[Pair], list[Failure]]:
    """Pairs and failures of a chunk, scored on the held-out sources as the teacher's are."""
    origins = plan.targets["origin"].to_pylist()[plan.rows(chunk)]
    count, (num_ws, w_dim) = len(origins), teacher.held_out.shape[1:]
    vectors = torch.zeros(count, num_ws, w_dim)
    reasons: list[str | None] = [None] * count
    for i, origin in enumerate(origins):
        try:
            vectors[i] = published.direction(origin, num_ws, w_dim)
        except (ValueError, OSError) as error:
            reasons[i] = str(error)
    unknown = torch.zeros(count)
    found = Optimized(
        directions=vectors.to(teacher.held_out.device),
        coefficients=torch.zeros(count, 0),
        loss=unknown,
        transfer=unknown + 1,  # a loss, of which rows have 1 minus it
        consistency=unknown + 1,
        steps=unknown.long(),
        failures=tuple(reasons),
    )
    pairs, failures = teacher.rows(plan, chunk, found, seconds=0.0)
    return [replace(pair, seed=0) for pair in pairs], failures


def settings_of(
    config: Config, world: World, parts: Parts, directions: FolderTargets, precision: str
) -> dict[str, Any]:
    """What rows depend on but their targets; of the recipe, how it embeds and scores."""
    recipe = RECIPES[world.recipe]
    return {
        "generator": parts.generator.fingerprint,
        "embedder": parts.embedder.fingerprint,
        "recipe_name": RECIPE,
        "recipe": {
            name: getattr(recipe, name)
            for name in ("preprocess", "target_preprocess", "differences")
        },
        "truncation": world.truncation,
        "held_out": config.held_out,
        "seed": 0,
        "precision": precision,
        "directions": describe(directions),
    }


def make_teacher(config: Config, world: World, parts: Parts, accelerator: Accelerator) -> Teacher:
    """The teacher that a build in this world has, to embed and score as it does."""
    recipe = replace(RECIPES[world.recipe], initial="zero")  # no search starts here
    return build.make_teacher(
        as_build(config), world, parts, RECIPE, recipe, lambda: build.in_precision(accelerator)
    )


def dataset_info(config: Config, world: World, parts: Parts, plan: Plan) -> DatasetInfo:
    """What the card says of all pairs alike."""
    settings = plan.settings
    found = [settings["directions"]["spec"], *(one["spec"] for one in settings["targets"])]
    flags = ["--out", "pairs", "--directions", found[0], "--targets", found[1]]
    flags += ["--world", Path(config.world).name, "--held-out", str(config.held_out)]
    return DatasetInfo(
        name="Published directions",
        generator=settings["generator"],
        resolution=parts.generator.resolution,
        num_ws=parts.generator.num_ws,
        w_dim=parts.generator.w_dim,
        embedder=world.name if Path(world.embedder).is_dir() else world.embedder,
        embedder_fingerprint=settings["embedder"],
        preprocess=settings["recipe"]["preprocess"],
        recipe=RECIPE,
        settings=settings["recipe"],
        truncation=settings["truncation"],
        precision=settings["precision"],
        seed=settings["seed"],
        targets=tuple(found[1:]),
        sources=UNKNOWN,
        held_out=f"{settings['held_out']} samples of the generator",
        licence="other",
        licence_text=LICENCE,
        command="python -m data.released " + shlex.join(flags),
    )


def plan_targets(
    work: Path, pictures: FolderTargets, settings: Mapping[str, Any], teacher: Teacher
) -> Plan:
    """A plan of all pictures that can be decoded; ValueError if none can."""
    try:
        return make_plan(
            work, "import", [pictures], dict(settings), CHUNK, teacher.prepare, lambda n, of: None
        )
    except ValueError as error:
        bad = [found for found in pictures if not isinstance(found, Target)]
        if len(bad) < len(pictures):
            raise
        raise ValueError(f"no picture of --targets can be read: {bad[0].reason}") from error


def fill(
    folder: Path,
    config: Config,
    world: World,
    directions: FolderTargets,
    pictures: FolderTargets,
) -> dict[str, Any]:
    """Make the dataset in a folder of its own; its report.

    Raises:
        ValueError: no pair came of it, or the folder is not what was written.
    """
    accelerator = Accelerator()
    parts = load_scene(world, accelerator.device)
    teacher = make_teacher(config, world, parts, accelerator)
    settings = settings_of(config, world, parts, directions, accelerator.mixed_precision)
    work = folder / build.WORK
    (work / "chunks").mkdir(parents=True)
    plan = plan_targets(work, pictures, settings, teacher)
    published = Published.of(directions, pictures)
    left_out = [*plan.failures, *published.without_picture()]
    plan = replace(plan, failures=tuple(left_out))
    columns = features(plan.embeddings.shape[1], parts.generator.num_ws, parts.generator.w_dim)
    count = 0
    for chunk in range(plan.chunks):
        pairs, failures = rows_of(plan, chunk, teacher, published)
        path = work / "chunks" / f"{chunk_name(chunk)}.parquet"
        publish_file(path, chunk_bytes(pairs, failures, columns))
        left_out += failures
        count += len(pairs)
    for failure in left_out:
        logger.warning("%s: left out: %s", failure.origin, failure.reason)
    if not count:
        raise ValueError("no direction could be paired with a picture; the reasons are above")
    report = merge_all(folder, work, plan, dataset_info(config, world, parts, plan))
    for problem in verify_build(folder, work):
        raise ValueError(f"what was written is not what is there: {problem}; import again")
    return report


def import_released(config: Config) -> dict[str, Any]:
    """Make the dataset; its report.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, nothing to pair, or files that cannot be
            read or written. Nothing is left behind.
    """
    out = config.out.resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out: expected nothing at {str(config.out)!r} or an empty folder")
    for flag, folder in (("--directions", config.directions), ("--targets", config.targets)):
        if not folder.is_dir():
            raise FileNotFoundError(f"{flag}: no folder {str(folder)!r}; check the path")
    as_build(config)
    world = load_world(config.world)
    directions, pictures = open_directions(config.directions), open_folder(str(config.targets))
    if not by_name(directions.names).keys() & by_name(pictures.names).keys():
        raise ValueError(
            f"no picture in {str(config.targets)!r} is called as a direction in "
            f"{str(config.directions)!r}: expected e.g. "
            f"{Path(directions.names[0]).stem + '.jpg'!r} for {directions.names[0]!r}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        report = fill(folder, config, world, directions, pictures)
        # Takes the place of an empty folder only: what came there meanwhile is not replaced.
        folder.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    try:
        report = import_released(tyro.cli(Config, description=__doc__))
    except KeyboardInterrupt:
        print("stopped; nothing is left behind", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps({"splits": report["splits"], "failures": report["failures"]}))


if __name__ == "__main__":
    main()
