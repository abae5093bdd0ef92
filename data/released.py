"""Make a dataset of pairs from published directions: the release's `.npy` files and pictures.

    python -m data.released --out runs/released --directions dirs --targets dirs/targets \\
        --world ffhq.toml

A direction belongs to the picture of the same name, in any case: joker.npy to Joker.jpg. Where no
name is the same, one may be the beginning of the other, up to the end of a word: doc.npy belongs to
doc_brown.jpg, if no other name begins so. Files without a partner, and files that cannot be read,
are listed with the reason and left out. The directions are scored
in a world. Columns that only their makers know are 0, and `coefficients` is empty.

The folder is as `data.build` leaves one; its `--only verify` checks it. It appears whole or not at
all.
"""

import logging
import secrets
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from targetclip.command import Precision, choose_precision, say, start, sync_folder
from targetclip.recipes import RECIPES
from targetclip.world import World, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder of the dataset; it must not be there, or be empty."""
    directions: Path
    """Folder of published directions, one in each .npy."""
    targets: Path
    """Folder of their target pictures; a picture has the name of its direction."""
    world: str
    """World of the generator they were found on: a bundled one's name, or a .toml file's path."""
    held_out: int = 16
    """Sources that every direction is scored on."""
    max_images: int | None = None
    """Images rendered at once. Default: 64, fewer above 256 px."""
    precision: Precision | None = None
    """Of the scores. Default: accelerate's, or else fp32."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("data.released", Config)

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from data import build
from data.card import DatasetInfo
from data.pairs import Failure, Pair, chunk_bytes, features, such_as
from data.plan import Plan, describe, make_plan, not_taken
from data.publish import At, go_on, publish_file
from data.targets import FolderTargets, Target, brief, open_folder, printable
from data.teacher import Teacher, make_teacher
from data.worker import chunk_name, merge_all
from targetclip.directions import released_direction
from targetclip.optimize import Optimized

logger = logging.getLogger(__name__)

RECIPE = "released"
SUFFIX = ".npy"  # a .pt beside the release's directions holds latents
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
"""File names by their stem, in lower case."""


def stem_of(name: str) -> str:
    """Return the name of a file that decides its partner: without folder, ending and case."""
    return Path(printable(name)).stem.lower()


def by_name(names: Sequence[str]) -> Named:
    """Return names of files, or origins of targets, by their stem."""
    stems: Named = defaultdict(list)
    for name in names:
        stems[stem_of(name)].append(name)
    return dict(stems)


def open_directions(folder: Path) -> FolderTargets:
    """Open the direction files directly in a folder; size and hash are as those of pictures.
    ValueError: there is none. OSError: the folder is missing or may not be read."""
    files = [path for path in folder.iterdir() if not path.is_dir() and path.name[0] != "."]
    names = sorted(path.name for path in files if path.suffix == SUFFIX)
    others = sorted(path.name for path in files if path.suffix != SUFFIX)
    left_out = such_as([printable(name) for name in others])
    if not names:
        found = left_out or "none"
        raise ValueError(f"--directions: expected {SUFFIX} files in {str(folder)!r}, found {found}")
    if others:
        logger.warning(
            "%s: %d of %d files are not taken: %s; expected directions, each in a %s",
            *(folder, len(others), len(files), left_out, SUFFIX),
        )
    return FolderTargets(str(folder), tuple(names), tuple(others))


def begins_alike(name: str, other: str) -> bool:
    """Tell whether one name is the beginning of the other, up to the end of a word."""
    short, long = sorted((name, other), key=len)
    return long.startswith(short) and not long[len(short) : len(short) + 1].isalpha()


def partners_of(directions: Named, pictures: Named) -> dict[str, str]:
    """Return the direction of each picture that has one, both as stems.

    Equal stems belong together. Of the others, two belong together that begin alike, if neither
    begins like a third.
    """
    partners = {stem: stem for stem in pictures.keys() & directions.keys()}
    free = directions.keys() - partners.keys()
    alike = {
        picture: [stem for stem in free if begins_alike(stem, picture)]
        for picture in pictures.keys() - partners.keys()
    }
    uses = Counter(stem for stems in alike.values() for stem in stems)
    for picture, stems in alike.items():
        if len(stems) == 1 and uses[stems[0]] == 1:
            partners[picture] = stems[0]
    return partners


