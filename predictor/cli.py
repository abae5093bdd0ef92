"""The `targetclip` command: transfer a target's essence, find a direction and keep it, see worlds.

Examples:

    targetclip transfer --target examples/joker.png --num-sources 6 --out out
    targetclip transfer --target t.png --sources a.png b.png --out out
    targetclip transfer --target t.png --sources clip.mp4 --out out
    targetclip optimize --target t.png --out out
    targetclip transfer --target t.png --direction out/direction.safetensors --out other
    targetclip world check ffhq1024
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.clips import WINDOW, Clip, check_clip, clips_among
from predictor.direction import Direction, Interrupted, Method, mixed
from predictor.direction import Gate
from predictor.transfer import load_essence
from predictor.options import (
    OF_OPTIMIZER,
    Asked,
    Optimize,
    Options,
    Transfer,
    WorldCheck,
    applied,
    parse,
)
from predictor.report import (
    Found,
    Stopwatch,
    Wanted,
    base_report,
    make_folder,
    report_scores,
    report_targets,
    tell,
    write_file,
    write_grid,
    write_report,
)
from predictor.sources import (
    Generated,
    Photos,
    Sources,
    check_inverting,
    find_faces,
    inverting,
    may_invert_target,
    prepare_inversion,
)
from predictor.transfer import EssenceTransfer, Mode
from targetclip.directions import direction_bytes, load_direction
from targetclip.editing import layer_weights
from targetclip.media.faces import FaceFinder
from targetclip.media.images import read_picture, tensor_to_pictures
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Recipe
from targetclip.released import SUFFIXES, released_direction
from targetclip.world import World, load_world, world_names
from targetclip.world_files import READY, check_files, fetch_missing, state_of

RELEASED = "released"  # how a direction file of TargetCLIP's release was made
INTERRUPTED = 130  # exit code of a command that Ctrl-C ended


def choose_recipe(options: Options, world: World) -> tuple[str, Recipe]:
    """The recipe's name, and the recipe with what the command line changes."""
    name = options.recipe or world.recipe
    if name not in RECIPES:
        raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    changes = {
        key: value
        for key in ("initial", "steps", "patience")
        if (value := getattr(options, key)) is not None
    }
    return name, dataclasses.replace(RECIPES[name], **changes)


def check_world(options: Options, world: World) -> None:
    """Raise a ValueError for what the world cannot do, before a search takes its minutes."""
    name, recipe = choose_recipe(options, world)
    check_inverting(options, world, recipe)
    if isinstance(options, Transfer):
        check_clip(options.sources, options.smooth, options.out)
    if options.text and not world.neutral:
        raise ValueError(
            f"--text: world {world.name!r} has no neutral texts to measure others from: "
            "give --target, or add neutral to the world's file"
        )
    # The mapper alone and its refinements do not follow the recipe's losses.
    searches = not isinstance(options, Transfer) or (
        options.direction is None and options.mode not in ("instant", "refine")
    )
    if searches and recipe.identity_weight and world.identity is None:
        raise ValueError(
            f"--recipe: {name!r} has an identity loss, and world {world.name!r} no identity model: "
            "choose another, or name one in the world's file"
        )
    floor = options.identity_floor if isinstance(options, Transfer) else None
    if floor is not None and world.identity is None:
        raise ValueError(
            f"--identity-floor: world {world.name!r} has no identity model: choose a --strength"
        )


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or an accelerator, or the processor."""
    if name is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.get_default_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices exist but cannot compute
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} cannot be used here: {reason}") from error
    return device


def load(options: Options, world: World, finder: FaceFinder | None) -> EssenceTransfer:
    """The world's parts, ready to use."""
    mapper = options.mapper if isinstance(options, Transfer) else None
    essence = load_essence(
        world,
        choose_device(options.device),
        mapper,
        options.max_images,
        options.checkpoint_layers,
    )
    prepare_inversion(essence, options, world, finder)
    return essence


def choose_mode(options: Options, essence: EssenceTransfer) -> Mode:
    """The mode asked for, or the one that fits what else was asked."""
    if isinstance(options, Optimize):
        return "optimize"
    if isinstance(options, Transfer) and options.mode is not None:
        return options.mode
    if options.given(OF_OPTIMIZER):
        return "optimize"
    if essence.mapper is not None:
        return "auto"
    print("targetclip: this world has no mapper: the optimizer it is", file=sys.stderr)
    return "optimize"


