"""Train the mapper of a world: target embeddings to directions, in one pass.

    python -m train.mapper --out runs/mapper                                  # without a teacher
    accelerate launch -m train.mapper --out runs/mapper --pairs runs/pairs \\
        --schedule pairs:1000 transfer:4000                                   # one GPU
    accelerate launch --multi_gpu --num_processes 8 -m train.mapper ...       # eight

Kill it whenever you like: the same command goes on, as if nothing had been. Every process draws
its own batches, so a checkpoint of another number of processes is refused.

Knows the command and how the parts make a training: `mapper_data` holds what is learned from,
`mapper_objective` what is minimised, `loop` the steps.
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.mapper")

import math
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
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
from predictor.mapper_file import CorrectionConfig, MapperConfig, MapperRecord
from predictor.tradeoff import MIDDLE, TradeoffConfig
from targetclip import command
from targetclip.command import (
    Precision,
    Stop,
    choose_precision,
    command_line,
    in_precision,
    locked_folder,
    say,
    say_next,
    versions,
    write_json,
)
from targetclip.generators import check_render_size
from targetclip.media.images import write_picture
from targetclip.recipes import RECIPES, Recipe, recipe_named
from targetclip.scene import Scene
from targetclip.seeds import TRAINING_TARGETS, VALIDATION_TARGETS, seed_of
from targetclip.tracking import Tracker, check_tracker
from targetclip.world import DEFAULT_WORLD, load_scene, load_world
from train.loop import LOG, Schedule, Trainer
from train.mapper_data import (
    KINDS,
    BatchSizes,
    Pairs,
    SourceKind,
    SourceReading,
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
from train.mapper_objective import Objective, TrainingStage, parse_schedule, stage_at

MAPPER = "mapper.safetensors"
WHITENED = 20_000  # targets of the bank that say how embeddings vary
CLIP = 1.0  # longest gradient
WEIGHT_DECAY = 0.01  # of AdamW
EMA = 0.999
# Settings that could once be chosen: checkpoints and records still hold them.
FIXED = {"weight_transfer": 1.0, "weight_pairs": 1.0, "weight_differences": 1.0}
FIXED |= {"weight_decay": WEIGHT_DECAY, "clip": CLIP, "ema": EMA}


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is learned from, and what is judged on."""

    targets: tuple[str, ...] | None = None
    """Target pictures of the transfer term, as data.build takes them; those of the pairs are used
    as well. Default: for the bundled world 40,000 avatars and 10,000 samples of its generator; for
    any other world 50,000 samples of its own generator."""
    pairs: Path | None = None
    """Dataset made by data.build; only its train split is read."""
    num_pairs: int | None = None
    """Number of pairs to use, the first by their ids. Default: all."""
    validation: tuple[str, ...] | None = None
    """Targets to judge by while training; none of them is trained on. Default: 64 avatars for the
    bundled world; 64 samples of its own generator for any other world."""
    start: Path | None = None
    """Mapper's file to start from, whose sizes and units are kept. Default: a fresh mapper."""
    bank: Path | None = None
    """Folder where embeddings of targets are kept, to share between runs. Default: --out."""
    max_targets: int | None = None
    """Train on so many of the target pictures, drawn by --seed. Default: all."""


@dataclass(frozen=True, kw_only=True)
class TransferTerm:
    """The recipe of the transfer term."""

    recipe: str | None = None
    """Recipe: release, paper, consistent or identity. Default: the world's."""
    direction_decay: float | None = None
    """Weight decay of directions. Default: the recipe's."""
    identity_weight: float | None = None
    """Weight of the identity loss. Default: the recipe's."""
    sources: int | None = None
    """Sources edited for each target. Default: the recipe's."""
    keep_identity_weights: tuple[float, float] | None = None
    """Make the trade-off between essence and identity an input: the identity weights at its two
    ends, where most essence arrives and where most identity is kept. Each target of a batch draws
    a place between them. Default: none, or those of --start."""
    keep_identity_decays: tuple[float, float] | None = None
    """Weight decays of directions at the same two ends."""
    mixtures: float = 0.0
    """Part of the targets of a batch that are mixtures of two or three of them, at random weights:
    their answers are mixed, and so are their losses."""


