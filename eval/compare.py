"""Compare the mapper with its teacher, baselines and peers on targets and sources none has seen.

    python -m eval.compare --out runs/compare --pairs runs/pairs        # a quarter of an hour
    python -m eval.compare --out runs/compare --quick                   # under two minutes
    python -m eval.compare --out runs/mine --world mine.toml --mapper mine.safetensors --folder pics

(on two cores). Writes report.json, report.md, figures and grids of pictures. Methods that need a
part which is not there (pairs, an encoder, a calibrated mapper) are left out, and the report says
so. What methods answer is kept in --out: the same command goes on after an interruption, and runs
again only a method whose parts or settings have changed.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from data.publish import sha256_of
from eval.answers import Run, run_of
from eval.compare_judge import (
    DRAWN_ANSWER,
    RELEASED_SOURCES,
    Stage,
    judged_trials,
    released_report,
    set_report,
    sweep_report,
    write_grids,
)
from eval.judging import Judges
from eval.methods import LACKING, METHODS, Bench, Part, needs_of
from eval.pair_methods import open_pair_table
from eval.reader import load_reader
from eval.report import figures, report_text
from eval.sets import (
    ADVERSARIAL,
    IN_RANGE,
    SOURCE_SEED,
    TARGET_SEED,
    EvalSet,
    adversarial,
    check_sources,
    check_unseen,
    folder_set,
    in_range,
    out_of_range,
    samples,
)
from eval.studies.benchmark import machine
from predictor.cli import choose_device
from predictor.gate import Gate
from predictor.load import load_essence
from predictor.mapper import load_mapper
from predictor.report import make_folder, versions, write_file
from targetclip.embedder import ClipEmbedder
from targetclip.encoders.blip import BlipEmbedder
from targetclip.encoders.inverter import load_inverter
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.sources import generated_sources
from targetclip.world import World, load_world

Precision = Literal["fp32", "bf16"]

DRAWN_WORLD = "sketch64"  # whose pictures the attribute reader knows, and the renderer draws
NAMES = (*METHODS, DRAWN_ANSWER)
ADVERSARIES = 6
BLIP = "blip:"
TEACHERS = ("consistent", "identity")


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for the report, and for what methods answered."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    pairs: Path | None = None
    """Dataset made by data.build, for the baselines that are fitted to the teacher's pairs."""
    differences: Path | None = None
    """A mapper trained by --schedule differences alone."""
    encoder: Path | None = None
    """What train.encoder wrote."""
    judge: str | None = None
    """A second judge: a model of open_clip, a folder of one, or blip: and then a folder or a
    repository of the Hub, e.g. blip:Salesforce/blip-itm-base-coco."""
    judge_pretrained: str | None = None
    """Its weights, where --judge is a model's name."""
    folder: Path | None = None
    """Pictures of your own as a further test set; of them only those of the test split."""
    trust_folder: bool = False
    """Take them all: you vouch that nothing was ever trained on them."""
    only: tuple[str, ...] = ()
    """Run these methods alone, by name. Default: all whose parts are there."""
    quick: bool = False
    """Fewer targets, and of all that search only `consistent` and `identity`, on a few."""
    targets: int | None = None
    """Of the sets in range, out of range and folder. Default: 32, or 8 if quick."""
    slow: int | None = None
    """How many of them the slow methods are run on. Default: 4, or 2 if quick."""
    sources: int = 16
    references: int | None = None
    """Unedited images that FID and KID compare with. Default: 1000, or 300 if quick."""
    precision: Precision | None = None
    """Of methods that search; scores are in float32. Default: bf16 where the processor has it."""
    max_steps: int | None = None
    """Cut every search to so many steps."""
    max_images: int = 96
    """Images rendered at once; less needs less memory."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""
    seed: int = 0
    """Decides what searches and bootstrap draw; targets and sources are always the same."""

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


def check_config(config: Config) -> None:
    """Raise a ValueError for a flag that cannot be; here, for tyro prints a box for its own."""
    least = {"sources": 2, "references": 2}
    for name, value in vars(config).items():
        if type(value) is int and name != "seed" and value < least.get(name, 1):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected {least.get(name, 1)} or more, found {value}")
    if unknown := [name for name in config.only if name not in NAMES]:
        raise ValueError(f"--only: expected some of {', '.join(NAMES)}, found {unknown[0]!r}")
    if config.trust_folder and config.folder is None:
        raise ValueError("--trust-folder: expected --folder as well, found none")
    if config.judge_pretrained is not None and config.judge is None:
        raise ValueError("--judge-pretrained: expected --judge as well, found none")


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is of use: accelerators of today have it, not every processor does."""
    # Its public sibling is younger than the oldest torch that the project takes.
    return device.type != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


