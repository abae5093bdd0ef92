"""Calibrate a mapper: find the score below which its answer is not used, and write it to its file.

    python -m eval.calibrate --mapper runs/mapper/mapper.safetensors --out runs/calibrated

The mapper and the optimizer, its teacher, answer validation targets, and refinements of the
mapper's answers are tried. The results are a threshold for the score on the probe sources and the
settings of refinements (`predictor.direction.Gate`), and a factor that stretches the mapper's
directions, which weight decay leaves too short. The expected score is fitted anew
(`eval.expectation`). Sources that judge are neither the probe's nor the optimizer's. Writes the
mapper with its calibration, report.json and reliability.png.

A mapper that reads the trade-off between essence and identity gets its default place there: that of
--keep-identity; or its own, where it answers as the mapper that it was trained from; or else the
one of most identity kept whose transfer score is within 0.01 of the best. All figures are those of
this place; at others the threshold is moved by as much as the mean score on the probe sources
differs there.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import Precision, start
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import CALIBRATION_TARGETS, VALIDATION_SOURCES, probe_seeds, seed_of
from targetclip.world import DEFAULT_WORLD, World, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    mapper: Path
    """Mapper file to calibrate; it is not changed."""
    out: Path
    """Folder for mapper.safetensors, report.json and reliability.png."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    targets: tuple[str, ...] | None = None
    """Sets of targets, as data.build takes them; the threshold holds on each. Those of the
    validation split judge; the expected score is fitted on those of the training split, so give
    others than the mapper was trained on. Default: 4,000 avatars for the bundled world; 4,000
    samples of its own generator for any other world."""
    count: int = 32
    """Targets of each set that judge, at most."""
    fitted: int = 2000
    """Targets of each set that the expected score is fitted on, at most; 0 leaves it as it is."""
    sources: int = 16
    """Sources that judge."""
    probes: int = 8
    """Sources that the mapper's answers will be checked on."""
    keep_identity: float | None = None
    """Default place on the trade-off, from 0 to 1, of a mapper that reads one. Default: that where
    it answers as the mapper that it was trained from, or else chosen."""
    precision: Precision | None = None
    """Of the optimizer; scores are in float32. Default: accelerate's, or else fp32."""
    half: bool = False
    """Write the mapper's weights in half precision."""
    max_images: int | None = None
    """Images rendered at once; fewer need less memory. Default: 64, fewer above 256
    px, or a whole step of a search."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    seed: int = 0
    """Of every random number of the searches, and of the sources of the expected score."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.calibrate", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.targets import Target, check_trainable, default_targets, of_split, open_targets, portable
from data.teacher import search_in_batches
from eval.expectation import fit_expectation
from eval.methods import Answer, mapped
from eval.report import Series, check_charts, line_chart
from eval.sets import Embeddings, Sources
from predictor.direction import THRESHOLD_AT, Gate
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperRecord
from predictor.tradeoff import check_keep
from predictor.transfer import EssenceTransfer, load_essence
from targetclip.media.images import write_picture
from targetclip.optimize import losses_of
from targetclip.scores import score_features

REFINEMENTS = tuple((rate, steps) for rate in (0.01, 0.03) for steps in (5, 10, 20, 30))
STRETCHES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
NEAR = 0.002  # a shorter refinement is preferred whose loss exceeds the lowest by no more
TOLERANCE = 0.005  # part of the better score of mapper and teacher that passing answers may lose
RARE = 0.01  # part of the validation targets that count as unlike all others
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)  # on the trade-off, that are measured
LOST = 0.01  # of the best transfer score, that the default place may lose


# Figures from scores


def threshold_of(
    probe: Float[Tensor, " targets"],
    mapper: Float[Tensor, " targets"],
    teacher: Float[Tensor, " targets"],
    sets: Sequence[Bool[Tensor, " targets"]],
    usual: Float[Tensor, " others"],
) -> float:
    """Return the lowest probe score that may pass.

    Targets below it are answered by the better of mapper and teacher. Then every set's mean score
    must reach the better mean of mapper and teacher, but for TOLERANCE. The threshold is at least
    the score that all but RARE of `usual`, scores of the mapper on many other targets, reach.
    """
    floor = float(torch.quantile(usual, RARE))
    best = torch.maximum(mapper, teacher)

    def holds(threshold: float) -> bool:
        answered = torch.where(probe >= threshold, mapper, best)
        return all(
            float(answered[members].mean())
            >= (1 - TOLERANCE) * max(float(mapper[members].mean()), float(teacher[members].mean()))
            for members in sets
        )

    # At 1.0 nothing passes, so that it always holds.
    candidates = sorted(score for score in probe.tolist() if score > floor)
    return next((score for score in [floor, *candidates] if holds(score)), 1.0)


