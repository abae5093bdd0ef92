"""The evaluation of TargetCLIP's release: latents edited along directions, at strength 1.2.

Cosines times 100 are means over sources, then mean and deviation over targets; FID is of each
target. `eval.referee --protocol targetclip` runs it. Knows the files that people have: latents of
sources, directions, pictures. Unlike the other protocol it renders the results itself, since the
latents and directions that are public are no pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data.released import Published, open_directions
from data.targets import Target, open_folder
from eval import compare
from eval.answers import answer_of
from eval.judging import (
    RELEASED_STRENGTH,
    Judges,
    KeptEmbeddings,
    load_judge,
    reader_of,
    released_scores,
)
from eval.methods import METHODS, Bench
from eval.reader import INPUT
from eval.report import protocol_text
from eval.results import by_name
from eval.sets import Directions, EvalSet, Sources
from targetclip import command
from targetclip.directions import looks_like_latent
from targetclip.embedder import preprocess_images
from targetclip.media.images import read_picture, tensor_to_pictures, write_picture
from targetclip.scene import Scene
from targetclip.world import load_world

if TYPE_CHECKING:
    from eval.referee import Config

PUBLISHED, MAPPER = "published", "mapper"
OF_WORLD = {"mapper", "correction", "calibration", "inverter", "identity"}  # parts of a world
KNOWN = tuple(n for n, m in METHODS.items() if OF_WORLD.issuperset(m.needs) and not m.per_source)


def check_config(config: "Config") -> None:
    """Raise a ValueError for options that the protocol has no use for, or that cannot be."""
    if config.results:
        raise ValueError(
            "--results: --protocol targetclip edits the sources itself: drop one of the two"
        )
    if unknown := [name for name in config.methods if name not in KNOWN]:
        hint = command.did_you_mean(unknown[0], KNOWN)
        raise ValueError(
            f"--methods: expected some of {', '.join(KNOWN)}, found {unknown[0]!r}{hint}"
        )
    if config.mapper is not None and not any(
        "mapper" in METHODS[name].needs for name in methods_of(config)
    ):
        raise ValueError("--mapper: no method asks it: add --methods mapper, or drop it")
    command.check_least(config, max_images=1)


def methods_of(config: "Config") -> tuple[str, ...]:
    """Return the methods that are asked for."""
    return config.methods or (() if config.direction is not None else (MAPPER,))


# What is given


def open_sources(config: "Config", scene: Scene) -> tuple[list[int], Sources]:
    """Return the numbers of the sources, and their latents on the scene's device.

    Raises:
        FileNotFoundError, ValueError: as `open_latents`; fewer than two are left.
    """
    latents = compare.open_latents(config.sources, scene)
    if beyond := [i for i in config.leave_out if not 0 <= i < len(latents)]:
        raise ValueError(f"--leave-out: expected 0 to {len(latents) - 1}, found {beyond[0]}")
    numbers = [i for i in range(len(latents)) if i not in config.leave_out]
    if len(numbers) < 2:
        raise ValueError(f"--sources: expected two latents or more, found {len(numbers)}")
    return numbers, latents[numbers]


def open_targets(
    config: "Config", scene: Scene, notes: list[str]
) -> tuple[EvalSet, Directions | None]:
    """Return the targets and, with --direction, their published directions.

    With --direction a picture without one is no target; what is left out is noted.

    Raises:
        FileNotFoundError, ValueError, OSError: a folder is not there, or nothing in it can be used.
    """
    for flag, folder in (("--targets", config.targets), ("--direction", config.direction)):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{flag}: expected a folder, found none at {str(folder)!r}")
    pictures = open_folder(str(config.targets))
    published = None
    if config.direction is not None:
        published = Published.of(open_directions(config.direction), pictures)
        notes += [f"{one.origin}: left out: {one.reason}" for one in published.without_picture()]
    shape = (scene.generator.num_ws, scene.generator.w_dim)
    chosen: list[Target] = []
    vectors: list[Tensor] = []
    for target in pictures:
        if not isinstance(target, Target):
            notes.append(f"{target.origin}: left out: {target.reason}")
            continue
        try:
            if published is not None:
                vectors.append(published.direction(target.origin, *shape))
                if looks_like_latent(vectors[-1], scene.generator):
                    notes.append(f"the direction of {target.origin} looks like a latent")
            chosen.append(target)
        except (ValueError, OSError) as error:
            notes.append(f"{target.origin}: left out: {command.one_line(error)}")
    if not chosen:
        raise ValueError(f"--targets: found no target that can be used: {'; '.join(notes[:3])}")
    goals = EvalSet(
        name="targets",
        ids=tuple(target.id for target in chosen),
        origins=tuple(target.origin for target in chosen),
        pictures=tuple(target.picture for target in chosen),
    )
    return goals, torch.stack(vectors) if vectors else None


@dataclass(frozen=True)
class FeatureModel:
    """The model that makes features for FID, as one that `KeptEmbeddings` takes."""

    judges: Judges

    @property
    def fingerprint(self) -> str:
        if self.judges.reader is not None:
            return f"features {self.judges.reader.fingerprint}"
        return (self.judges.second or self.judges.scene.embedder).fingerprint

    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Return the features of square images of any size, as `Judges.outputs` does."""
        if self.judges.reader is not None:
            return self.judges.reader.read(preprocess_images(images, "consistent", INPUT))[0]
        return (self.judges.second or self.judges.scene.embedder).embed_images(images)