# What it takes


def make_bench(config: Config, world: World, device: torch.device) -> Bench:
    """Everything methods may use."""
    path = config.mapper or world.mapper
    if path is None and (not config.only or {"mapper", "auto"} & set(config.only)):
        raise ValueError(
            f"--mapper: expected a mapper's file, for world {world.name!r} names none; train one "
            "with python -m train.mapper, or name other methods by --only"
        )
    essence = load_essence(world, device, path, config.max_images, config.checkpoint_layers)
    prints = (essence.generator.fingerprint, essence.embedder.fingerprint)
    digests: dict[Part, str] = {}
    if path is not None:
        digests["mapper"] = sha256_of(path)
        try:
            Gate.of(essence.asked_mapper())
            digests["calibration"] = digests["mapper"]
        except ValueError:
            pass  # the report says so
    if world.inverter is not None:
        digests["inverter"] = sha256_of(world.inverter)
    if world.identity is not None:
        digests["identity"] = sha256_of(world.identity)
    pairs = differences = encoder = None
    if config.pairs is not None:
        pairs = open_pair_table(config.pairs, essence.generator, essence.embedder)
        digests["pairs"] = pairs.digest
    if config.differences is not None:
        differences = load_mapper(config.differences, *prints)[0].to(device)
        digests["differences"] = sha256_of(config.differences)
    if config.encoder is not None:
        encoder = load_inverter(config.encoder, prints[0]).to(device)
        digests["encoder"] = sha256_of(config.encoder)
    return Bench(
        essence,
        generated_sources(essence.generator, essence.truncation, config.sources, SOURCE_SEED),
        pairs,
        differences,
        encoder,
        config.precision == "bf16" or (config.precision is None and has_bfloat16(device)),
        config.max_steps,
        config.seed,
        world.recipe,
        digests,
    )


def load_judge(
    name: str | None, pretrained: str | None, device: torch.device
) -> ClipEmbedder | BlipEmbedder | None:
    """The second judge, if one is wanted."""
    if name is None:
        return None
    if not name.startswith(BLIP):
        return ClipEmbedder.load(name, pretrained).to(device)
    if pretrained is not None:
        raise ValueError(f"--judge-pretrained: {name} brings its own weights; drop the flag")
    return BlipEmbedder.load(name.removeprefix(BLIP)).to(device)


def make_judges(config: Config, world: World, bench: Bench) -> Judges:
    """Everything that looks at images."""
    essence, device = bench.essence, bench.sources.device
    return Judges(
        essence.generator,
        essence.embedder,
        load_reader().to(device) if world.name == DRAWN_WORLD else None,
        load_judge(config.judge, config.judge_pretrained, device),
        essence.identity,
        config.max_images,
    )


def make_sets(config: Config, bench: Bench, judges: Judges) -> list[EvalSet]:
    """The test sets, checked against what may have been trained on."""
    essence = bench.essence
    if judges.reader is not None:
        sets = [in_range(config.count), out_of_range(config.count)]
    else:
        sets = [samples(essence.generator, essence.truncation, config.count)]
    unedited = tensor_to_pictures(judges.render(bench.sources))
    sets.append(adversarial(ADVERSARIES, essence.generator.resolution, unedited))
    if config.folder is not None:
        sets.append(folder_set(config.folder, config.count, config.trust_folder))
    trained = frozenset[str]() if bench.pairs is None else bench.pairs.ids
    check_unseen(sets, trained, config.trust_folder)
    return sets


