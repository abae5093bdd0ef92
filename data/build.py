"""Build a dataset of pairs: the embedding of a target, and the direction the teacher finds for it.

    python -m data.build --out runs/pairs --targets drawn:200 wide:50              # a laptop
    accelerate launch -m data.build --out pairs --targets ffhq/ --world ffhq.toml   # one GPU
    accelerate launch --multi_gpu --num_processes 8 -m data.build --out pairs --targets ffhq/ \\
        --world ffhq.toml                                                           # eight
    python -m data.build --out pairs --only verify                                  # is it whole?

Plans, runs and merges. Kill it whenever you like and start it again, by the same command, any
number of times at once: whatever is finished stays finished.
"""

import dataclasses
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.batch_size import MOST_TARGETS, fitting_batch_size, time_step
from data.card import DatasetInfo
from data.claims import claim, owner_name
from data.dataset import mean_scores, merge, verify
from data.pairs import features
from data.plan import Plan, check_plan, check_settings, check_targets, load_plan, make_plan
from data.publish import replace_file, sha256_of
from data.targets import Target, TargetSet, open_targets
from data.teach import Stop, Stopped, Teacher, Worker, chunk_name
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.sources import BANK, generated_sources, source_bank
from targetclip.targets import embed_targets, initial_directions
from targetclip.world import Parts, World, load_parts, load_world

Stage = Literal["plan", "run", "merge", "verify"]

WORK = ".build"  # hidden, so that a loader sees the dataset alone
HELD_OUT_SEED = 2  # of the sources that score every pair; others are for choosing and for judging


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder of the dataset, on a file system that all workers share."""
    targets: tuple[str, ...] = ()
    """Where the targets come from: folders, dataset:NAME, generated:N, mixed:N, drawn:N, wide:N.
    Not needed once the plan is made."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    only: Stage | None = None
    """Do this stage alone. Default: plan, run and merge."""
    recipe: str | None = None
    """Recipe of the teacher: release, paper or consistent. Default: the world's."""
    initial: Initial | None = None
    """What directions start from. Default: the recipe's."""
    steps: int | None = None
    """Steps of the teacher. Default: the recipe's."""
    batch_size: int | Literal["auto"] = "auto"
    """Targets optimized together, which are a chunk; auto finds what fits and is fast."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: all of a step."""
    held_out: int = 16
    """Sources that every pair is scored on and none is optimized on."""
    seed: int = 0
    """Decides everything random, with each target's id."""
    lease: float = 120.0
    """Seconds without a sign of life after which a worker's chunk is another's to take."""
    checkpoint_seconds: float = 60.0
    """Of work that a kill may cost."""
    max_attempts: int = 5
    """How often a chunk may end its worker without getting on, before its targets are given up."""
    name: str = "Teacher directions"
    """Title of the dataset's card."""
    licence: str = "other"
    """Licence of the dataset by its name on the hub, e.g. mit or cc-by-nc-4.0."""
    licence_text: str = "See the licences of the generator, the embedder and the target pictures."
    """What the card says of it."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_images", "held_out", "max_attempts"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
        for name in ("lease", "checkpoint_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                flag, value = name.replace("_", "-"), getattr(self, name)
                raise ValueError(f"--{flag}: expected seconds above 0, found {value}")
        if self.held_out < 2:
            raise ValueError("--held-out: expected 2 or more, for consistency compares sources")
        if self.recipe is not None and self.recipe not in RECIPES:
            raise ValueError(f"--recipe: expected {', '.join(RECIPES)}, found {self.recipe!r}")


def chosen_recipe(config: Config, world: World) -> tuple[str, Recipe]:
    """The teacher's recipe and its name, with what the command line changes."""
    name = config.recipe or world.recipe
    changes = {"initial": config.initial, "steps": config.steps}
    changes = {key: value for key, value in changes.items() if value is not None}
    return name, dataclasses.replace(RECIPES[name], **changes)  # type: ignore[arg-type]


def settings_of(
    config: Config, world: World, parts: Parts, recipe_name: str, recipe: Recipe, precision: str
) -> dict[str, Any]:
    """Everything a direction depends on but its target; what may not change within a folder."""
    inverts = world.inverter is not None and recipe.initial == "inversion"
    return {
        "generator": parts.generator.fingerprint,
        "embedder": parts.embedder.fingerprint,
        "inverter": sha256_of(world.inverter) if inverts and world.inverter else None,
        "recipe_name": recipe_name,
        "recipe": dataclasses.asdict(recipe),
        "truncation": world.truncation,
        "bank": BANK if recipe.fresh_sources else recipe.sources,
        "held_out": config.held_out,
        "seed": config.seed,
        "precision": precision,
    }


