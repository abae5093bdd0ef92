"""Compare settings of the optimizer on the bundled world, on sources that none of them edited.

Targets are avatars that no network was trained on; half of them are of other styles than the
generator's. Every setting runs twice, with other sources and other random starts, to
measure chance. Writes report.json, report.md, a sheet of pictures a setting, and charts of settings
that change the same thing.

    python -m eval.studies.teachers --out runs/recipes                 # the named recipes
    python -m eval.studies.teachers --out runs/recipes --variants all  # all settings, in hours

The same command goes on after an interruption.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from targetclip import command
from targetclip.command import Precision, choose_precision, did_you_mean, in_precision, start
from targetclip.recipes import RECIPES, Recipe
from targetclip.seeds import BANK, VALIDATION_SOURCES, seed_of
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for the report, the sheets and the charts."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    variants: Literal["named", "all"] = "named"
    """The named recipes, or variants of `consistent` as well."""
    only: tuple[str, ...] = ()
    """Run these alone, by name."""
    targets: int = 12
    held_out: int = 16
    """Sources that no recipe edits while it optimizes."""
    strengths: tuple[float, ...] = (0.6, 0.8, 1.0, 1.2)
    """How far along the direction to judge, besides 1."""
    twice: bool = True
    """Run everything a second time, to measure what two runs agree on."""
    precision: Precision | None = None
    """Of the optimizer; scores are always in float32. Default: accelerate's, or else fp32."""
    max_steps: int | None = None
    """Cut every recipe to so many steps."""
    seed: int = 0


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.teachers", Config, exclusive=True)

from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

from eval.answers import earlier_report
from eval.judging import Goal, Judges, face_judges, goal_of, judge_edits, study_means
from eval.methods import right_answer
from eval.report import Series, check_charts, line_chart, table
from eval.sets import Directions, EvalSet, Sources, study_set
from eval.trials import sheet
from targetclip.media.images import write_picture
from targetclip.optimize import Optimized, Progress
from targetclip.scene import Scene
from targetclip.weights import stored_recipe

MAX_IMAGES = 512  # rendered at once: all targets of a step
RIGHT_ANSWER = "right answer"
BASE = "consistent"

# Changes of the `consistent` recipe, each tried alone
CHANGES: dict[str, dict[str, Any]] = {
    "start inversion": {"initial": "inversion"},
    "start random": {"initial": "random"},
    "1 fixed source": {"sources": 1, "fresh_sources": False},
    "2 fixed sources": {"sources": 2, "fresh_sources": False},
    "4 fixed sources": {"sources": 4, "fresh_sources": False},
    "6 fixed sources": {"sources": 6, "fresh_sources": False},
    "8 fixed sources": {"sources": 8, "fresh_sources": False},
    "3 fresh sources": {"sources": 3},
    "12 fresh sources": {"sources": 12},
    "75 steps": {"steps": 75},
    "150 steps": {"steps": 150},
    "300 steps": {"steps": 300},
    "600 steps": {"steps": 600},
    "rate 0.05": {"learning_rate": 0.05},
    "rate 0.2": {"learning_rate": 0.2},
    "decay 0": {"weight_decay": 0.0},
    "decay 3e-3": {"weight_decay": 3e-3},
    "decay 1e-2": {"weight_decay": 1e-2},
    "decay 2e-2": {"weight_decay": 2e-2},
    "decay 4e-2": {"weight_decay": 4e-2},
    "consistency 0": {"consistency_weight": 0.0},
    "consistency 0.2": {"consistency_weight": 0.2},
    "consistency 0.5": {"consistency_weight": 0.5},
    "consistency 1": {"consistency_weight": 1.0},
    "consistency 2": {"consistency_weight": 2.0},
    "raw differences": {"differences": "raw"},
    "release preprocessing": {"preprocess": "release"},
    "tied layers": {"tied_layers": True},
    "identity 0.5": {"identity_weight": 0.5},
    "identity 0.15, decay 2e-3": {"identity_weight": 0.15, "weight_decay": 2e-3},
    "6 fixed sources, coefficients": {"sources": 6, "fresh_sources": False, "coefficients": True},
}


