"""Score folders of pictures that any tools made, without a generator; or by the release's protocol.

    python -m eval.referee --sources faces --targets targets --results ours theirs \\
        --world ffhq1024 --out runs/referee

Each folder of --results holds TARGET/SOURCE.png, by the names of the pictures in --targets and
--sources; other names that are known, and tables of results, are in docs/referee.md. Writes
report.json, report.md, sheet.png and chart.png. Embeddings are kept in --out: the same command goes
on after an interruption.

    python -m eval.referee --protocol targetclip --sources w_plus.npy --targets dirs/targets \\
        --direction dirs --references ffhq --world ffhq1024 --out runs/protocol

does what the evaluation of TargetCLIP's release does: it edits latents along directions at strength
1.2, with the world's generator, and scores the results (docs/protocol.md). Writes report.json and
report.md.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from targetclip import command
from targetclip.command import start
from targetclip.world import World, load_encoders, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    sources: Path
    """Folder of the pictures that were edited; for --protocol targetclip the file of their latents,
    .npy or .pt, [sources, num_ws, w_dim]."""
    targets: Path
    """Folder of the pictures whose essence they were given."""
    results: tuple[Path, ...] = ()
    """Folders of results, TARGET/SOURCE.png; or tables, .csv with source, target and result."""
    protocol: Literal["pictures", "targetclip"] = "pictures"
    """pictures: score --results. targetclip: what the release's evaluation does; the options from
    --direction to --max-images are of this one."""
    world: str
    """World whose embedder and identity model judge: a bundled one's name, or a .toml file."""
    out: Path
    """Folder for the report, and for embeddings so far."""
    judge: str | None = None
    """A second judge: a model of open_clip, a folder of one, or blip: and then a folder or a
    repository of the Hub, e.g. blip:Salesforce/blip-itm-base-coco."""
    judge_pretrained: str | None = None
    """Its weights, where --judge is a model's name."""
    direction: Path | None = None
    """Folder of published directions, an .npy for each target picture, by its name."""
    methods: tuple[str, ...] = ()
    """Methods of eval.compare that find directions for the targets, such as mapper, identity or
    paper. Default: mapper, or none with --direction."""
    mapper: Path | None = None
    """Mapper's file. Default: the world's."""
    references: Path | None = None
    """Folder of pictures that FID compares with. Default: no FID."""
    leave_out: tuple[int, ...] = ()
    """Numbers of sources, from 0 on, that are not edited."""
    keep_pictures: bool = False
    """Write every edited picture: pictures/METHOD/TARGET/SOURCE.png."""
    max_images: int | None = None
    """Images rendered at once; fewer need less memory. Default: 64, fewer above 256 px."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""
    seed: int = 0
    """Of the bootstrap, and of methods that search."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.referee", Config)

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.illustrated.avatars import check_dicebear
from data.illustrated.shown import Shown
from eval import protocol
from eval.judging import KeptEmbeddings, load_judge, reader_of
from eval.metrics import (
    Parts,
    edit_scores,
    essence_acquired,
    essence_parts,
    frechet_distance,
    identity_kept,
    identity_parts,
    interval,
    interval_kept,
    kernel_distance,
    outside_change,
    sharpness_kept,
)
from eval.reader import READINGS, AvatarReader
from eval.report import REFEREE, check_charts, referee_chart, referee_text
from eval.results import Pair, Results, by_name, fault_lines, find_results, judged_part
from eval.truth import Content, Truth, face_of, read_truth, truth_of
from predictor.cli.options import NAMED
from targetclip.losses import unit_cosines
from targetclip.media.images import (
    labelled_grid,
    picture_to_tensor,
    read_picture,
    write_picture,
)

SHOWN_TARGETS, SHOWN_SOURCES = 6, 8
OF_RELEASE = (  # options of --protocol targetclip alone
    *("direction", "methods", "mapper", "references", "leave_out", "keep_pictures", "max_images"),
)
NAMES = {"transfer": "clip", "person": "identity", "target_person": "target_identity"}


