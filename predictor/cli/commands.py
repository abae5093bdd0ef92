"""What the `targetclip` command does: find directions, edit sources, write the results.

Knows the order of the work and how long each phase takes. Every choice is in the request.
"""

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from predictor.cli.clips import Clip
from predictor.cli.console import Console
from predictor.cli.edits import Edited, Editor, open_editor
from predictor.cli.finding import find_direction, write_direction
from predictor.cli.options import Request
from predictor.cli.output import DIRECTION, GRID, OutputFolder, unique_names, words_of
from predictor.cli.report import (
    NamedTarget,
    Outcome,
    edit_facts,
    inversion_facts,
    run_facts,
    search_facts,
    sheet,
    sheet_of_targets,
    target_facts,
    tiles,
)
from predictor.cli.sources import (
    Generated,
    Photos,
    Sources,
    check_shows,
    find_faces,
    searching_inverter,
    target_aligner,
)
from predictor.inputs import Text
from predictor.transfer import EssenceTransfer, essence_of
from targetclip.command import (
    FAILED,
    STOPPED,
    Stopwatch,
    choose_device,
    locked_folder,
    say,
)
from targetclip.media.alignment import FaceFinder
from targetclip.media.images import read_picture, write_picture
from targetclip.scene import Scores
from targetclip.world import load_scene


def read_targets(request: Request, console: Console) -> list[NamedTarget]:
    """Read the targets: pictures, then texts."""
    contents: list[tuple[str, Image.Image | Text]] = []
    for path in request.pictures:
        picture = read_picture(path)
        check_shows(picture, str(path), console)
        contents.append((str(path), picture))
    contents += [(text, Text(text)) for text in request.texts]
    return [NamedTarget(*named, w) for named, w in zip(contents, request.weights, strict=True)]


def read_sources(request: Request, finder: FaceFinder | None, console: Console) -> Sources:
    """Read the sources and find their faces, before any network is loaded."""
    if request.clip is not None:
        return Clip(request.clip, finder, request.face, request.smooth, console=console)
    if request.sources is not None:
        return Photos(request.sources, finder, request.face, console)
    return Generated(request.num_sources, request.seed)


def load(request: Request, finder: FaceFinder | None, console: Console) -> EssenceTransfer:
    """Load the networks of a request."""
    scene = load_scene(
        request.world,
        choose_device(request.device),
        max_images=request.max_images,
        checkpoint_layers=request.checkpoint_layers,
    )
    if request.invert_steps:
        inverter = searching_inverter(scene, request.invert_steps, console)
        scene = dataclasses.replace(scene, inverter=inverter)
    aligner = None if finder is None else target_aligner(finder, scene.generator.resolution)
    return essence_of(scene, request.world, request.mapper, aligner)