def variants() -> dict[str, Recipe]:
    """Return the named recipes, and `consistent` with one change each."""
    base = RECIPES[BASE]
    changed = {name: replace(base, **change) for name, change in CHANGES.items()}
    return RECIPES | {name: recipe for name, recipe in changed.items() if recipe != base}


def chosen_recipes(config: Config) -> dict[str, Recipe]:
    """Return the recipes to run, by name."""
    recipes = variants() if config.variants == "all" else RECIPES
    if unknown := sorted(set(config.only) - recipes.keys()):
        hint = did_you_mean(unknown[0], recipes)
        raise ValueError(
            f"--only: expected names among {', '.join(recipes)}, found {', '.join(unknown)}{hint}"
        )
    chosen = {name: r for name, r in recipes.items() if not config.only or name in config.only}
    if config.max_steps is None:
        return chosen
    most = config.max_steps
    return {name: replace(r, steps=min(r.steps, most)) for name, r in chosen.items()}


# Searching and judging


def search(
    scene: Scene, recipe: Recipe, targets: EvalSet, seed: int, precision: Precision
) -> tuple[Optimized, float]:
    """Search the directions of all targets at once, from sources and starts of a seed.

    Returns:
        The optimizer's results, and its seconds a target.
    """
    pictures, count = targets.pictures, len(targets)
    embeddings = scene.embed_targets(pictures, recipe)
    starts = [seed_of("initial", seed_of(seed, i)) for i in range(count)]
    initial = scene.initial(pictures, recipe.initial, starts)
    bank = scene.sources(BANK, seed_of("bank", seed))
    seeds = [seed_of("recipes", seed, i) for i in range(count)]
    start = time.perf_counter()
    with (
        in_precision(scene.device, precision),
        tqdm(total=recipe.steps, desc="optimizer", unit="step", leave=False) as bar,
    ):

        def on_step(progress: Progress) -> None:
            bar.update()

        optimized = scene.search(embeddings, recipe, initial, seeds, bank=bank, on_step=on_step)
    return optimized, (time.perf_counter() - start) / count


def direction_scores(
    judges: Judges, goal: Goal, sources: Sources, directions: Directions, strength: float = 1.0
) -> dict[str, float]:
    """Judge directions on sources that none of them was optimized on."""
    return study_means(judge_edits(judges, goal, sources, directions, strength).scores)


def right_scores(judges: Judges, targets: EvalSet, count: int) -> dict[str, float]:
    """Judge the right answer, which no direction can reach, on so many sources."""
    if targets.truth is None:
        raise ValueError("expected targets whose content is known, found others")
    sources = judges.scene.sources(count, VALIDATION_SOURCES)
    edits = right_answer(judges.scene, targets.truth, sources, VALIDATION_SOURCES)
    return study_means(judge_edits(judges, goal_of(judges, targets), sources, edits).scores)


def run_recipe(
    judges: Judges, recipe: Recipe, targets: EvalSet, config: Config, precision: Precision
) -> tuple[dict[str, Any], Directions]:
    """Search the directions of all targets, and judge them on held-out sources.

    Returns:
        The recipe's part of the report, and the directions.
    """
    scene = judges.scene
    optimized, seconds = search(scene, recipe, targets, config.seed, precision)
    directions, goal = optimized.directions, goal_of(judges, targets)
    sources = scene.sources(config.held_out, VALIDATION_SOURCES)
    figures: dict[str, Any] = {
        **direction_scores(judges, goal, sources, directions),
        "own_transfer": 1 - float(optimized.transfer.mean()),
        "norm": float(directions.flatten(1).norm(dim=1).mean()),
        "seconds_per_target": seconds,
        "by_strength": {
            str(strength): direction_scores(judges, goal, sources, directions, strength)
            for strength in config.strengths
        },
    }
    if config.twice:
        again = search(scene, recipe, targets, config.seed + 1, precision)[0].directions
        agreement = F.cosine_similarity(directions.flatten(1), again.flatten(1), dim=1)
        figures["agreement"] = float(agreement.mean())
        figures["again"] = direction_scores(judges, goal, sources, again)
    return figures, directions


