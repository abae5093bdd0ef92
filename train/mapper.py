"""Train the mapper of a world: target embeddings to directions, in one pass.

    python -m train.mapper --out runs/mapper                                  # without a teacher
    accelerate launch -m train.mapper --out runs/mapper --pairs runs/pairs \\
        --schedule pairs:1000 transfer:4000                                   # one GPU
    accelerate launch --multi_gpu --num_processes 8 -m train.mapper ...       # eight

Kill it whenever you like: the same command goes on, as if nothing had been. Every process draws
its own batches, so a checkpoint of another number of processes is refused.

Knows the command and how the parts make a training: `mapper_settings` holds its flags,
`mapper_data` what is learned from, `mapper_objective` what is minimised, `loop` the steps.
"""

import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from targetclip.command import (
    Precision,
    Stop,
    choose_precision,
    command_line,
    in_precision,
    locked_folder,
    say,
    say_next,
    start,
    versions,
    write_json,
)
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import TRAINING_TARGETS, VALIDATION_TARGETS, seed_of
from targetclip.world import load_scene, load_world
from train.mapper_settings import (
    KINDS,
    Config,
    Reading,
    TrainingStage,
    asked_correction,
    asked_tradeoff,
    check_config,
    flags_of,
    stage_at,
    stages_of,
    tradeoff_of,
)

if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.mapper", Config)

import torch
from accelerate import Accelerator
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from data.targets import (
    check_trainable,
    default_targets,
    digest_of,
    hub_datasets,
    portable,
)
from predictor.mapper import Mapper, load_mapper, save_mapper
from predictor.mapper_file import MapperConfig, MapperRecord, trained_recipe
from predictor.tradeoff import MIDDLE
from targetclip.generators import check_render_size
from targetclip.media.images import write_picture
from targetclip.scene import Scene
from train.loop import LOG, Schedule, Trainer
from train.mapper_batches import SourceReading
from train.mapper_data import (
    Pairs,
    Validation,
    drawn_targets,
    embedded_sources,
    open_pairs,
    scale_of_latents,
    scale_of_pairs,
    settings_of_scene,
    target_bank,
    whitening_of,
)
from train.mapper_objective import Objective

MAPPER = "mapper.safetensors"
WHITENED = 20_000  # targets of the bank that say how embeddings vary
CLIP = 1.0  # longest gradient
WEIGHT_DECAY = 0.01  # of AdamW
EMA = 0.999
# Settings that could once be chosen: checkpoints and records still hold them.
FIXED = {"weight_transfer": 1.0, "weight_pairs": 1.0, "weight_differences": 1.0}
FIXED |= {"weight_decay": WEIGHT_DECAY, "clip": CLIP, "ema": EMA}


# What may change between a run and its continuation, or is in its settings by its content.
FREE = {"out", "world", "pairs", "bank", "targets", "validation", "recipe", "licence", "precision"}
FREE |= {"evaluate_every", "checkpoint_layers", "start", "tracker"}
# There where asked for: other files stay as they were
FREE |= {"max_targets", "mixtures", "only_tradeoff"}
FREE |= {field.name for field in fields(Reading)}  # see `settings_of_reading`
FREE |= {"keep_identity_weights", "keep_identity_decays"}  # see `settings_of_tradeoff`


def with_targets(config: Config) -> Config:
    """Return the options with the world's own targets where none are given."""
    world, data = load_world(config.world), config.data
    targets, validation = data.targets, data.validation
    if targets is None:
        targets = default_targets(world, TRAINING_TARGETS, 20_000, samples=5000)
    if validation is None:
        validation = default_targets(world, VALIDATION_TARGETS, 32)
    check_trainable(targets)
    check_trainable(validation, "--validation")
    return replace(config, data=replace(data, targets=targets, validation=validation))


# The parts of a training


