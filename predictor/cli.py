"""The `targetclip` command: transfer a target's essence, or find a direction and keep it.

Examples:

    targetclip transfer --target examples/joker.png --num-sources 6 --out out
    targetclip transfer --target t.png --sources a.png b.png --out out
    targetclip optimize --target t.png --out out
    targetclip transfer --target t.png --direction out/direction.safetensors --out other
"""

import dataclasses
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from predictor.transfer import Direction, EssenceTransfer
from targetclip.directions import direction_bytes, load_direction
from targetclip.editing import Scores
from targetclip.images import labelled_grid, read_picture, tensor_to_pictures, write_picture
from targetclip.optimize import Progress
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.world import World, load_parts, load_world

INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
MAX_SOURCES = 1000  # more than a person looks at; the grid is one picture
MAX_STRENGTH = 100.0  # far beyond it images overflow


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    out: Path
    """Folder to write into; made if missing."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    recipe: str | None = None
    """Recipe of the optimizer: release, paper or consistent. Default: the world's."""
    initial: Initial | None = None
    """What the optimizer starts from. Default: the recipe's."""
    steps: int | None = None
    """Steps of the optimizer. Default: the recipe's."""
    patience: int | None = None
    """Stop early when the loss has not improved for so many steps."""
    seed: int = 0
    """Decides everything random: sources, starts, what the optimizer draws."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""
    max_images: int = 64
    """Images rendered at once; less needs less memory."""

    def __post_init__(self) -> None:
        for name in ("steps", "patience", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected 1 or more, found {value}")


@dataclass(frozen=True, kw_only=True)
class Transfer(Options):
    """Give sources the essence of a target picture."""

    target: Path
    """Picture whose essence is wanted."""
    sources: tuple[Path, ...] | None = None
    """Pictures to edit; they are inverted first. Default: generated ones."""
    num_sources: int | None = None
    """How many sources to generate instead. Default: 6."""
    mode: Literal["optimize"] = "optimize"
    """How the direction is found."""
    direction: Path | None = None
    """Apply this direction file instead of finding one."""
    strength: float | None = None
    """How far along the direction; 0 changes nothing. Default: the world's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sources is not None and self.num_sources is not None:
            raise ValueError("--sources and --num-sources exclude each other: give one of them")
        if self.sources is not None and not self.sources:
            raise ValueError("--sources: expected one or more pictures, found none")
        if self.num_sources is not None and not 1 <= self.num_sources <= MAX_SOURCES:
            raise ValueError(
                f"--num-sources: expected 1 to {MAX_SOURCES}, found {self.num_sources}"
            )
        if self.direction is not None:
            for name in ("recipe", "initial", "steps", "patience"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name} is for finding a direction: drop it or --direction")
        # Written so that NaN fails too.
        if self.strength is not None and not abs(self.strength) <= MAX_STRENGTH:
            raise ValueError(
                f"--strength: expected a number within {MAX_STRENGTH:g} of 0, found {self.strength}"
            )


@dataclass(frozen=True, kw_only=True)
class Optimize(Options):
    """Find the direction of a target picture and save it."""

    target: Path
    """Picture whose essence is wanted."""


class Stopwatch:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + elapsed, 4)


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


def make_folder(out: Path) -> None:
    """Make the output folder and see that it can be written into, before any work."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out: cannot write into {out}: {error.strerror}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    names = ("targetclip", "torch", "open_clip_torch", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


def load(options: Options, world: World) -> EssenceTransfer:
    """The world's parts, ready to use."""
    parts = load_parts(world, choose_device(options.device))
    return EssenceTransfer(
        parts.generator, parts.embedder, parts.inverter, world.truncation, options.max_images
    )


@dataclass
class Found:
    """A direction, how it came about, and whether Ctrl-C cut the search short."""

    direction: Direction
    record: dict[str, Any]
    interrupted: bool = False


