"""The page of the studio: what is shown where, and which change renders what again.

Knows Gradio and a visitor's session; nothing of the server. What a visitor types reaches the page
escaped, and never as the name of a file.
"""

import secrets
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from predictor import Mode
from predictor.direction import Method, WatchStep
from predictor.studio.session import (
    MAX_FACTOR,
    MAX_SOURCES,
    MAX_TARGETS,
    Found,
    OpenWorld,
    Settings,
    Sources,
    direction_of,
    edit,
    find_targets,
    for_people,
    generate_sources,
    in_words,
    open_world,
    read_sources,
    render,
    strength_within,
    write_files,
)
from targetclip.command import one_line
from targetclip.optimize import Progress
from targetclip.recipes import Recipe
from targetclip.world import DEFAULT_WORLD, World

MODES = {
    "auto": "the mapper, checked: refined or optimized where it falls short",
    "instant": "the mapper alone, unchecked",
    "refine": "the mapper, always refined",
    "optimize": "the optimizer alone: slow",
}
MINE, GENERATED = "my pictures", "generated"
PROGRESS = gr.Progress()  # how a handler asks Gradio for one
KEPT = 1800  # seconds that a visitor's results are kept after the last use
UPLOADS: dict[str, Any] = {  # of galleries that take pictures
    "sources": ["upload", "webcam", "clipboard"],
    "interactive": True,
    "show_label": False,
    "columns": 4,
    "fit_columns": False,
    "height": 150,
}
CHOICES: dict[str, Any] = {  # of galleries whose pictures are clicked
    "show_label": False,
    "fit_columns": False,
    "height": "auto",
    "allow_preview": False,
    "interactive": False,
}
CSS = """
.facts dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; margin: 0 }
.facts dt { font-weight: 600 } .facts dd { margin: 0 }
#examples .grid-wrap, #results .grid-wrap { min-height: 0 !important; max-height: 60vh !important }
"""


@dataclass
class Worlds:
    """The worlds of a studio, each loaded when it is first used."""

    known: dict[str, World]
    device: str | None = None
    mapper: Path | None = None
    """Mapper of the first world, in the place of its own."""
    opened: dict[str, OpenWorld] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, name: str) -> OpenWorld:
        """Return a world, loaded. ValueError: no such world, or as `open_world`."""
        if name not in self.known:
            raise ValueError(f"expected one of {', '.join(self.known)}, found {name!r}")
        with self.lock:  # two visitors at once load it once
            if name not in self.opened:
                mapper = self.mapper if name == next(iter(self.known)) else None
                self.opened[name] = open_world(self.known[name], self.device, mapper)
        return self.opened[name]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a visitor has so far; a new one is made at every change."""

    world: str
    target_key: tuple[Any, ...]
    found: Found
    source_key: tuple[Any, ...]
    sources: Sources
    limit_key: Settings | None
    limit: float
    """The largest strength that keeps the identity asked for."""
    chosen: int
    """The source that is shown large."""
    shown: str
    """Its file."""


def explained(work: Callable[..., Any]) -> Callable[..., Any]:
    """Show an error that a visitor can mend as its one line, without markup."""

    @wraps(work)
    def run(*args: Any) -> Any:
        try:
            return work(*args)
        except (ValueError, OSError, FloatingPointError) as error:
            raise gr.Error(escape(one_line(error)), print_exception=False) from error

    return run


def paths_of(pictures: Sequence[tuple[str, str | None]] | None) -> tuple[str, ...]:
    """Return the paths of a gallery's pictures."""
    return tuple(path for path, _ in pictures or ())


def facts_html(facts: dict[str, str]) -> str:
    """Return facts as a list of names and sentences."""
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(rows)}</dl>"


