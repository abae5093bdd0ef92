"""Tell how often glasses, beard, hat and hair colour arrive from targets of every style.

    python -m eval.studies.styles --out runs/styles

Seeded avatars of each human style have these forced on and off in turn. The mapper edits held-out
sources by them, and the attribute reader says what the results show. An attribute must arrive where
the target has it, and must not where it has not: the difference counts. Writes report.json,
report.md and a sheet of pictures for each group of styles, and prints the table. The same command
goes on after an interruption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.seeds import STYLE_TARGETS, TEST_SOURCES
from targetclip.world import DEFAULT_WORLD, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and the sheets."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    one_direction: bool = False
    """Edit all sources by one direction, also where the mapper corrects it for each."""
    styles: tuple[str, ...] = ()
    """Styles to take targets from. Default: all."""
    count: int = 30
    """Targets of each style."""
    sources: int = 16
    """Sources that are edited."""
    seed: int = STYLE_TARGETS
    """Of the targets; sources are always the same."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.styles", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.illustrated.avatars import HELD_OUT, TRAINED, check_dicebear, draw, render
from data.illustrated.codes import SIZE
from data.illustrated.shown import Shown, Wish, can_show, colours, sample, shown
from data.publish import sha256_of
from eval.answers import earlier_report
from eval.judging import face_reader
from eval.methods import mapped
from eval.reader import BUNDLED, HAIR_COLOURS, AvatarReader
from eval.report import number, table
from predictor.editing import edits_sheet
from predictor.mapper import Mapper
from predictor.transfer import load_essence
from targetclip.media.images import write_picture
from targetclip.scene import Scene

KINDS: tuple[Wish, ...] = ("glasses", "beard", "hat")
GROUPS = {"trained": TRAINED, "held-out": HELD_OUT}
ALL = TRAINED + HELD_OUT
SHOWN_TARGETS, SHOWN_SOURCES = 8, 6  # on a sheet

READING = """## How to read it

Shares of edited sources that show an attribute, by the attribute reader: where the target has it,
where it has not, and the difference. Hair colour is right where the reader names that of the
target, among 12. The row of unedited sources is the same for every target. Empty: the style does
not draw it. Means are over styles.
"""


def check_config(config: Config) -> None:
    """Raise a ValueError for an option that cannot be."""
    command.check_least(config, count=1, sources=1)
    if unknown := [style for style in config.styles if style not in ALL]:
        hint = command.did_you_mean(unknown[0], ALL)
        raise ValueError(f"--styles: expected some of {', '.join(ALL)}, found {unknown[0]!r}{hint}")
    check_dicebear("a style")


# Targets


@dataclass(frozen=True)
class StyleTarget:
    """An avatar, and what it shows."""

    picture: Image.Image
    shown: Shown


def style_target(style: str, seed: int, index: int) -> StyleTarget:
    """Draw a target; glasses, beard and hat are on by the bits of its index, hair's colour is
    random."""
    wishes = {k: bool(index >> bit & 1) for bit, k in enumerate(KINDS) if can_show(style, k)}
    colour = str(np.random.default_rng([seed, index]).choice(list(colours())))
    svg, drawn = draw(style, sample(style, seed, index, wishes, colour))
    return StyleTarget(Image.fromarray(render(svg, SIZE)), shown(style, drawn))


def has(target: Shown, kind: Wish) -> bool | None:
    """Tell whether a target has something; None where a moustache leaves open if it is a beard."""
    there = bool(getattr(target, kind))
    return None if kind == "beard" and target.moustache and not there else there


# Edits and their reading


def edits_of(
    scene: Scene,
    mapper: Mapper,
    pictures: Sequence[Image.Image],
    sources: Float[Tensor, "sources num_ws w_dim"],
    one_direction: bool,
) -> Float[Tensor, "targets *sources num_ws w_dim"]:
    """Return a mapper's directions, or an offset for each source where it corrects them."""
    answer = mapped(scene, mapper, pictures)
    return answer.edits if one_direction else answer.on(sources)


Found = dict[str, Tensor]
"""What the reader finds on edited sources [targets, sources], by attribute."""


def found_on(
    reader: AvatarReader,
    scene: Scene,
    sources: Float[Tensor, "sources num_ws w_dim"],
    edits: Float[Tensor, "targets *sources num_ws w_dim"],
) -> Found:
    """Return what the reader finds on edited sources."""
    rows = [reader.present(scene.edit(sources, edit).clamp(-1, 1)) for edit in edits]
    return {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}


