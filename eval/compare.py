"""Compare the mapper with its teacher, baselines and peers on unseen targets and sources.

    python -m eval.compare --out runs/compare --pairs runs/pairs        # a quarter of an hour
    python -m eval.compare --out runs/compare --quick                   # under two minutes
    python -m eval.compare --out runs/mine --world mine.toml --mapper mine.safetensors --folder pics

(on two cores). Writes report.json, report.md, charts and grids of pictures. Methods that need a
part which is not there (pairs, an encoder, a calibrated mapper) are left out, and the report names
them. Answers are kept in --out: the same command goes on after an interruption, and runs again only
methods whose parts or settings have changed.
"""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import Precision, start
from targetclip.seeds import TEST_SOURCES, TEST_TARGETS
from targetclip.world import DEFAULT_WORLD, World, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for the report and the answers of methods."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    pairs: Path | None = None
    """Dataset made by data.build, for the baselines that are fitted to pairs."""
    differences: Path | None = None
    """A mapper trained by --schedule differences alone."""
    encoder: Path | None = None
    """Encoder made by train.encoder."""
    judge: str | None = None
    """A second judge: a model of open_clip, a folder of one, or blip: and then a folder or a
    repository of the Hub, e.g. blip:Salesforce/blip-itm-base-coco."""
    judge_pretrained: str | None = None
    """Its weights, where --judge is a model's name."""
    folder: Path | None = None
    """Folder of your own pictures as a further test set; those of the test split are taken."""
    trust_folder: bool = False
    """Take them all: you vouch that nothing was trained on them."""
    only: tuple[str, ...] = ()
    """Run these methods alone, by name. Default: all whose parts are there."""
    quick: bool = False
    """Fewer targets; only `consistent` and `identity` of the methods that search, on a few."""
    targets: int | None = None
    """Targets of the sets in range, of other styles and folder. Default: 32, or 8 if quick."""
    slow: int | None = None
    """Targets of a set that the slow methods are run on. Default: 4, or 2 if quick."""
    sources: int | Path = 16
    """Sources that every method edits: how many are generated, or a .npy or .pt file of your own
    latents, [sources, num_ws, w_dim]."""
    references: int | None = None
    """Unedited images that FID and KID compare with. Default: 1000, or 300 if quick."""
    precision: Precision | None = None
    """Of methods that search; scores are in float32. Default: accelerate's, or else bf16 where the
    processor has it."""
    max_steps: int | None = None
    """Cut every search to so many steps."""
    max_images: int | None = None
    """Images rendered at once; fewer need less memory. Default: 64, fewer above 256
    px, or a whole step of a search."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""
    seed: int = 0
    """Of searches and bootstrap; targets and sources are always the same."""

    @property
    def count(self) -> int:
        """Targets of a set."""
        return self.targets or (8 if self.quick else 32)

    @property
    def unedited(self) -> int:
        """Images that FID and KID compare with."""
        return self.references or (300 if self.quick else 1000)

    @property
    def first(self) -> int:
        """Targets of a set that every method answers."""
        return min(self.slow or (2 if self.quick else 4), self.count)


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.compare", Config)

import torch
from PIL import Image
from tqdm import tqdm

from data.publish import sha256_of
from eval.answers import answer_of
from eval.costs import machine
from eval.judging import Judges, load_judge, reader_of
from eval.methods import LACKING, METHODS, Answer, Bench, Part, needs_of, open_pair_table
from eval.report import charts, check_charts, report_text
from eval.sets import (
    ADVERSARIAL,
    IN_RANGE,
    EvalSet,
    Sources,
    adversarial,
    check_sources,
    check_unseen,
    folder_set,
    held_out_styles,
    in_range,
    samples,
    trained_styles,
)
from eval.trials import (
    RELEASED_SOURCES,
    RIGHT_ANSWER,
    Comparison,
    grids,
    reference_features,
    released_report,
    set_report,
    sweep_report,
)
from predictor.direction import Gate
from predictor.mapper import load_mapper
from predictor.transfer import load_essence
from targetclip.directions import released_latents
from targetclip.encoders.inverter import load_inverter
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.scene import Scene

NAMES = (*METHODS, RIGHT_ANSWER)
ADVERSARIES = 6
TEACHERS = ("consistent", "identity")
UNKNOWN = "nobody knows what the latents of --sources show"


def check_config(config: Config) -> None:
    """Raise a ValueError for options that are out of range or do not go together."""
    command.check_least(config, targets=1, slow=1, max_steps=1, max_images=1)
    command.check_least(config, references=2)
    if isinstance(config.sources, int):
        command.check_least(config, sources=2)
    elif RIGHT_ANSWER in config.only:
        raise ValueError(f"--only {RIGHT_ANSWER}: {UNKNOWN}: leave it out, or give their number")
    if unknown := [name for name in config.only if name not in NAMES]:
        hint = command.did_you_mean(unknown[0], NAMES)
        raise ValueError(f"--only: expected some of {', '.join(NAMES)}, found {unknown[0]!r}{hint}")
    if config.trust_folder and config.folder is None:
        raise ValueError("--trust-folder: expected --folder as well, found none")
    if config.judge_pretrained is not None and config.judge is None:
        raise ValueError("--judge-pretrained: expected --judge as well, found none")


# Parts


def open_latents(path: Path, scene: Scene) -> Sources:
    """Return the latents of the file given as --sources, on the scene's device.
    FileNotFoundError, ValueError: as `released_latents`."""
    generator = scene.generator
    try:
        return released_latents(path, generator.num_ws, generator.w_dim).to(scene.device)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"--sources: {error}") from error


def make_bench(config: Config, world: World, device: torch.device) -> Bench:
    """Load everything that methods may use."""
    path = config.mapper or world.mapper
    asking = {name for name, method in METHODS.items() if "mapper" in method.needs}
    if path is None and (not config.only or asking & set(config.only)):
        raise ValueError(
            f"--mapper: expected a mapper's file, for world {world.name!r} names none; train one "
            "with python -m train.mapper, or name other methods by --only"
        )
    essence = load_essence(
        world,
        device,
        path,
        max_images=config.max_images,
        checkpoint_layers=config.checkpoint_layers,
    )
    scene = essence.scene
    prints = (scene.generator.fingerprint, scene.embedder.fingerprint)
    files: dict[Part, Path | None] = {
        "mapper": path,
        "inverter": world.inverter,
        "identity": world.identity,
        "differences": config.differences,
        "encoder": config.encoder,
    }
    digests = {part: sha256_of(file) for part, file in files.items() if file is not None}
    if path is not None:
        if essence.asked_mapper().correction is not None:
            digests["correction"] = digests["mapper"]
        try:
            Gate.of(essence.asked_mapper())
            digests["calibration"] = digests["mapper"]
        except ValueError:
            pass  # the report names the methods that are left out
    pairs = differences = encoder = None
    if config.pairs is not None:
        pairs = open_pair_table(config.pairs, scene)
        digests["pairs"] = pairs.digest
    if config.differences is not None:
        differences = load_mapper(config.differences, *prints)[0].to(device)
    if config.encoder is not None:
        encoder = load_inverter(config.encoder, prints[0]).to(device)
    origin: int | str = TEST_SOURCES
    if isinstance(config.sources, int):
        sources = scene.sources(config.sources, TEST_SOURCES)
    else:
        sources, origin = open_latents(config.sources, scene), sha256_of(config.sources)
        if len(sources) < 2:
            raise ValueError(f"--sources: expected two latents or more, found {len(sources)}")
    return Bench(
        essence=essence,
        sources=sources,
        origin=origin,
        pairs=pairs,
        differences=differences,
        encoder=encoder,
        precision=command.choose_precision(config.precision, command.fast_precision(device)),
        max_steps=config.max_steps,
        seed=config.seed,
        recipe=world.recipe,
        digests=digests,
    )


def make_judges(config: Config, world: World, bench: Bench) -> Judges:
    """Load the networks that judge images."""
    device = bench.scene.device
    return Judges(
        scene=bench.scene,
        reader=reader_of(world, device),
        second=load_judge(config.judge, config.judge_pretrained, device),
    )


def make_sets(config: Config, bench: Bench, judges: Judges) -> list[EvalSet]:
    """Make the test sets, checked against what may have been trained on."""
    scene = bench.scene
    if judges.reader is not None:
        makers = (in_range, trained_styles, held_out_styles)
        sets = [make(config.count) for make in makers]
    else:
        sets = [samples(scene.generator, scene.truncation, config.count)]
    unedited = tensor_to_pictures(scene.render(bench.sources))
    sets.append(adversarial(ADVERSARIES, scene.generator.resolution, unedited))
    if config.folder is not None:
        sets.append(folder_set(config.folder, config.count, config.trust_folder))
    trained = frozenset[str]() if bench.pairs is None else bench.pairs.ids
    check_unseen(sets, trained, config.trust_folder)
    return sets


def choose_methods(config: Config, bench: Bench) -> tuple[list[str], list[str]]:
    """Return the names of the methods to run, and why others are left out."""
    chosen, left_out = [], []
    for name, method in METHODS.items():
        lacking = [LACKING[part] for part in needs_of(method, bench) if part not in bench.digests]
        if config.only and name not in config.only:
            continue
        if lacking and config.only:
            raise ValueError(f"--only {name}: cannot be run, for {lacking[0]}")
        if lacking:
            left_out.append(f"{name}: {lacking[0]}")
        elif config.quick and method.optimizes and name not in TEACHERS and not config.only:
            left_out.append(f"{name}: it takes too long for --quick")
        else:
            chosen.append(name)
    return chosen, left_out


def count_for(config: Config, name: str, targets: EvalSet) -> int:
    """Return the number of targets of a set that a method is run on."""
    method = METHODS[name]
    if not method.slow and not (config.quick and method.optimizes):
        return len(targets)
    # Adversarial targets have no essence for a slow search to find.
    return 0 if targets.name == ADVERSARIAL else min(config.first, len(targets))


def find_all(
    config: Config, bench: Bench, sets: Sequence[EvalSet], chosen: Sequence[str]
) -> dict[str, dict[str, Answer]]:
    """Return the answers of every method to every set, by the names of sets and methods."""
    folder = config.out / "answers"
    folder.mkdir(exist_ok=True)
    answers: dict[str, dict[str, Answer]] = {targets.name: {} for targets in sets}
    bar = tqdm([(targets, name) for targets in sets for name in chosen], unit="run")
    for targets, name in bar:
        bar.set_description(f"{targets.name}, {name}")
        if count := count_for(config, name, targets):
            part = targets.part(0, count)
            answers[targets.name][name] = answer_of(folder, name, bench, part)
    return answers


# The report


def commit() -> str | None:
    """Return the commit of this code, marked where files differ from it; None outside of git."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        described = subprocess.run(
            describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def facts(
    config: Config, world: World, bench: Bench, judges: Judges, left_out: Sequence[str]
) -> dict[str, Any]:
    """Return what the scores belong to: settings, networks, seeds, judges, code and machine."""
    second = {} if judges.second is None else {"judge": judges.second.fingerprint}
    seed, own = (bench.origin, {}) if bench.generated else (None, {"sources": bench.origin})
    return {
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()},
        "world": world.name,
        "fingerprints": {
            "generator": bench.scene.generator.fingerprint,
            "embedder": bench.scene.embedder.fingerprint,
            **second,
            **own,
            **bench.digests,
        },
        "seeds": {"targets": TEST_TARGETS, "sources": seed, "draws": config.seed},
        "sources": len(bench.sources),
        "references": config.unedited,
        "first": config.first,
        "precision": bench.precision,
        "judges": {
            "features": judges.features_of,
            "people": judges.people_of,
            "second": config.judge,
        },
        "left_out": list(left_out),
        "commit": commit(),
        "versions": command.versions(),
        "machine": machine(),
    }