class Bars:
    """A progress bar for every search of the optimizer."""

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.bar: Any = None

    def watch(self, method: Method, recipe: Recipe) -> Callable[[Progress], None]:
        """Begin a search."""
        self.close()
        what = "refine" if method == "refined" else "optimize"
        self.bar = bar = tqdm(total=recipe.steps, desc=f"{what} ({self.recipe})", unit="step")

        def on_step(progress: Progress) -> None:
            bar.set_postfix(loss=f"{progress.loss[0]:.4f}", refresh=False)
            bar.update()

        return on_step

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def read_targets(options: Options) -> list[Wanted]:
    """Pictures, then texts."""
    found: list[tuple[str, Image.Image | str]] = [
        (str(path), read_picture(path)) for path in options.target
    ]
    found += [(text, text) for text in options.text]
    return [Wanted(*each, w) for each, w in zip(found, options.target_weights(), strict=True)]


def find_direction(
    essence: EssenceTransfer, wanted: Sequence[Wanted], options: Options, world: World
) -> Found:
    """The direction of the targets; after Ctrl-C, if there is one target, what it had so far."""
    name, recipe = choose_recipe(options, world)
    mode, bars, each, interrupted = choose_mode(options, essence), Bars(name), [], False
    try:
        for one in wanted:
            each.append(essence.direction(one.target, mode, recipe, options.seed, bars.watch))
    except Interrupted as stopped:
        if len(wanted) > 1:  # half a mixture is none
            raise
        bars.close()
        print("targetclip: interrupted; going on with the direction so far", file=sys.stderr)
        each, interrupted = [stopped.direction], True
    finally:
        bars.close()
    weights = [one.weight for one in wanted]
    direction = each[0] if weights == [1] else mixed(each, weights)
    record: dict[str, Any] = {
        "method": direction.method,
        "mode": mode,
        "seed": options.seed,
        "steps": direction.steps,
        "embedder": essence.embedder.fingerprint,
    }
    if mode != "instant":
        record |= {"recipe": name, "settings": dataclasses.asdict(recipe)}
        if may_invert_target(options, recipe):
            record |= inverting(options, world)
    if mode != "optimize" and essence.mapper is not None:
        record["mapper"] = essence.mapper.fingerprint
        if mode != "instant":
            record["gate"] = dataclasses.asdict(Gate.of(essence.mapper))
    if weights != [1]:
        record["targets"] = [{"target": one.name, "weight": one.weight} for one in wanted]
    if interrupted:
        record["interrupted"] = True
    return Found(direction, record, each, interrupted)


def read_direction(essence: EssenceTransfer, path: Path) -> Found:
    """A direction from a file of ours, with its record, or of TargetCLIP's release."""
    generator = essence.generator
    if path.suffix in SUFFIXES:
        vector = released_direction(path, generator.num_ws, generator.w_dim)
        return Found(
            Direction(vector.to(generator.mean_w.device), RELEASED), {"method": RELEASED}, []
        )
    stored = load_direction(path, generator)
    vector = stored.direction.to(generator.mean_w.device)
    direction = Direction(vector, str(stored.record.get("method", "file")))
    return Found(direction, stored.record, [])


def run_optimize(options: Optimize) -> int:
    """Find a direction, write direction.safetensors and report.json."""
    world = load_world(options.world)
    check_world(options, world)
    wanted = read_targets(options)
    finder = find_faces(options, world, choose_recipe(options, world)[1], wanted)
    make_folder(options.out)
    watch = Stopwatch()
    with watch.phase("load"):
        essence = load(options, world, finder)
    with watch.phase("optimize"):
        found = find_direction(essence, wanted, options, world)
    content = direction_bytes(found.direction.vector, essence.generator, found.record)
    write_file(options.out / "direction.safetensors", content)
    report = base_report(essence, found, world, watch)
    report["targets"] = report_targets(wanted, found)
    if found.direction.transfer is not None:
        own = {"transfer": found.direction.transfer, "consistency": found.direction.consistency}
        report["scores_on_own_sources"] = own
    write_report(options.out, report)
    print(f"wrote {options.out / 'direction.safetensors'}")
    return INTERRUPTED if found.interrupted else 0


def read_sources(options: Transfer, finder: FaceFinder | None) -> Sources:
    """What is to be edited; its faces are found here, before any network is loaded."""
    if options.sources is None:
        return Generated(options.num_sources, options.seed)
    face = options.face or 0
    if clips := clips_among(options.sources):
        return Clip(clips[0], finder, face, options.smooth or WINDOW)
    return Photos(options.sources, finder, face)