class Page:
    """The page, and what its controls do.

    Args:
        worlds: to choose from, the first by default.
        folder: for files that are shown; Gradio serves it, and removes what is old.
        targets, sources: examples for the bundled world; of other worlds' generators they are not.
    """

    def __init__(
        self,
        worlds: Worlds,
        folder: Path,
        targets: Sequence[Path] = (),
        sources: Sequence[Path] = (),
    ) -> None:
        self.worlds, self.folder = worlds, folder
        self.examples = [str(path) for path in targets]
        self.example_sources = [str(path) for path in sources]
        self.stops: dict[str, threading.Event] = {}
        """By session: set to end a search with the direction so far."""
        first = worlds.open(next(iter(worlds.known)))
        self.offers = first.world.name == DEFAULT_WORLD and bool(self.examples)
        with gr.Blocks(
            title="targetclip studio", analytics_enabled=False, delete_cache=(KEPT, KEPT)
        ) as self.blocks:
            gr.Markdown("# Give faces the essence of a picture")
            self.kept = gr.State(None, time_to_live=KEPT)
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    self.lay_out_targets(first)
                    self.lay_out_sources(first)
                with gr.Column(scale=3, min_width=320):
                    self.lay_out_results(first)
            self.connect()
            self.offer_api()

    # Layout

    def lay_out_targets(self, first: OpenWorld) -> None:
        """Make the controls of targets."""
        names = list(self.worlds.known)
        self.world = gr.Dropdown(names, value=names[0], label="World", visible=len(names) > 1)
        gr.Markdown("### 1. Target: its essence is taken")
        first_target = self.examples[:1] if self.offers else None
        self.targets = gr.Gallery(first_target, label="Targets", elem_id="targets", **UPLOADS)
        self.text = gr.Textbox(
            label="Or in words",
            placeholder="green hair and round glasses",
            visible=first.essence.texts is not None,
            elem_id="text",
        )
        self.offered = gr.Gallery(
            self.examples or None,
            label="Examples",
            columns=5,
            visible=self.offers,
            elem_id="examples",
            **CHOICES,
        )

    def lay_out_sources(self, first: OpenWorld) -> None:
        """Make the controls of sources."""
        gr.Markdown("### 2. Sources: the faces that get it")
        inverts = first.essence.scene.inverter is not None
        mine = inverts and self.offers
        self.kind = gr.Radio(
            [MINE, GENERATED] if inverts else [GENERATED],
            value=MINE if mine else GENERATED,
            label="Faces that are edited",
        )
        self.mine = gr.Gallery(
            self.example_sources if self.offers else None,
            label="Sources",
            visible=mine,
            elem_id="sources",
            **UPLOADS,
        )
        self.count = gr.Slider(1, MAX_SOURCES, 4, step=1, label="Number", visible=not mine)
        self.seed = gr.Number(0, precision=0, minimum=0, label="Seed", visible=not mine)
        with gr.Accordion("How the direction is found", open=False):
            self.mode = gr.Radio(
                [(MODES[mode], mode) for mode in first.modes],
                value=first.modes[0],
                label="Who finds it",
                elem_id="mode",
            )
            self.keep = gr.Slider(
                0,
                1,
                first.keep or 0.0,
                step=0.01,
                label="Keep identity",
                info="0 asks the mapper for the most essence, 1 for the most identity.",
                visible=first.keep is not None,
                elem_id="keep",
            )
            self.stop = gr.Button("Stop the search, keep the direction so far", size="sm")
        self.go = gr.Button("Transfer the essence", variant="primary", elem_id="go")

    def lay_out_results(self, first: OpenWorld) -> None:
        """Make what shows results, and the controls that only render again."""
        gr.Markdown("### 3. Result: drag the line, click another face")
        self.large = gr.ImageSlider(
            label="Source and result",
            format="png",
            type="filepath",
            interactive=False,
            max_height=420,
            elem_id="large",
        )
        self.strength = gr.Slider(
            0, MAX_FACTOR, first.world.strength, step=0.05, label="Strength", elem_id="strength"
        )
        self.all = gr.Gallery(
            label="Results", format="png", columns=6, elem_id="results", **CHOICES
        )
        self.facts = gr.HTML(elem_classes="facts", elem_id="facts")
        self.floor = gr.Slider(
            0,
            1,
            0,
            step=0.05,
            label="Keep at least this identity",
            info="Lowers the strength where needed; 0 leaves it alone.",
            visible=first.essence.scene.identity is not None,
            elem_id="floor",
        )
        with gr.Accordion("Several targets: how much of each", open=False):
            self.weights = [
                gr.Slider(-1, 1, 0.5, step=0.05, label=f"Target {i + 1}")
                for i in range(MAX_TARGETS)
            ]
        with gr.Accordion("Layers, and one direction for all", open=False):
            self.coarse, self.middle, self.fine = (
                gr.Slider(0, MAX_FACTOR, 1, step=0.05, label=label)
                for label in ("Coarse: shape", "Middle: features", "Fine: colours")
            )
            self.one_direction = gr.Checkbox(
                False, label="Move all sources alike: leave out what is read from each source"
            )
        with gr.Accordion("Download", open=True):
            self.make = gr.Button("Make the files", elem_id="make")
            self.files = gr.File(
                label="Pictures, sheet, direction and GIF",
                file_count="multiple",
                interactive=False,
                visible=False,
                elem_id="files",
            )

    # Events

    def connect(self) -> None:
        """Say which control does what."""
        asked = {self.world, self.targets, self.text, self.mode, self.kind, self.mine}
        asked |= {self.count, self.seed, self.keep, self.kept}
        sliders = {self.strength, self.floor, *self.weights, self.one_direction}
        sliders |= {self.coarse, self.middle, self.fine}
        self.inputs = asked | sliders
        results = [self.large, self.all, self.facts, self.kept]
        private: dict[str, Any] = {"api_visibility": "private"}
        # One visitor's work at a time: a second one would make both slower.
        work = {**private, "concurrency_id": "work", "concurrency_limit": 1}
        gr.on(
            [self.go.click, self.text.submit, self.keep.release],
            self.show_transfer,
            self.inputs,
            results,
            trigger_mode="once",
            **work,
        )
        self.blocks.load(self.first_result, self.inputs, results, **work)
        self.offered.select(self.take_example, None, [self.targets, self.text], **private).then(
            self.show_transfer, self.inputs, results, **work
        )
        latest = {"trigger_mode": "always_last", "show_progress": "hidden"}
        moving, sliding = {**latest, **work}, {**latest, **private, "queue": False}
        # While a slider moves, the large picture follows; the others when it is let go.
        moves = [self.strength, self.coarse, self.middle, self.fine, *self.weights]
        gr.on(
            [slider.input for slider in moves],
            self.render_one,
            sliders | {self.kept},
            [self.large],
            **sliding,
        )
        gr.on(
            [*(slider.release for slider in [*moves, self.floor]), self.one_direction.input],
            self.render_all,
            sliders | {self.kept},
            results,
            **moving,
        )
        self.all.select(self.choose, sliders | {self.kept}, [self.large, self.kept], **moving)
        self.kind.change(
            lambda kind: [gr.update(visible=kind == MINE)] + [gr.update(visible=kind != MINE)] * 2,
            self.kind,
            [self.mine, self.count, self.seed],
            **private,
        )
        self.stop.click(self.stop_searching, None, None, queue=False, **private)
        self.world.change(
            self.change_world,
            self.world,
            [
                *(self.text, self.mode, self.kind, self.mine, self.floor, self.keep),
                *(self.offered, self.strength, self.targets, *results),
            ],
            **work,
        )
        self.make.click(
            self.make_files, sliders | {self.kept}, self.files, trigger_mode="once", **work
        )

    def settings(self, data: dict[Any, Any]) -> Settings:
        """Return what the sliders say."""
        return Settings(
            strength=float(data[self.strength]),
            weights=tuple(float(data[slider]) for slider in self.weights),
            coarse=float(data[self.coarse]),
            middle=float(data[self.middle]),
            fine=float(data[self.fine]),
            one_direction=bool(data[self.one_direction]),
            floor=float(data[self.floor]),
        )

    @explained
    def show_transfer(
        self, data: dict[Any, Any], request: gr.Request, progress: gr.Progress = PROGRESS
    ) -> tuple[Any, ...]:
        """Find directions and read sources, unless the last ones still hold; show the edits."""
        opened = self.worlds.open(data[self.world])
        kept: Kept | None = data[self.kept]
        pictures, text, mode = paths_of(data[self.targets]), data[self.text] or "", data[self.mode]
        keep = None if opened.keep is None or mode == "optimize" else float(data[self.keep])
        keep = None if keep == opened.keep else keep  # then as where nobody asks
        target_key = (opened.world.name, pictures, text, mode, keep)
        source_key = (
            opened.world.name,
            data[self.kind],
            paths_of(data[self.mine]),
            data[self.count],
            data[self.seed],
        )
        if kept is not None and kept.source_key == source_key:
            sources, chosen, shown = kept.sources, kept.chosen, kept.shown
        else:
            if data[self.kind] == MINE:
                sources = read_sources(opened, paths_of(data[self.mine]))
            else:
                sources = generate_sources(opened, int(data[self.count]), int(data[self.seed] or 0))
            chosen, shown = 0, self.file_of(sources.pictures[0])
        if kept is not None and kept.target_key == target_key:
            found = kept.found
        else:
            found = self.find(opened, pictures, text, mode, keep, request, progress)
        kept = Kept(
            world=opened.world.name,
            target_key=target_key,
            found=found,
            source_key=source_key,
            sources=sources,
            limit_key=None,
            limit=MAX_FACTOR,
            chosen=chosen,
            shown=shown,
        )
        return self.results(kept, self.settings(data))

    def find(
        self,
        opened: OpenWorld,
        pictures: Sequence[str],
        text: str,
        mode: Mode,
        keep: float | None,
        request: gr.Request,
        progress: gr.Progress,
    ) -> Found:
        """Find directions; a search shows its steps, and ends early when it is told to stop."""
        session = str(request.session_hash)
        stop = self.stops[session] = threading.Event()

        def begun(method: Method, recipe: Recipe) -> WatchStep:
            def on_step(step: Progress) -> None:
                progress((step.step, recipe.steps), desc=f"searching, loss {step.loss[0]:.3f}")
                if stop.is_set():
                    raise KeyboardInterrupt  # as Ctrl-C does: the best so far is kept

            return on_step

        try:
            return find_targets(opened, pictures, text, mode, keep, begun)
        finally:
            self.stops.pop(session, None)

    def results(self, kept: Kept, settings: Settings) -> tuple[Any, ...]:
        """Return all edits, what is said of them, and what is kept of the visitor."""
        opened = self.worlds.open(kept.world)
        limit_key = replace(settings, strength=0.0)
        if kept.limit_key != limit_key:
            limit = strength_within(opened, kept.found, kept.sources, settings)
            kept = replace(kept, limit_key=limit_key, limit=limit)
        edited = edit(opened, kept.found, kept.sources, settings, kept.limit)
        facts = facts_html(in_words(kept.found, edited, settings))
        pictures = [for_people(picture) for picture in edited.pictures]
        return self.pair(kept, edited.pictures[kept.chosen]), pictures, facts, kept

    def file_of(self, picture: Image.Image, path: str | None = None) -> str:
        """Write a picture to show, under a name that nobody can guess. Quickly: a moving slider
        waits for it."""
        path = path or str(self.folder / f"{secrets.token_hex(16)}.png")
        for_people(picture).save(path, compress_level=1)
        return path

    def pair(self, kept: Kept, edited: Image.Image) -> tuple[str, str]:
        """Return the files of the chosen source, written again if it was removed, and its edit."""
        if not Path(kept.shown).exists():
            self.file_of(kept.sources.pictures[kept.chosen], kept.shown)
        return kept.shown, self.file_of(edited)

    @explained
    def render_one(self, data: dict[Any, Any]) -> Any:
        """Render the source that is shown large."""
        kept: Kept | None = data[self.kept]
        if kept is None:
            return gr.skip()
        opened, settings = self.worlds.open(kept.world), self.settings(data)
        direction = direction_of(opened, kept.found, settings)
        strength = min(settings.strength, kept.limit)
        pictures, _ = render(opened, kept.sources, direction, strength, kept.chosen)
        return self.pair(kept, pictures[0])

    @explained
    def render_all(self, data: dict[Any, Any]) -> Any:
        """Render and score all sources."""
        kept: Kept | None = data[self.kept]
        if kept is None:
            return (gr.skip(),) * 4
        return self.results(kept, self.settings(data))

    @explained
    def choose(self, data: dict[Any, Any], event: gr.SelectData) -> Any:
        """Show another source large."""
        kept: Kept | None = data[self.kept]
        if kept is None:
            return gr.skip(), gr.skip()
        place = int(event.index)
        if not 0 <= place < len(kept.sources.names):
            raise ValueError(f"expected the number of a source, found {place}")
        kept = replace(kept, chosen=place, shown=self.file_of(kept.sources.pictures[place]))
        return self.render_one({**data, self.kept: kept}), kept

    @explained
    def take_example(self, event: gr.SelectData) -> Any:
        """Make an example the only target."""
        return [self.examples[int(event.index)]], ""

    def first_result(self, data: dict[Any, Any], request: gr.Request) -> Any:
        """Show the example's result as the page opens, where there is one."""
        if not data[self.targets]:
            return (gr.skip(),) * 4
        return self.show_transfer(data, request)

    def stop_searching(self, request: gr.Request) -> None:
        """End the visitor's search; the direction so far is kept."""
        if (stop := self.stops.get(str(request.session_hash))) is not None:
            stop.set()

    @explained
    def change_world(self, name: str) -> tuple[Any, ...]:
        """Show what another world can do, and forget the results of the last one."""
        opened = self.worlds.open(name)
        scene, bundled = opened.essence.scene, name == DEFAULT_WORLD
        inverts = scene.inverter is not None
        kind = MINE if bundled and inverts else GENERATED
        return (
            gr.update(value="", visible=opened.essence.texts is not None),
            gr.update(
                choices=[(MODES[mode], mode) for mode in opened.modes], value=opened.modes[0]
            ),
            gr.update(choices=[MINE, GENERATED] if inverts else [GENERATED], value=kind),
            self.example_sources if bundled else None,
            gr.update(value=0, visible=scene.identity is not None),
            gr.update(value=opened.keep or 0.0, visible=opened.keep is not None),
            gr.update(visible=bundled and bool(self.examples)),
            opened.world.strength,
            self.examples[:1] if bundled else None,
            *(None, None, "", None),
        )

    @explained
    def make_files(self, data: dict[Any, Any]) -> Any:
        """Write the results into a new folder, and offer them."""
        kept: Kept | None = data[self.kept]
        if kept is None:
            raise ValueError("there is no result yet: choose a target and transfer its essence")
        opened, settings = self.worlds.open(kept.world), self.settings(data)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        paths = write_files(folder, opened, kept.found, kept.sources, settings, kept.limit)
        return gr.update(value=[str(path) for path in paths], visible=True)

    # For programs

    def offer_api(self) -> None:
        """Offer one call for programs, which the page's API view documents."""
        target, source = gr.File(visible=False), gr.File(visible=False)
        text, strength = gr.Textbox(visible=False), gr.Number(1, visible=False)
        result = gr.Image(format="png", visible=False)
        facts = gr.JSON(visible=False)
        gr.Button(visible=False).click(
            self.call,
            [target, source, text, strength],
            [result, facts],
            api_name="transfer",
            concurrency_id="work",
            concurrency_limit=1,
        )

    @explained
    def call(
        self, target: str | None, source: str, text: str = "", strength: float = 1.0
    ) -> tuple[Image.Image, dict[str, str]]:
        """Give one source the essence of a target picture, a text, or both; return the edited
        picture and what is to be said of it."""
        opened = self.worlds.open(next(iter(self.worlds.known)))
        found = find_targets(opened, [target] if target else [], text or "")
        settings = Settings(strength=float(strength), weights=(0.5, 0.5))
        edited = edit(opened, found, read_sources(opened, [source]), settings)
        return edited.pictures[0], in_words(found, edited, settings)