def find_direction(
    essence: EssenceTransfer, target: Image.Image, options: Options, world: World
) -> Found:
    """Run the optimizer under a progress bar; after Ctrl-C, what it had so far."""
    name, recipe = choose_recipe(options, world)
    latest: list[Progress] = []
    kept: list[Progress] = []
    bar = tqdm(total=recipe.steps, desc=f"optimize ({name})", unit="step")

    def on_step(progress: Progress) -> None:
        if not kept or recipe.keep == "last" or progress.loss[0] < kept[0].loss[0]:
            kept[:] = [progress]
        latest[:] = [progress]
        bar.set_postfix(loss=f"{progress.loss[0]:.4f}", refresh=False)
        bar.update()

    record: dict[str, Any] = {
        "method": "optimizer",
        "recipe": name,
        "settings": dataclasses.asdict(recipe),
        "seed": options.seed,
        "embedder": essence.embedder.fingerprint,
    }
    try:
        direction = essence.optimize(target, recipe, options.seed, on_step)
        return Found(direction, {**record, "steps": direction.steps})
    except KeyboardInterrupt:
        if not latest:
            raise
        direction = Direction(
            vector=latest[0].kept_directions[0],
            method="optimizer",
            transfer=1 - float(kept[0].transfer[0]),
            consistency=1 - float(kept[0].consistency[0]),
            steps=latest[0].step + 1,
        )
        bar.close()
        print("targetclip: interrupted; going on with the direction so far", file=sys.stderr)
        return Found(direction, {**record, "steps": direction.steps, "interrupted": True}, True)
    finally:
        bar.close()


def read_direction(essence: EssenceTransfer, path: Path) -> Found:
    """A direction from a file, with its own record."""
    stored = load_direction(path, essence.generator)
    device = essence.generator.mean_w.device
    direction = Direction(
        vector=stored.direction.to(device),
        method=str(stored.record.get("method", "file")),
        transfer=float("nan"),
        consistency=float("nan"),
        steps=0,
    )
    return Found(direction, stored.record)


def report_scores(scores: Scores) -> dict[str, Any]:
    """Scores as report.json holds them: means, then each source."""
    return {
        "transfer": scores.transfer,
        "consistency": scores.consistency,
        "target_similarity_before": float(scores.target_before.mean()),
        "target_similarity_after": float(scores.target_after.mean()),
        "source_similarity_after": float(scores.source_after.mean()),
        "each": {
            "target_similarity_before": scores.target_before.tolist(),
            "target_similarity_after": scores.target_after.tolist(),
            "source_similarity_after": scores.source_after.tolist(),
        },
    }


def base_report(
    essence: EssenceTransfer, found: Found, world: World, watch: Stopwatch
) -> dict[str, Any]:
    """What the reports of both commands say."""
    return {
        **found.record,
        "method": found.direction.method,
        "world": world.name,
        "direction_norm": float(found.direction.vector.norm()),
        "interrupted": found.interrupted,
        "seconds": watch.seconds,
        "versions": versions(),
        "fingerprints": {
            "generator": essence.generator.fingerprint,
            "embedder": essence.embedder.fingerprint,
        },
    }


def write_report(out: Path, report: dict[str, Any]) -> None:
    """report.json, indented for people."""
    write_file(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())


def run_optimize(options: Optimize) -> int:
    """Find a direction, write direction.safetensors and report.json."""
    world = load_world(options.world)
    choose_recipe(options, world)
    target = read_picture(options.target)
    make_folder(options.out)
    watch = Stopwatch()
    with watch.phase("load"):
        essence = load(options, world)
    with watch.phase("optimize"):
        found = find_direction(essence, target, options, world)
    content = direction_bytes(found.direction.vector, essence.generator, found.record)
    write_file(options.out / "direction.safetensors", content)
    report = base_report(essence, found, world, watch)
    own = {"transfer": found.direction.transfer, "consistency": found.direction.consistency}
    write_report(options.out, {**report, "scores_on_own_sources": own})
    print(f"wrote {options.out / 'direction.safetensors'}")
    return INTERRUPTED if found.interrupted else 0