@dataclass(frozen=True, kw_only=True)
class MapperSizes:
    """The sizes of the mapper."""

    width: int = 512
    """Features of a residual block."""
    depth: int = 3
    """Residual blocks."""
    rank: int | None = None
    """Directions are mixtures of this many learned ones, which makes the mapper quicker. Default:
    each of their numbers is free."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How edits read their source."""

    correction: int | None = None
    """Learn a correction that reads the source: a mixture of this many learned directions, added to
    the direction. Default: none, or that of --start."""
    correction_width: int = 256
    """Features of its hidden layers."""
    correction_layers: Literal["all", "first"] = "all"
    """Layers of a source's latent that it reads."""
    correction_rate: float = 4.0
    """Its learning rate, as a factor of --learning-rate."""
    correction_decay: float | None = None
    """Weight decay of corrections, beside that of whole edits. Default: a quarter of it."""
    uncorrected: float = 0.25
    """Part of the targets of a batch whose edits have no correction, so that a direction alone
    stays an answer."""
    only_correction: bool = False
    """Learn the correction and the expected score alone; directions stay those of --start."""
    source_kinds: tuple[SourceKind, ...] | None = None
    """Sources of the transfer term, in equal parts: generated, mixed (another latent in each third
    of the layers), inverted. Default: generated; with a correction all that the world can make."""


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for checkpoint, log, pictures and mapper.safetensors, shared by all processes."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    schedule: tuple[str, ...] = ("differences:1000", "transfer:4000")
    """Stages NAME[+NAME...][@SIZE]:STEPS, one after the other: transfer is the teacher's own
    objective, pairs its directions, differences those between random latents. With @SIZE
    the transfer term renders images of SIZE px, skipping the generator's finest levels. Let the
    last stage have none, for the expected score is of full images."""
    data: Data = field(default_factory=Data)
    transfer: TransferTerm = field(default_factory=TransferTerm)
    batches: BatchSizes = field(default_factory=BatchSizes)
    sizes: MapperSizes = field(default_factory=MapperSizes)
    reading: Reading = field(default_factory=Reading)
    learning_rate: float = 5e-4
    """The highest: the rate warms up over 100 steps and falls as a cosine to the end."""
    accumulate: int = 1
    """Batches a step and process whose gradients are averaged."""
    max_images: int | None = None
    """Images rendered at once, where memory is short. Default: those of a batch."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    precision: Precision | None = None
    """Precision of a step. Default: accelerate's, or else fp32."""
    seed: int = 0
    evaluate_every: int = 500
    """Steps between two lines of the log."""
    tracker: Tracker | None = None
    """Send the figures of the log to this tracker as well: tensorboard (files in --out) or wandb.
    It needs the package of that name."""
    licence: str = "See the licences of the generator, the embedder and the target pictures."
    """Terms of use, for the mapper's file."""


# What may change between a run and its continuation, or is in its settings by its content.
FREE = {"out", "world", "pairs", "bank", "targets", "validation", "recipe", "licence", "precision"}
FREE |= {"evaluate_every", "checkpoint_layers", "start", "tracker"}
FREE |= {"max_targets", "mixtures"}  # there where asked for: other files stay as they were
FREE |= {field.name for field in fields(Reading)}  # see `settings_of_reading`
FREE |= {"keep_identity_weights", "keep_identity_decays"}  # see `settings_of_tradeoff`