class Run:
    """One command, once its networks are loaded."""

    def __init__(
        self,
        request: Request,
        console: Console,
        watch: Stopwatch,
        essence: EssenceTransfer,
        editor: Editor | None,
        out: OutputFolder,
    ) -> None:
        self.request, self.console, self.watch = request, console, watch
        self.essence, self.editor = essence, editor
        self.out = out

    def direct(self, out: OutputFolder, targets: Sequence[NamedTarget]) -> Outcome:
        """Find or read a direction, and write it."""
        phase = "optimize" if self.request.command == "optimize" else "direction"
        with self.watch.phase(phase):
            outcome = find_direction(self.essence, targets, self.request, self.console)
        self.out.clear()
        out.clear()
        # Written at once: minutes of optimization must outlive any fault that follows.
        write_direction(out, self.essence.scene, outcome)
        return outcome

    def result(
        self, out: OutputFolder, targets: Sequence[NamedTarget], warnings: Sequence[str]
    ) -> tuple[Outcome, Edited | None, dict[str, Any]]:
        """Find a direction, edit the sources along it, and write all results but the sheet.

        Args:
            warnings: of the whole run.

        Returns:
            The direction, the edits (None: none are wanted), and the content of report.json, which
            is left to write.
        """
        request, start = self.request, len(self.console.warnings)
        outcome = self.direct(out, targets)
        edited = None if self.editor is None else self.editor.edit(out, targets, outcome)
        facts = {
            **outcome.record,
            **run_facts(request, self.essence.scene, self.watch),
            "method": outcome.direction.method,
            "direction_norm": float(outcome.direction.vector.norm()),
            "interrupted": outcome.interrupted,
            "warnings": [*warnings, *self.console.warnings[start:]],
        }
        if edited is None:
            facts["targets"] = target_facts(targets, outcome)
            direction = outcome.direction
            if direction.transfer is not None:
                own = {"transfer": direction.transfer, "consistency": direction.consistency}
                facts["scores_on_own_sources"] = own
        else:
            facts |= {"mode": request.mode, **self.source_facts(), **edited.facts}
            facts["direction"] = None if request.direction is None else str(request.direction)
            facts["corrected"] = outcome.direction.correction is not None
            if len(targets) == 1:
                row = edited.facts["targets"][0]
                facts |= {"target": row["target"], "scores": row["scores"]}
        return outcome, edited, facts

    def source_facts(self) -> dict[str, Any]:
        """Return the entries of report.json on the sources."""
        assert self.editor is not None
        facts = {**self.editor.sources.facts, **self.editor.latents.facts}
        facts |= edit_facts(self.request)
        return facts | (inversion_facts(self.request) if self.request.inverts_sources else {})

    def one(self, targets: Sequence[NamedTarget]) -> tuple[dict[str, Any], int]:
        """Write the result of one target or of a mixture; return its report and the exit code."""
        outcome, edited, facts = self.result(self.out, targets, tuple(self.console.warnings))
        if edited is not None:
            assert self.editor is not None
            with self.watch.phase("write"):
                rows, strength = self.editor.latents.rows, edited.facts["strength"]
                grid = sheet(targets, rows, edited.shown, strength)
                write_picture(grid, self.out.take(GRID))
            facts["seconds"] = dict(self.watch.seconds)
        report = self.out.write_report(facts)
        for target, scores in zip(targets, edited.scores if edited else (), strict=False):
            name = f"{target.name}: " if len(targets) > 1 else ""
            self.console.result(f"{name}{score_line(scores)}")
        path = self.out.path / DIRECTION
        if edited is None:
            self.console.result(f"direction by {outcome.direction.method}; wrote {path}")
        else:
            self.print_cut(len(edited.shown))
            place = self.out.path / GRID
            self.console.result(f"direction by {outcome.direction.method}; look at {place}")
        self.print_next(targets[0], path)
        return report, STOPPED if outcome.interrupted else 0

    def print_cut(self, shown: int) -> None:
        """Say how many of the sources the sheet shows, if not all."""
        assert self.editor is not None
        total = len(self.editor.latents.scored)
        if self.request.clip is None and shown < total:
            self.console.result(f"{GRID} shows the first {shown} of {total} sources")

    def several(self, targets: Sequence[NamedTarget]) -> tuple[dict[str, Any], int]:
        """Write a result for each target, a sheet and a report of all.

        A target without a direction does not end the run. After Ctrl-C the report and the sheet
        tell of the targets so far.

        Returns:
            The report and the exit code.
        """
        names = unique_names(
            words_of(t.name) if isinstance(t.content, Text) else Path(t.name).stem for t in targets
        )
        folders = [self.out.within(name) for name in names]
        warnings = tuple(self.console.warnings)
        entries: list[dict[str, Any]] = []
        shown: list[tuple[NamedTarget, list[Image.Image]]] = []
        done: list[str] = []
        interrupted = False
        for number, (target, folder) in enumerate(zip(targets, folders, strict=True)):
            self.console.progress(f"{number + 1} of {len(targets)}: {target.name}")
            try:
                outcome, edited, facts = self.result(folder, [target], warnings)
            except FloatingPointError as error:
                self.console.warn(f"{target.name}: {error}")
                entries.append({"target": target.name, "error": str(error)})
                continue
            except KeyboardInterrupt:
                if not done:
                    raise
                interrupted = True
                break
            folder.write_report(facts)
            self.out.files += [f"{names[number]}/{file}" for file in folder.files]
            done.append(names[number])
            entries.append(entry_of(names[number], facts))
            line = f"{names[number]}: direction by {outcome.direction.method}"
            if edited is not None:
                shown.append((target, tiles(edited.shown, len(edited.shown) + 1)))
                line += f", {score_line(edited.scores[0])}"
            self.console.result(line)
            if interrupted := outcome.interrupted:
                break
        if not done:
            raise FloatingPointError(f"none of {len(targets)} targets has a direction")
        report = self.write_overview(entries, shown, interrupted)
        place = self.out.path / GRID if self.editor else self.out.path
        self.console.result(f"{len(done)} of {len(targets)} targets; look at {place}")
        self.print_next(targets[names.index(done[0])], self.out.path / done[0] / DIRECTION)
        if interrupted:
            return report, STOPPED
        return report, FAILED if len(done) < len(targets) else 0

    def write_overview(
        self,
        entries: Sequence[dict[str, Any]],
        shown: Sequence[tuple[NamedTarget, list[Image.Image]]],
        interrupted: bool,
    ) -> dict[str, Any]:
        """Write the sheet of several targets, and the report, whose content is returned."""
        facts = {
            **search_facts(self.request),
            **run_facts(self.request, self.essence.scene, self.watch),
            "interrupted": interrupted,
            "warnings": self.console.warnings,
            "targets": entries,
        }
        if self.editor is not None:
            sources = next(iter(self.editor.latents.rows.values()))
            grid = sheet_of_targets([t for t, _ in shown], [row for _, row in shown], sources)
            write_picture(grid, self.out.take(GRID))
            facts |= self.source_facts()
            self.print_cut(len(sources))
        return self.out.write_report(facts)

    def print_next(self, target: NamedTarget, direction: Path) -> None:
        """Print what comes next."""
        flag = "--text" if isinstance(target.content, Text) else "--target"
        command = f"targetclip transfer {flag} {shlex.quote(target.name)}"
        self.console.result(
            f"next: {command} --direction {shlex.quote(str(direction))} --sources ... --out ..."
        )