def run(config: Config) -> dict[str, Any]:
    """Compare, write everything into --out, and return the report.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: a search whose loss stopped being finite.
    """
    check_config(config)
    command.choose_precision(config.precision)  # refuses what cannot be, before anything is loaded
    check_charts()
    world, device = load_world(config.world), command.choose_device(config.device)
    if isinstance(config.sources, int):
        check_sources(TEST_SOURCES, max(config.sources, RELEASED_SOURCES))
    with command.locked_folder(config.out):
        command.say(f"loading world {world.name}", error=True)
        report = make_report(config, world, device)
    command.say_next(config.out, "report.md, report.json, grids/, charts", "read report.md")
    return report


def make_report(config: Config, world: World, device: torch.device) -> dict[str, Any]:
    """Compare in a folder that this run holds; see `run`."""
    bench = make_bench(config, world, device)
    judges = make_judges(config, world, bench)
    sets = make_sets(config, bench, judges)
    chosen, left_out = choose_methods(config, bench)
    answers = find_all(config, bench, sets, chosen)
    comparison = Comparison(
        bench=bench,
        judges=judges,
        references=reference_features(judges, config.unedited),
        first=config.first,
        seed=config.seed,
    )
    right = not config.only or RIGHT_ANSWER in config.only
    if right and not bench.generated:
        left_out.append(f"{RIGHT_ANSWER}: {UNKNOWN}")
    report = facts(config, world, bench, judges, left_out) | {"sets": {}}
    pictures: dict[str, Image.Image] = {}
    for targets in sets:
        own = answers[targets.name]
        if trials := comparison.judge_all(targets, own, right):
            report["sets"][targets.name] = set_report(comparison, targets, own, trials)
            pictures |= grids(comparison, targets, own, trials)
    report["released"] = released_report(comparison, sets, answers)
    report["sweep"] = sweep_report(comparison, sets[0], answers[IN_RANGE])
    command.write_json(config.out / "report.json", report)
    command.write_file(config.out / "report.md", report_text(report))
    (config.out / "grids").mkdir(exist_ok=True)
    for name, picture in pictures.items():
        write_picture(picture, config.out / "grids" / f"{name}.png")
    for name, picture in charts(report).items():
        write_picture(picture, config.out / f"{name}.png")
    return report