def make_scene(config: Config, device: torch.device) -> tuple[str, Recipe, Scene]:
    """Return the recipe's name, the recipe as changed by flags, and the world's networks.
    FileNotFoundError, ValueError: see `load_world` and `load_scene`; the recipe needs an identity
    model and there is none."""
    world, term = load_world(config.world), config.transfer
    name = term.recipe or world.recipe
    changes: dict[str, Any] = {
        "sources": term.sources,
        "weight_decay": term.direction_decay,
        "identity_weight": term.identity_weight,
    }
    recipe = replace(RECIPES[name], **{k: v for k, v in changes.items() if v is not None})
    scene = load_scene(
        world,
        device,
        # Not None: how many are rendered without gradients decides the last bits of a training.
        max_images=config.max_images or config.batches.batch_size * recipe.sources,
        checkpoint_layers=config.checkpoint_layers,
    )
    scene.feature_model(recipe.identity_weight)  # before hours are spent
    return name, recipe, scene


def open_start(config: Config, scene: Scene) -> Mapper | None:
    """Return the mapper to start from; None: a fresh one.
    FileNotFoundError, ValueError: see `load_mapper`; it has another correction or another trade-off
    than is asked, or no correction where only that is learned."""
    path, asked = config.data.start, asked_correction(config)
    if path is None:
        return None
    start, _ = load_mapper(path, scene.generator.fingerprint, scene.embedder.fingerprint)
    if start.config.correction is None and asked is None and config.reading.only_correction:
        raise ValueError("--only-correction: expected --correction, or a --start that has one")
    if asked is not None and start.config.correction not in (None, asked):
        raise ValueError(
            f"--correction: expected that of --start, {start.config.correction}, found {asked}"
        )
    ends = asked_tradeoff(config)
    has = start.config.tradeoff
    if config.transfer.only_tradeoff:
        if ends is None or has is not None:
            raise ValueError(
                "--only-tradeoff: expected --keep-identity-weights and --keep-identity-decays, and "
                "a --start that reads no trade-off"
            )
        if start.config.correction is None and asked is not None:
            raise ValueError("--only-tradeoff: --correction would be learned as well: drop one")
    if ends is not None and has is not None and ends != replace(has, origin=None):
        raise ValueError(f"--keep-identity-weights: expected those of --start, {has}, found {ends}")
    return start