def alone(name: str, kind: str, others: Named) -> str:
    """Return why a file has no partner among the others, which are of the kind."""
    stem = stem_of(name)
    alike = [each for key in sorted(others) if begins_alike(key, stem) for each in others[key]]
    found = f"{such_as(alike)} begins alike, but belongs to another or is not the only one"
    return (
        f"expected a {kind} called {Path(name).stem!r}, found {found if alike else 'none'}; give "
        "files that belong together one name"
    )


@dataclass(frozen=True)
class Published:
    """Directions and pictures by their stems, and which belong together."""

    folder: Path
    """Of the directions."""
    directions: Named
    """File names."""
    pictures: Named
    """Origins, as of the plan's targets."""
    partners: dict[str, str]
    """Stems of directions by those of their pictures."""

    @staticmethod
    def of(directions: FolderTargets, pictures: FolderTargets) -> "Published":
        folder = Path(pictures.spec).resolve().name
        origins = [printable(f"{folder}/{name}") for name in pictures.names]
        named, shown = by_name(directions.names), by_name(origins)
        return Published(Path(directions.spec), named, shown, partners_of(named, shown))

    def shown(self, name: str) -> str:
        """Return a direction file's name for failures, without the path of this machine."""
        return printable(f"{self.folder.resolve().name}/{name}")

    def without_picture(self) -> list[Failure]:
        """Return the directions that no picture belongs to."""
        return [
            Failure("", self.shown(name), "decode", alone(name, "picture", self.pictures))
            for stem in sorted(self.directions.keys() - self.partners.values())
            for name in self.directions[stem]
        ]

    def direction(self, origin: str, num_ws: int, w_dim: int) -> Float[Tensor, "num_ws w_dim"]:
        """Read the direction of a target picture.
        ValueError, OSError: there is none, there are several, or it cannot be read."""
        stem = stem_of(origin)
        if stem not in self.partners:
            raise ValueError(alone(origin, "direction", self.directions))
        pictures, directions = self.pictures[stem], self.directions[self.partners[stem]]
        for kind, names in (("pictures", pictures), ("directions", directions)):
            if len(names) > 1:
                raise ValueError(f"{len(names)} {kind} of one name: {', '.join(names)}; keep one")
        path = self.folder / directions[0]
        try:
            return released_direction(path, num_ws, w_dim)
        except (ValueError, OSError) as error:
            reason = str(error).replace(repr(str(path)), repr(self.shown(directions[0])))
            raise ValueError(brief(reason)) from error


def rows_of(
    plan: Plan, chunk: int, teacher: Teacher, published: Published
) -> tuple[list[Pair], list[Failure]]:
    """Return pairs and failures of a chunk, scored on the held-out sources as in a build."""
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
    result = Optimized(
        directions=vectors.to(teacher.held_out.device),
        coefficients=torch.zeros(count, 0),
        loss=unknown,
        transfer=unknown + 1,  # a loss: rows hold 1 minus it
        consistency=unknown + 1,
        steps=unknown.long(),
        failures=tuple(reasons),
    )
    pairs, failures = teacher.rows(plan, chunk, result, seconds=0.0)
    return [replace(pair, seed=0) for pair in pairs], failures


def settings_of(teacher: Teacher, world: World, directions: FolderTargets) -> dict[str, Any]:
    """Return what rows depend on but their targets; of the recipe, how it embeds and scores."""
    settings = build.settings_of(teacher, world, seed=0)
    for name in ("inverter", "identity", "bank"):
        del settings[name]
    names = ("preprocess", "target_preprocess", "differences")
    settings["recipe"] = {name: settings["recipe"][name] for name in names}
    return {**settings, "directions": describe(directions)}