def choose_refinement(losses: Mapping[float, Mapping[int, float]]) -> tuple[float, int]:
    """Return the rate with the lowest loss, and its fewest steps that come as near as NEAR.

    Args:
        losses: by rate and steps; 0 steps do not count.
    """
    refined = {rate: {n: loss for n, loss in row.items() if n > 0} for rate, row in losses.items()}
    rate = min(refined, key=lambda rate: min(refined[rate].values()))
    lowest = min(refined[rate].values())
    return rate, min(steps for steps, loss in refined[rate].items() if loss <= lowest + NEAR)


def steps_to_teacher(losses: Mapping[int, float], teacher: float) -> int | None:
    """Return the fewest steps from predictions that reach the teacher's mean loss, or None."""
    return min((steps for steps, loss in losses.items() if loss <= teacher), default=None)


def reliability(
    expected: Float[Tensor, " targets"], reached: Float[Tensor, " targets"]
) -> dict[str, float]:
    """Return mean error, bias and correlation of expected scores."""
    return {
        "expected_error": float((expected - reached).abs().mean()),
        "expected_bias": float((expected - reached).mean()),
        "expected_correlation": float(torch.corrcoef(torch.stack([expected, reached]))[0, 1]),
    }


# Validation targets


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation targets, one set after another, and what judges edits for them."""

    essence: EssenceTransfer
    pictures: list[Image.Image]
    ids: list[str]
    specs: list[str]
    """The set that each target is from."""
    embeddings: Embeddings
    """Edits are compared with them."""
    sources: Sources
    """Not used by the optimizer or the probe."""
    probes: int
    teacher: Recipe
    refined: Recipe
    """The loss of refinements: the teacher's, with the identity weight of the mapper's training."""
    precision: Precision
    """Of searches."""
    seed: int
    """Of searches."""

    def members(self) -> dict[str, Bool[Tensor, " targets"]]:
        """Return a mask of the targets of each set."""
        return {
            spec: torch.tensor([other == spec for other in self.specs])
            for spec in dict.fromkeys(self.specs)
        }

    def means(self, values: Float[Tensor, " targets"]) -> dict[str, float]:
        """Return the mean of each set."""
        return {spec: float(values[rows].mean()) for spec, rows in self.members().items()}

    @torch.no_grad()
    def scores(self, answer: Answer) -> dict[str, Float[Tensor, " targets"]]:
        """Score edits, corrected for each source where the answer has a correction.

        Returns:
            The `transfer` score, the `loss` of refinements, the `teacher_loss`, the transfer score
            on the `probe` sources, and the `identity` similarity where a loss weighs it.
        """
        scene = self.essence.scene
        weight = max(self.teacher.identity_weight, self.refined.identity_weight)
        edits = self.sources + answer.on(self.sources)
        after = scene.features(edits.flatten(0, 1), identity_weight=weight)
        after = after.unflatten(0, edits.shape[:2])
        before = scene.features(self.sources, identity_weight=weight).expand_as(after)
        offsets = answer.on(scene.latents(probe_seeds(self.probes)))
        probe = [
            self.essence.probe_score(embedding, each, self.probes)
            for embedding, each in zip(self.embeddings, offsets, strict=True)
        ]
        scores = score_features(self.embeddings, before, after)
        kept = {} if scores.identity is None else {"identity": scores.identity.mean(dim=1).cpu()}
        return {
            "transfer": scores.transfer.cpu(),
            "loss": losses_of(self.refined, before, after, self.embeddings).loss.cpu(),
            "teacher_loss": losses_of(self.teacher, before, after, self.embeddings).loss.cpu(),
            "probe": torch.tensor(probe),
            **kept,
        }

    def search(self, recipe: Recipe, start: Answer, label: str) -> Answer:
        """Return the optimizer's directions of all targets, with the corrections of the start,
        which are held; the start where a search failed."""
        scene, initial = self.essence.scene, start.edits
        correction = start.correction
        held = None if correction is None else correction.each(scene.bank_of(recipe))
        directions, failures = search_in_batches(
            scene,
            scene.embed_targets(self.pictures, recipe),
            recipe,
            initial,
            [seed_of("calibrate", self.seed, name) for name in self.ids],
            label=label,
            precision=self.precision,
            held=held,
        )
        failed = torch.tensor([failure is not None for failure in failures], device=initial.device)
        return replace(start, edits=torch.where(failed[:, None, None], initial, directions))


def open_validation(
    config: Config, essence: EssenceTransfer, teacher: Recipe, precision: Precision
) -> Validation:
    """Take the first targets of the validation split of each set, which may not be empty."""
    scene, trained = essence.scene, essence.trained
    targets: list[tuple[str, Target]] = []
    for spec in config.targets or ():
        candidates = open_targets(spec, scene.generator, scene.truncation)
        chosen = list(of_split(candidates, "validation", config.count))
        if not chosen:
            raise ValueError(
                f"--targets: expected pictures of the validation split (one in twenty), found none "
                f"in {spec!r}; give more"
            )
        targets += [(spec, target) for target in chosen]
    pictures = [target.picture for _, target in targets]
    return Validation(
        essence=essence,
        pictures=pictures,
        ids=[target.id for _, target in targets],
        specs=[spec for spec, _ in targets],
        embeddings=scene.embedder.embed_pictures(pictures),
        sources=scene.sources(config.sources, VALIDATION_SOURCES),
        probes=config.probes,
        teacher=teacher,
        refined=replace(
            teacher, identity_weight=trained.identity_weight, weight_decay=trained.weight_decay
        ),
        precision=precision,
        seed=config.seed,
    )


# The trade-off

Curve = dict[float, dict[str, float]]


def curve_of(validation: Validation, mapper: Mapper) -> Curve:
    """Return the mean scores of a mapper's answers at each of PLACES on the trade-off."""
    scene, pictures = validation.essence.scene, validation.pictures
    curve: Curve = {}
    for keep in tqdm(PLACES, "trade-off", unit="place"):
        scores = validation.scores(mapped(scene, mapper, pictures, keep=keep))
        names = [name for name in ("transfer", "identity", "probe") if name in scores]
        curve[keep] = {name: float(scores[name].mean()) for name in names}
    return curve


