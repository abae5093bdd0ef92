"""What the `targetclip` command does: find directions, edit sources, write the results.

Knows the order of the work and how long each phase takes. Every choice is in the request. Pictures
are rendered, written and forgotten lot by lot, so that a thousand sources need no more memory than
a few.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from predictor.cli.options import Request
from predictor.cli.output import (
    DIRECTION,
    GRID,
    MORPHS,
    PAGE,
    REPORT,
    STRIP,
    VIDEO,
    Console,
    OutputFolder,
    unique_names,
    words_of,
)
from predictor.cli.report import (
    MAX_TARGETS,
    NamedTarget,
    Outcome,
    doubts,
    edit_facts,
    inversion_facts,
    method_words,
    result_words,
    run_facts,
    score_facts,
    score_words,
    search_facts,
    sheet,
    sheet_of_targets,
    source_words,
    target_facts,
    tiles,
)
from predictor.cli.sources import (
    MAX_SHOWN,
    Clip,
    Generated,
    LatentFile,
    Latents,
    Photos,
    Sources,
    check_shows,
    find_faces,
    searching_inverter,
    target_aligner,
)
from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    Method,
    WatchStep,
    layer_weights,
    mixed,
    read_direction,
)
from predictor.editing import MORPH
from predictor.gallery import Linked, gallery, overview
from predictor.inputs import Text
from predictor.transfer import EssenceTransfer, essence_of
from targetclip.command import (
    FAILED,
    STOPPED,
    Stopwatch,
    choose_device,
    in_precision,
    locked_folder,
    say,
    write_file,
)
from targetclip.generators import check_render_size
from targetclip.media.alignment import FaceFinder
from targetclip.media.frames import write_morph
from targetclip.media.images import read_picture, tensor_to_pictures, write_picture
from targetclip.optimize import Progress
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.scores import Scores, score_features
from targetclip.world import load_scene

IN_SHOWS = 12  # sources of a strip and of a morph
IN_OVERVIEW = 4  # results of each of several targets, on the page of all
NO_EFFECT = "--one-direction has no effect: there is no correction for each source to leave out"


class Searches:
    """Shows the searches for one target: why each begins, and its steps."""

    def __init__(self, request: Request, console: Console, bars: ExitStack) -> None:
        self.request, self.console, self.bars = request, console, bars
        self.reason = ""

    def probed(self, score: float, threshold: float) -> None:
        """Remember a probe score, the reason of the next search."""
        self.reason = f"probe score {score:.2f}, {threshold:.2f} wanted: "

    def begun(self, method: Method, recipe: Recipe) -> WatchStep:
        """Open a bar for a search, and close that of the last."""
        self.bars.close()
        verb = "refine" if method == "refined" else "optimize"
        if self.reason:
            self.console.progress(self.reason + ("refining" if verb == "refine" else "optimizing"))
        name = self.request.recipe_name
        bar = self.console.bar(total=recipe.steps, desc=f"{verb} ({name})", unit="step")
        self.bars.enter_context(bar)

        def on_step(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.loss[0]:.4f}", refresh=False)
            bar.update()

        return on_step


def find_one(
    essence: EssenceTransfer, target: NamedTarget, request: Request, console: Console
) -> Direction:
    """Find the direction of one target, and warn of a target that is out of place."""
    assert request.mode is not None
    with ExitStack() as bars, in_precision(essence.scene.device, request.precision):
        searches = Searches(request, console, bars)
        direction = essence.direction(
            target.content,
            request.mode,
            request.recipe,
            request.seed,
            searches.begun,
            watch_probe=searches.probed,
            one_direction=request.one_direction,
            keep_identity=request.keep_identity,
        )
    if request.mode == "optimize":
        return direction
    try:
        gate = Gate.of(essence.asked_mapper(), request.keep_identity)
    except ValueError:  # not calibrated, so nothing is known of what is usual
        return direction
    if (probe := direction.probe) is None:
        embedding = essence.embed_target(target.content)
        probe = essence.probe_score(embedding, direction, gate.probes)
    if not gate.passes(probe):
        more = "; --mode auto refines such answers" if request.mode == "instant" else ""
        console.warn(
            f"{target.name}: the target looks out of place: its probe score is {probe:.2f}, and "
            f"{gate.threshold:.2f} or more is usual for this mapper{more}"
        )
    return replace(direction, probe=probe)


def find_direction(
    essence: EssenceTransfer, targets: Sequence[NamedTarget], request: Request, console: Console
) -> Outcome:
    """Find the direction of one target, after Ctrl-C the best so far; or the mixture of several."""
    if request.mode is None:
        assert request.direction is not None  # where there is no mode
        direction, record = read_direction(request.direction, essence.scene.generator)
        if request.one_direction:
            if direction.correction is None:
                console.warn(NO_EFFECT)
            direction = direction.uncorrected()
        return Outcome(direction, record, [])
    if request.one_direction and essence.asked_mapper().correction is None:
        console.warn(NO_EFFECT)
    parts, interrupted = list[Direction](), False
    try:
        for target in targets:
            parts.append(find_one(essence, target, request, console))
    except Interrupted as stopped:
        if len(targets) > 1:  # a mixture needs every direction
            raise
        console.progress("interrupted; going on with the direction so far")
        parts, interrupted = [stopped.direction], True
    taken, weights = [*parts], [target.weight for target in targets]
    for i, target in enumerate(targets):
        if request.mixes and isinstance(target.content, Text):
            # What it does not name would work against the other targets.
            with in_precision(essence.scene.device, request.precision):
                taken[i] = essence.only_named(parts[i], request.keep_identity)
        if target.layers:
            factors = layer_weights(essence.scene.generator.num_ws, **target.layers)
            taken[i] = taken[i].weighted(factors)
    direction = taken[0] if weights == [1] else mixed(taken, weights)
    record = record_of(essence, direction, targets, request)
    if interrupted:
        record["interrupted"] = True
    return Outcome(direction, record, parts, interrupted)


def record_of(
    essence: EssenceTransfer, direction: Direction, targets: Sequence[NamedTarget], request: Request
) -> dict[str, Any]:
    """Return the record of a direction: what made it, and by which settings."""
    record: dict[str, Any] = {
        "method": direction.method,
        "mode": request.mode,
        "seed": request.seed,
        "steps": direction.steps,
        "embedder": essence.scene.embedder.fingerprint,
    }
    if request.precision != "fp32":
        record["precision"] = request.precision
    if request.mode != "instant":
        record["recipe"] = request.recipe_name
        record["settings"] = asdict(essence.recipe_at(request.recipe, request.keep_identity))
        if request.inverts_target:
            record |= inversion_facts(request)
    if request.mode != "optimize":
        mapper = essence.asked_mapper()
        record["mapper"] = mapper.fingerprint
        if (place := essence.place(request.keep_identity)) is not None:
            record["keep_identity"] = place
        if request.one_direction:
            record["one_direction"] = True
        if request.mode != "instant":
            record["gate"] = asdict(Gate.of(mapper, request.keep_identity))
    if request.mixes:
        record["targets"] = [{"target": t.name, "weight": t.weight, **t.layers} for t in targets]
    return record


# Edits


def lots_of(
    scene: Scene, ws: Float[Tensor, "sources num_ws w_dim"]
) -> Iterator[Float[Tensor, "lot num_ws w_dim"]]:
    """Return latents in lots that are rendered at once."""
    return (lot.to(scene.device) for lot in ws.split(scene.at_once))


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The edits of the sources along one direction."""

    facts: dict[str, Any]
    """Entries of report.json."""
    shown: list[Image.Image]
    """Pictures for the sheet."""
    shows: dict[str, Path]
    """Files that show the edit, by their headings on the page."""
    scores: list[Scores]
    """Of each target."""