# The report


def report_table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a row a setting, in Markdown."""
    columns = {
        "transfer": "transfer score",
        "transfer_out_of_range": "out of range",
        "own_transfer": "on its own sources",
        "consistency": "consistency",
        "essence_in_range": "essence acquired",
        "identity": "identity kept",
        "agreement": "agreement of two runs",
        "norm": "length",
        "seconds_per_target": "s a target",
    }
    rows = [
        [name, *(f"{row[key]:.3g}" if key in row else "" for key in columns)]
        for name, row in figures.items()
    ]
    return "\n".join(table(["setting", *columns.values()], rows))


def family_of(name: str) -> str:
    """Return what a setting changes: "sources" of "4 fixed sources", "decay" of "decay 0"."""
    words = name.split()
    return words[-1].rstrip("s") + "s" if words[0].isdigit() else words[0]


def families(names: Sequence[str]) -> dict[str, list[str]]:
    """Group settings that change the same thing, at least two together, each group with BASE."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if name != BASE:
            groups.setdefault(family_of(name), []).append(name)
    return {family: [BASE, *group] for family, group in groups.items() if len(group) > 1}


def family_charts(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Image.Image]:
    """Draw a chart for each family of settings, if BASE was run: a line a setting.

    A line has the setting's strengths, from little essence and much identity to the opposite.
    """
    swept = {name: row["by_strength"] for name, row in figures.items() if "by_strength" in row}
    charts = {}
    for family, names in families(list(swept)).items() if BASE in swept else ():
        series = []
        for name in names:
            rows = [row for _, row in sorted(swept[name].items(), key=lambda item: float(item[0]))]
            points = [(row["identity"], row["essence_in_range"]) for row in rows]
            series.append(Series(name=name, points=points, joined=True))
        title = f"Essence and identity by strength: {family}"
        charts[family] = line_chart(title, series, "identity kept", "essence acquired")
    return charts


def run(config: Config) -> dict[str, Any]:
    """Run what the report lacks, write it after every recipe, and return it.

    Raises:
        ValueError: bad options, a recipe that lacks a part of the world, a report of other options.
        OSError: files that cannot be read or written.
    """
    check_charts()
    recipes, precision = chosen_recipes(config), choose_precision(config.precision)
    path = config.out / "report.json"
    names = ("world", "targets", "held_out", "strengths", "seed")
    comparison = {name: getattr(config, name) for name in names} | {"precision": precision}
    report = earlier_report(path, comparison)
    command.say(f"loading world {config.world}", error=True)
    scene = load_scene(load_world(config.world), max_images=MAX_IMAGES)
    judges, targets = face_judges(scene), study_set(config.targets)
    for name in [name for name, recipe in recipes.items() if recipe.identity_weight]:
        if scene.identity is None and name not in config.only:
            del recipes[name]
            print(f"left out: {name}: the world has no identity model", flush=True)
    command.make_folder(config.out)
    if RIGHT_ANSWER not in report and scene.inverter is not None:
        report[RIGHT_ANSWER] = right_scores(judges, targets, config.held_out)
        command.write_json(path, report)
    for name, recipe in recipes.items():
        # A recipe that has changed since is run again.
        if name in report and stored_recipe(report[name]["settings"]) == recipe:
            continue
        figures, directions = run_recipe(judges, recipe, targets, config, precision)
        report[name] = {**figures, "settings": asdict(recipe)}
        command.write_json(path, report)
        shown = {key: value for key, value in figures.items() if isinstance(value, float)}
        print(f"{name:22}" + "  ".join(f"{k} {v:.3f}" for k, v in shown.items()), flush=True)
        picture = sheet(scene, targets, scene.sources(9, VALIDATION_SOURCES), directions)
        write_picture(picture, config.out / f"{name.replace(' ', '_')}.png")
    rows = {name: figures for name, figures in report.items() if name != "comparison"}
    command.write_file(config.out / "report.md", report_table(rows))
    for family, picture in family_charts(rows).items():
        write_picture(picture, config.out / f"chart_{family}.png")
    command.say_next(config.out, "report.md, sheets, charts", "read report.md", error=True)
    return report
