"""The settings of a mapper's training: its flags, the stages of its schedule, and their checks.

Knows flags only: nothing is loaded here, and nothing trained. Importing it does not import torch.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from targetclip.command import Precision, Tracker, did_you_mean
from targetclip.recipes import recipe_named
from targetclip.world import DEFAULT_WORLD

if TYPE_CHECKING:
    from predictor.mapper import Mapper
    from predictor.mapper_file import CorrectionConfig
    from predictor.tradeoff import TradeoffConfig

SourceKind = Literal["generated", "mixed", "inverted"]
"""Samples of the generator, samples of another latent in each third of the layers, and what the
inverter answers to renderings of samples, as pictures of people are edited."""
KINDS: tuple[SourceKind, ...] = get_args(SourceKind)
TERMS = ("transfer", "pairs", "differences")
STAGE = re.compile(r"([a-z]+(?:\+[a-z]+)*)(?:@([1-9][0-9]{0,4}))?:([1-9][0-9]{0,8})")


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """What one batch of a process holds."""

    batch_size: int = 16
    """Targets a step and process in the transfer term."""
    pairs_batch_size: int = 256
    """Pairs a step and process."""
    differences_batch_size: int = 64
    """Differences between two random latents a step and process."""
    noise: float = 0.0
    """Expected length of the noise added to the unit embeddings that the mapper is given."""


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
    only_tradeoff: bool = False
    """Learn only what reads the trade-off: at the place of its own recipe, --start's answers stay
    as they are. Give a mapper that is not calibrated, and calibrate afterwards: that stretches
    the answers of all places by one factor."""
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


# Stages


@dataclass(frozen=True)
class TrainingStage:
    """A part of the schedule: the terms that are minimised, and for how many steps."""

    terms: tuple[str, ...]
    steps: int
    render_size: int | None = None
    """Size in px of the images of the transfer term; None: the generator's own."""


def parse_schedule(texts: Sequence[str]) -> tuple[TrainingStage, ...]:
    """Return the stages of texts NAME[+NAME...][@SIZE]:STEPS.
    ValueError: no stage, a text of another form, unknown or repeated terms, or a size where nothing
    is rendered."""
    if not texts:
        raise ValueError("--schedule: expected stages such as pairs:1000 transfer:4000, found none")
    stages = []
    for text in texts:
        parts = STAGE.fullmatch(text)
        names = parts[1].split("+") if parts else []
        unknown = [name for name in names if name not in TERMS]
        if not parts or unknown or len(set(names)) < len(names):
            hint = did_you_mean(unknown[0], TERMS) if unknown else ""
            raise ValueError(
                f"--schedule: expected NAME[+NAME...][@SIZE]:STEPS with different names of "
                f"{', '.join(TERMS)} and 1 step or more, found {text!r}{hint}"
            )
        terms = tuple(name for name in TERMS if name in names)
        size = int(parts[2]) if parts[2] else None
        if size is not None and "transfer" not in terms:
            raise ValueError(f"--schedule: @{size} is of transfer, which is not in {text!r}")
        stages.append(TrainingStage(terms, int(parts[3]), size))
    return tuple(stages)


def stage_at(stages: Sequence[TrainingStage], step: int) -> TrainingStage:
    """Return the stage that a step belongs to. ValueError: the step is after the last one."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    raise ValueError(f"expected a step before the end, found one {step} after it")


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


# Checks


def flags_of(config: Config) -> dict[str, Any]:
    """Return the values of all flags by their names."""
    flags: dict[str, Any] = {}
    for name, value in vars(config).items():
        flags |= vars(value) if is_dataclass(value) else {name: value}
    return flags


def asked_correction(config: Config) -> "CorrectionConfig | None":
    """Return the sizes of the correction that flags ask for."""
    from predictor.mapper_file import CorrectionConfig

    reading = config.reading
    if reading.correction is None:
        return None
    return CorrectionConfig(
        rank=reading.correction, width=reading.correction_width, layers=reading.correction_layers
    )


def asked_tradeoff(config: Config) -> "TradeoffConfig | None":
    """Return the ends of the trade-off that flags ask for.
    ValueError: ends that cannot be, or those of one weight alone."""
    from predictor.tradeoff import TradeoffConfig

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


def tradeoff_of(config: Config, start: "Mapper | None") -> "TradeoffConfig | None":
    """Return the ends of the trade-off that the mapper reads, by flags or by its start.
    ValueError: a flag of one weight alone is given as well."""
    from predictor.mapper_file import trained_recipe

    tradeoff = asked_tradeoff(config) or (start.config.tradeoff if start is not None else None)
    if tradeoff is not None and start is not None:
        origin = None
        if start.config.tradeoff is not None:
            origin = start.config.tradeoff.origin
        elif config.transfer.only_tradeoff:
            its = trained_recipe(start.record)
            ends = {"weights": tradeoff.identity_weights, "decays": tradeoff.decays}
            for (name, (low, high)), own in zip(
                ends.items(), (its.identity_weight, its.weight_decay), strict=True
            ):
                if not low <= own <= high:
                    raise ValueError(
                        f"--keep-identity-{name}: expected --start's own, {own:g}, between the "
                        f"ends, found {low:g} and {high:g}"
                    )
            origin = round(tradeoff.nearest(its), 2)  # as people type it
        tradeoff = replace(tradeoff, origin=origin)
    for name in ("identity_weight", "direction_decay"):
        if tradeoff is not None and getattr(config.transfer, name) is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: every target draws its own between the ends of "
                "--keep-identity-weights and --keep-identity-decays: drop it"
            )
    return tradeoff


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be."""
    from targetclip.tracking import check_tracker

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
    if config.transfer.only_tradeoff and (config.data.start is None or reading.only_correction):
        raise ValueError("--only-tradeoff: expected a mapper by --start, and no --only-correction")
    tradeoff_of(config, None)
    kinds = reading.source_kinds
    if kinds is not None and not 0 < len(kinds) == len(set(kinds)):
        raise ValueError(f"--source-kinds: expected different ones, found {list(kinds)}")