def flags_of(config: Config) -> dict[str, Any]:
    """Return the values of all flags by their names."""
    flags: dict[str, Any] = {}
    for name, value in vars(config).items():
        flags |= vars(value) if is_dataclass(value) else {name: value}
    return flags


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be."""
    check_tracker(config.tracker)
    for name, value in flags_of(config).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"{flag}: expected 1 or more, found {value}")
        if isinstance(value, float) and not 0 <= value < math.inf:
            raise ValueError(f"{flag}: expected a number from 0 on, found {value}")
    if config.learning_rate == 0:
        raise ValueError("--learning-rate: expected a number above 0, found 0")
    if config.transfer.recipe is not None:
        recipe_named(config.transfer.recipe)
    if config.data.num_pairs is not None and config.data.pairs is None:
        raise ValueError("--num-pairs: expected a dataset by --pairs as well, found none")
    reading = config.reading
    if not reading.uncorrected < 1:
        raise ValueError(f"--uncorrected: expected a number below 1, found {reading.uncorrected}")
    if not config.transfer.mixtures < 1:
        raise ValueError(f"--mixtures: expected a number below 1, found {config.transfer.mixtures}")
    if reading.correction_rate == 0:
        raise ValueError("--correction-rate: expected a number above 0, found 0")
    if reading.only_correction and config.data.start is None:
        raise ValueError("--only-correction: expected a mapper by --start as well, found none")
    tradeoff_of(config, None)
    kinds = reading.source_kinds
    if kinds is not None and not 0 < len(kinds) == len(set(kinds)):
        raise ValueError(f"--source-kinds: expected different ones, found {list(kinds)}")


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


def stages_of(config: Config) -> tuple[TrainingStage, ...]:
    """Return the stages of the schedule.
    ValueError: see `parse_schedule`; data that a term needs is not given."""
    stages = parse_schedule(config.schedule)
    used = {term for stage in stages for term in stage.terms}
    if "pairs" in used and config.data.pairs is None:
        raise ValueError("--schedule: a stage of pairs needs --pairs, a folder made by data.build")
    if "transfer" in used and not config.data.targets and config.data.pairs is None:
        raise ValueError("--targets: expected some for a stage of transfer, found none")
    if config.transfer.identity_weight is not None and "transfer" not in used:
        raise ValueError("--identity-weight: it is of the transfer term, which has no stage")
    if (config.reading.correction or config.reading.only_correction) and "transfer" not in used:
        raise ValueError("--correction: the transfer term teaches it, which has no stage")
    if config.transfer.keep_identity_weights and "transfer" not in used:
        raise ValueError(
            "--keep-identity-weights: they are of the transfer term, which has no stage"
        )
    return stages


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
    if ends is not None and start.config.tradeoff not in (None, ends):
        raise ValueError(
            f"--keep-identity-weights: expected those of --start, {start.config.tradeoff}, found "
            f"{ends}"
        )
    return start


def asked_correction(config: Config) -> CorrectionConfig | None:
    """Return the sizes of the correction that flags ask for."""
    reading = config.reading
    if reading.correction is None:
        return None
    return CorrectionConfig(
        rank=reading.correction, width=reading.correction_width, layers=reading.correction_layers
    )


def asked_tradeoff(config: Config) -> TradeoffConfig | None:
    """Return the ends of the trade-off that flags ask for.
    ValueError: ends that cannot be, or those of one weight alone."""
    term = config.transfer
    weights, decays = term.keep_identity_weights, term.keep_identity_decays
    if weights is None and decays is None:
        return None
    if weights is None or decays is None:
        raise ValueError(
            "--keep-identity-weights and --keep-identity-decays: expected both, found one"
        )
    try:
        return TradeoffConfig(identity_weights=weights, decays=decays)
    except ValueError as error:
        raise ValueError(f"--keep-identity-weights, --keep-identity-decays: {error}") from None


def tradeoff_of(config: Config, start: Mapper | None) -> TradeoffConfig | None:
    """Return the ends of the trade-off that the mapper reads, by flags or by its start.
    ValueError: a flag of one weight alone is given as well."""
    tradeoff = asked_tradeoff(config) or (start.config.tradeoff if start is not None else None)
    for name in ("identity_weight", "direction_decay"):
        if tradeoff is not None and getattr(config.transfer, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: every target draws its own between the ends of "
                "--keep-identity-weights and --keep-identity-decays: drop it"
            )
    return tradeoff


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
    return {"tradeoff": {name: list(ends) for name, ends in asdict(tradeoff).items()}}


def settings_of(config: Config, objective: Objective, **more: Any) -> dict[str, Any]:
    """Return everything a run's weights depend on, in values that JSON and a checkpoint hold."""
    flags = {name: value for name, value in flags_of(config).items() if name not in FREE}
    scene, pairs = objective.scene, objective.training_pairs
    asked = {"max_targets": config.data.max_targets, "mixtures": config.transfer.mixtures}
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
) -> MapperRecord:
    """Return what the mapper's file says of its making, without paths of this machine.

    Args:
        validation: scores on held-out targets.
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
        command=command_of(config, settings),
        validation=validation,
        datasets=hub_datasets(specs),
    )


@dataclass(frozen=True, kw_only=True)
class MapperTraining:
    """A training of the mapper, at the step where it stands, and how it is judged."""

    config: Config
    stages: tuple[TrainingStage, ...]
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
        recipe = tradeoff.recipe_at(recipe, MIDDLE)
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
            save_mapper(average, path, record_of(config, settings, training.stages, figures))
            then = f"python -m eval.calibrate --out CALIBRATED --mapper {shlex.quote(str(path))}"
            say_next(config.out, f"{MAPPER}, {LOG}, grid.png", then)
    accelerator.end_training()
    return average


def main() -> None:
    """Run the command line."""
    kind = tyro.conf.OmitArgPrefixes[Config]
    command.main(run, kind, __doc__, "python -m train.mapper")