def command_line(config: Config, settings: Mapping[str, Any]) -> str:
    """Return the command that makes this dataset again, without paths of this machine."""
    (targets,) = settings["targets"]
    flags = ["--out", "pairs", "--directions", settings["directions"]["spec"]]
    flags += ["--targets", targets["spec"], "--world", Path(config.world).name]
    return "python -m data.released " + shlex.join([*flags, "--held-out", str(config.held_out)])


def plan_targets(
    work: Path, pictures: FolderTargets, settings: Mapping[str, Any], teacher: Teacher
) -> Plan:
    """Plan all pictures that can be decoded. ValueError: none can."""
    try:
        return make_plan(
            work, "import", [pictures], dict(settings), CHUNK, teacher.prepare, lambda n, of: None
        )
    except ValueError as error:
        bad = [candidate for candidate in pictures if not isinstance(candidate, Target)]
        if len(bad) < len(pictures):
            raise
        raise ValueError(f"no picture of --targets can be read: {bad[0].reason}") from error


def fill(
    folder: Path,
    config: Config,
    world: World,
    directions: FolderTargets,
    pictures: FolderTargets,
    at: At,
) -> dict[str, Any]:
    """Make the dataset in a folder of its own; return its report.
    ValueError: there is no pair, or the folder is not as it was written."""
    precision = choose_precision(config.precision)
    say(f"loading world {world.name}", error=True)
    device = Accelerator(mixed_precision="no").device
    scene = load_scene(world, device, max_images=config.max_images)
    scene = replace(scene, max_images=scene.at_once)  # no step of a search says how many fit
    recipe = replace(RECIPES[world.recipe], initial="zero")  # no search starts here
    teacher = make_teacher(scene, RECIPE, recipe, config.held_out, precision)
    work = folder / build.WORK
    (work / "chunks").mkdir(parents=True)
    plan = plan_targets(work, pictures, settings_of(teacher, world, directions), teacher)
    published = Published.of(directions, pictures)
    left_out = [*plan.failures, *published.without_picture()]
    ignored = not_taken([directions, pictures])
    plan = replace(plan, failures=tuple(left_out), not_taken=ignored)
    columns = features(plan.embeddings.shape[1], scene.generator.num_ws, scene.generator.w_dim)
    count = 0
    for chunk in range(plan.chunks):
        pairs, failures = rows_of(plan, chunk, teacher, published)
        path = work / "chunks" / f"{chunk_name(chunk)}.parquet"
        publish_file(path, chunk_bytes(pairs, failures, columns), at)
        left_out += failures
        count += len(pairs)
    for failure in left_out:
        logger.warning("%s: left out: %s", failure.origin, failure.reason)
    if not count:
        raise ValueError("no direction could be paired with a picture; the reasons are above")
    info = DatasetInfo(
        **build.facts_of(plan.settings, world, scene),
        name="Published directions",
        sources=UNKNOWN,
        held_out=f"{config.held_out} samples of the generator",
        licence="other",
        licence_text=LICENCE,
        command=command_line(config, plan.settings),
    )
    report = merge_all(folder, work, plan, info, at)
    for problem in build.verify_build(folder, work):
        raise ValueError(f"the files are not as they were written: {problem}; import again")
    return report


def import_released(config: Config, at: At = go_on) -> dict[str, Any]:
    """Make the dataset; return its report.

    Args:
        at: is called at the points of `publish_file` and `merge_all`.

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
    limits = build.Config(out=out, held_out=config.held_out, max_images=config.max_images)
    build.check_config(limits)
    choose_precision(config.precision)  # refuses what cannot be, before anything is loaded
    world = load_world(config.world)
    directions, pictures = open_directions(config.directions), open_folder(str(config.targets))
    if not Published.of(directions, pictures).partners:
        raise ValueError(
            f"no picture in {str(config.targets)!r} is called as a direction in "
            f"{str(config.directions)!r}: expected e.g. "
            f"{Path(directions.names[0]).stem + '.jpg'!r} for {directions.names[0]!r}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    try:
        report = fill(folder, config, world, directions, pictures, at)
        # Takes the place of an empty folder only: files that came there meanwhile are kept.
        folder.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def run(config: Config) -> None:
    """Make the dataset and print its counts and scores."""
    build.print_result(config.out, import_released(config))