def make_mapper(
    config: Config,
    scene: Scene,
    recipe: Recipe,
    targets: Float32[ndarray, "targets embed"] | None,
    pairs: Pairs | None,
    start: Mapper | None,
) -> Mapper:
    """Return the mapper as it starts, the same for the same seed, with its units."""
    asked, tradeoff = asked_correction(config), tradeoff_of(config, start)
    if start is None:
        sizes = MapperConfig(
            embed_dim=scene.embedder.embed_dim,
            num_ws=scene.generator.num_ws,
            w_dim=scene.generator.w_dim,
            generator=scene.generator.fingerprint,
            embedder=scene.embedder.fingerprint,
            **vars(config.sizes),
            correction=asked,
            tradeoff=tradeoff,
        )
    else:
        correction = start.config.correction or asked
        sizes = replace(start.config, correction=correction, tradeoff=tradeoff)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("mapper", config.seed))
        mapper = Mapper(sizes)
    if mapper.correction is not None:
        mapper.correction.mean.copy_(scene.generator.mean_w.expand(sizes.num_ws, -1))
        mapper.correction.deviation.copy_(scale_of_latents(scene))
    if start is not None:
        # Of the sizes of `start`: what is missing there are layers that change nothing while fresh.
        mapper.load_state_dict(start.state_dict(), strict=False)
        return mapper.to(scene.device)
    sources = embedded_sources(scene, recipe)
    mapper.centre.copy_(sources.mean(dim=0))
    every = 1 if targets is None else -(-len(targets) // WHITENED)
    known = [] if targets is None else [torch.from_numpy(targets[::every].copy())]
    known += [] if pairs is None else [pairs.embeddings]
    mapper.whitening.copy_(whitening_of(torch.cat(known) if known else sources.cpu()))
    # The optimizer's directions are what is to be answered, and differ in size from layer to layer.
    # Without them latents tell at least which coordinates of w the generator uses how far.
    mapper.scale.copy_(scale_of_latents(scene) if pairs is None else scale_of_pairs(pairs))
    return mapper.to(scene.device)


def reading_of(config: Config, scene: Scene, recipe: Recipe, mapper: Mapper) -> SourceReading:
    """Return how the transfer term learns from sources.
    ValueError: inverted sources are asked for, and there is no inverter."""
    reading, default = config.reading, KINDS[:1]
    if mapper.correction is not None:
        default = KINDS if scene.inverter is not None else ("generated", "mixed")
    kinds = reading.source_kinds or default
    if "inverted" in kinds and scene.inverter is None:
        raise ValueError("--source-kinds: inverted sources need a world with an inverter")
    decay = reading.correction_decay
    return SourceReading(
        kinds=kinds,
        # Directions that are not learned need no targets of their own.
        uncorrected=0.0 if reading.only_correction else reading.uncorrected,
        decay=recipe.weight_decay / 4 if decay is None else decay,
    )


def parameter_groups(config: Config, mapper: Mapper) -> list[dict[str, Any]]:
    """Return the weights that are learned, with their rates as factors of the schedule's."""
    if config.transfer.only_tradeoff:
        mapper.requires_grad_(False)
        learned = [p for name, p in mapper.named_parameters() if "keep_" in name]
        for parameter in learned:
            parameter.requires_grad_(True)
        return [{"params": learned}]
    if mapper.correction is None:
        return [{"params": list(mapper.parameters())}]
    correction = list(mapper.correction.parameters())
    if config.reading.only_correction:
        # The expected score is that of corrected edits, and its heads change nothing else.
        scores = (mapper.score, mapper.score_linear, mapper.keep_score)
        heads = [p for head in scores if head is not None for p in head.parameters()]
        mapper.requires_grad_(False)
        for parameter in [*heads, *correction]:
            parameter.requires_grad_(True)
        others = heads
    else:
        others = [p for n, p in mapper.named_parameters() if not n.startswith("correction.")]
    return [{"params": others}, {"params": correction, "lr": config.reading.correction_rate}]


def settings_of_reading(
    config: Config, reading: SourceReading, mapper: Mapper, start: Mapper | None
) -> dict[str, Any]:
    """Return what of a correction and of sources decides weights; None for what is not there, as
    in checkpoints from before it could be."""
    correction = None
    if mapper.config.correction is not None:
        correction = {
            **asdict(mapper.config.correction),
            "rate": config.reading.correction_rate,
            "decay": reading.decay,
            "uncorrected": reading.uncorrected,
        }
    return {
        "correction": correction,
        "only_correction": config.reading.only_correction or None,
        "source_kinds": None if reading.kinds == ("generated",) else list(reading.kinds),
        "start": None if start is None else start.fingerprint,
        **{name: getattr(mapper.config, name) for name in ("width", "depth", "rank")},
    }


def settings_of_tradeoff(mapper: Mapper) -> dict[str, Any]:
    """Return the ends of the trade-off, which decide weights; nothing where the mapper reads none,
    as in checkpoints and records from before it could."""
    tradeoff = mapper.config.tradeoff
    if tradeoff is None:
        return {}
    ends = {name: list(getattr(tradeoff, name)) for name in ("identity_weights", "decays")}
    return {"tradeoff": ends if tradeoff.origin is None else {**ends, "origin": tradeoff.origin}}


def settings_of(config: Config, objective: Objective, **more: Any) -> dict[str, Any]:
    """Return everything a run's weights depend on, in values that JSON and a checkpoint hold."""
    flags = {name: value for name, value in flags_of(config).items() if name not in FREE}
    scene, pairs = objective.scene, objective.training_pairs
    term = config.transfer
    asked = {"max_targets": config.data.max_targets, "mixtures": term.mixtures}
    asked["only_tradeoff"] = term.only_tradeoff
    return {
        **FIXED,
        **flags,
        "schedule": list(config.schedule),
        **settings_of_scene(scene, objective.recipe),
        "pairs": None if pairs is None else pairs.digest,
        **{name: value for name, value in asked.items() if value},
        **more,
    }


def command_of(config: Config, settings: Mapping[str, Any]) -> str:
    """Return the command that makes this mapper again, without paths of this machine."""
    flags = flags_of(config)
    for name in ("targets", "validation"):
        flags[name] = tuple(map(portable, flags[name] or ()))
    flags |= {"out": Path("mapper"), "world": Path(config.world).name}
    # Whoever chose it, this flag or accelerate's variable.
    flags["precision"] = "bf16" if settings["precision"] == "bf16" else None
    for name in ("bank", "licence", "tracker"):
        del flags[name]
    count, launcher = settings["processes"], "python"
    if count > 1:
        launcher = f"accelerate launch --multi_gpu --num_processes {count}"
    defaults = {n: v for n, v in flags_of(Config(out=config.out)).items() if n != "out"}
    return command_line("train.mapper", flags, defaults, launcher)


def record_of(
    config: Config,
    settings: Mapping[str, Any],
    stages: tuple[TrainingStage, ...],
    validation: dict[str, float],
    before: str,
) -> MapperRecord:
    """Return what the mapper's file says of its making, without paths of this machine.

    Args:
        validation: scores on held-out targets.
        before: the commands that made the mapper that it was trained from.
    """
    used = {term for stage in stages for term in stage.terms}
    data = config.data
    specs = data.targets or () if settings["targets"] else ()
    some = "" if data.max_targets is None else f"{data.max_targets} of the "
    trained_on = [f"{some}targets {', '.join(map(portable, specs))}"] if specs else []
    if data.pairs is not None:
        count = "all" if data.num_pairs is None else f"the first {data.num_pairs}"
        trained_on += [f"{count} training pairs of {data.pairs.resolve().name}"]
    if "differences" in used:
        trained_on += ["differences between samples of the generator"]
    if settings["start"]:
        trained_on += [f"started from mapper {settings['start'][:12]}"]
    return MapperRecord(
        # In training the expected score is learned by the transfer term alone.
        recipe={**settings, "name": settings["recipe_name"], "expects": "transfer" in used},
        calibration={},
        licence=config.licence,
        trained_on="; ".join(trained_on),
        version=versions()["targetclip"],
        command=f"{before}\n{command_of(config, settings)}".strip(),
        validation=validation,
        datasets=hub_datasets(specs),
    )


@dataclass(frozen=True, kw_only=True)
class MapperTraining:
    """A training of the mapper, at the step where it stands, and how it is judged."""

    config: Config
    stages: tuple[TrainingStage, ...]
    before: str
    """The commands that made the mapper that it starts from."""
    objective: Objective
    model: Any
    """The objective, perhaps in a parallel wrapper."""
    precision: Precision
    trainer: Trainer[Mapper]
    validation: Validation

    def losses_at(self, step: int, shard: int) -> dict[str, Tensor]:
        """Return the losses of a batch of a step."""
        seed = seed_of("mapper step", self.config.seed, step, shard)
        stage = stage_at(self.stages, step)
        with in_precision(self.objective.scene.device, self.precision):
            losses: dict[str, Tensor] = self.model(stage.terms, seed, stage.render_size)
        return losses

    @torch.no_grad()
    def evaluate(self, average: Mapper) -> dict[str, Any]:
        """Judge the averaged mapper: figures for the log, and a picture."""
        validation, stage = self.validation, stage_at(self.stages, self.trainer.step - 1)
        edits = average.edits(validation.embeddings, validation.sources)
        write_picture(validation.grid(edits), self.config.out / "grid.png")
        size = "" if stage.render_size is None else f"@{stage.render_size}"
        name = "+".join(stage.terms) + size
        return {"stage": name, **validation.figures_of(average)}


def prepare(config: Config, accelerator: Accelerator, stop: Stop) -> MapperTraining:
    """Load, embed and make everything that a training needs.
    ValueError, FileNotFoundError, OSError, Stopped: see `run`."""
    config = with_targets(config)
    stages, data = stages_of(config), config.data
    recipe_name, recipe, scene = make_scene(config, accelerator.device)
    precision, start = choose_precision(config.precision), open_start(config, scene)
    if (tradeoff := tradeoff_of(config, start)) is not None:
        if tradeoff.origin is None or start is None:
            recipe = tradeoff.recipe_at(recipe, MIDDLE)
        else:
            weights = trained_recipe(start.record)
            recipe = replace(
                recipe,
                identity_weight=weights.identity_weight,
                weight_decay=weights.weight_decay,
            )
        scene.feature_model(recipe.identity_weight)
    for stage in stages:
        check_render_size(scene.generator, stage.render_size, "--schedule")
    validation = Validation.open(data.validation or (), scene, recipe)
    pairs = None
    if data.pairs is not None:
        pairs = open_pairs(data.pairs, data.num_pairs, scene, validation.ids)
    name, targets = None, None
    if data.targets and any("transfer" in stage.terms for stage in stages):
        name, targets = target_bank(
            data.bank or config.out,
            data.targets,
            scene,
            recipe,
            validation.ids,
            stop.check,
            is_main_process=accelerator.is_main_process,
        )
        if data.max_targets is not None:
            targets = drawn_targets(targets, data.max_targets, config.seed)
    mapper = make_mapper(config, scene, recipe, targets, pairs, start)
    reading = reading_of(config, scene, recipe, mapper)
    objective = Objective(
        mapper,
        scene=scene,
        recipe=recipe,
        sizes=config.batches,
        reading=reading,
        targets=targets,
        pairs=pairs,
        mixtures=config.transfer.mixtures,
    )
    # The rate is set at every step; 1 makes it the schedule's.
    optimizer = torch.optim.AdamW(
        parameter_groups(config, mapper), lr=1.0, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
    )
    trainer = Trainer(
        network=mapper,
        optimizer=accelerator.prepare(optimizer),
        out=config.out,
        schedule=Schedule(
            steps=sum(stage.steps for stage in stages),
            learning_rate=config.learning_rate,
            decay_from=None,
            clip=CLIP,
            ema=EMA,
            evaluate_every=config.evaluate_every,
        ),
        settings=settings_of(
            config,
            objective,
            recipe_name=recipe_name,
            targets=name,
            left_out=digest_of(sorted(validation.ids)),
            processes=accelerator.num_processes,
            precision="bf16" if precision == "bf16" else "no",
            **settings_of_reading(config, reading, mapper, start),
            **settings_of_tradeoff(mapper),
        ),
        processes=accelerator,
        in_backward=partial(in_precision, scene.device, precision),
        tracker=config.tracker,
    )
    return MapperTraining(
        config=config,
        stages=stages,
        before="" if start is None or start.record is None else start.record.command,
        objective=objective,
        model=accelerator.prepare(objective),
        precision=precision,
        trainer=trainer,
        validation=validation,
    )


def run(config: Config, stop: Stop | None = None) -> Mapper:
    """Train, and return the average of the weights, which the main process has saved.

    Args:
        stop: None: one that listens to the signals of this process.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: the loss or its gradient is not finite.
        Stopped: a signal came; the same command goes on from here.
    """
    check_config(config)
    choose_precision(config.precision)  # refuses what cannot be, before anything is loaded
    stop = stop or Stop()
    stop.listen()
    # The loop computes in the precision; accelerate need not convert anything.
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulate, mixed_precision="no")
    main = accelerator.is_main_process
    with locked_folder(config.out) if main else nullcontext():
        if main:
            say(f"loading world {config.world}", error=True)
        training = prepare(config, accelerator, stop)
        config, settings = training.config, training.trainer.settings
        if main:
            content = {"config": flags_of(config), "settings": settings, "versions": versions()}
            write_json(config.out / "config.json", content)
        average = training.trainer.run(training.losses_at, training.evaluate, stop, training.model)
        if main:
            path, figures = config.out / MAPPER, training.trainer.last_figures()
            record = record_of(config, settings, training.stages, figures, training.before)
            save_mapper(average, path, record)
            then = f"python -m eval.calibrate --out CALIBRATED --mapper {shlex.quote(str(path))}"
            say_next(config.out, f"{MAPPER}, {LOG}, grid.png", then)
    accelerator.end_training()
    return average