def choose_strength(
    essence: EssenceTransfer,
    ws: Float[Tensor, "sources num_ws w_dim"],
    vector: Float[Tensor, "num_ws w_dim"],
    options: Transfer,
    world: World,
) -> float:
    """The strength asked for, or as much of it as the identity floor allows."""
    strength = world.strength if options.strength is None else options.strength
    if options.identity_floor is None:
        return strength
    return essence.strength_at_identity(ws, vector, options.identity_floor, strength)


def run_transfer(options: Transfer) -> int:
    """Find or read a direction, edit the sources, write pictures, grid, direction and report."""
    world = load_world(options.world)
    check_world(options, world)
    wanted = read_targets(options)
    finder = find_faces(options, world, choose_recipe(options, world)[1], wanted)
    make_folder(options.out)
    watch = Stopwatch()
    with watch.phase("sources"):
        sources = read_sources(options, finder)
    with watch.phase("load"):
        essence = load(options, world, finder)
    with watch.phase("sources"):
        ws, rows = sources.latents(essence)
    with watch.phase("direction"):
        if options.direction is not None:
            found = read_direction(essence, options.direction)
        else:
            found = find_direction(essence, wanted, options, world)
    # Written at once: minutes of optimization outlive any fault that follows.
    content = direction_bytes(found.direction.vector, essence.generator, found.record)
    write_file(options.out / "direction.safetensors", content)

    def edit(ws: Float[Tensor, "sources num_ws w_dim"]) -> Float[Tensor, "sources 3 size size"]:
        return essence.edit(ws.to(vector.device), vector, strength)

    with watch.phase("edit"):
        factors = layer_weights(essence.generator.num_ws, **options.layers()).to(ws.device)
        vector = found.direction.vector * factors[:, None]
        strength = choose_strength(essence, ws, vector, options, world)
        before = essence.edit(ws, vector, 0.0)
        edited = edit(ws)
    with watch.phase("score"):
        scores = [essence.score(one.target, before, edited) for one in wanted]
    with watch.phase("write"):
        pictures = tensor_to_pictures(edited)
        write_grid(options.out, wanted, rows, sources.shown(pictures), strength)
        written = sources.write(options.out, pictures, edit)
    targets = report_targets(wanted, found)
    for row, each in zip(targets, scores, strict=True):
        row["scores"] = report_scores(each)
    facts: dict[str, Any] = {
        "mode": found.record["mode"] if options.direction is None else None,
        "direction": None if options.direction is None else str(options.direction),
        "strength": strength,
        **sources.facts,
        "targets": targets,
        **written,
        **applied(options),
    }
    if options.sources is not None:
        facts |= inverting(options, world)
    if len(wanted) == 1:
        facts |= {"target": wanted[0].name, "scores": targets[0]["scores"]}
    write_report(options.out, {**base_report(essence, found, world, watch), **facts})
    tell(wanted, scores, found, options.out)
    return INTERRUPTED if found.interrupted else 0


def run_world_list() -> int:
    """A line for each bundled world; files are looked for, not read."""
    for name in world_names():
        world = load_world(name)
        lacking = [f.role for f in world.files if state_of(f, hashed=False) not in READY]
        state = f"lacks {', '.join(lacking)}: targetclip world check {name}" if lacking else "ready"
        print(": ".join(text for text in (name, world.makes, state) if text))
    return 0


def run_world_check(options: WorldCheck) -> int:
    """A paragraph for each file of a world, after fetching what is missing if that is wanted."""
    world = load_world(options.world)
    if options.download:
        fetch_missing(world.files)
    lines, ready = check_files(world.files)
    print(*lines, f"{world.name}: {'ready' if ready else 'not ready'}", sep="\n")
    return 0 if ready else 1


def run(command: Asked) -> int:
    """Do what was asked; the exit code."""
    if isinstance(command, Transfer):
        return run_transfer(command)
    if isinstance(command, Optimize):
        return run_optimize(command)
    return run_world_check(command) if isinstance(command, WorldCheck) else run_world_list()


def main() -> None:
    """Run the command line; anything the user can mend is one line and exit code 1."""
    try:
        code = run(parse(__doc__))
    except torch.OutOfMemoryError:
        print(
            "targetclip: out of memory: lower --max-images, or add --checkpoint-layers",
            file=sys.stderr,
        )
        code = 1
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"targetclip: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("targetclip: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