def source_latents(
    essence: EssenceTransfer, options: Transfer
) -> tuple[Float[Tensor, "sources num_ws w_dim"], dict[str, list[Image.Image]]]:
    """Latents of the sources, and the rows of the grid that show them unedited."""
    if options.sources is not None:
        pictures = [read_picture(path) for path in options.sources]
        ws = essence.invert(pictures)
        return ws, {"sources": pictures, "sources, inverted": rendered(essence, ws)}
    count = 6 if options.num_sources is None else options.num_sources
    ws = essence.generated_sources(count, options.seed)
    return ws, {"sources": rendered(essence, ws)}


def rendered(
    essence: EssenceTransfer, ws: Float[Tensor, "sources num_ws w_dim"]
) -> list[Image.Image]:
    """Pictures of unedited latents."""
    return tensor_to_pictures(essence.edit(ws, torch.zeros_like(ws[0])))


def run_transfer(options: Transfer) -> int:
    """Find or read a direction, edit the sources, write pictures, grid, direction and report."""
    world = load_world(options.world)
    choose_recipe(options, world)
    target = read_picture(options.target)
    make_folder(options.out)
    strength = world.strength if options.strength is None else options.strength
    watch = Stopwatch()
    with watch.phase("load"):
        essence = load(options, world)
    with watch.phase("sources"):
        ws, rows = source_latents(essence, options)
    with watch.phase("direction"):
        if options.direction is not None:
            found = read_direction(essence, options.direction)
        else:
            found = find_direction(essence, target, options, world)
    # Written at once: minutes of optimization outlive any fault that follows.
    content = direction_bytes(found.direction.vector, essence.generator, found.record)
    write_file(options.out / "direction.safetensors", content)
    with watch.phase("edit"):
        before = essence.edit(ws, found.direction.vector, 0.0)
        edited = essence.edit(ws, found.direction.vector, strength)
    with watch.phase("score"):
        scores = essence.score(target, before, edited)
    with watch.phase("write"):
        pictures = tensor_to_pictures(edited)
        names = [f"edited_{i:03d}.png" for i in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            write_picture(picture, options.out / name)
        label = f"results, strength {strength:g}"
        write_picture(labelled_grid(target, {**rows, label: pictures}), options.out / "grid.png")
    facts: dict[str, Any] = {
        "target": str(options.target),
        "mode": options.mode if options.direction is None else None,
        "direction": None if options.direction is None else str(options.direction),
        "strength": strength,
        "sources": {"count": len(ws), "seed": options.seed},
    }
    if options.sources is not None:
        facts["sources"] = [str(path) for path in options.sources]
    report = base_report(essence, found, world, watch)
    write_report(options.out, {**report, **facts, "scores": report_scores(scores), "edited": names})
    print(
        f"transfer score {float(scores.target_before.mean()):.3f} -> {scores.transfer:.3f}; "
        f"look at {options.out / 'grid.png'}"
    )
    return INTERRUPTED if found.interrupted else 0


Command = (
    Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Optimize, tyro.conf.subcommand("optimize")]
)


def usage_line(box: str) -> str:
    """What a usage error says, without tyro's frame, title and the help below it."""
    rows = [row.strip("│╭╮╰╯ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def says_something(row: str) -> bool:
        return bool(row.strip("─-"))

    # Where the terminal knows no frames there is a rule under the title instead.
    below_title = dropwhile(lambda row: not says_something(row), rows[1:])
    message = " ".join(takewhile(says_something, below_title))
    return re.sub(r"^Error parsing \w+: ", "", message)  # a class's name, where options disagree


def parse() -> Transfer | Optimize:
    """The command asked for; a usage error is one line, as every error is, and exit code 2."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            command: Transfer | Optimize = tyro.cli(Command, prog="targetclip", description=__doc__)
    except SystemExit as ended:
        if ended.code:
            line = usage_line(box.getvalue())
            print(f"targetclip: {line} (see targetclip --help)", file=sys.stderr)
        raise
    return command


def main() -> None:
    """Run the command line; anything the user can mend is one line and exit code 1."""
    try:
        command = parse()
        code = run_transfer(command) if isinstance(command, Transfer) else run_optimize(command)
    except torch.OutOfMemoryError:
        print("targetclip: out of memory: lower --max-images", file=sys.stderr)
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
