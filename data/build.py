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
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from accelerate import Accelerator
from tqdm import tqdm

from data.batch_size import fitting_batch_size, time_step
from data.card import DatasetInfo
from data.claims import Claim, claim, clock_ns, owner_name
from data.finish import merge_once, verify_build
from data.pairs import features
from data.plan import RECORD, Plan, PlanTaken, check_settings, check_targets, load_plan, make_plan
from data.publish import sha256_of
from data.targets import TargetSet, open_targets
from data.worker import Stop, Stopped, Teacher, Worker
from targetclip.optimize import Progress
from targetclip.precision import plain_attention
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.sources import generated_sources, source_bank
from targetclip.seeds import BANK
from targetclip.world import Parts, World, load_parts, load_world

logger = logging.getLogger(__name__)

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
    """Recipe of the teacher: release, paper, consistent or identity. Default: the world's."""
    initial: Initial | None = None
    """What directions start from. Default: the recipe's."""
    steps: int | None = None
    """Steps of the teacher. Default: the recipe's."""
    batch_size: int | Literal["auto"] = "auto"
    """Targets optimized together, which are a chunk; auto finds what fits and is fast."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a step."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
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


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be; here, for tyro prints a box for its own."""
    for name in ("steps", "batch_size", "max_images", "held_out", "max_attempts"):
        value = getattr(config, name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected 1 or more, found {value}")
    for name in ("lease", "checkpoint_seconds"):
        if not 0 < getattr(config, name) < math.inf:
            flag, value = name.replace("_", "-"), getattr(config, name)
            raise ValueError(f"--{flag}: expected seconds above 0, found {value}")
    if config.held_out < 2:
        raise ValueError(
            "--held-out: expected 2 or more, for consistency compares sources, found 1"
        )
    if config.recipe is not None and config.recipe not in RECIPES:
        raise ValueError(f"--recipe: expected {', '.join(RECIPES)}, found {config.recipe!r}")


def chosen_recipe(config: Config, world: World) -> tuple[str, Recipe]:
    """The teacher's recipe and its name, with what the command line changes."""
    name = config.recipe or world.recipe
    changes = {"initial": config.initial, "steps": config.steps}
    changes = {key: value for key, value in changes.items() if value is not None}
    recipe = dataclasses.replace(RECIPES[name], **changes)  # type: ignore[arg-type]
    if recipe.initial == "inversion" and world.inverter is None:
        raise ValueError(
            f"recipe {name!r} starts from the target's inversion, and world {world.name!r} has no "
            "inverter: give --initial zero or random"
        )
    if recipe.identity_weight and world.identity is None:
        raise ValueError(
            f"--recipe: {name!r} has an identity loss, and world {world.name!r} no identity model: "
            "choose another, or name one in the world's file"
        )
    return name, recipe


def settings_of(
    config: Config, world: World, parts: Parts, recipe_name: str, recipe: Recipe, precision: str
) -> dict[str, Any]:
    """Everything a direction depends on but its target; what may not change within a folder."""
    inverts = world.inverter is not None and recipe.initial == "inversion"
    return {
        "generator": parts.generator.fingerprint,
        "embedder": parts.embedder.fingerprint,
        "inverter": sha256_of(world.inverter) if inverts and world.inverter else None,
        "identity": parts.identity.fingerprint
        if parts.identity is not None and recipe.identity_weight
        else None,
        "recipe_name": recipe_name,
        "recipe": dataclasses.asdict(recipe),
        "truncation": world.truncation,
        "bank": BANK if recipe.fresh_sources else recipe.sources,
        "held_out": config.held_out,
        "seed": config.seed,
        "precision": precision,
    }


@contextmanager
def in_precision(accelerator: Accelerator) -> Iterator[None]:
    """The launcher's precision, at its best speed."""
    half = accelerator.mixed_precision != "no"
    with accelerator.autocast(), plain_attention(accelerator.device) if half else nullcontext():
        yield


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
        config.max_images,
        autocast,
        parts.inverter,
        parts.identity,
    )


def make_own_plan(
    config: Config,
    work: Path,
    held: Claim,
    sets: list[TargetSet],
    settings: dict[str, Any],
    teacher: Teacher,
    stop: Stop,
) -> None:
    """Plan, in a process that holds the claim to it."""

    def try_batch(size: int) -> float:
        stop.check()
        return time_step(teacher, size)

    size = config.batch_size
    if size == "auto":
        size = fitting_batch_size(try_batch, teacher.recipe.steps)
    with tqdm(desc="plan", total=sum(map(len, sets)), unit="target") as bar:

        def on_batch(done: int, total: int) -> None:
            bar.update(done - bar.n)
            stop.check()
            if held.lost:
                raise PlanTaken

        make_plan(work, held.owner, sets, settings, size, teacher.prepare, on_batch)


