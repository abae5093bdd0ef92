"""What the `targetclip` command does: find a direction, edit sources, write the results.

Knows the order of the work and how long each phase takes. Every choice is in the request.
"""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.clips import Clip
from predictor.direction import (
    Direction,
    Gate,
    Interrupted,
    Method,
    WatchSearch,
    WatchStep,
    mixed,
)
from predictor.inputs import Text
from predictor.options import Request
from predictor.report import (
    NamedTarget,
    Outcome,
    edit_facts,
    inversion_facts,
    print_scores,
    score_facts,
    target_facts,
    write_grid,
    write_report,
)
from predictor.sources import (
    Generated,
    Photos,
    Sources,
    find_faces,
    searching_inverter,
    target_aligner,
)
from predictor.transfer import EssenceTransfer, essence_of
from targetclip.command import (
    STOPPED,
    Stopwatch,
    choose_device,
    in_precision,
    make_folder,
    write_file,
)
from targetclip.directions import (
    RELEASED_SUFFIXES,
    direction_bytes,
    load_direction,
    released_direction,
)
from targetclip.media.alignment import FaceFinder
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.optimize import Progress
from targetclip.recipes import Recipe
from targetclip.scene import MAX_IMAGES, Scene, layer_weights
from targetclip.world import load_scene

RELEASED = "released"  # method of the directions of TargetCLIP's release


def read_targets(request: Request) -> list[NamedTarget]:
    """Read the targets: pictures, then texts."""
    contents: list[tuple[str, Image.Image | Text]] = [
        *((str(path), read_picture(path)) for path in request.pictures),
        *((text, Text(text)) for text in request.texts),
    ]
    return [NamedTarget(*named, w) for named, w in zip(contents, request.weights, strict=True)]


def read_sources(request: Request, finder: FaceFinder | None) -> Sources:
    """Read the sources and find their faces, before any network is loaded."""
    if request.sources is None:
        return Generated(request.num_sources, request.seed)
    if request.clip is not None:
        return Clip(request.clip, finder, request.face, request.smooth)
    return Photos(request.sources, finder, request.face)


def load(request: Request, finder: FaceFinder | None) -> EssenceTransfer:
    """Load the networks of a request."""
    scene = load_scene(
        request.world,
        choose_device(request.device),
        max_images=request.max_images,
        checkpoint_layers=request.checkpoint_layers,
    )
    if request.invert_steps:
        inverter = searching_inverter(scene, request.invert_steps)
        scene = dataclasses.replace(scene, inverter=inverter)
    aligner = None if finder is None else target_aligner(finder, scene.generator.resolution)
    return essence_of(scene, request.world, request.mapper, aligner)


def progress_bars(bars: ExitStack, recipe_name: str) -> WatchSearch:
    """Return a function that opens a bar in `bars` for a search, and closes that of the last."""

    def watch(method: Method, recipe: Recipe) -> WatchStep:
        bars.close()
        verb = "refine" if method == "refined" else "optimize"
        bar = tqdm(total=recipe.steps, desc=f"{verb} ({recipe_name})", unit="step")
        bars.enter_context(bar)

        def on_step(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.loss[0]:.4f}", refresh=False)
            bar.update()

        return on_step

    return watch


def find_direction(
    essence: EssenceTransfer, targets: list[NamedTarget], request: Request
) -> Outcome:
    """Find the direction of the targets; after Ctrl-C, if there is one target, the best so far."""
    if request.mode is None:
        return read_direction(essence.scene, request)
    if request.falls_back:
        print(
            "targetclip: this world has no mapper: the optimizer finds directions", file=sys.stderr
        )
    parts, interrupted = list[Direction](), False
    try:
        with ExitStack() as bars, in_precision(essence.scene.device, request.precision):
            given = request.mode, request.recipe, request.seed
            watch = progress_bars(bars, request.recipe_name)
            for target in targets:
                parts.append(essence.direction(target.content, *given, watch))
    except Interrupted as stopped:
        if len(targets) > 1:  # a mixture needs every direction
            raise
        print("targetclip: interrupted; going on with the direction so far", file=sys.stderr)
        parts, interrupted = [stopped.direction], True
    direction = parts[0] if request.weights == (1,) else mixed(parts, request.weights)
    record = record_of(essence, direction, request)
    if interrupted:
        record["interrupted"] = True
    return Outcome(direction, record, parts, interrupted)