# Looking at every picture


def compare_pixels(result: Image.Image, source: Image.Image) -> dict[str, float]:
    """Return the scores of a result against its source, in the source's size."""
    side = min(source.size)
    if side < 3:
        return {}
    before, after = picture_to_tensor(source, side), picture_to_tensor(result, side)
    return {
        "outside": float(outside_change(before, after)),
        "sharpness": float(sharpness_kept(before, after)),
    }


def look(
    tools: Sequence[Results],
    sources: Mapping[str, Path],
    targets: Mapping[str, Path],
    seen: KeptEmbeddings,
    notes: list[str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Judge all pictures; return the ids of the sources and of the targets that can be read.

    What is wrong with results is noted in them. A source is read once for all its results.
    """
    total = len(sources) + len(targets) + sum(len(tool.files) for tool in tools)
    bar = tqdm(total=total, unit="picture")

    def read(path: Path, faults: list[str]) -> Image.Image | None:
        bar.update()
        try:
            return read_picture(path)
        except (ValueError, OSError) as error:
            faults.append(command.one_line(error))
            return None

    of_sources: dict[str, str] = {}
    of_targets: dict[str, str] = {}
    with bar:
        for name in targets:
            if (picture := read(targets[name], notes)) is not None:
                of_targets[name] = seen.add(picture)
        for name in sources:
            if (source := read(sources[name], notes)) is None:
                continue
            of_sources[name] = seen.add(source)
            for tool, pair in [(tool, (target, name)) for tool in tools for target in of_targets]:
                path = tool.files.get(pair)
                if path is None or (whole := read(path, tool.damaged)) is None:
                    continue
                result = judged_part(whole, source)
                if result.size != source.size:
                    size = f"{result.width} x {result.height} for {source.width} x {source.height}"
                    tool.mis_sized.append(f"{'/'.join(pair)}, {size} px")
                tool.ids[pair] = seen.add(result)
                tool.pixels[pair] = compare_pixels(result, source)
        seen.finish()
    for flag, found in (("--sources", of_sources), ("--targets", of_targets)):
        if not found:
            raise ValueError(f"{flag}: expected pictures, found none that can be read")
    return of_sources, of_targets


# What pictures show


@dataclass(frozen=True)
class Known:
    """What the attribute reader can be trusted with."""

    sources: frozenset[str]
    """Those in the generator's style."""
    targets: Mapping[str, Truth]
    """What each target shows, where that is known."""
    origins: Mapping[str, str | None]
    """Whether a target's truth was given by a file or read; None where it is not known."""


def named(names: Sequence[str]) -> str:
    """Return the first of some names."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def know(
    reader: AvatarReader,
    sources: Mapping[str, Path],
    targets: Mapping[str, Path],
    given: Mapping[str, Shown],
    notes: list[str],
) -> Known | None:
    """Tell what targets show, and which sources are in the style that the reader knows.

    The truth of a target is what is `given` for its file or else, of pictures in the generator's
    style alone, what the reader reads. What is left out is noted.
    """
    if surplus := sorted(given.keys() - {path.name for path in targets.values()}):
        notes.append(f"truth of {len(surplus)} files that are no targets: {named(surplus)}")
    try:
        check_dicebear("a face in the generator's style")
    except ValueError as error:
        notes.append(f"attributes are not scored: {error}")
        return None
    faces = {name for name in sources if face_of(reader, read_picture(sources[name]))}
    contents: dict[str, Content] = {}
    origins: dict[str, str | None] = dict.fromkeys(targets)
    for name, path in tqdm(targets.items(), "truth", unit="target"):
        shown: Content | None = given.get(path.name)
        origins[name] = "read" if shown is None else "given"
        if shown is None and (shown := face_of(reader, read_picture(path))) is None:
            origins[name] = None
            continue
        contents[name] = shown
    style = "which are not in the generator's style"
    if left := [name for name in targets if name not in contents]:
        notes.append(
            f"essence by attributes leaves out {len(left)} of {len(targets)} targets, {style}; a "
            f"truth.json beside them can say what they show: {named(left)}"
        )
    if left := [name for name in sources if name not in faces]:
        notes.append(
            f"scores by attributes leave out {len(left)} of {len(sources)} sources, {style}: "
            f"{named(left)}"
        )
    return Known(frozenset(faces), {n: truth_of([c]) for n, c in contents.items()}, origins)


# Scores


@dataclass(frozen=True)
class Table:
    """Everything of all pictures that scores are made of."""

    seen: KeptEmbeddings
    sources: dict[str, str]
    """Ids by names."""
    targets: dict[str, str]
    known: Known | None
    """None without an attribute reader."""

    def scores(self, tool: Results, pairs: set[Pair]) -> dict[str, dict[str, float]]:
        """Return the scores of each target over the sources of some of a tool's results."""
        rows: dict[str, dict[str, float]] = {}
        for target, name in self.targets.items():
            chosen = [(target, source) for source in self.sources if (target, source) in pairs]
            if not chosen:
                continue
            before = self.seen.of([self.sources[source] for _, source in chosen])
            after = self.seen.of([tool.ids[pair] for pair in chosen])
            batched = {judge: row[None] for judge, row in after.items()}
            found = edit_scores(self.seen.of([name]), before, batched)
            row = {NAMES.get(score, score): float(value) for score, value in found.items()}
            if len(chosen) < 2:
                del row["consistency"]  # of two sources or more
            for score in ("outside", "sharpness"):
                values = np.array([tool.pixels[pair].get(score, np.nan) for pair in chosen])
                if np.isfinite(values).any():
                    row[score] = float(np.nanmean(values))
            row |= self.attribute_scores(tool, target, pairs)
            rows[target] = {score: row[score] for score in REFEREE if score in row}
        return rows

    def readings(
        self, tool: Results, target: str, pairs: Collection[Pair]
    ) -> tuple[Tensor, Tensor] | None:
        """Return readings of some results of a target [1, sources, outputs] and of their sources
        [sources, outputs]; None where there is none that the reader can be trusted with."""
        faces = frozenset() if self.known is None else self.known.sources
        chosen = [name for name in self.sources if name in faces and (target, name) in pairs]
        if not chosen:
            return None
        after = self.seen.of([tool.ids[target, name] for name in chosen])["readings"]
        return after[None], self.seen.of([self.sources[name] for name in chosen])["readings"]

    def attribute_scores(
        self, tool: Results, target: str, pairs: Collection[Pair]
    ) -> dict[str, float]:
        """Return the scores of a target by the attribute reader; empty where there are none."""
        found, scores = self.readings(tool, target, pairs), {}
        if self.known is None or found is None:
            return {}
        after, before = found
        if len(before) > 1:  # identity is measured by how far sources are apart
            scores["identity_by_attribute"] = float(identity_kept(after, before))
        if (truth := self.known.targets.get(target)) is not None:
            essence = essence_acquired(after, before, truth.readings, truth.seen)
            scores["essence"] = float(essence)
        return {name: value for name, value in scores.items() if np.isfinite(value)}

    def by_attribute(self, tool: Results, seed: int) -> dict[str, dict[str, Any]]:
        """Return essence acquired and identity kept of each attribute; empty without a reader."""
        if self.known is None:
            return {}
        rows: dict[str, dict[str, list[Parts]]] = {"essence": {}, "identity": {}}
        for target in self.targets:
            if (found := self.readings(tool, target, tool.ids)) is None:
                continue
            parts = {"identity": identity_parts(*found) if len(found[1]) > 1 else {}}
            if (truth := self.known.targets.get(target)) is not None:
                parts["essence"] = essence_parts(*found, truth.readings, truth.seen)
            for kind, of in parts.items():
                for name, (left, whole) in of.items():
                    if whole.any():
                        rows[kind].setdefault(name, []).append((left, whole))
        return {
            kind: {r.name: joined(of[r.name], seed) for r in READINGS if r.name in of}
            for kind, of in rows.items()
        }

    def unedited(self) -> dict[str, float]:
        """Return the mean scores of the sources as they are."""
        targets = self.seen.of([*self.targets.values()])
        sources = self.seen.of([*self.sources.values()])
        names = {"people": "target_identity", "embeddings": "clip", "second": "second"}
        return {
            name: float(unit_cosines(targets[judge][:, None], sources[judge]).mean())
            for judge, name in names.items()
            if judge in targets
        }

    def distances(self, tool: Results) -> dict[str, Any]:
        """Return FID and KID of a tool's results against the sources, and the numbers of both."""
        judge = "second" if "second" in self.seen.judges else "embeddings"
        results = self.seen.of([*tool.ids.values()])[judge]
        sources = self.seen.of([*self.sources.values()])[judge]
        sizes = {"images": len(results), "references": len(sources)}
        if min(sizes.values()) < 2:
            return {"fid": None, "kid": None, **sizes}
        fid, kid = frechet_distance(results, sources), kernel_distance(results, sources)
        return {"fid": fid, "kid": kid, **sizes}


def joined(parts: Sequence[Parts], seed: int) -> dict[str, Any]:
    """Return the interval of an attribute over the targets whose parts are given."""
    left, whole = zip(*parts, strict=True)
    return interval_kept((torch.cat(left), torch.cat(whole)), seed)


def intervals(rows: Sequence[Mapping[str, float]], seed: int) -> dict[str, dict[str, Any]]:
    """Return the interval of each score over the targets that have it."""
    columns = {score: [row[score] for row in rows if score in row] for score in REFEREE}
    return {s: interval(torch.tensor(v), seed) for s, v in columns.items() if v}


def paired(table: Table, one: Results, other: Results, seed: int) -> dict[str, dict[str, Any]]:
    """Return scores of one tool less those of another, over the targets and sources of both."""
    both = one.ids.keys() & other.ids.keys()
    mine, theirs = table.scores(one, both), table.scores(other, both)
    rows = [
        {score: mine[t][score] - theirs[t][score] for score in mine[t] if score in theirs[t]}
        for t in mine
    ]
    return intervals(rows, seed)


def tool_report(
    table: Table, tool: Results, held_out: Collection[str], seed: int
) -> dict[str, Any]:
    """Return the entry of report.json for a tool.

    Args:
        held_out: targets that have means of their own as well.
    """
    rows = table.scores(tool, {*tool.ids})
    return {
        **intervals([*rows.values()], seed),
        "held_out": intervals([row for name, row in rows.items() if name in held_out], seed),
        **table.distances(tool),
        "seconds": tool.seconds,
        "layout": tool.layout,
        "faults": tool.faults,
        "by_target": rows,
        "by_attribute": table.by_attribute(tool, seed),
    }


# The report


def sheet(
    tools: Sequence[Results],
    report: Mapping[str, Any],
    sources: Mapping[str, Path],
    targets: Mapping[str, Path],
) -> Image.Image:
    """Return the first sources, then for each of the first targets a row of every tool's results.

    A tile is white where there is no result.
    """
    columns = report["sources"][:SHOWN_SOURCES]
    unedited = [read_picture(sources[name]) for name in columns]
    white = Image.new("RGB", unedited[0].size, "white")
    rows = {"sources": [white, *unedited]}
    for target in report["targets"][:SHOWN_TARGETS]:
        for tool in tools:
            scores = report["results"][tool.name]["by_target"].get(target, {})
            shown = [name for name in ("clip", "identity") if name in scores]
            said = ", ".join(f"{REFEREE[name]} {scores[name]:.2f}" for name in shown)
            row = [read_picture(targets[target])]
            for source, name in zip(unedited, columns, strict=True):
                there = (target, name) in tool.ids
                result = read_picture(tool.files[target, name]) if there else white
                row.append(judged_part(result, source))
            rows[f"{target} by {tool.name}: {said or 'no result'}"] = row
    return labelled_grid(None, rows)


def check_protocol(config: Config) -> None:
    """Raise a ValueError for options that are not of the protocol, or lack what it needs."""
    if config.protocol == "targetclip":
        protocol.check_config(config)
        return
    for name in OF_RELEASE:
        if getattr(config, name) not in (None, (), False):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is of --protocol targetclip: add that, or drop --{flag}")
    if not config.results:
        raise ValueError("--results: expected folders or tables of results, found none")


def run(config: Config) -> dict[str, Any]:
    """Judge all results, write the report into --out, and return it.

    Raises:
        ValueError, FileNotFoundError, OSError: bad input, or files that cannot be read or written.
    """
    if config.judge_pretrained is not None and config.judge is None:
        raise ValueError("--judge-pretrained: expected --judge as well, found none")
    check_protocol(config)
    if config.protocol == "targetclip":
        with command.locked_folder(config.out):
            return protocol.judge(config)
    check_charts()
    world, device = load_world(config.world), command.choose_device(config.device)
    sources, targets = by_name("--sources", config.sources), by_name("--targets", config.targets)
    tools = [find_results(path, [*sources], [*targets]) for path in config.results]
    names = [tool.name for tool in tools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--results: expected names that differ, found {twice[0]!r} twice")
    with command.locked_folder(config.out):
        return judge(config, world, device, sources, targets, tools)


def judge(
    config: Config,
    world: World,
    device: torch.device,
    sources: Mapping[str, Path],
    targets: Mapping[str, Path],
    tools: Sequence[Results],
) -> dict[str, Any]:
    """Judge in a folder that this run holds; see `run`."""
    command.say(f"loading the judges of world {world.name}", error=True)
    embedder, identity = load_encoders(world, device)
    second = load_judge(config.judge, config.judge_pretrained, device)
    reader = reader_of(world, device)
    given, marked = ({}, frozenset[str]()) if reader is None else read_truth(config.targets)
    judges: dict[str, Any] = {"people": identity, "second": second, "readings": reader}
    judges = {"embeddings": embedder, **judges}
    judges = {name: model for name, model in judges.items() if model is not None}
    notes: list[str] = []
    if identity is None:
        notes.append(f"identity is not scored: world {world.name} names no identity model")
    seen = KeptEmbeddings(config.out / "embeddings", judges, device)
    of_sources, of_targets = look(tools, sources, targets, seen, notes)
    held_out = [name for name in of_targets if targets[name].name in marked]
    known = None
    if reader is not None:
        faces, goals = ({n: sources[n] for n in of_sources}, {n: targets[n] for n in of_targets})
        known = know(reader, faces, goals, given, notes)
    found = Table(seen, of_sources, of_targets, known)
    for tool in tools:
        notes += fault_lines(tool)
        if not tool.ids:
            raise ValueError(f"--results: {tool.name}: found no result that can be read")
    for words in notes:
        command.say(f"eval.referee: {words}", error=True)
    differences = {
        one.name: {other.name: paired(found, one, other, config.seed) for other in tools[i:]}
        for i, one in enumerate(tools[:-1], 1)
    }
    report = {
        "world": world.name,
        "judges": {name: model.fingerprint for name, model in judges.items()},
        "second": config.judge,
        "features": f"{'the second judge' if second else 'the embedder'}'s embedding",
        "seed": config.seed,
        "sources": [*found.sources],
        "targets": [*found.targets],
        "truth": {} if known is None else known.origins,
        "held_out": held_out,
        "notes": notes,
        "unedited": found.unedited(),
        "results": {tool.name: tool_report(found, tool, held_out, config.seed) for tool in tools},
        "differences": differences,
        "versions": command.versions(),
    }
    write_picture(sheet(tools, report, sources, targets), config.out / "sheet.png")
    written = "report.md, report.json, sheet.png"
    if identity is not None:
        write_picture(referee_chart(report), config.out / "chart.png")
        written += ", chart.png"
    command.write_json(config.out / "report.json", report)
    command.write_file(config.out / "report.md", referee_text(report))
    command.say_next(config.out, written, "read report.md")
    return report
