"""The plan of train.own: what each stage does, by which command, and about how long it takes here.

Knows the flags of the stages, and times a few steps of the teacher and of the training; runs none
of the stages.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import build
from data.plan import check_settings
from data.publish import sha256_of
from data.targets import SEEDED, check_trainable, default_targets, of_split, open_targets, sampled
from data.teacher import fitting_batch_size, make_teacher, memory, time_step
from predictor.mapper import load_mapper
from targetclip import command
from targetclip.command import Precision, in_precision, say
from targetclip.generators import check_render_size
from targetclip.recipes import RECIPES, Recipe
from targetclip.scene import MAX_IMAGES, Scene
from targetclip.seeds import CALIBRATION_TARGETS, DEFAULT_TARGETS, TRAINING_TARGETS
from targetclip.world import DEFAULT_WORLD, World, load_scene
from train import mapper, mapper_settings
from train.mapper_objective import Objective
from train.mapper_settings import TrainingStage
from train.own import MAPPER, PLAN, PROGRESS, Config, Stage, duration, is_done, read, words_of

CLIP_SIDE = 256  # px: CLIP reads 224, so most steps render no more
LEAST_SIDE = 64
USABLE = 0.8  # of the free memory
PROBED = (1, 8)  # images whose backward pass shows what one of them holds
LOOKED_AT = 500  # pictures of a folder among which one to test by is looked for
# Ends of the trade-off, as factors of the weights that the mapper was trained at
IDENTITY_ENDS, DECAY_ENDS = (1 / 3, 20 / 3), (1 / 3, 10.0)
# Of other commands, for estimates alone
PLACES = 5  # on the trade-off, that calibration measures
SCORED_ON, EXPECTED_ON = 16, 4  # images: of a pair or a validation target; of an expectation
REFINING = 130  # steps that calibration refines a target's answers by
METHODS, JUDGED = 8, 40  # of a comparison, and images that it renders of a target by each


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was found and timed on this device before the first stage."""

    files: dict[str, str]
    """Hashes of the world's files."""
    device: str
    accelerator: bool
    precision: Precision
    resolution: int
    pictures: int
    """Of --targets, in all."""
    folder: str | None
    """First folder among them that has a picture to test by."""
    fits: int = sys.maxsize
    """Images whose backward pass memory holds at once."""
    batch: int = 1
    """Targets that are searched for together."""
    image: float = 0.0
    """Seconds to render and embed an image."""
    search: float = 0.0
    """Seconds of a teacher's step for a target."""
    passes: dict[str, float] = field(default_factory=dict)
    """Seconds of an image in a step of training, by its size in px, or `None` for the whole."""

    def pass_at(self, size: int | None = None) -> float:
        """Return the seconds of an image in a step of training."""
        return self.passes.get(str(size), max(self.passes.values(), default=0.0))