def choose_methods(config: Config, bench: Bench) -> tuple[list[str], list[str]]:
    """Names of the methods to run, and why others are left out.

    Raises:
        ValueError: a method that was asked for lacks a part.
    """
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
    """How many targets of a set a method is run on."""
    method = METHODS[name]
    if not method.slow and not (config.quick and method.optimizes):
        return len(targets)
    # What is adversarial has no essence to bring: slow searches would be spent on nothing.
    return 0 if targets.name == ADVERSARIAL else min(config.first, len(targets))


def find_all(
    config: Config, bench: Bench, sets: Sequence[EvalSet], chosen: Sequence[str]
) -> dict[str, dict[str, Run]]:
    """The answer of every method to every set."""
    folder = config.out / "answers"
    folder.mkdir(exist_ok=True)
    runs: dict[str, dict[str, Run]] = {targets.name: {} for targets in sets}
    wanted = [(targets, name) for targets in sets for name in chosen]
    for targets, name in (bar := tqdm(wanted, unit="run")):
        bar.set_description(f"{targets.name}, {name}")
        if count := count_for(config, name, targets):
            runs[targets.name][name] = run_of(folder, name, bench, targets.part(0, count))
    return runs


# The report


def commit() -> str | None:
    """The commit of this code, marked where files differ from it; None if it is no checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def facts(
    config: Config, world: World, bench: Bench, judges: Judges, left_out: Sequence[str]
) -> dict[str, Any]:
    """What the scores belong to."""
    essence = bench.essence
    return {
        "config": {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()},
        "world": world.name,
        "fingerprints": {
            "generator": essence.generator.fingerprint,
            "embedder": essence.embedder.fingerprint,
            **({} if judges.second is None else {"judge": judges.second.fingerprint}),
            **bench.digests,
        },
        "seeds": {"targets": TARGET_SEED, "sources": SOURCE_SEED, "draws": config.seed},
        "sources": len(bench.sources),
        "references": config.unedited,
        "first": config.first,
        "precision": "bf16" if bench.half else "fp32",
        "judges": {
            "features": judges.features_of,
            "people": judges.people_of,
            "second": config.judge,
        },
        "left_out": list(left_out),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


def run(config: Config) -> dict[str, Any]:
    """Compare, write everything into --out, and return the report.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: a search whose loss stopped being finite.
    """
    check_config(config)
    world, device = load_world(config.world), choose_device(config.device)
    check_sources(SOURCE_SEED, max(config.sources, RELEASED_SOURCES))
    make_folder(config.out)
    bench = make_bench(config, world, device)
    judges = make_judges(config, world, bench)
    sets = make_sets(config, bench, judges)
    chosen, left_out = choose_methods(config, bench)
    runs = find_all(config, bench, sets, chosen)
    stage = Stage.of(bench, judges, config.unedited, config.first, config.seed)
    drawn = not config.only or DRAWN_ANSWER in config.only
    report = facts(config, world, bench, judges, left_out) | {"sets": {}}
    for targets in sets:
        trials = judged_trials(stage, targets, runs[targets.name], drawn)
        if trials:
            report["sets"][targets.name] = set_report(stage, targets, runs[targets.name], trials)
            write_grids(config.out, stage, targets, runs[targets.name], trials)
    report["released"] = released_report(stage, sets, runs)
    report["sweep"] = sweep_report(stage, sets[0], runs[IN_RANGE])
    write_file(config.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    write_file(config.out / "report.md", report_text(report).encode())
    for name, picture in figures(report).items():
        write_picture(picture, config.out / f"{name}.png")
    return report


def main() -> None:
    """The command: errors of input and of files are one line, and never a traceback."""
    code = 0
    try:
        config = tyro.cli(Config, description=__doc__)
        run(config)
        print(f"look at {config.out / 'report.md'}")
    except KeyboardInterrupt:
        code = 130
        print("stopped; the same command goes on from here", file=sys.stderr)
    except torch.OutOfMemoryError:
        code = 1
        print(
            "error: out of memory: lower --max-images, or add --checkpoint-layers", file=sys.stderr
        )
    except (ValueError, OSError, FloatingPointError) as error:
        code = 1
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
