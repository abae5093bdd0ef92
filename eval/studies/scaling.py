"""Measure how a mapper's quality grows with the number of its targets, and predict a larger number.

    python -m eval.studies.scaling --out runs/scaling
    python -m eval.studies.scaling --out runs/scaling --jobs 15  # at once, on a GPU

Every training is a run of train.mapper as the shipped mapper was made, but from scratch and
shorter: the same number of steps for all, on so many random targets of one bank. Each of --seeds
draws its own. All mappers are judged on the same validation targets and sources. A law is fitted to
--sizes; what it says of --predict is written to report.json before a training of that size begins.

The law is loss = a + b n^-c, by least squares. It needs a floor a: a training draws as many targets
as its steps have room for, however many there are. With c towards 0 it becomes a line in log n, so
it holds that form as well. Its interval is of the mean over the seeds: residuals are drawn anew
2000 times, for the fit and for the trainings to come. Writes report.json, report.md and chart.png.
The same command goes on after an interruption.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import Precision, choose_precision, start
from targetclip.seeds import seed_of
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md, chart.png and the trainings."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    sizes: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """Numbers of targets that the law is fitted to."""
    predict: int = 16384
    """Number of targets that it predicts."""
    seeds: int = 3
    """Trainings of each number."""
    steps: int = 300
    """Of every training."""
    batch_size: int = 32
    """Targets a step."""
    targets: tuple[str, ...] = (
        "avataaars:7000@17",
        "styles:9000@17",
        "generated:2000@17",
        "mixed:2000@17",
    )
    """Target pictures of the bank, as train.mapper takes them."""
    validation: tuple[str, ...] = ("avataaars:32@23", "styles:32@23")
    """Targets that trainings are logged by; none of them is trained on."""
    bank: Path | None = None
    """Folder of the bank, as of train.mapper. Default: below --out."""
    jobs: int = 1
    """Trainings at once. Several share a GPU well, and a processor badly."""
    judged: int = 64
    """Validation targets that mappers are judged by; every second one is in the generator's
    style."""
    sources: int = 16
    """Sources that judge."""
    precision: Precision | None = None
    """Of trainings; scores are in float32. Default: accelerate's, or else fp32."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.scaling", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy import ndarray
from PIL import Image
from torch import Tensor

from data.publish import sha256_of
from eval.answers import earlier_report
from eval.judging import Judges, face_judges, goal_of, judge_edits
from eval.methods import mapped
from eval.reader import BUNDLED
from eval.report import Series, check_charts, line_chart, number, table
from eval.sets import EvalSet, Sources, targets_and_sources
from predictor.mapper import Mapper, load_mapper
from predictor.mapper_file import trained_recipe
from targetclip.media.images import write_picture
from targetclip.optimize import losses_of
from targetclip.scene import Scene

# As the shipped mapper was trained (docs/results.md), but for what is varied here.
TRAINING = (
    "--recipe identity --sources 3 --learning-rate 2e-3 --direction-decay 3e-3 --width 256 "
    "--depth 1 --rank 128 --correction 96 --correction-rate 0.75 --uncorrected 0.1"
)
RENDER_SIZE = 64  # px of images in training
# What is fitted, as losses. Identity kept is not: a mapper that edits nothing keeps all of it.
LOSSES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "objective": lambda row: row["objective"],
    "score missed": lambda row: 1 - row["transfer"],
    "essence missed": lambda row: 1 - row["essence"],
}
JUDGED = ("objective", "transfer", "essence", "identity")
EXPONENTS = np.linspace(0.005, 2, 400)
RESAMPLES = 2000


def check_config(config: Config) -> None:
    """Raise a ValueError for options that are out of range."""
    command.check_least(config, seeds=1, steps=1, batch_size=1, jobs=1, judged=2, sources=2)
    sizes = (*config.sizes, config.predict)
    if len(config.sizes) < 3 or list(sizes) != sorted({*sizes}) or sizes[0] < 2:
        raise ValueError(
            f"--sizes, --predict: expected three numbers or more from 2 on, and a larger one, in "
            f"rising order, found {list(config.sizes)} and {config.predict}"
        )


# Trainings