def on_curve(curve: Curve, name: str, places: Any) -> Any:
    """Return a score at places of a curve, linear between those that were measured."""
    return np.interp(places, list(curve), [row[name] for row in curve.values()])


def default_place(curve: Curve) -> float:
    """Return the place of most identity kept whose transfer score is within LOST of the best."""
    places = np.linspace(0, 1, 101).round(2)
    scores = on_curve(curve, "transfer", places)
    return float(places[scores >= scores.max() - LOST].max())


def thresholds(threshold: float, curve: Curve, keep: float) -> dict[str, float]:
    """Return the threshold at each place that was measured, from that of the place `keep`."""
    usual = float(on_curve(curve, "probe", keep))
    return {f"{THRESHOLD_AT}{k:g}": threshold + row["probe"] - usual for k, row in curve.items()}


def with_default_place(
    validation: Validation, mapper: Mapper, asked: float | None
) -> tuple[Validation, float | None]:
    """Give a mapper that reads the trade-off its default place, in its record.

    Returns:
        The validation, with the loss of refinements there; the place, None where none is read.
    """
    tradeoff, record = mapper.config.tradeoff, mapper.record
    if tradeoff is None or record is None:
        return validation, None
    keep = tradeoff.origin if asked is None else asked
    if keep is None:
        keep = default_place(curve_of(validation, mapper))
    mapper.record = replace(record, calibration={**record.calibration, "keep_identity": keep})
    return replace(validation, refined=tradeoff.recipe_at(validation.refined, keep)), keep


# Searches and scores


def scaled(answer: Answer, factor: float) -> Answer:
    """Return an answer whose directions and corrections are longer by a factor."""
    correction = answer.correction
    if correction is not None:
        correction = replace(correction, weights=factor * correction.weights)
    return replace(answer, edits=factor * answer.edits, correction=correction)


def stretched(validation: Validation, predicted: Answer) -> tuple[float, dict[float, float]]:
    """Return the factor of the edits with the lowest mean loss, and the loss of each."""
    losses = {
        factor: float(validation.scores(scaled(predicted, factor))["loss"].mean())
        for factor in tqdm(STRETCHES, "stretch", unit="factor")
    }
    return min(losses, key=lambda factor: losses[factor]), losses


