"""Build a dataset of pairs: the embedding of a target, and the direction the teacher finds for it.

    python -m data.build --out runs/pairs --targets avataaars:200 styles:50       # a laptop
    accelerate launch -m data.build --out pairs --targets ffhq/ --world ffhq.toml   # one GPU
    accelerate launch --multi_gpu --num_processes 8 -m data.build --out pairs --targets ffhq/ \\
        --world ffhq.toml                                                           # eight
    python -m data.build --out pairs --only verify                                  # is it whole?

Plans, runs and merges. Kill it at any time and start it again by the same command, several times at
once if you like: finished work stays finished.
"""

import dataclasses
import json
import logging
import math
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from targetclip import command
from targetclip.command import (
    Precision,
    Stop,
    Tracker,
    choose_precision,
    make_folder,
    say,
    say_next,
    start,
)
from targetclip.recipes import RECIPES, Initial, Recipe, recipe_named
from targetclip.world import DEFAULT_WORLD, World, load_scene, load_world

Stage = Literal["plan", "run", "merge", "verify"]


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder of the dataset, on a file system that all workers share."""
    targets: tuple[str, ...] = ()
    """Target pictures: folders, dataset:NAME, generated:N, mixed:N, avataaars:N, styles:N. Not
    needed once the plan is made."""
    sample: int | None = None
    """Take so many of each set of targets, at random by --seed; of samples the first. Default: all.
    """
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    only: Stage | None = None
    """Do this stage alone. Default: plan, run and merge."""
    recipe: str | None = None
    """Recipe of the teacher: release, paper, consistent or identity. Default: the world's."""
    initial: Initial | None = None
    """Start of the directions. Default: the recipe's."""
    steps: int | None = None
    """Steps of the teacher. Default: the recipe's."""
    render_size: int | None = None
    """Size in px of the images that the teacher renders, without the generator's finest levels.
    Scores on held-out sources are of full images, others of these. Default: the generator's own."""
    batch_size: int | Literal["auto"] = "auto"
    """Targets optimized together, which are a chunk; auto: as many as fit and are fast."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a step."""
    checkpoint_layers: bool = False
    """Keep three fifths of an image's memory for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    precision: Precision | None = None
    """Of the teacher. Default: accelerate's, or else fp32."""
    held_out: int = 16
    """Sources that every pair is scored on and none is optimized on."""
    seed: int = 0
    """Decides everything random, with each target's id."""
    lease: float = 120.0
    """Seconds without a sign of life after which others may take a worker's chunk."""
    checkpoint_seconds: float = 60.0
    """Of work that a kill may cost."""
    max_attempts: int = 5
    """How often a chunk may end its worker without progress, before its targets are given up."""
    name: str = "Teacher directions"
    """Title of the dataset's card."""
    licence: str = "other"
    """Licence of the dataset by its name on the hub, e.g. mit or cc-by-nc-4.0."""
    licence_text: str = "See the licences of the generator, the embedder and the target pictures."
    """The card's words on the licence."""
    tracker: Tracker | None = None
    """Send what is done, and mean scores of this launch's own chunks, to this tracker: tensorboard
    (files in --out/.build/trackers) or wandb. Every launch is a run of its own there. It needs the
    package of that name."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("data.build", Config)

from accelerate import Accelerator
from tqdm import tqdm

from data.card import CARD, REPORT, SUMS, DatasetInfo
from data.claims import Claim, claim, clock_ns, owner_name
from data.dataset import verify
from data.pairs import Failure, Pair
from data.plan import (
    RECORD,
    Plan,
    PlanTaken,
    check_plan,
    check_settings,
    check_targets,
    load_plan,
    make_plan,
)
from data.publish import At, go_on, sha256_of
from data.targets import TargetSet, check_trainable, open_targets, sampled
from data.teacher import Teacher, fitting_batch_size, make_teacher, time_step
from data.worker import Worker, merge_all, remove_leftovers
from targetclip.generators import check_render_size
from targetclip.optimize import Progress
from targetclip.scene import Scene
from targetclip.tracking import check_tracker, tracked

logger = logging.getLogger(__name__)

TRACKED = (
    "loss",
    "transfer",
    "consistency",
    "held_out_transfer",
    "held_out_consistency",
    "seconds",
)
SCHEDULE = "pairs:1000 transfer:4000"  # schedule of a mapper's training
LATER = {  # where results are and what comes next, after a part of the work
    "plan": ("planned", "the same command without --only, on as many workers as you like"),
    "run": ("this worker's chunks are done", "the same command with --only merge"),
}
TRACKERS = "trackers"  # folder of a folder for each launch
WORK = ".build"  # hidden, so that a loader finds the dataset alone
ACCELERATE_NAMES: dict[Precision, str] = {"fp32": "no", "bf16": "bf16"}  # as plans record them


def check_config(config: Config) -> None:
    """Check the options. ValueError: an option has an impossible value."""
    check_trainable(config.targets)
    check_tracker(config.tracker)
    command.check_least(config, steps=1, sample=1, max_images=1, held_out=1, max_attempts=1)
    if config.batch_size != "auto":
        command.check_least(config, batch_size=1)
    for name in ("lease", "checkpoint_seconds"):
        if not 0 < getattr(config, name) < math.inf:
            flag, value = name.replace("_", "-"), getattr(config, name)
            raise ValueError(f"--{flag}: expected seconds above 0, found {value}")
    if config.held_out < 2:
        raise ValueError(
            "--held-out: expected 2 or more, for consistency compares sources, found 1"
        )
    if config.recipe is not None:
        recipe_named(config.recipe)


def chosen_recipe(config: Config, world: World) -> tuple[str, Recipe]:
    """Return the name of the teacher's recipe, and the recipe with the changes of the options.
    ValueError: the world has no network that the recipe needs."""
    name = config.recipe or world.recipe
    names = ("initial", "steps", "render_size")
    changes = {name: value for name in names if (value := getattr(config, name)) is not None}
    recipe = dataclasses.replace(RECIPES[name], **changes)
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


def settings_of(teacher: Teacher, world: World, seed: int) -> dict[str, Any]:
    """Return everything a direction depends on but its target; it may not change in a folder."""
    scene, recipe = teacher.scene, teacher.recipe
    inverter = world.inverter if recipe.initial == "inversion" else None
    identity = scene.identity if recipe.identity_weight else None
    return {
        "generator": scene.generator.fingerprint,
        "embedder": scene.embedder.fingerprint,
        "inverter": None if inverter is None else sha256_of(inverter),
        "identity": None if identity is None else identity.fingerprint,
        "recipe_name": teacher.recipe_name,
        "recipe": dataclasses.asdict(recipe),
        "truncation": world.truncation,
        "bank": len(teacher.bank),
        "held_out": len(teacher.held_out),
        "seed": seed,
        "precision": ACCELERATE_NAMES[teacher.precision],
    }


@dataclass(frozen=True, kw_only=True)
class Build:
    """A build as this process sees it."""

    config: Config
    work: Path
    """Folder of the plan, the chunks and the claims."""
    teacher: Teacher
    settings: dict[str, Any]
    sets: list[TargetSet]
    """Targets to plan, or to compare with the plan; none in the other processes of a launch."""
    stop: Stop
    main: bool
    """This is the main process of a launch."""
    at: At

    def claim(self, name: str) -> Claim | None:
        """Claim the plan or the merge; return None if another process holds it."""
        return claim(self.work / "claims", name, owner_name(), self.config.lease, self.at)


# Planning


def make_own_plan(build: Build, held: Claim) -> None:
    """Plan, in a process that holds the claim to it."""
    stop, teacher, size = build.stop, build.teacher, build.config.batch_size

    def try_batch(size: int) -> float:
        stop.check()
        return time_step(teacher, size)

    if size == "auto":
        size = fitting_batch_size(try_batch, teacher.recipe.steps)
    with tqdm(desc="plan", total=sum(map(len, build.sets)), unit="target") as bar:

        def on_batch(done: int, total: int) -> None:
            bar.update(done - bar.n)
            stop.check()
            if held.lost:
                raise PlanTaken

        make_plan(
            build.work,
            held.owner,
            build.sets,
            build.settings,
            size,
            teacher.prepare,
            on_batch,
            at=build.at,
        )


def await_plan(build: Build) -> None:
    """Return once there is a plan: made here, or by another process, in this launch or not.
    FileNotFoundError: there is none, and no targets to plan."""
    record = build.work / "plan" / RECORD
    planning = build.config.only in (None, "plan") and bool(build.config.targets)
    (build.work / "claims").mkdir(parents=True, exist_ok=True)
    warned = False
    while not record.is_file():
        build.stop.check()
        # The other processes of a launch leave planning to its main one.
        held = build.claim("plan") if build.main or not planning else None
        if held is None:
            if build.main and not warned:
                logger.warning("waiting for the plan of another process, or for its claim to end")
                warned = True
            time.sleep(1.0)
            continue
        try:
            # Another may have finished it and released its claim since the last look.
            if not planning and not record.is_file():
                raise FileNotFoundError(
                    f"no plan in {str(build.config.out)!r}: plan first, by giving --targets"
                )
            if not record.is_file():
                with held.kept_alive(), suppress(PlanTaken):
                    make_own_plan(build, held)
        finally:
            held.release()


def checked_plan(build: Build) -> Plan:
    """Load the plan, and check that it is of this command.
    ValueError: it is of other settings or targets."""
    config, plan = build.config, load_plan(build.work / "plan")
    planned = {name: value for name, value in plan.settings.items() if name != "targets"}
    check_settings(config.out, planned, build.settings)
    if config.batch_size not in ("auto", plan.batch_size):
        check_settings(
            config.out, {"batch_size": plan.batch_size}, {"batch_size": config.batch_size}
        )
    if build.sets:
        check_targets(plan, build.sets)
    return plan


# Running


def run_chunks(build: Build, plan: Plan) -> bool:
    """Do chunks until each is done or held by others; return True if all are done."""
    config = build.config
    total = len(plan.targets)
    finished = 0

    def on_step(chunk: int, progress: Progress) -> None:
        nonlocal finished
        if bar.disable:  # the loss would wait for the device, and the folder be read, for nothing
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

    def on_chunk(pairs: list[Pair], failures: list[Failure]) -> None:
        figures: dict[str, float] = {"failures": len(failures)}
        for name in TRACKED if pairs else ():
            figures[name] = fmean(getattr(pair, name) for pair in pairs)
        done = min(total, len(worker.published()) * plan.batch_size)
        track({"targets_done": done, **figures}, done)

    worker = Worker(
        work=build.work,
        plan=plan,
        teacher=build.teacher,
        stop=build.stop,
        lease=config.lease,
        checkpoint_seconds=config.checkpoint_seconds,
        max_attempts=config.max_attempts,
        on_step=on_step,
        on_chunk=on_chunk if build.main else None,
        at=build.at,
    )
    finished = min(total, len(worker.published()) * plan.batch_size)
    tracker = config.tracker if build.main and finished < total else None
    with (
        tracked(tracker, build.work / TRACKERS / worker.owner, plan.settings, 0) as track,
        tqdm(
            desc="targets", total=total, initial=finished, unit="target", disable=not build.main
        ) as bar,
    ):
        # The main process of a launch waits for the others' last chunks, to merge them.
        done = worker.run(wait=build.main and config.only is None)
        bar.update(total - bar.n if done else 0)
    return done


# Merging and checking


def facts_of(settings: dict[str, Any], world: World, scene: Scene) -> dict[str, Any]:
    """Return the facts of a card that follow from the settings of a plan and from the world."""
    return {
        "generator": settings["generator"],
        "resolution": scene.generator.resolution,
        "num_ws": scene.generator.num_ws,
        "w_dim": scene.generator.w_dim,
        "embedder": world.name if Path(world.embedder).is_dir() else world.embedder,
        "embedder_fingerprint": settings["embedder"],
        "preprocess": settings["recipe"]["preprocess"],
        "recipe": settings["recipe_name"],
        "settings": settings["recipe"],
        "truncation": settings["truncation"],
        "precision": settings["precision"],
        "seed": settings["seed"],
        "targets": tuple(targets["spec"] for targets in settings["targets"]),
    }


def dataset_info(config: Config, world: World, scene: Scene, plan: Plan) -> DatasetInfo:
    """Return the facts of the card."""
    settings = plan.settings
    sources = f"{settings['bank']} samples of the generator"
    if settings["recipe"]["fresh_sources"]:
        sources += f", {settings['recipe']['sources']} of them drawn anew at every step"
    return DatasetInfo(
        **facts_of(settings, world, scene),
        name=config.name,
        sources=sources,
        held_out=f"{settings['held_out']} other samples of the generator",
        licence=config.licence,
        licence_text=config.licence_text,
        command="python -m data.build " + shlex.join(command_line(config, plan)),
    )


def command_line(config: Config, plan: Plan) -> list[str]:
    """Return the arguments that make this dataset again, without paths of this machine."""
    recipe = plan.settings["recipe"]
    specs = [targets["spec"] for targets in plan.settings["targets"]]
    flags = ["--out", "pairs", "--targets", *specs, "--world", Path(config.world).name]
    flags += ["--recipe", plan.settings["recipe_name"], "--initial", recipe["initial"]]
    flags += ["--steps", str(recipe["steps"]), "--batch-size", str(plan.batch_size)]
    if recipe.get("render_size") is not None:
        flags += ["--render-size", str(recipe["render_size"])]
    if config.sample is not None:
        flags += ["--sample", str(config.sample)]
    return [*flags, "--held-out", str(plan.settings["held_out"]), "--seed", str(config.seed)]


def merge_once(build: Build, plan: Plan, info: DatasetInfo, began: int) -> dict[str, Any]:
    """Merge, unless another process has since `began`; return the report.

    Args:
        began: a time of the file system's clock, in ns.

    Raises:
        Stopped: a signal came while another process merged.
    """
    out, work = build.config.out, build.work
    while True:
        while (held := build.claim("merge")) is None:
            build.stop.check()
            time.sleep(0.5)
        try:
            # Workers finish together. One merge is enough, and its dataset may be in use already.
            merged = (out / SUMS).is_file() and (out / REPORT).is_file()
            if merged and (out / REPORT).stat().st_mtime_ns > began:
                report: dict[str, Any] = json.loads((out / REPORT).read_text())
                return report
            with held.kept_alive():
                report = merge_all(out, work, plan, info, build.at)
                remove_leftovers(out, work, build.config.lease)
                return report
        except FileNotFoundError:
            if held.heartbeat():
                raise
            # Halted for longer than the lease: another has merged meanwhile, and removed the files
            # that this one was writing.
        finally:
            held.release()


def verify_build(out: Path, work: Path) -> list[str]:
    """Return all that is wrong with the dataset, and with its plan where that is still there."""
    folder = work / "plan"
    if not (folder / RECORD).is_file():
        return verify(out)
    try:
        expected = load_plan(folder).splits()
    except ValueError as error:
        return [str(error), *verify(out)]
    return [*check_plan(folder), *verify(out, expected)]


# The command


def print_result(out: Path, report: dict[str, Any]) -> None:
    """Print counts and scores as JSON and, to standard error, where the dataset is."""
    say(json.dumps({"splits": report["splits"], "failures": report["failures"]}))
    pairs = sum(split["pairs"] for split in report["splits"].values())
    folder = shlex.quote(str(out))
    train = f"python -m train.mapper --out MAPPER --pairs {folder} --schedule {SCHEDULE}"
    say_next(out, f"{pairs} pairs, {report['failures']} failures, {CARD}", train, error=True)


def run(config: Config, at: At = go_on) -> int:
    """Do the stages that are asked for; return the exit code.

    Args:
        at: is called at named points of the work; a test ends or halts the process there.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        Stopped: a signal came; the same command goes on from here.
    """
    check_config(config)
    work = config.out / WORK
    if config.only == "verify":
        problems = verify_build(config.out, work)
        say("\n".join(problems) or f"{config.out}: clean")
        if problems and work.is_dir():
            then = "the command of its build again, which merges anew"
            say_next(config.out, f"{len(problems)} problems", then, error=True)
        return 1 if problems else 0
    precision = choose_precision(config.precision)
    world = load_world(config.world)
    make_folder(config.out)
    stop = Stop()
    stop.listen()
    # Searches run in the precision that was chosen; accelerate need not convert anything.
    launch = Accelerator(mixed_precision="no")
    main = launch.is_main_process
    if main:
        say(f"loading world {world.name}", error=True)
    scene = load_scene(
        world,
        launch.device,
        max_images=config.max_images,
        checkpoint_layers=config.checkpoint_layers,
    )
    check_render_size(scene.generator, config.render_size, "--render-size")
    teacher = make_teacher(scene, *chosen_recipe(config, world), config.held_out, precision)
    build = Build(
        config=config,
        work=work,
        teacher=teacher,
        settings=settings_of(teacher, world, config.seed),
        sets=[
            sampled(
                open_targets(spec, scene.generator, world.truncation), config.sample, config.seed
            )
            for spec in (config.targets if main else ())
        ],
        stop=stop,
        main=main,
        at=at,
    )
    work.mkdir(parents=True, exist_ok=True)
    began = clock_ns(work)
    await_plan(build)
    plan = checked_plan(build)
    info = dataset_info(config, world, scene, plan)
    done = config.only == "merge"
    if config.only in (None, "run"):
        done = run_chunks(build, plan) and config.only is None
    if main and done:
        print_result(config.out, merge_once(build, plan, info, began))
    elif main:
        say_next(config.out, *LATER[config.only or "run"], error=True)
    return 0