@dataclass(frozen=True)
class Training:
    """A training to come."""

    size: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, and of its row in the report."""
        return f"{self.size} targets, seed {self.seed}"


Train = Callable[[list[str], Path], None]
"""Runs a command line, with its output appended to a file."""


def words_of(config: Config, training: Training, folder: Path) -> list[str]:
    """Return the command line of a training."""
    bank = config.bank or config.out / "bank"
    words = [sys.executable, "-m", "train.mapper", "--out", str(folder), "--world", config.world]
    words += ["--bank", str(bank), "--targets", *config.targets]
    words += ["--validation", *config.validation, "--max-targets", str(training.size)]
    words += ["--schedule", f"transfer@{RENDER_SIZE}:{config.steps}", "--seed", str(training.seed)]
    words += ["--batch-size", str(config.batch_size), "--evaluate-every", str(config.steps)]
    return [*words, "--precision", choose_precision(config.precision), *TRAINING.split()]


def train_alone(words: list[str], log: Path) -> None:
    """Train in a process of its own, of one thread unless the environment says otherwise.
    ChildProcessError: it failed."""
    threads = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a", encoding="utf-8") as file:
        ended = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=threads)
    if ended.returncode:
        last = log.read_text("utf-8").splitlines()[-1:]
        raise ChildProcessError(f"{str(log.parent)!r}: the training failed: {' '.join(last)}")


def now() -> str:
    """Return the time, as reports have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# Judging


def objectives(
    scene: Scene,
    mapper: Mapper,
    targets: EvalSet,
    sources: Sources,
    offsets: Float[Tensor, "targets sources num_ws w_dim"],
) -> Float[Tensor, " targets"]:
    """Return what the training minimises, of edits: the recipe's loss and the weight decay of whole
    edits, at the generator's full size."""
    recipe = trained_recipe(mapper.record)
    rendering = recipe.preprocess, recipe.identity_weight
    losses = []
    with torch.no_grad():
        before = scene.features(sources, *rendering)[None]
        for embedding, edits in zip(
            scene.embed_targets(targets.pictures, recipe), offsets, strict=True
        ):
            after = scene.features(sources + edits, *rendering)[None]
            loss = losses_of(recipe, before, after, embedding[None]).loss[0]
            squares = edits.square().sum(dim=(1, 2)).mean()
            losses.append(loss + recipe.weight_decay / 2 * squares)
    return torch.stack(losses).cpu()


@dataclass(frozen=True, kw_only=True)
class Referee:
    """What all mappers are judged by."""

    judges: Judges
    targets: EvalSet
    sources: Sources

    @staticmethod
    def of(config: Config) -> "Referee":
        """Load the world. ValueError: its pictures are not those that the reader knows."""
        scene = load_scene(load_world(config.world), command.choose_device())
        targets, sources = targets_and_sources(scene, config.judged, config.sources, test=False)
        return Referee(judges=face_judges(scene), targets=targets, sources=sources)

    def scores(self, path: Path) -> dict[str, float]:
        """Return the means over targets of a mapper's scores and of its objective."""
        scene, targets, sources = self.judges.scene, self.targets, self.sources
        prints = scene.generator.fingerprint, scene.embedder.fingerprint
        mapper = load_mapper(path, *prints)[0].to(scene.device)
        offsets = mapped(scene, mapper, targets.pictures).on(sources)
        goal = goal_of(self.judges, targets)
        judged = {**judge_edits(self.judges, goal, sources, offsets).scores}
        judged["objective"] = objectives(scene, mapper, targets, sources, offsets)
        return {name: float(judged[name].mean()) for name in JUDGED}