def await_plan(
    config: Config,
    work: Path,
    sets: list[TargetSet],
    settings: dict[str, Any],
    teacher: Teacher,
    stop: Stop,
    main: bool,
) -> None:
    """Return once there is a plan: made here, or by another process, in this launch or not."""
    record = work / "plan" / RECORD
    planning = config.only in (None, "plan") and bool(config.targets)
    (work / "claims").mkdir(parents=True, exist_ok=True)
    told = False
    while not record.is_file():
        stop.check()
        # The other processes of a launch leave planning to its main one.
        mine = main or not planning
        held = claim(work / "claims", "plan", owner_name(), config.lease) if mine else None
        if held is None:
            if main and not told:
                logger.warning("waiting for the plan of another process, or for its claim to end")
                told = True
            time.sleep(1.0)
            continue
        try:
            # It may have been finished, and its claim released, since the last look.
            if not planning and not record.is_file():
                raise FileNotFoundError(
                    f"no plan in {str(config.out)!r}: plan first, by giving --targets"
                )
            if not record.is_file():
                with held.kept_alive(), suppress(PlanTaken):
                    make_own_plan(config, work, held, sets, settings, teacher, stop)
        finally:
            held.release()


def plan_stage(config: Config, work: Path, sets: list[TargetSet], settings: dict[str, Any]) -> Plan:
    """The plan, if it is of this command."""
    plan = load_plan(work / "plan")
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
    total = len(plan.targets)
    finished = 0

    def on_step(chunk: int, progress: Progress) -> None:
        nonlocal finished
        if bar.disable:  # a loss is not to be waited for, nor a folder read, for nobody
            return
        if progress.step % 10 == 0:
            finished = min(total, len(worker.published()) * plan.batch_size)
        rows = plan.rows(chunk)
        part = int((progress.step + 1) / progress.steps * (rows.stop - rows.start))
        loss = f"{float(progress.loss.nanmean()):.3f}"
        bar.set_postfix(
            chunk=f"{chunk + 1}/{plan.chunks}", step=progress.step + 1, loss=loss, refresh=False
        )
        bar.update(max(0, min(total, finished + part) - bar.n))

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
    finished = min(total, len(worker.published()) * plan.batch_size)
    with tqdm(
        desc="targets", total=total, initial=finished, unit="target", disable=not main
    ) as bar:
        # The main process of a launch waits for the others' last chunks, since somebody has to
        # merge; theirs need not wait for anyone.
        done = worker.run(wait=main and config.only is None)
        bar.update(total - bar.n if done else 0)
    return done


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
        precision=settings["precision"],
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
    found = ["--out", "pairs", "--targets", *specs, "--world", Path(config.world).name]
    found += ["--recipe", plan.settings["recipe_name"], "--initial", recipe["initial"]]
    found += ["--steps", str(recipe["steps"]), "--batch-size", str(plan.batch_size)]
    return [*found, "--held-out", str(plan.settings["held_out"]), "--seed", str(config.seed)]


def run(config: Config) -> int:
    """Do what the configuration says; the exit code.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        Stopped: a signal came; the same command goes on from here.
    """
    check_config(config)
    work = config.out / WORK
    if config.only == "verify":
        problems = verify_build(config.out, work)
        print("\n".join(problems) or f"{config.out}: clean")
        return 1 if problems else 0
    stop = Stop()
    stop.listen()
    accelerator = Accelerator()
    world = load_world(config.world)
    parts = load_parts(world, accelerator.device, config.checkpoint_layers)
    recipe_name, recipe = chosen_recipe(config, world)
    precision = accelerator.mixed_precision
    settings = settings_of(config, world, parts, recipe_name, recipe, precision)
    teacher = make_teacher(
        config, world, parts, recipe_name, recipe, lambda: in_precision(accelerator)
    )
    main = accelerator.is_main_process
    specs = config.targets if main else ()
    sets = [open_targets(spec, parts.generator, world.truncation) for spec in specs]
    work.mkdir(parents=True, exist_ok=True)
    began = clock_ns(work)
    await_plan(config, work, sets, settings, teacher, stop, main)
    plan = plan_stage(config, work, sets, settings)
    info = dataset_info(config, world, parts, plan)
    done = config.only == "merge"
    if config.only in (None, "run"):
        done = run_stage(config, work, plan, teacher, stop, main) and config.only is None
    if main and done:
        report = merge_once(config.out, work, plan, info, config.lease, began, stop.check)
        print(json.dumps({"splits": report["splits"], "failures": report["failures"]}))
    return 0


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    try:
        code = run(tyro.cli(Config, description=__doc__))
    except (Stopped, KeyboardInterrupt):
        code = 130
        print("stopped; the same command goes on from here", file=sys.stderr)
    except (ValueError, OSError) as error:
        code = 1
        print(f"error: {error}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