def prepare(
    parts: Parts, recipe: Recipe
) -> Callable[[list[Target], list[int]], tuple[Tensor, Tensor | None]]:
    """How targets are embedded, and where they start."""

    def embed(targets: list[Target], seeds: list[int]) -> tuple[Tensor, Tensor | None]:
        pictures = [target.picture for target in targets]
        embeddings = embed_targets(parts.generator, parts.embedder, pictures, recipe)
        if recipe.initial == "zero":
            return embeddings, None
        return embeddings, initial_directions(
            parts.generator, parts.inverter, pictures, recipe.initial, seeds
        )

    return embed


def make_teacher(
    config: Config,
    world: World,
    parts: Parts,
    recipe_name: str,
    recipe: Recipe,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Teacher:
    """The optimizer with its sources."""
    count = BANK if recipe.fresh_sources else recipe.sources
    held_out = generated_sources(parts.generator, world.truncation, config.held_out, HELD_OUT_SEED)
    return Teacher(
        parts.generator,
        parts.embedder,
        recipe,
        recipe_name,
        source_bank(parts.generator, world.truncation, count),
        held_out,
        config.max_images or MOST_TARGETS * max(recipe.sources, config.held_out),
        autocast,
    )


def plan_stage(
    config: Config,
    work: Path,
    sets: list[TargetSet],
    settings: dict[str, Any],
    teacher: Teacher,
    parts: Parts,
    stop: Stop,
    show: bool,
) -> Plan:
    """The plan of this build: made, or awaited while another process makes it, and checked."""
    folder, owner = work / "plan", owner_name()
    (work / "claims").mkdir(parents=True, exist_ok=True)
    while not (folder / "plan.json").is_file():
        stop.check()
        held = claim(work / "claims", "plan", owner, config.lease) if sets else None
        if held is None:
            if not sets and not any(work.glob("draft.*")):
                raise FileNotFoundError(f"no plan in {str(config.out)!r}: give --targets")
            time.sleep(1.0)
            continue
        try:
            with held.kept_alive():
                size = config.batch_size
                if size == "auto":
                    size = fitting_batch_size(lambda n: time_step(teacher, n), teacher.recipe.steps)
                bar = tqdm(desc="plan", total=sum(map(len, sets)), unit="target", disable=not show)

                def on_batch(count: int, total: int, bar: Any = bar) -> None:
                    stop.check()
                    bar.update(count)

                make = prepare(parts, teacher.recipe)
                plan = make_plan(work, owner, sets, settings, size, make, on_batch)
                bar.close()
                return plan
        finally:
            held.release()
    plan = load_plan(folder)
    planned = {name: value for name, value in plan.settings.items() if name != "targets"}
    check_settings(config.out, planned, settings)
    if config.batch_size not in ("auto", plan.batch_size):
        check_settings(
            config.out, {"batch_size": plan.batch_size}, {"batch_size": config.batch_size}
        )
    if sets:
        check_targets(plan, sets)
    return plan


def run_stage(
    config: Config, work: Path, plan: Plan, teacher: Teacher, stop: Stop, main: bool
) -> bool:
    """Teach until every chunk is done or in other hands; True if every one is done."""
    columns = features(plan.embeddings.shape[1], *teacher.bank.shape[1:])
    bar = tqdm(
        desc="targets", total=len(plan.targets), unit="target", disable=not main, smoothing=0.1
    )

    def on_step(chunk: int, progress: Progress) -> None:
        rows = plan.rows(chunk)
        done = len(worker.published()) * plan.batch_size if progress.step % 10 == 0 else bar.n
        part = (progress.step + 1) / progress.steps * (rows.stop - rows.start)
        bar.n = max(bar.n, min(len(plan.targets), int(done + part)))
        loss = float(progress.loss.nanmean())
        bar.set_postfix(
            chunk=f"{chunk + 1}/{plan.chunks}", step=progress.step + 1, loss=f"{loss:.3f}"
        )

    worker = Worker(
        work,
        plan,
        teacher,
        columns,
        stop,
        config.lease,
        config.checkpoint_seconds,
        config.max_attempts,
        on_step,
    )
    try:
        # The main process of a launch waits for the others' last chunks, since somebody has to
        # merge; theirs need not wait for anyone.
        return worker.run(wait=main and config.only is None)
    finally:
        bar.close()


def dataset_info(config: Config, world: World, parts: Parts, plan: Plan) -> DatasetInfo:
    """What the card says of all pairs alike."""
    settings = plan.settings
    fresh = settings["recipe"]["fresh_sources"]
    return DatasetInfo(
        name=config.name,
        generator=settings["generator"],
        resolution=parts.generator.resolution,
        num_ws=parts.generator.num_ws,
        w_dim=parts.generator.w_dim,
        embedder=world.name if Path(world.embedder).is_dir() else world.embedder,
        embedder_fingerprint=settings["embedder"],
        preprocess=settings["recipe"]["preprocess"],
        recipe=settings["recipe_name"],
        settings=settings["recipe"],
        truncation=settings["truncation"],
        seed=settings["seed"],
        targets=tuple(targets["spec"] for targets in settings["targets"]),
        sources=f"{settings['bank']} samples of the generator"
        + (f", {settings['recipe']['sources']} of them drawn anew at every step" if fresh else ""),
        held_out=f"{settings['held_out']} other samples of the generator",
        licence=config.licence,
        licence_text=config.licence_text,
        command="python -m data.build " + shlex.join(command_line(config, plan)),
    )


def command_line(config: Config, plan: Plan) -> list[str]:
    """The arguments that make this dataset again, without paths of this machine."""
    recipe = plan.settings["recipe"]
    specs = [targets["spec"] for targets in plan.settings["targets"]]
    shown = [Path(spec).name if Path(spec).is_dir() else spec for spec in specs]
    world = Path(config.world).name
    found = ["--out", "pairs", "--targets", *shown, "--world", world]
    found += ["--recipe", plan.settings["recipe_name"], "--initial", recipe["initial"]]
    found += ["--steps", str(recipe["steps"]), "--batch-size", str(plan.batch_size)]
    return [*found, "--held-out", str(plan.settings["held_out"]), "--seed", str(config.seed)]


def merge_stage(
    config: Config, work: Path, plan: Plan, world: World, parts: Parts
) -> dict[str, Any]:
    """Make the dataset of all chunks, and report.json; by one process at a time."""
    names = [chunk_name(chunk) for chunk in range(plan.chunks)]
    chunks = [work / "chunks" / f"{name}.parquet" for name in names]
    missing = [path.stem for path in chunks if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {plan.chunks} chunks are not done, {missing[0]} the first: "
            "run the build again, without --only merge"
        )
    columns = features(plan.embeddings.shape[1], parts.generator.num_ws, parts.generator.w_dim)
    merge(chunks, config.out, columns, dataset_info(config, world, parts, plan), plan.failures)
    report = report_of(config.out, plan)
    replace_file(config.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report


def report_of(out: Path, plan: Plan) -> dict[str, Any]:
    """Counts and mean scores of a merged dataset, and what it was made with."""
    packages = ("torch", "open_clip_torch", "accelerate", "datasets", "numpy", "pyarrow")
    return {
        "splits": mean_scores(out),
        "failures": len((out / "failures.jsonl").read_text().splitlines()),
        "settings": plan.settings,
        "batch_size": plan.batch_size,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
    }


def verify_stage(config: Config, work: Path) -> list[str]:
    """Everything wrong with the dataset, and with its plan where that is still there."""
    folder = work / "plan"
    if not (folder / "plan.json").is_file():
        return verify(config.out)
    try:
        expected = load_plan(folder).splits()
    except ValueError as error:
        return [str(error), *verify(config.out)]
    return [*check_plan(folder), *verify(config.out, expected)]


def run(config: Config) -> int:
    """Do what the configuration says; the exit code.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        Stopped: a signal came; the same command goes on from here.
    """
    work = config.out / WORK
    if config.only == "verify":
        problems = verify_stage(config, work)
        print("\n".join(problems) or f"{config.out}: clean")
        return 1 if problems else 0
    stop = Stop()
    stop.listen()
    accelerator = Accelerator()
    world = load_world(config.world)
    parts = load_parts(world, accelerator.device)
    recipe_name, recipe = chosen_recipe(config, world)
    precision = accelerator.mixed_precision
    settings = settings_of(config, world, parts, recipe_name, recipe, precision)
    teacher = make_teacher(config, world, parts, recipe_name, recipe, accelerator.autocast)
    # Every process of a launch may plan, but one is enough, and the others' targets stay closed.
    main = accelerator.is_main_process
    specs = config.targets if main and config.only in (None, "plan") else ()
    sets = [open_targets(spec, parts.generator, world.truncation) for spec in specs]
    work.mkdir(parents=True, exist_ok=True)
    plan = plan_stage(config, work, sets, settings, teacher, parts, stop, main)
    done = True
    if config.only in (None, "run"):
        done = run_stage(config, work, plan, teacher, stop, main)
    if config.only == "merge" or (config.only is None and done):
        held = claim(work / "claims", "merge", owner_name(), config.lease)
        if held is not None:
            try:
                with held.kept_alive():
                    report = merge_stage(config, work, plan, world, parts)
                print(json.dumps({"splits": report["splits"], "failures": report["failures"]}))
            finally:
                held.release()
    return 0


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    try:
        # Its checks of the configuration are errors of input too.
        code = run(tyro.cli(Config, description=__doc__))
    except Stopped:
        code = 130
        print("stopped; the same command goes on from here", file=sys.stderr)
    except (ValueError, OSError) as error:
        code = 1
        print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