def scored(
    config: Config, trainings: Sequence[Training], train: Train, referee: Callable[[], Referee]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run trainings, `jobs` at once, and yield the name and the row of each as it ends.

    Args:
        referee: loads the world, while the first trainings run.

    Raises:
        ChildProcessError: one failed; those under way are waited for.
    """

    def work(training: Training) -> tuple[Training, Path, str]:
        folder, began = config.out / "trainings" / training.name, now()
        command.make_folder(folder)
        train(words_of(config, training, folder), folder / "train.log")
        return training, folder / "mapper.safetensors", began

    pool = ThreadPoolExecutor(config.jobs)
    try:
        futures = [pool.submit(work, training) for training in trainings]
        judge = referee()
        for future in as_completed(futures):
            training, mapper, began = future.result()
            yield training.name, {**vars(training), "began": began, **judge.scores(mapper)}
    finally:
        pool.shutdown(cancel_futures=True)


# The law


@dataclass(frozen=True)
class Law:
    """loss = floor + fall (n / n0)^-exponent, for each of several fits."""

    floor: Float64[ndarray, " fits"]
    fall: Float64[ndarray, " fits"]
    """Loss above the floor at n0."""
    exponent: Float64[ndarray, " fits"]
    smallest: int
    """n0."""

    def at(self, size: int) -> Float64[ndarray, " fits"]:
        """Return the loss at a number of targets."""
        falls: Float64[ndarray, " fits"] = self.floor + self.fall * (
            (size / self.smallest) ** -self.exponent
        )
        return falls


def fitted(sizes: Sequence[int], losses: Float64[ndarray, "fits trainings"]) -> Law:
    """Fit the law by least squares: of each exponent the best line, then the best exponent.

    Args:
        sizes: of the trainings.
    """
    smallest = min(sizes)
    x = (np.array(sizes) / smallest) ** -EXPONENTS[:, None]
    centred = x - x.mean(axis=1, keepdims=True)
    mean = losses.mean(axis=1, keepdims=True)
    products = (losses - mean) @ centred.T
    slopes = products / np.square(centred).sum(axis=1)
    # The sum of squares that each line explains is largest where the rest is smallest.
    best = (slopes * products).argmax(axis=1)
    rows = np.arange(len(losses))
    fall = slopes[rows, best]
    floor = mean[:, 0] - fall * x.mean(axis=1)[best]
    return Law(floor, fall, EXPONENTS[best], smallest)


def predicted(
    sizes: Sequence[int], losses: Float64[ndarray, " trainings"], size: int, count: int
) -> dict[str, Any]:
    """Return the law, what it says of the mean of `count` trainings of a size, and the bounds of
    95 % of what it says where residuals are drawn anew."""
    law = fitted(sizes, losses[None])
    line = np.array([law.at(n)[0] for n in sizes])
    spread = (len(sizes) / max(len(sizes) - 3, 1)) ** 0.5  # three numbers were fitted
    residuals = (losses - line) * spread
    random = np.random.default_rng(seed_of("scaling"))
    drawn = random.choice(residuals, (RESAMPLES, len(sizes)))
    to_come = random.choice(residuals, (RESAMPLES, count)).mean(axis=1)
    means = fitted(sizes, line + drawn).at(size) + to_come
    low, high = np.quantile(means, (0.025, 0.975))
    exponent = float(law.exponent[0])
    return {
        "a": float(law.floor[0]),
        "b": float(law.fall[0]) * law.smallest**exponent,
        "c": exponent,
        "mean": float(law.at(size)[0]),
        "low": float(low),
        "high": float(high),
    }


def prediction_of(config: Config, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the law of every loss, and what it says of the size to come."""
    known = [row for row in rows.values() if row["size"] in config.sizes]
    sizes = [row["size"] for row in known]
    laws = {
        name: predicted(
            sizes,
            np.array([loss(row) for row in known]),
            config.predict,
            config.seeds,
        )
        for name, loss in LOSSES.items()
    }
    return {"size": config.predict, "written": now(), "laws": laws}


def outcome_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was measured at the predicted size, and whether it is in the interval."""
    prediction = report["prediction"]
    rows = [row for row in report["trainings"].values() if row["size"] == prediction["size"]]
    outcome = {}
    for name, law in prediction["laws"].items():
        measured = float(np.mean([LOSSES[name](row) for row in rows]))
        inside = law["low"] <= measured <= law["high"]
        outcome[name] = {"measured": measured, "inside": inside}
    return outcome


# The report


def size_rows(rows: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of the table for each size: means over seeds, with the least and the most."""
    cells = []
    for size in sorted({row["size"] for row in rows.values()}):
        its = [row for row in rows.values() if row["size"] == size]
        line = [f"{size:,}", str(len(its))]
        for name in JUDGED:
            values = [row[name] for row in its]
            spread = f" ({number(min(values))} to {number(max(values))})"
            line.append(number(float(np.mean(values))) + spread)
        cells.append(line)
    return cells


def report_text(report: Mapping[str, Any]) -> str:
    """Return report.md."""
    prediction, outcome = report["prediction"], report["outcome"]
    began = min(
        row["began"] for row in report["trainings"].values() if row["size"] == prediction["size"]
    )
    heads = ["targets", "trainings", "objective", "transfer score", "essence acquired"]
    lines = ["# Quality by the number of targets", ""]
    lines += table([*heads, "identity kept"], size_rows(report["trainings"]))
    lines += [
        f"Prediction for {prediction['size']:,} targets, written {prediction['written']}; the "
        f"first of its trainings began {began}.",
        "",
    ]
    laws = [
        [
            name,
            f"{law['a']:.3f} + {law['b']:.3g} n^-{law['c']:.2f}",
            f"{number(law['mean'])} [{law['low']:.3f}, {law['high']:.3f}]",
            number(outcome[name]["measured"]),
            "yes" if outcome[name]["inside"] else "no",
        ]
        for name, law in prediction["laws"].items()
    ]
    lines += table(["loss", "law", "predicted [95 %]", "measured", "inside"], laws)
    lines += [
        "Means over seeds; in parentheses the least and the most. Score and essence missed are 1",
        "less transfer score and essence acquired. The interval is of the mean over seeds.",
        "",
    ]
    return "\n".join(lines)


def chart(report: Mapping[str, Any]) -> Image.Image:
    """Draw every training, and the laws with their intervals at the predicted size."""
    prediction, rows = report["prediction"], report["trainings"].values()
    sizes = sorted({row["size"] for row in rows})
    series = []
    for i, (name, law) in enumerate(prediction["laws"].items()):
        points = [(row["size"], LOSSES[name](row)) for row in rows]
        series.append(Series(name=name, points=points, colour=2 * i))
        line = [law["a"] + law["b"] * size ** -law["c"] for size in sizes]
        spans = [(y, y) for y in line[:-1]] + [(law["low"], law["high"])]
        series.append(
            Series(
                name=f"{name}, law",
                points=list(zip(sizes, line, strict=True)),
                colour=2 * i + 1,
                spans=spans,
                joined=True,
                hollow=True,
            )
        )
    return line_chart("Loss by the number of targets", series, "targets", "loss", log_x=True)


def run(config: Config, train: Train = train_alone) -> dict[str, Any]:
    """Train and judge what the report lacks, write it after each mapper, and return it.

    Args:
        train: runs the command line of a training.

    Raises:
        FileNotFoundError, ValueError: options or a world that cannot be; a report of other options;
            trainings of the predicted size that no prediction came before.
        ChildProcessError: a training failed.
        OSError: --out cannot be written into.
    """
    check_config(config)
    check_charts()
    load_world(config.world)
    names = ("world", "sizes", "predict", "seeds", "steps", "batch_size", "targets", "validation")
    comparison = {name: getattr(config, name) for name in (*names, "judged", "sources")}
    comparison |= {"precision": choose_precision(config.precision), "training": TRAINING}
    comparison["reader"] = sha256_of(BUNDLED)[:12]
    path = config.out / "report.json"
    report: dict[str, Any] = {"trainings": {}} | earlier_report(path, comparison)
    rows = report["trainings"]
    later = [Training(config.predict, seed) for seed in range(config.seeds)]
    if "prediction" not in report:
        for training in later:
            if (folder := config.out / "trainings" / training.name).exists():
                raise ValueError(f"{str(folder)!r} was trained before its prediction: delete it")
    command.make_folder(config.out)
    referee = cache(lambda: Referee.of(config))

    def work(trainings: Sequence[Training]) -> None:
        """Run and judge the trainings that the report lacks, and write it after each."""
        lacking = [training for training in trainings if training.name not in rows]
        banked = any((config.bank or config.out / "bank").glob("targets-*.npy"))
        # The first training makes the bank for all.
        parts = [lacking] if banked or config.jobs == 1 else [lacking[:1], lacking[1:]]
        for part in filter(None, parts):
            for name, row in scored(config, part, train, referee):
                rows[name] = row
                command.write_json(path, report)
                said = ", ".join(f"{score} {number(row[score])}" for score in JUDGED)
                command.say(f"{name}: {said}", error=True)

    work([Training(size, seed) for size in config.sizes for seed in range(config.seeds)])
    if "prediction" not in report:
        report["prediction"] = prediction_of(config, rows)
        command.write_json(path, report)
    work(later)
    report["outcome"] = outcome_of(report)
    command.write_json(path, report)
    text = report_text(report)
    command.write_file(config.out / "report.md", text)
    write_picture(chart(report), config.out / "chart.png")
    print(text)
    command.say_next(config.out, "report.md, chart.png", "read report.md", error=True)
    return report