def entry_of(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a target's result in the report of several."""
    kept = ("method", "strength", "scores_on_own_sources", "warnings")
    return {**facts["targets"][0], "folder": name, **{k: facts[k] for k in kept if k in facts}}


def score_line(scores: Scores) -> str:
    """Return the transfer score before and after the edit."""
    before, after = float(scores.target_before.mean()), float(scores.transfer)
    return f"transfer score {before:.3f} -> {after:.3f}"


def run(request: Request, console: Console) -> int:
    """Do what a request asks, and write its results. Return the exit code.
    FileNotFoundError, ValueError: an input cannot be used. FileExistsError: the folder holds other
    results. OSError: the results cannot be written."""
    for note in request.notes:
        console.warn(note)
    with console.hearing_logs():
        targets = read_targets(request, console)
        finder = find_faces(request, targets)
        with locked_folder(request.out):
            out = OutputFolder(
                request.out,
                request.command,
                overwrite=request.overwrite,
                inputs=request.inputs,
            )
            watch, sources = Stopwatch(), None
            if request.command == "transfer":
                with watch.phase("sources"):
                    sources = read_sources(request, finder, console)
            with watch.phase("load"):
                essence = load(request, finder, console)
            if request.falls_back:
                console.progress("this world has no mapper: the optimizer finds directions")
            editor = None
            if sources is not None:
                editor = open_editor(essence, sources, request, console, watch)
            work = Run(request, console, watch, essence, editor, out)
            whole = work.several if request.separate else work.one
            report, code = whole(targets)
    if request.json:
        say(json.dumps(report, indent=2, default=str))
    return code