def row_of(targets: Sequence[Shown], found: Found) -> dict[str, Any]:
    """Return how often each attribute arrives with and without it, and how often the colour is
    right; None where targets do not tell, as those of a style that does not draw it."""
    row: dict[str, Any] = {"targets": len(targets)}
    for kind in KINDS:
        there = [has(target, kind) for target in targets]
        names = [f"{kind}_{name}" for name in ("with", "without", "difference")]
        row |= dict.fromkeys(names)
        if True in there and False in there:
            having, lacking = (
                float(found[kind][[i for i, t in enumerate(there) if t is side]].float().mean())
                for side in (True, False)
            )
            row |= dict(zip(names, (having, lacking, having - lacking), strict=True))
    told = [i for i, target in enumerate(targets) if target.hair_colour]
    wanted = torch.tensor([[HAIR_COLOURS.index(targets[i].hair_colour)] for i in told])
    right = (found["hair_colour"][told] == wanted).float() if told else None
    return row | {"hair_colour": None if right is None else float(right.mean())}


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over styles, of those that tell."""
    means: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = fmean(values) if values else None
    return means


# The report


def report_table(report: Mapping[str, Any]) -> str:
    """Return the unedited sources, then a row a style and the mean of each group, in Markdown."""
    ways = ("with", "without", "difference")
    heads = [f"{kind}, {way}" for kind in KINDS for way in ways] + ["hair colour right"]
    names = [f"{kind}_{way}" for kind in KINDS for way in ways] + ["hair_colour"]
    rows = {"unedited": {f"{kind}_with": share for kind, share in report["unedited"].items()}}
    for group, styles in GROUPS.items():
        known = {style: report["styles"][style] for style in styles if style in report["styles"]}
        rows |= known
        if known:
            rows[f"**{group}, mean**"] = mean_row(list(known.values()))
    cells = [[name, *(number(row.get(key), 2) for key in names)] for name, row in rows.items()]
    return "\n".join(table(["style", *heads], cells))


def targets_of_sheet(config: Config, styles: Sequence[str]) -> dict[str, StyleTarget]:
    """Return the targets of a sheet, of the styles in turn, by what they show."""
    targets = {}
    for index in range(SHOWN_TARGETS):
        style = styles[index % len(styles)]
        target = style_target(style, config.seed, index)
        words = [word for word in vars(target.shown).values() if word]
        targets[f"{index}, {style}: {', '.join(words)}"] = target
    return targets


def run(config: Config) -> dict[str, Any]:
    """Judge the styles that the report lacks, write it after each, and print the table.

    Raises:
        FileNotFoundError, ValueError: options, a world or a mapper that cannot be; a report of
            other options.
        OSError: --out cannot be written into.
    """
    check_config(config)
    command.say(f"loading world {config.world}", error=True)
    essence = load_essence(load_world(config.world), command.choose_device(), config.mapper)
    scene, mapper = essence.scene, essence.asked_mapper()
    reader = face_reader(scene)
    sources = scene.sources(config.sources, TEST_SOURCES)
    comparison = {name: getattr(config, name) for name in ("world", "count", "sources", "seed")}
    comparison |= {"one_direction": config.one_direction, "mapper": mapper.fingerprint}
    comparison["reader"] = sha256_of(BUNDLED)[:12]
    path = config.out / "report.json"
    report: dict[str, Any] = {"styles": {}} | earlier_report(path, comparison)
    command.make_folder(config.out)
    unedited = reader.present(scene.render(sources).clamp(-1, 1))
    report["unedited"] = {kind: float(unedited[kind].float().mean()) for kind in KINDS}
    asked = config.styles or ALL
    for style in tqdm(asked, unit="style"):
        if style in report["styles"]:
            continue
        targets = [style_target(style, config.seed, i) for i in range(config.count)]
        pictures = [target.picture for target in targets]
        edits = edits_of(scene, mapper, pictures, sources, config.one_direction)
        found = found_on(reader, scene, sources, edits)
        report["styles"][style] = row_of([target.shown for target in targets], found)
        command.write_json(path, report)
    text = report_table(report)
    command.write_file(config.out / "report.md", f"# Styles as targets\n\n{text}\n{READING}")
    few = sources[:SHOWN_SOURCES]
    for group, known in GROUPS.items():
        if styles := [style for style in known if style in asked]:
            shown_targets = targets_of_sheet(config, styles)
            pictures = [target.picture for target in shown_targets.values()]
            edits = edits_of(scene, mapper, pictures, few, config.one_direction)
            rows = dict(zip(shown_targets, zip(pictures, edits, strict=True), strict=True))
            write_picture(edits_sheet(scene, few, rows), config.out / f"{group}.png")
    print(text)
    command.say_next(config.out, "report.md, a sheet a group", "read report.md", error=True)
    return report
