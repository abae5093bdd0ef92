"""Calibrate a mapper: find out when its answer will not do, and write that into its file.

    python -m eval.calibrate --mapper runs/mapper/mapper.safetensors --out runs/calibrated

On validation targets, none of which anything was trained on, the mapper and its teacher answer,
and refinements of the mapper's answers are tried. What comes out is a threshold for the score on
the probe sources (`predictor.gate`), how refinements go, and by how much its directions are
stretched: weight decay, by which they were trained, leaves them shorter than the rest of its loss
would have them. The score that the mapper expects is fitted anew (`eval.expectation`), and judged.
Sources that judge are neither the probe's nor the optimizer's. Writes the mapper with its
calibration, report.json and reliability.png.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.targets import Target, of_split, open_targets
from eval.calibration import choose_refinement, reliability, steps_to_teacher, threshold_of
from eval.charts import COLOURS, Series, chart
from eval.expectation import fit_expectation
from predictor.cli import choose_device
from predictor.gate import Gate
from predictor.load import load_essence
from predictor.mapper import Mapper, save_mapper
from predictor.mapper_file import MapperRecord, trained_recipe
from predictor.report import make_folder, versions, write_file
from predictor.transfer import EssenceTransfer
from targetclip.editing import render
from targetclip.embedder import EmbedsImages
from targetclip.encoders.identity import feature_model
from targetclip.media.images import write_picture
from targetclip.optimize import losses_of, optimize_directions
from targetclip.precision import in_bfloat16
from targetclip.recipes import RECIPES, Recipe
from targetclip.sources import generated_sources, source_bank
from targetclip.seeds import BANK, seed_of
from targetclip.targets import embed_targets, initial_directions
from targetclip.world import load_world

JUDGED_SEED = 1  # of the sources that judge: those that trainings validate on
LENGTHS = (5, 10, 20, 30)  # steps of the refinements tried
RATES = (0.01, 0.03)
STRETCHES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25)

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Config:
    mapper: Path
    """Mapper file to calibrate; it is left as it is."""
    out: Path
    """Folder for mapper.safetensors, report.json and reliability.png."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    targets: tuple[str, ...] = ("drawn:2000@29", "wide:2000@29")
    """Where targets are from, as data.build takes them: sets that are calibrated for apart. Those
    of the validation split judge; the expected score is fitted on those of the training split, so
    give others than the mapper was trained on."""
    count: int = 32
    """Targets of each set that judge, at most."""
    fitted: int = 2000
    """Targets of each set that the expected score is fitted on, at most; 0 leaves it as it is."""
    sources: int = 16
    """Sources that judge."""
    probes: int = 8
    """Sources that the mapper's answers will be checked on."""
    precision: Precision = "fp32"
    """Of the optimizer; scores are always in float32."""
    half: bool = False
    """Write the mapper's weights in half precision."""
    max_images: int = 96
    """Images rendered at once."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    seed: int = 0
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("count", "sources", "probes", "max_images"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected 1 or more, found {getattr(self, name)}")
        if self.fitted < 0:
            raise ValueError(f"--fitted: expected 0 or more, found {self.fitted}")
        if self.sources < 2:
            raise ValueError("--sources: expected 2 or more, which can be consistent, found 1")


# Targets


@dataclass(frozen=True)
class Targets:
    """Validation targets, one set after another."""

    pictures: list[Image.Image]
    ids: list[str]
    sets: list[str]
    """The spec that each is from."""
    judged: Float[Tensor, "targets embed"]
    """Embeddings that edits are compared with."""

    def members(self, spec: str) -> Bool[Tensor, " targets"]:
        return torch.tensor([each == spec for each in self.sets])


def validation_targets(config: Config, essence: EssenceTransfer) -> Targets:
    """The first targets of the validation split of each set.

    Raises:
        ValueError: a set has none.
    """
    found: list[tuple[str, Target]] = []
    for spec in config.targets:
        candidates = open_targets(spec, essence.generator, essence.truncation)
        before = len(found)
        found += [(spec, each) for each in of_split(candidates, "validation", config.count)]
        if len(found) == before:
            raise ValueError(
                f"--targets: expected pictures of the validation split (one in twenty), found none "
                f"in {spec!r}; give more"
            )
    pictures = [target.picture for _, target in found]
    return Targets(
        pictures,
        [target.id for _, target in found],
        [spec for spec, _ in found],
        essence.embedder.embed_pictures(pictures),
    )


# Scores


@dataclass(frozen=True)
class Judge:
    """Scores directions on sources that nothing is optimized or checked on."""

    essence: EssenceTransfer
    sources: Float[Tensor, "sources num_ws w_dim"]
    before: Float[Tensor, "sources seen"]
    targets: Targets
    probes: int
    teacher: Recipe
    refined: Recipe
    """What refinements minimise: the teacher's loss, with the identity loss of the mapper's."""

    @staticmethod
    def new(essence: EssenceTransfer, targets: Targets, teacher: Recipe, config: Config) -> "Judge":
        trained = essence.trained
        # Decay, too, is what the mapper was trained by (`Gate.refining`), but no part of the loss.
        refined = replace(
            teacher, identity_weight=trained.identity_weight, weight_decay=trained.weight_decay
        )
        truncation = essence.truncation
        sources = generated_sources(essence.generator, truncation, config.sources, JUDGED_SEED)
        seeing = Judge.feature_model(essence, teacher, refined)
        with torch.no_grad():
            before = seeing.embed_images(render(essence.generator, sources, essence.max_images))
        return Judge(essence, sources, before, targets, config.probes, teacher, refined)

    @staticmethod
    def feature_model(essence: EssenceTransfer, *recipes: Recipe) -> EmbedsImages:
        """What sees all that any of the recipes looks at."""
        weight = max(recipe.identity_weight for recipe in recipes)
        return feature_model(essence.embedder, essence.identity, weight)

    def scores(self, vectors: Float[Tensor, "targets num_ws w_dim"]) -> dict[str, Tensor]:
        """Each [targets]: transfer score, the loss of refinements and that of the teacher, transfer
        score on the probe."""
        essence, found = self.essence, []
        seeing = Judge.feature_model(essence, self.teacher, self.refined)
        for vector in vectors:
            images = render(essence.generator, self.sources + vector, essence.max_images)
            with torch.no_grad():
                found.append(seeing.embed_images(images))
        seen = torch.stack(found)
        before, judged = self.before.expand_as(seen), self.targets.judged
        losses = losses_of(self.refined, before, seen, judged)
        taught = losses_of(self.teacher, before, seen, judged)
        rows = zip(self.targets.judged, vectors, strict=True)
        probe = [essence.probe_score(target, vector, self.probes) for target, vector in rows]
        return {
            "transfer": 1 - losses.transfer.cpu(),
            "loss": losses.loss.cpu(),
            "teacher_loss": taught.loss.cpu(),
            "probe": torch.tensor(probe),
        }


# Answers


def predictions(
    essence: EssenceTransfer, mapper: Mapper, targets: Targets
) -> tuple[Float[Tensor, "targets num_ws w_dim"], Float[Tensor, " targets"]]:
    """The mapper's directions, and the transfer scores it expects."""
    recipe = trained_recipe(mapper.record)
    wanted = embed_targets(essence.generator, essence.embedder, targets.pictures, recipe)
    with torch.no_grad():
        prediction = mapper(wanted)
    return prediction.directions, prediction.expected.cpu()