# The stages


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Return a command's flags with their values; the last counts, as for the command itself.

    Paths of the results and of the world may be written in another way, so they are left out, and
    of a mapper's path but its folder's and its own name.
    """
    flags: dict[str, str] = {}
    name = ""
    for word in words[1:]:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        else:
            flags[name] = f"{flags[name]} {word}".strip()
    for name in ("--mapper", "--start"):
        if name in flags:
            flags[name] = "/".join(Path(flags[name]).parts[-2:])
    return {n: v for n, v in flags.items() if n not in ("--out", "--world", "--pairs", "--bank")}


def number_of(flags: Mapping[str, str], name: str) -> int:
    """Return the value of a flag. ValueError: it is no whole number."""
    try:
        return int(flags[name])
    except ValueError as error:
        raise ValueError(f"{name}: expected a whole number, found {flags[name]!r}") from error


def build_config(words: Sequence[str]) -> build.Config:
    """Read the flags of data.build. SystemExit: a usage error, which is one line."""
    return command.parse(build.Config, "python -m data.build", None, [*words[1:]])


def mapper_config(words: Sequence[str]) -> mapper_settings.Config:
    """Read the flags of train.mapper. SystemExit: a usage error, which is one line."""
    config: mapper_settings.Config = command.parse(
        mapper_settings.Config, "python -m train.mapper", None, [*words[1:]]
    )
    mapper_settings.check_config(config)
    return config


def search_side(facts: Facts) -> int | None:
    """Return the size in px that searches and most steps render; None: the generator's own.

    CLIP shrinks larger images anyway. A processor takes half of a small generator's size as well,
    which in the bundled world found directions as good in half of the time.
    """
    side = facts.resolution if facts.accelerator else max(facts.resolution // 2, LEAST_SIDE)
    side = min(side, CLIP_SIDE)
    return side if side < facts.resolution else None


def schedule_of(steps: int, pairs: int, side: int | None) -> tuple[str, ...]:
    """Return the stages of a training whose transfer term has so many steps."""
    first = f"pairs:{max(1, steps // 10)}" if pairs else f"differences:{max(1, steps // 4)}"
    return first, *closing_stages(steps, side)


def closing_stages(steps: int, side: int | None) -> tuple[str, ...]:
    """Return the stages of so many steps of the transfer term, the last ones of whole images: the
    expected score is of these."""
    last = max(1, steps // 10)
    if side is None or last == steps:
        return (f"transfer:{steps}",)
    return f"transfer@{side}:{steps - last}", f"transfer:{last}"


def images_of_batch(config: mapper_settings.Config, world: World) -> int:
    """Return the images that a batch of the transfer term renders."""
    recipe = RECIPES[config.transfer.recipe or world.recipe]
    sources = config.transfer.sources or recipe.sources
    return config.batches.batch_size * sources


def transfer_stages(config: mapper_settings.Config) -> list[TrainingStage]:
    """Return the stages that render."""
    return [stage for stage in mapper_settings.stages_of(config) if "transfer" in stage.terms]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Makes the stages, each with its command and its estimate, of what was asked and found."""

    config: Config
    world: World
    facts: Facts
    processes: int = 1

    @property
    def number(self) -> int:
        """Pairs that are asked for, about."""
        asked, many = self.config.pairs, self.facts.accelerator
        return asked if asked is not None else 1000 if many else 200

    @property
    def usual(self) -> Recipe:
        """The recipe of searches."""
        return RECIPES[self.world.recipe]

    def words(self, module: str, further: str, **flags: Any) -> list[str]:
        """Return the words of a command, with the flags that all stages share; see `words_of`."""
        shared = {
            "world": self.config.world,
            "precision": self.facts.precision,
            "checkpoint_layers": self.config.checkpoint_layers,
            "seed": self.config.seed,
        }
        return words_of(module, further, **flags, **shared)

    def at_once(self, most: int) -> int | None:
        """Return --max-images of a stage that renders so many; None: all of them fit."""
        return self.config.max_images or (self.facts.fits if self.facts.fits < most else None)

    def size_of(self, spec: str) -> int:
        """Return the number of targets of a set."""
        seeded = SEEDED.fullmatch(spec)
        return int(seeded[2]) if seeded else self.facts.pictures

    @property
    def steps(self) -> int:
        """Steps of training after those on pairs."""
        return self.config.steps or (4000 if self.facts.accelerator else 1000)

    def search_seconds(self) -> float:
        """Return the seconds of a step of a search for a target, alone."""
        return self.facts.pass_at() * self.usual.sources

    def pairs(self) -> Stage:
        """Return the build of pairs."""
        config, facts, own = self.config, self.facts, self.config.targets
        half = -(-max(self.number, 1) // 2)
        words = self.words(
            "data.build",
            config.build_flags,
            out=config.out / "pairs",
            targets=own or default_targets(self.world, DEFAULT_TARGETS, half),
            sample=-(-max(self.number, 1) // len(own)) if own else None,
            render_size=search_side(facts),
            batch_size=facts.batch,
            max_images=self.at_once(self.usual.sources),
        )
        building = build_config(words)
        _, recipe = build.chosen_recipe(building, self.world)
        sizes = map(self.size_of, building.targets)
        made = sum(min(size, building.sample or size) for size in sizes)
        a_pair = recipe.steps * facts.search + (1 + SCORED_ON) * facts.image
        side = recipe.render_size or facts.resolution
        return Stage(
            name="pairs",
            words=words,
            result="pairs/SHA256SUMS",
            what=f"{made} pairs, {recipe.steps} steps at {side} px",
            seconds=made * a_pair / self.processes,
            parallel=True,
        )

    def training_seconds(self, training: mapper_settings.Config) -> float:
        """Return the seconds of a training, which judges itself on validation targets."""
        facts, stages = self.facts, mapper_settings.stages_of(training)
        pictures = sum(map(self.size_of, training.data.targets or ()))
        validated = sum(map(self.size_of, training.data.validation or ())) or 64
        ways = (4 if self.world.inverter else 2) + 2 * training.transfer.only_tradeoff
        total = sum(stage.steps for stage in stages)
        looks = (1 + total // training.evaluate_every) * validated * SCORED_ON * ways
        embedded = 0 if training.data.bank else pictures
        images = training.accumulate * images_of_batch(training, self.world)
        passes = sum(s.steps * facts.pass_at(s.render_size) for s in transfer_stages(training))
        return images * passes + (embedded + looks) * facts.image

    def train(self) -> Stage:
        """Return the training of the mapper."""
        config, facts, world, many = self.config, self.facts, self.world, self.facts.accelerator
        spread = (20_000, 5_000) if many else (4_000, 1_000)
        words = self.words(
            "train.mapper",
            config.train_flags,
            out=config.out / "mapper",
            pairs=config.out / "pairs" if self.number else None,
            schedule=schedule_of(self.steps, self.number, search_side(facts)),
            targets=(*config.targets, *default_targets(world, TRAINING_TARGETS, *spread)),
            correction=96,
            max_images=config.max_images,
            licence=config.licence,
        )
        training = mapper_config(words)
        images = images_of_batch(training, world)
        if training.max_images is None and facts.fits < images:
            words += ["--max-images", str(facts.fits)]
        pictures = sum(map(self.size_of, training.data.targets or ()))
        total = sum(stage.steps for stage in mapper_settings.stages_of(training))
        return Stage(
            name="train",
            words=words,
            result=f"mapper/{mapper.MAPPER}",
            what=f"{total} steps of {images} images, on {pictures} pictures",
            seconds=self.training_seconds(training),
            parallel=True,
        )

    def tradeoff(self) -> Stage | None:
        """Return the learning of the trade-off; None: none is asked, or nothing weighs identity, or
        the first training reads the trade-off already."""
        config, out = self.config, self.config.out
        training = mapper_config(self.train().words)
        term, reading, sizes = training.transfer, training.reading, training.batches
        recipe = RECIPES[term.recipe or self.world.recipe]
        weights = term.identity_weight, term.direction_decay
        given = (recipe.identity_weight, recipe.weight_decay)
        identity, decay = (g if w is None else w for w, g in zip(weights, given, strict=True))
        first = training.data.start
        reads = first is not None and load_mapper(first)[0].config.tradeoff is not None
        learned = bool(term.keep_identity_weights) or reads
        can = bool(self.world.identity and identity and decay) and not learned
        steps = config.tradeoff_steps
        if steps is None:
            steps = self.steps // 2 if can else 0
        if steps and not can:
            raise ValueError(
                "--tradeoff-steps: expected a world with an identity model, and a first training "
                "at one identity weight and one decay above 0, found others: drop the flag"
            )
        if not steps:
            return None
        words = self.words(
            "train.mapper",
            config.tradeoff_flags,
            out=out / "tradeoff",
            start=out / "mapper" / mapper.MAPPER,
            only_tradeoff=True,
            keep_identity_weights=tuple(f"{identity * end:g}" for end in IDENTITY_ENDS),
            keep_identity_decays=tuple(f"{decay * end:g}" for end in DECAY_ENDS),
            schedule=closing_stages(steps, search_side(self.facts)),
            learning_rate=1e-3,
            bank=training.data.bank or out / "mapper",
            pairs=training.data.pairs,
            num_pairs=training.data.num_pairs,
            max_targets=training.data.max_targets,
            targets=training.data.targets,
            validation=training.data.validation,
            recipe=term.recipe,
            sources=term.sources,
            source_kinds=reading.source_kinds,
            uncorrected=reading.uncorrected,
            correction_decay=reading.correction_decay,
            mixtures=term.mixtures or None,
            batch_size=sizes.batch_size,
            noise=sizes.noise or None,
            accumulate=training.accumulate if training.accumulate > 1 else None,
            max_images=training.max_images,
            evaluate_every=training.evaluate_every,
            licence=config.licence,
        )
        return Stage(
            name="tradeoff",
            words=words,
            result=f"tradeoff/{mapper.MAPPER}",
            what=f"{steps} steps of {images_of_batch(training, self.world)} images",
            seconds=self.training_seconds(mapper_config(words)),
            parallel=True,
        )

    def calibrate(self, trained: str) -> Stage:
        """Return the calibration of the mapper in a folder."""
        config = self.config
        count, fitted = (32, 2000) if self.facts.accelerator else (8, 400)
        words = self.words(
            "eval.calibrate",
            config.calibrate_flags,
            mapper=config.out / trained / mapper.MAPPER,
            out=config.out / "calibrated",
            targets=default_targets(self.world, CALIBRATION_TARGETS, fitted),
            count=count,
            fitted=fitted,
            half=True,
            max_images=self.at_once(MAX_IMAGES),
        )
        flags = flags_of(words)
        specs = flags["--targets"].split()
        judge, teach = (number_of(flags, n) * len(specs) for n in ("--count", "--fitted"))
        curve = trained == "tradeoff"
        seen = sum(map(self.size_of, specs)) + EXPECTED_ON * teach * (1 + curve)
        seen += curve * PLACES * SCORED_ON * judge
        searched = judge * (self.usual.steps + REFINING) * self.search_seconds()
        return Stage(
            name="calibrate",
            words=words,
            result=MAPPER,
            what=f"{judge} targets judge, {teach} teach what to expect",
            seconds=searched + seen * self.facts.image,
        )

    def compare(self) -> Stage:
        """Return the comparison with other methods."""
        config, facts, world = self.config, self.facts, self.world
        tested, slow = (32, 4) if facts.accelerator else (16, 2)
        words = self.words(
            "eval.compare",
            config.compare_flags,
            mapper=config.out / MAPPER,
            out=config.out / "compare",
            quick=True,
            targets=tested,
            slow=slow,
            folder=facts.folder,
            max_images=self.at_once(MAX_IMAGES),
            pairs=config.out / "pairs" if self.number else None,
        )
        flags = flags_of(words)
        tested, slow = number_of(flags, "--targets"), number_of(flags, "--slow")
        sets = 3 if world.argument == DEFAULT_WORLD else 1 + bool(facts.folder)
        cut = number_of({"--max-steps": str(RECIPES["consistent"].steps), **flags}, "--max-steps")
        searched = slow * (2 if world.identity else 1) * cut * self.search_seconds()
        return Stage(
            name="compare",
            words=words,
            result="compare/report.json",
            what=f"{tested} unseen targets a set, {slow} for searches; sets: {sets}",
            seconds=sets * (searched + tested * METHODS * JUDGED * facts.image),
        )


def stages_of(config: Config, world: World, facts: Facts, processes: int = 1) -> list[Stage]:
    """Return the stages with their commands and estimates: the same for the same facts."""
    planner = Planner(config=config, world=world, facts=facts, processes=processes)
    curve, pairs = planner.tradeoff(), [planner.pairs()] if planner.number else []
    trained = [planner.train()] if curve is None else [planner.train(), curve]
    last = planner.calibrate("mapper" if curve is None else curve.name)
    return [*pairs, *trained, last, planner.compare()]


# Timing


def world_files(world: World) -> dict[str, str]:
    """Return the hash of each single file that a world names, but that of a mapper."""
    paths = {file.role: file.path for file in world.files if file.role != "mapper"}
    return {role: sha256_of(path) for role, path in paths.items() if path and path.is_file()}


def found(config: Config, world: World, scene: Scene) -> Facts:
    """Return what can be known without timing. ValueError, OSError: as `open_targets`."""
    device = scene.device
    own = {spec: open_targets(spec, scene.generator, scene.truncation) for spec in config.targets}
    judging = (
        spec
        for spec, targets in own.items()
        if os.path.isdir(spec)
        and next(of_split(sampled(targets, LOOKED_AT, config.seed), "test", 1), None)
    )
    name = getattr(torch.get_device_module(device), "get_device_name", platform.machine)()
    return Facts(
        files=world_files(world),
        device=f"{device.type} {name}",
        accelerator=device.type != "cpu",
        precision=command.choose_precision(config.precision, command.fast_precision(device)),
        resolution=scene.generator.resolution,
        pictures=sum(map(len, own.values())),
        folder=next(judging, None),
    )


def timed(work: Callable[[], torch.Tensor]) -> float:
    """Return the seconds of a second call, or of the first where that takes long.

    To read a number of the result waits for a device that computes in the background.
    """
    for _ in range(2):
        begin = time.perf_counter()
        float(work().sum())
        if (seconds := time.perf_counter() - begin) > 5:
            break
    return seconds


def fitting_images(scene: Scene, identity_weight: float) -> int:
    """Return how many images' backward pass the free memory holds, from that of a few."""
    fits, on_processor = sys.maxsize, scene.device.type == "cpu"
    for count in PROBED:
        if fits < 4 * count:
            break
        free, before, _ = memory()
        if not on_processor:
            free, _ = torch.accelerator.get_memory_info()
            before = torch.accelerator.memory_allocated()
        ws = scene.latents(range(count)).requires_grad_()
        scene.features(ws, identity_weight=identity_weight).sum().backward()
        peak = memory()[2] if on_processor else torch.accelerator.max_memory_allocated()
        fits = max(1, int(USABLE * free * count / max(peak - before, 1)))
    return fits


def seconds_of_passes(
    config: mapper_settings.Config, world: World, device: torch.device
) -> dict[str, float]:
    """Return `Facts.passes`, of a few steps on embeddings at random."""
    _, recipe, scene = mapper.make_scene(config, device)
    size = config.batches.batch_size, scene.embedder.embed_dim
    targets = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    made = mapper.make_mapper(
        config, scene, recipe, targets, None, mapper.open_start(config, scene)
    )
    objective = Objective(
        made,
        scene=scene,
        recipe=recipe,
        sizes=config.batches,
        reading=mapper.reading_of(config, scene, recipe, made),
        targets=targets / np.linalg.norm(targets, axis=1, keepdims=True),
        pairs=None,
    )

    def step(side: int | None) -> torch.Tensor:
        with in_precision(device, command.choose_precision(config.precision)):
            loss: torch.Tensor = objective(("transfer",), 0, side)["loss"]
            loss.backward()
        return torch.stack([p.grad.sum() for p in made.parameters() if p.grad is not None])

    images = images_of_batch(config, world)
    sides = dict.fromkeys(stage.render_size for stage in transfer_stages(config))
    return {str(side): timed(partial(step, side)) / images for side in sides}


def timed_search(config: Config, world: World, device: torch.device) -> Facts:
    """Return the facts but those of the training, with its networks gone from memory again."""
    scene = load_scene(
        world, device, max_images=config.max_images, checkpoint_layers=config.checkpoint_layers
    )
    facts = found(config, world, scene)
    building = build_config(stages_of(replace(config, pairs=1), world, facts)[0].words)
    build.check_config(building)
    name, recipe = build.chosen_recipe(building, world)
    check_render_size(scene.generator, recipe.render_size, "--render-size")
    with in_precision(device, facts.precision):
        fits = config.max_images or fitting_images(scene, recipe.identity_weight)
        with torch.no_grad():
            ws = scene.latents(range(min(fits, 16)))
            image = timed(lambda: scene.features(ws)) / len(ws)
    at_once = config.max_images or (fits if fits < recipe.sources else None)
    scene = replace(scene, max_images=at_once)
    teacher = make_teacher(scene, name, recipe, building.held_out, facts.precision)
    times: dict[int, float] = {}

    def try_batch(size: int) -> float:
        times[size] = time_step(teacher, size)
        return times[size]

    if "--batch-size" in config.build_flags and building.batch_size != "auto":
        batch = building.batch_size
    else:
        batch = fitting_batch_size(try_batch, recipe.steps)
    search = times.get(batch) or try_batch(batch)
    return replace(facts, fits=fits, image=image, batch=batch, search=search / batch)


def measure(config: Config, world: World) -> Facts:
    """Check files and flags, and time a few steps of the teacher and of the training.

    Raises:
        FileNotFoundError, ValueError, OSError: a file is missing, damaged or of another network;
            targets or flags cannot be used; not even one image fits into memory.
        SystemExit: further flags that their command does not know.
    """
    device = command.choose_device()
    facts = timed_search(config, world, device)
    words = {stage.name: stage.words for stage in stages_of(config, world, facts)}
    training = mapper_config(words["train"])
    return replace(facts, passes=seconds_of_passes(training, world, device))


# The plan


def asked(config: Config) -> dict[str, Any]:
    """Return the options that the plan depends on, as JSON holds them."""
    content = {name: value for name, value in vars(config).items() if name not in ("out", "plan")}
    options: dict[str, Any] = json.loads(json.dumps(content))
    return options


def check_done(config: Config, stages: Sequence[Stage], progress: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the changed flags of finished stages."""
    done = {s.name: s for s in stages if is_done(config.out, s, progress)}
    before = {name: flags_of(progress[name]["words"]) for name in done}
    check_settings(config.out, before, {name: flags_of(s.words) for name, s in done.items()})


def plan_text(
    config: Config, facts: Facts, stages: Sequence[Stage], progress: Mapping[str, Any]
) -> str:
    """Return the plan: what each stage does and about how long it takes."""
    rows, left = [], 0.0
    for stage in stages:
        about = f"about {duration(stage.seconds)}"
        if is_done(config.out, stage, progress):
            about = "done"
        else:
            left += stage.seconds
        rows.append((stage.name, about, stage.what))
    rows.append(("left", f"about {duration(left)}", f"on {facts.device} in {facts.precision}"))
    return "\n".join(f"{name:<10} {about:<15} {what}" for name, about, what in rows)


def make_plan(config: Config, world: World, processes: int) -> None:
    """Print the plan and write it into --out.

    Steps are timed where there is no plan yet, or one of other flags; but never again once a stage
    has begun.

    ValueError: the world's files or the flags of a finished stage have changed; see `measure`.
    """
    check_trainable(config.targets)
    plan, progress = read(config.out / PLAN), read(config.out / PROGRESS)
    if plan and (progress or plan["asked"] == asked(config)):
        try:
            facts = Facts(**plan["facts"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{str(config.out / PLAN)!r} is of another version ({error}): delete it, and steps "
                "are timed anew"
            ) from error
        check_settings(config.out, {"files": facts.files}, {"files": world_files(world)})
    else:
        say("timing a few steps", error=True)
        facts = measure(config, world)
    stages = stages_of(config, world, facts, processes)
    check_done(config, stages, progress)
    content = {
        "world": world.name,
        "device": f"{facts.device} in {facts.precision}, processes: {processes}",
        "asked": asked(config),
        "facts": asdict(facts),
        "stages": [asdict(stage) for stage in stages],
        "versions": command.versions(),
    }
    command.write_json(config.out / PLAN, content)
    say(plan_text(config, facts, stages, progress))