Losses = dict[str, dict[float, dict[int, float]]]


def refinements(
    validation: Validation,
    predicted: Answer,
    scores: Mapping[str, Tensor],
    settings: Sequence[tuple[float, int]],
) -> Losses:
    """Return mean losses, `loss` and `teacher_loss`, by rate and steps of a refinement.

    Args:
        scores: of the predictions, which are those of 0 steps.
        settings: rates and steps.
    """
    rates = dict.fromkeys(rate for rate, _ in settings)
    losses: Losses = {
        name: {rate: {0: float(scores[name].mean())} for rate in rates}
        for name in ("loss", "teacher_loss")
    }
    for rate, steps in settings:
        gate = Gate(0.0, validation.probes, steps, rate)
        recipe = gate.refining(validation.teacher, validation.refined)
        refined = validation.search(recipe, predicted, f"refine, rate {rate:g}, {steps} steps")
        refined_scores = validation.scores(refined)
        for name, by_rate in losses.items():
            by_rate[rate][steps] = float(refined_scores[name].mean())
    return losses


# The command


def reliability_chart(
    validation: Validation, expected: Float[Tensor, " targets"], reached: Float[Tensor, " targets"]
) -> Image.Image:
    """Draw expected against reached transfer scores, a point for each target."""
    series = [
        Series(name=spec, points=list(zip(expected[m].tolist(), reached[m].tolist(), strict=True)))
        for spec, m in validation.members().items()
    ]
    title = "Transfer scores that the mapper expects and reaches"
    return line_chart(title, series, "expected transfer score", "reached", diagonal=True)


def command_of(config: Config, precision: Precision) -> str:
    """Return the command that calibrates so again, without paths of this machine."""
    flags = {**vars(config), "out": Path("calibrated"), "world": Path(config.world).name}
    flags["targets"] = tuple(map(portable, config.targets or ()))
    flags["precision"] = None if precision == "fp32" else precision
    del flags["device"]
    known = vars(Config(mapper=config.mapper, out=config.out))
    defaults = {name: value for name, value in known.items() if name not in ("mapper", "out")}
    return command.command_line("eval.calibrate", flags, defaults)


def opened(config: Config) -> tuple[Config, World, EssenceTransfer]:
    """Return the options with the world's own targets where none are given, the world, and the
    product with the mapper. FileNotFoundError, ValueError: see `run`."""
    command.check_least(config, count=1, fitted=0, sources=2, probes=1, max_images=1)
    check_charts()
    if config.keep_identity is not None:
        check_keep(config.keep_identity, "--keep-identity")
    world = load_world(config.world)
    command.make_folder(config.out)
    command.say(f"loading world {world.name}", error=True)
    specs = config.targets
    if specs is None:
        specs = default_targets(world, CALIBRATION_TARGETS, 2000)
    check_trainable(specs)
    essence = load_essence(
        world,
        command.choose_device(config.device),
        config.mapper,
        max_images=config.max_images,
        checkpoint_layers=config.checkpoint_layers,
    )
    mapper = essence.asked_mapper()
    if mapper.record is None:
        raise ValueError(f"{config.mapper}: expected a mapper with a record, found none")
    if config.keep_identity is not None and mapper.config.tradeoff is None:
        raise ValueError(
            f"--keep-identity: the mapper {str(config.mapper)!r} reads no trade-off: drop the flag"
        )
    return replace(config, targets=specs), world, essence


def report_of(
    validation: Validation,
    expected: Float[Tensor, " targets"],
    scores: Mapping[str, Tensor],
    teacher_scores: Mapping[str, Tensor],
    threshold: float,
    losses: Losses,
) -> dict[str, Any]:
    """Return what report.json says of the mapper and of its teacher.

    Args:
        losses: of refinements, by rate and steps.
    """
    teacher_loss = float(teacher_scores["teacher_loss"].mean())
    return {
        "passing": validation.means((scores["probe"] >= threshold).float()),
        "mapper": {name: validation.means(values) for name, values in scores.items()},
        "teacher": {name: validation.means(values) for name, values in teacher_scores.items()},
        "loss_by_rate_and_steps": losses,
        "teacher_steps": validation.teacher.steps,
        "steps_to_teachers_loss": {
            r: steps_to_teacher(row, teacher_loss) for r, row in losses["teacher_loss"].items()
        },
        "each": {
            "id": validation.ids,
            "set": validation.specs,
            "expected": expected.tolist(),
            **{f"mapper_{name}": values.tolist() for name, values in scores.items()},
            **{f"teacher_{name}": values.tolist() for name, values in teacher_scores.items()},
        },
    }