def record_of(essence: EssenceTransfer, direction: Direction, request: Request) -> dict[str, Any]:
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
        record["settings"] = dataclasses.asdict(request.recipe)
        if request.inverts_target:
            record |= inversion_facts(request)
    if request.mode != "optimize":
        mapper = essence.asked_mapper()
        record["mapper"] = mapper.fingerprint
        if request.mode != "instant":
            record["gate"] = dataclasses.asdict(Gate.of(mapper))
    if request.weights != (1,):
        names = (*map(str, request.pictures), *request.texts)
        weighted = zip(names, request.weights, strict=True)
        record["targets"] = [{"target": name, "weight": weight} for name, weight in weighted]
    return record


def read_direction(scene: Scene, request: Request) -> Outcome:
    """Read a direction file: ours, with its record, or one of TargetCLIP's release."""
    path, generator = request.direction, scene.generator
    assert path is not None  # where there is no mode
    if path.suffix in RELEASED_SUFFIXES:
        vector = released_direction(path, generator.num_ws, generator.w_dim)
        record: dict[str, Any] = {"method": RELEASED}
    else:
        stored = load_direction(path, generator)
        vector, record = stored.direction, stored.record
    method = str(record.get("method", "file"))
    direction = Direction(
        vector=vector.to(scene.device), method=method, generator=generator.fingerprint
    )
    return Outcome(direction, record, [])


def write_direction(request: Request, scene: Scene, outcome: Outcome) -> None:
    """Write direction.safetensors."""
    content = direction_bytes(outcome.direction.vector, scene.generator, outcome.record)
    write_file(request.out / "direction.safetensors", content)


def run_optimize(request: Request) -> int:
    """Find a direction; write direction.safetensors and report.json. Return the exit code."""
    targets = read_targets(request)
    finder = find_faces(request, targets)
    make_folder(request.out)
    watch = Stopwatch()
    with watch.phase("load"):
        essence = load(request, finder)
    with watch.phase("optimize"):
        outcome = find_direction(essence, targets, request)
    write_direction(request, essence.scene, outcome)
    facts: dict[str, Any] = {"targets": target_facts(targets, outcome)}
    direction = outcome.direction
    if direction.transfer is not None:
        own = {"transfer": direction.transfer, "consistency": direction.consistency}
        facts["scores_on_own_sources"] = own
    write_report(request, essence.scene, outcome, watch, facts)
    print(f"wrote {request.out / 'direction.safetensors'}")
    return STOPPED if outcome.interrupted else 0


def run_transfer(request: Request) -> int:
    """Find or read a direction, edit the sources, and write pictures, grid, direction and report.

    Return the exit code.
    """
    targets = read_targets(request)
    finder = find_faces(request, targets)
    make_folder(request.out)
    watch = Stopwatch()
    with watch.phase("sources"):
        sources = read_sources(request, finder)
    with watch.phase("load"):
        essence = load(request, finder)
        scene = essence.scene
    with watch.phase("sources"):
        latents = sources.latents(scene)
    with watch.phase("direction"):
        outcome = find_direction(essence, targets, request)
    # Written at once: minutes of optimization must outlive any fault that follows.
    write_direction(request, scene, outcome)
    with watch.phase("edit"):
        factors = layer_weights(scene.generator.num_ws, **request.layers).to(scene.device)
        vector, strength = outcome.direction.vector * factors[:, None], request.strength
        if request.identity_floor is not None:
            strength = essence.strength_at_identity(
                latents.scored, vector, request.identity_floor, strength
            )
        before = scene.edit(latents.scored, vector, 0.0)
        edited = scene.edit(latents.scored, vector, strength)
    with watch.phase("score"):
        scores = [essence.score(target.content, before, edited) for target in targets]

    def edited_pictures(ws: Float[Tensor, "sources num_ws w_dim"]) -> Iterator[Image.Image]:
        for part in ws.split(scene.max_images or MAX_IMAGES):
            yield from tensor_to_pictures(scene.edit(part.to(scene.device), vector, strength))

    with watch.phase("write"):
        pictures = tensor_to_pictures(edited)
        shown = [pictures[i] for i in latents.shown]
        write_grid(request.out, targets, latents.rows, shown, strength)
        written = sources.write(request.out, pictures, latents, edited_pictures)
    rows = target_facts(targets, outcome)
    for row, its in zip(rows, scores, strict=True):
        row["scores"] = score_facts(its)
    facts: dict[str, Any] = {
        "mode": request.mode,
        "direction": None if request.direction is None else str(request.direction),
        "strength": strength,
        **sources.facts,
        **latents.facts,
        "targets": rows,
        **written,
        **edit_facts(request),
    }
    if request.sources is not None:
        facts |= inversion_facts(request)
    if len(targets) == 1:
        facts |= {"target": targets[0].name, "scores": rows[0]["scores"]}
    write_report(request, scene, outcome, watch, facts)
    print_scores(targets, scores, outcome, request.out)
    return STOPPED if outcome.interrupted else 0