def reference_features(
    config: "Config", judges: Judges, notes: list[str]
) -> Float[Tensor, "images features"] | None:
    """Return the features of the pictures that FID compares with; they are kept in --out.

    Raises:
        FileNotFoundError, ValueError: no folder, or fewer than two pictures that can be read.
    """
    if config.references is None:
        return None
    seen = KeptEmbeddings(
        config.out / "embeddings", {"features": FeatureModel(judges)}, judges.scene.device
    )
    names = []
    for path in tqdm(by_name("--references", config.references).values(), "references"):
        try:
            names.append(seen.add(read_picture(path)))
        except (ValueError, OSError) as error:
            notes.append(f"left out: {command.one_line(error)}")
    seen.finish()
    if len(names) < 2:
        raise ValueError(f"--references: expected two pictures or more, found {len(names)}")
    return seen.of(names)["features"]


# Edits and their scores


def edits_by(
    config: "Config", bench: Bench, targets: EvalSet, published: Directions | None
) -> dict[str, Float[Tensor, "targets *sources num_ws w_dim"]]:
    """Return directions of each target, or an offset for each of its sources, by method."""
    edits: dict[str, Tensor] = {} if published is None else {PUBLISHED: published}
    folder = config.out / "answers"
    command.make_folder(folder)
    for name in methods_of(config):
        edits[name] = answer_of(folder, name, bench, targets).on(bench.sources.cpu())
    return edits


def folder_names(targets: EvalSet) -> list[str]:
    """Return a name for each target's folder: that of its file, with its id where several have
    it."""
    stems = [Path(origin).stem for origin in targets.origins]
    twice = {stem for stem in stems if stems.count(stem) > 1}
    return [
        f"{stem}-{name}" if stem in twice else stem
        for stem, name in zip(stems, targets.ids, strict=True)
    ]


def write_pictures(
    folder: Path, numbers: Sequence[int], images: Float[Tensor, "sources 3 height width"]
) -> None:
    """Write SOURCE.png of each edited source."""
    command.make_folder(folder)
    for number, picture in zip(numbers, tensor_to_pictures(images), strict=True):
        write_picture(picture, folder / f"{number:03d}.png")


def judge(config: "Config") -> dict[str, Any]:
    """Edit, score and write report.json and report.md into --out; return the report.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
        FloatingPointError: a search whose loss stopped being finite.
    """
    world, device = load_world(config.world), command.choose_device(config.device)
    command.say(f"loading world {world.name}", error=True)
    # A name of no method, where none is asked for: no mapper is needed then.
    options = compare.Config(
        out=config.out,
        world=config.world,
        mapper=config.mapper,
        only=methods_of(config) or (PUBLISHED,),
        max_images=config.max_images,
        seed=config.seed,
    )
    bench = compare.make_bench(options, world, device)
    compare.choose_methods(options, bench)  # refuses those whose parts are missing
    scene, notes = bench.scene, list[str]()
    numbers, sources = open_sources(config, scene)
    bench = replace(bench, sources=sources)
    targets, published = open_targets(config, scene, notes)
    judges = Judges(
        scene=scene,
        reader=reader_of(world, device),
        second=load_judge(config.judge, config.judge_pretrained, device),
    )
    if judges.people_of is None:
        notes.append(f"identity is not scored: world {world.name} names no identity model")
    references = reference_features(config, judges, notes)
    for words in notes:
        command.say(f"eval.referee: {words}", error=True)
    edits = edits_by(config, bench, targets, published)
    methods: dict[str, Any] = {}
    with tqdm(total=len(edits) * len(targets), unit="target") as bar:

        def seen(name: str, place: int, images: Tensor) -> None:
            bar.update()
            if config.keep_pictures:
                folder = config.out / "pictures" / name / folder_names(targets)[place]
                write_pictures(folder, numbers, images)

        for name, found in edits.items():
            methods[name] = released_scores(
                judges, sources, found, targets, references, partial(seen, name)
            )
    report = report_of(config, world.name, bench, judges, targets, methods)
    report |= {"sources": numbers, "notes": notes}
    report["references"] = None if references is None else len(references)
    command.write_json(config.out / "report.json", report)
    command.write_file(config.out / "report.md", protocol_text(report))
    written = "report.md, report.json" + (", pictures" if config.keep_pictures else "")
    command.say_next(config.out, written, "read report.md")
    return report


def report_of(
    config: "Config",
    world: str,
    bench: Bench,
    judges: Judges,
    targets: EvalSet,
    methods: Mapping[str, Any],
) -> dict[str, Any]:
    """Return report.json but for sources, references and notes."""
    second = {} if judges.second is None else {"second": judges.second.fingerprint}
    return {
        "protocol": config.protocol,
        "world": world,
        "strength": RELEASED_STRENGTH,
        "targets": list(targets.origins),
        "fingerprints": {
            "generator": bench.scene.generator.fingerprint,
            "embedder": bench.scene.embedder.fingerprint,
            **second,
            **bench.digests,
        },
        "features": judges.features_of,
        "people": judges.people_of,
        "second": config.judge,
        "seed": config.seed,
        "methods": methods,
        "versions": command.versions(),
    }