def run(
    config: Config,
    *,
    teacher: Recipe | None = None,
    refined_by: Sequence[tuple[float, int]] = REFINEMENTS,
) -> MapperRecord:
    """Calibrate, and return the record of the mapper that is written.

    A mapper that was calibrated before is stretched from its present length.

    Args:
        teacher: None: the world's recipe.
        refined_by: rates and steps of the refinements that are tried.

    Raises:
        FileNotFoundError, ValueError: parts that are missing or do not fit; no targets.
    """
    precision = command.choose_precision(config.precision)
    config, world, essence = opened(config)
    mapper, seed = essence.asked_mapper(), config.seed
    assert mapper.record is not None and config.targets is not None, "see `opened`"
    validation = open_validation(config, essence, teacher or RECIPES[world.recipe], precision)
    validation, keep = with_default_place(validation, mapper, config.keep_identity)

    scene, pictures = essence.scene, validation.pictures
    stretch, by_stretch = stretched(validation, mapped(scene, mapper, pictures))
    mapper.scale.mul_(stretch)
    reached, places = fit_expectation(scene, mapper, config.targets, config.fitted, seed)
    reached = reached.cpu()

    predicted = mapped(scene, mapper, pictures)
    assert predicted.expected is not None
    expected = predicted.expected.cpu()
    scores, recipe = validation.scores(predicted), validation.teacher
    seeds = [seed_of("initial", seed, name) for name in validation.ids]
    initial = Answer(edits=scene.initial(pictures, recipe.initial, seeds))
    teacher_scores = validation.scores(validation.search(recipe, initial, "teacher"))
    losses = refinements(validation, predicted, scores, refined_by)
    rate, steps = choose_refinement(losses["loss"])
    sets, transfer = list(validation.members().values()), scores["transfer"]
    usual = reached if len(reached) else scores["probe"]
    curve = {} if keep is None else curve_of(validation, mapper)  # of stretched directions
    if keep is not None and places is not None:
        # As if all of them had been answered at the default place
        moved = on_curve(curve, "transfer", keep) - on_curve(
            curve, "transfer", places.cpu().numpy()
        )
        usual = usual + torch.from_numpy(moved).to(usual)
    threshold = threshold_of(scores["probe"], transfer, teacher_scores["transfer"], sets, usual)
    gate = Gate(threshold, config.probes, steps, rate)
    trust = reliability(expected, transfer)
    figures = {**asdict(gate), **trust, "fitted": len(reached), "stretch": stretch}
    if keep is not None:
        figures |= {"keep_identity": keep, **thresholds(threshold, curve, keep)}
    trained = {**mapper.record.recipe, "expects": True} if len(reached) else mapper.record.recipe
    judged = {
        "transfer_score": transfer,
        "probe_score": scores["probe"],
        "teacher_transfer_score": teacher_scores["transfer"],
    }
    record = replace(
        mapper.record,
        recipe=trained,
        calibration=figures,
        command=f"{mapper.record.command}\n{command_of(config, precision)}".strip(),
        # Those of the training are of other lengths of directions.
        validation={name: float(values.mean()) for name, values in judged.items()},
    )
    path = config.out / "mapper.safetensors"
    save_mapper(mapper, path, record, half=config.half)

    options = {name: str(value) for name, value in vars(config).items()}
    report = {
        "calibration": record.calibration,
        **report_of(validation, expected, scores, teacher_scores, threshold, losses),
        **({"tradeoff": curve} if curve else {}),
        "loss_by_stretch": by_stretch,
        "config": options | {"precision": precision},
        "versions": command.versions(),
    }
    command.write_json(config.out / "report.json", report)
    write_picture(reliability_chart(validation, expected, transfer), config.out / "reliability.png")
    shown = {name: report[name] for name in ("calibration", "passing", "steps_to_teachers_loss")}
    print(json.dumps(shown, indent=2))
    then = f"python -m eval.compare --out REPORT --mapper {shlex.quote(str(path))}"
    command.say_next(config.out, "mapper.safetensors, report.json", then, error=True)
    return record