@dataclass(frozen=True, kw_only=True)
class Editor:
    """The sources of a run, ready to be edited along any direction."""

    essence: EssenceTransfer
    sources: Sources
    latents: Latents
    before: Float[Tensor, "sources features"]
    """Features of the unedited sources."""
    request: Request
    console: Console
    watch: Stopwatch

    def strength(self, direction: Direction) -> float:
        """Return the strength: the requested one, or as much of it as the identity floor leaves."""
        highest, floor = self.request.strength, self.request.identity_floor
        if floor is None:
            return highest
        scored = self.latents.scored[:MAX_SHOWN]
        strength = self.essence.strength_at_identity(scored, direction, floor, highest)
        self.console.result(f"strength {strength:.3g}, by --identity-floor {floor:g}")
        if strength == highest:
            self.console.warn(
                f"--identity-floor {floor:g} has no effect: sources keep more than that at "
                f"strength {highest:.3g}"
            )
        elif strength == 0:
            self.console.warn(
                f"--identity-floor {floor:g}: no strength above 0 keeps that; sources are unedited"
            )
        return strength

    def edit(self, out: OutputFolder, targets: Sequence[NamedTarget], outcome: Outcome) -> Edited:
        """Edit the sources, write their pictures, and score them."""
        scene, latents = self.essence.scene, self.latents
        with self.watch.phase("edit"):
            factors = layer_weights(scene.generator.num_ws, **self.request.layers)
            direction = outcome.direction.weighted(factors)
            if latents.whole is not None:
                direction = direction.for_clip(latents.whole)
            strength = self.strength(direction)
        features: list[Tensor] = []
        shown: list[Image.Image] = []

        def edits(ws: Float[Tensor, "sources num_ws w_dim"]) -> Iterator[Image.Image]:
            for lot in lots_of(scene, ws):
                yield from tensor_to_pictures(self.essence.edit(lot, direction, strength))

        def scored() -> Iterator[Image.Image]:
            places = {*latents.shown}
            for lot in lots_of(scene, latents.scored):
                images = self.essence.edit(lot, direction, strength)
                start = sum(map(len, features))
                features.append(scene.image_features(images))
                for place, picture in enumerate(tensor_to_pictures(images), start):
                    if place in places:
                        shown.append(picture)
                    yield picture

        with self.watch.phase("write"):
            pictures = scored()
            if self.request.clip is not None:  # these few frames are scored, all are written
                pictures = iter([*pictures])
            written = self.sources.write(out, pictures, latents, edits)
        with self.watch.phase("score"):
            after = torch.cat(features)
            embeddings = [self.essence.embed_target(target.content) for target in targets]
            scores = [score_features(one, self.before, after) for one in embeddings]
        rows = target_facts(targets, outcome)
        for row, its in zip(rows, scores, strict=True):
            row["scores"] = score_facts(its)
        with self.watch.phase("write"):
            shows = self.write_shows(out, targets, direction, strength)
        facts = {"strength": strength, "targets": rows, **written}
        return Edited(facts=facts, shown=shown, shows=shows, scores=scores)

    def write_shows(
        self,
        out: OutputFolder,
        targets: Sequence[NamedTarget],
        direction: Direction,
        strength: float,
    ) -> dict[str, Path]:
        """Write the strip and the morph that are asked for; return all that shows the edit."""
        request, ws = self.request, self.latents.scored[:IN_SHOWS]
        shows = {}
        if request.clip is not None and not request.clip.is_dir():
            shows["The edited clip"] = out.path / VIDEO
        if request.strip:
            names = [name for name, _ in self.sources.named(self.latents)][:IN_SHOWS]
            alone = targets[0].content if len(targets) == 1 else None
            target = None if isinstance(alone, Text) else alone
            strip = self.essence.strip(ws, direction, strength, target=target, names=names)
            path = shows["At several strengths"] = out.take(STRIP)
            write_picture(strip, path)
        if request.morph is not None:
            path = shows["From unedited to edited and back"] = out.take(MORPHS[request.morph])
            pictures = self.essence.morph(ws, direction, strength)
            with self.console.bar(pictures, total=MORPH + 1, desc="morph", unit="frame") as bar:
                write_morph(path, iter(bar))
        return shows