def searched(
    essence: EssenceTransfer,
    targets: Targets,
    recipe: Recipe,
    initial: Float[Tensor, "targets num_ws w_dim"],
    config: Config,
    name: str,
) -> Float[Tensor, "targets num_ws w_dim"]:
    """What the optimizer makes of a start, for all targets; a start that fails stays as it is."""
    wanted = embed_targets(essence.generator, essence.embedder, targets.pictures, recipe)
    bank = source_bank(
        essence.generator, essence.truncation, BANK if recipe.fresh_sources else recipe.sources
    )
    seeds = [seed_of("calibrate", config.seed, each) for each in targets.ids]
    at_once = max(1, config.max_images // recipe.sources)
    found = []
    with tqdm(total=len(seeds) * recipe.steps, desc=name, unit="step") as bar:
        for start in range(0, len(seeds), at_once):
            span = slice(start, start + at_once)
            part = initial[span]

            def on_step(progress: object, rows: int = len(part)) -> None:
                bar.update(rows)

            with in_bfloat16(bank.device) if config.precision == "bf16" else nullcontext():
                optimized = optimize_directions(
                    essence.generator, essence.embedder, wanted[span], bank, recipe, part,
                    seeds[span], on_step, config.max_images, identity=essence.identity,
                )  # fmt: skip
            failed = torch.tensor([each is not None for each in optimized.failures])
            kept = failed.to(part.device)[:, None, None]
            found.append(torch.where(kept, part, optimized.directions))
    return torch.cat(found)


# The command


def stretched(
    judge: Judge, predicted: Float[Tensor, "targets num_ws w_dim"]
) -> tuple[float, dict[float, float]]:
    """The factor of the mapper's directions with the lowest mean loss, and the loss of each."""
    losses = {
        factor: float(judge.scores(factor * predicted)["loss"].mean())
        for factor in tqdm(STRETCHES, "stretch", unit="factor")
    }
    return min(losses, key=lambda factor: losses[factor]), losses


def refinements(
    judge: Judge,
    predicted: Float[Tensor, "targets num_ws w_dim"],
    config: Config,
    first: dict[str, Tensor],
) -> dict[str, dict[float, dict[int, float]]]:
    """Mean losses, theirs and the teacher's, by rate and number of steps; 0 are the predictions."""
    losses: dict[str, dict[float, dict[int, float]]] = {"loss": {}, "teacher_loss": {}}
    for rate in RATES:
        for name, by in losses.items():
            by[rate] = {0: float(first[name].mean())}
        for steps in LENGTHS:
            gate = Gate(0.0, config.probes, steps, rate)
            recipe = gate.refining(judge.teacher, judge.refined)
            bar = f"refine, rate {rate:g}, {steps} steps"
            found = judge.scores(
                searched(judge.essence, judge.targets, recipe, predicted, config, bar)
            )
            for name, by in losses.items():
                by[rate][steps] = float(found[name].mean())
    return losses


def teacher_answers(judge: Judge, config: Config) -> Float[Tensor, "targets num_ws w_dim"]:
    """The optimizer's directions from its own start."""
    essence, targets, recipe = judge.essence, judge.targets, judge.teacher
    seeds = [seed_of("initial", config.seed, each) for each in targets.ids]
    initial = initial_directions(
        essence.generator, essence.inverter, targets.pictures, recipe.initial, seeds
    )
    return searched(essence, targets, recipe, initial, config, "teacher")


def means_by_set(targets: Targets, values: Float[Tensor, " targets"]) -> dict[str, float]:
    return {
        spec: float(values[targets.members(spec)].mean()) for spec in dict.fromkeys(targets.sets)
    }


def reliability_picture(
    targets: Targets, expected: Float[Tensor, " targets"], reached: Float[Tensor, " targets"]
) -> Image.Image:
    """Expected against reached transfer score, a dot a target."""
    series = []
    for colour, spec in zip(COLOURS, dict.fromkeys(targets.sets), strict=False):
        members = targets.members(spec)
        points = list(zip(expected[members].tolist(), reached[members].tolist(), strict=True))
        series.append(Series(spec, points, colour))
    title = "What the mapper expects, and what it reaches"
    return chart(title, series, "expected transfer score", "reached", diagonal=True)


def run(config: Config) -> MapperRecord:
    """Calibrate, and return the record of the mapper that is written.

    A mapper that is calibrated again is stretched again, from where it is.

    Raises:
        FileNotFoundError, ValueError: parts that are missing or do not fit; no targets.
    """
    world = load_world(config.world)
    make_folder(config.out)
    device = choose_device(config.device)
    essence = load_essence(
        world, device, config.mapper, config.max_images, config.checkpoint_layers
    )
    mapper = essence.asked_mapper()
    recipe = RECIPES[world.recipe]
    targets = validation_targets(config, essence)
    judge = Judge.new(essence, targets, recipe, config)
    stretch, by_stretch = stretched(judge, predictions(essence, mapper, targets)[0])
    mapper.scale.mul_(stretch)
    fitted = fit_expectation(essence, mapper, config.targets, config.fitted, config.seed)
    predicted, expected = predictions(essence, mapper, targets)
    first = judge.scores(predicted)
    taught = judge.scores(teacher_answers(judge, config))
    losses = refinements(judge, predicted, config, first)
    rate, steps = choose_refinement(losses["loss"])
    members = [targets.members(spec) for spec in dict.fromkeys(targets.sets)]
    threshold = threshold_of(first["probe"], first["transfer"], taught["transfer"], members)
    gate = Gate(threshold, config.probes, steps, rate)
    trust = reliability(expected, first["transfer"])
    if mapper.record is None:
        raise ValueError(f"{config.mapper}: expected a mapper with a record, found none")
    figures = {**asdict(gate), **trust, "fitted": fitted, "stretch": stretch}
    told_of = {**mapper.record.recipe, "expects": True} if fitted else mapper.record.recipe
    record = replace(mapper.record, recipe=told_of, calibration=figures)
    save_mapper(mapper, config.out / "mapper.safetensors", record, half=config.half)
    teacher_loss = float(taught["teacher_loss"].mean())
    report: dict[str, Any] = {
        "calibration": record.calibration,
        "passing": means_by_set(targets, (first["probe"] >= threshold).float()),
        "mapper": {name: means_by_set(targets, each) for name, each in first.items()},
        "teacher": {name: means_by_set(targets, each) for name, each in taught.items()},
        "loss_by_stretch": by_stretch,
        "loss_by_rate_and_steps": losses,
        "teacher_steps": recipe.steps,
        "steps_to_teachers_loss": {
            r: steps_to_teacher(by, teacher_loss) for r, by in losses["teacher_loss"].items()
        },
        "each": {
            "id": targets.ids,
            "set": targets.sets,
            "expected": expected.tolist(),
            **{f"mapper_{name}": each.tolist() for name, each in first.items()},
            **{f"teacher_{name}": each.tolist() for name, each in taught.items()},
        },
        "config": {name: str(value) for name, value in vars(config).items()},
        "versions": versions(),
    }
    write_file(config.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    picture = reliability_picture(targets, expected, first["transfer"])
    write_picture(picture, config.out / "reliability.png")
    told = {name: report[name] for name in ("calibration", "passing", "steps_to_teachers_loss")}
    print(json.dumps(told, indent=2))
    return record


def main() -> None:
    """Errors of input and of files are one line."""
    try:
        run(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