def open_editor(
    essence: EssenceTransfer, sources: Sources, request: Request, console: Console, watch: Stopwatch
) -> Editor:
    """Invert or generate the sources."""
    scene = essence.scene
    with watch.phase("sources"):
        latents = sources.latents(scene)
        lots = lots_of(scene, latents.scored)
        before = torch.cat([scene.image_features(scene.render(lot)) for lot in lots])
    return Editor(
        essence=essence,
        sources=sources,
        latents=latents,
        before=before,
        request=request,
        console=console,
        watch=watch,
    )


def read_targets(request: Request, console: Console) -> list[NamedTarget]:
    """Read the targets: pictures, then texts."""
    contents: list[tuple[str, Image.Image | Text]] = []
    for path in request.pictures:
        picture = read_picture(path)
        check_shows(picture, str(path), console)
        contents.append((str(path), picture))
    contents += [(text, Text(text)) for text in request.texts]
    parts = zip(contents, request.weights, request.own_layers, strict=True)
    return [NamedTarget(*named, weight, layers) for named, weight, layers in parts]


def read_sources(request: Request, finder: FaceFinder | None, console: Console) -> Sources:
    """Read the sources and find their faces, before any network is loaded."""
    if request.clip is not None:
        return Clip(request.clip, finder, request.face, request.smooth, console=console)
    if request.latents is not None:
        return LatentFile(request.latents)
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
    check_render_size(scene.generator, request.recipe.render_size, "--render-size")
    if request.invert_steps:
        inverter = searching_inverter(scene, request.invert_steps, console)
        scene = replace(scene, inverter=inverter)
    aligner = None if finder is None else target_aligner(finder, scene.generator.resolution)
    return essence_of(scene, request.world, request.mapper, aligner)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command, once its networks are loaded."""

    request: Request
    console: Console
    watch: Stopwatch
    essence: EssenceTransfer
    editor: Editor | None
    """None: no source is edited."""
    out: OutputFolder

    def direct(self, out: OutputFolder, targets: Sequence[NamedTarget]) -> Outcome:
        """Find or read a direction, and write it."""
        phase = "optimize" if self.request.command == "optimize" else "direction"
        with self.watch.phase(phase):
            outcome = find_direction(self.essence, targets, self.request, self.console)
        self.out.clear()
        out.clear()
        # Written at once: minutes of optimization must outlive any fault that follows.
        fingerprint = self.essence.scene.generator.fingerprint
        content = outcome.direction.content(outcome.record, fingerprint)
        write_file(out.take(DIRECTION), content)
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
                self.write_page(self.out, targets, edited, facts)
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
            self.console.result(f"direction by {outcome.direction.method}; {self.places()}")
        self.print_next(targets[0], path)
        return report, STOPPED if outcome.interrupted else 0

    def write_page(
        self,
        out: OutputFolder,
        targets: Sequence[NamedTarget],
        edited: Edited,
        facts: dict[str, Any],
    ) -> None:
        """Write index.html of one result.

        Args:
            facts: the content of report.json.
        """
        assert self.editor is not None
        sources, latents = self.editor.sources, self.editor.latents
        notes = [""] * len(latents.shown)
        if len(targets) == 1:
            notes = [source_words(facts["scores"], place) for place in latents.shown]
        shown = sources.shown(out, latents, edited.shown, notes)
        content = gallery(
            [(t.label, None if isinstance(t.content, Text) else t.content) for t in targets],
            shown,
            facts=result_words(facts),
            warnings=doubts(facts),
            others=facts["edited"][len(latents.shown) :],
            shows=edited.shows,
            command=self.request.line,
            files=[f for f in (GRID, DIRECTION) if f in out.files] + [REPORT],
        )
        write_file(out.take(PAGE), content)

    def places(self) -> str:
        """Return where to look, for people."""
        return f"look at {self.out.path / GRID}, or open {self.out.path / PAGE}"

    def print_cut(self, shown: int) -> None:
        """Say how many of the sources the sheet and other pictures show, if not all."""
        assert self.editor is not None
        request, total = self.request, len(self.editor.latents.scored)
        if request.clip is not None:
            return
        few = [STRIP] * request.strip + [MORPHS[m] for m in (request.morph,) if m is not None]
        for names, most in ((few, IN_SHOWS), ([GRID, PAGE], shown)):
            if names and most < total:
                verb = "shows" if len(names) == 1 else "show"
                names_of = " and ".join(names)
                self.console.result(f"{names_of} {verb} the first {most} of {total} sources")

    def several(self, targets: Sequence[NamedTarget]) -> tuple[dict[str, Any], int]:
        """Write a result for each target, a sheet and a report of all.

        A target without a direction does not end the run. After Ctrl-C the report and the sheet
        tell of the targets so far.

        Returns:
            The report and the exit code.
        """
        stems = [
            words_of(t.name) if isinstance(t.content, Text) else Path(t.name).stem for t in targets
        ]
        names = unique_names(stems, taken=(REPORT, GRID, PAGE))
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
                if edited is not None:
                    self.write_page(folder, [target], edited, facts)
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
        place = self.places() if self.editor else f"look at {self.out.path}"
        self.console.result(f"{len(done)} of {len(targets)} targets; {place}")
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
        """Write sheet and page of several targets, and the report, whose content is returned."""
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
            content = overview(
                cards_of(entries, shown),
                warnings=doubts(facts),
                command=self.request.line,
                files=[GRID, REPORT],
            )
            write_file(self.out.take(PAGE), content)
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


def cards_of(
    entries: Sequence[dict[str, Any]], shown: Sequence[tuple[NamedTarget, list[Image.Image]]]
) -> list[Linked]:
    """Return what the page of several targets shows of each.

    Args:
        entries: of report.json, also of targets without a direction.
        shown: the other targets and their results.
    """
    cards, rest = [], iter(shown)
    for entry in entries:
        if "error" in entry:
            cards.append(Linked(entry["target"], None, (), None, entry["error"]))
            continue
        target, pictures = next(rest)
        if len(cards) >= MAX_TARGETS:  # the page would grow too large to open
            pictures = []
        content = None if isinstance(target.content, Text) or not pictures else target.content
        facts = [
            f"transfer score {score_words(entry['scores'])}",
            f"strength {entry['strength']:.3g}",
            method_words(entry["method"]),
        ]
        link = f"{entry['folder']}/{PAGE}"
        cards.append(Linked(target.label, content, pictures[:IN_OVERVIEW], link, "; ".join(facts)))
    return cards


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
                request.out, request.command, overwrite=request.overwrite, inputs=request.inputs
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
            work = Run(
                request=request,
                console=console,
                watch=watch,
                essence=essence,
                editor=editor,
                out=out,
            )
            report, code = (work.several if request.separate else work.one)(targets)
    if request.json:
        say(json.dumps(report, indent=2, default=str))
    return code
