"""Every command once at full size, without anybody's weights; and what a step holds in memory.

    python -m tests.proof.full_size --out runs/full              # an hour and more of one core
    python -m tests.proof.full_size --out runs/full --memory     # two minutes on two idle cores

Makes seeded weights in the layouts of the public checkpoints (2 GB), and runs the project's own
commands on them, each in a process of its own, with its seconds and peak memory. Pictures come out
as noise: this shows that such files are read and that everything fits together and into memory,
nothing of quality. Writes report.json, report.md and log.txt (each command and its output). The
same command goes on after an interruption: finished steps are not run again.

`--memory` counts the bytes that a step of the optimizer keeps for its backward pass, and measures
steps of 1, 2 and 4 sources, with layers kept and computed again. Runs on the processor; GiB are
2**30 bytes.
"""

import argparse
import dataclasses
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from eval.sizes import Sizes
from targetclip import command
from targetclip.command import Precision, in_precision, start
from targetclip.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for weights, results and reports."""
    resolution: int = 1024
    """Of the generator, in pixels."""
    width: int = 512
    """Length of w and width of the widest layers; 512 is config-f."""
    clip: Path | None = None
    """A folder of open_clip. Default: ViT-B/32 with seeded weights."""
    seed: int = 0
    """Of the weights."""
    limit: float = 20.0
    """GiB that no step may hold more than."""
    memory: bool = False
    """Count and measure the memory of a step of the optimizer instead."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("tests.proof.full_size", Config)

import open_clip
import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from eval.costs import alone, machine, peak_bytes, random_networks
from eval.report import table
from targetclip.embedder import ClipEmbedder, resize_matrix
from targetclip.encoders.arcface import ArcFace
from targetclip.encoders.e4e import Encoder4Editing
from targetclip.generators.rosinality import rosinality_state
from targetclip.generators.stylegan2 import StyledConv, StyleGAN2, StyleGAN2Config
from targetclip.media.images import tensor_to_pictures, write_picture
from targetclip.scene import Scene, random_latents

GIB = 2**30
CLIP = "ViT-B-32"
CARDS = (8, 11, 24, 80)  # GiB
USABLE = 0.9  # of a card: the rest is the driver's and the convolutions' workspace, assumed
# Sources, how many of them at once, and whether layers are computed again.
MEASURED = (
    (1, 1, False), (2, 2, False), (4, 4, False), (4, 1, False), (1, 1, True), (4, 4, True),
)  # fmt: skip
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
AGAIN = ", layers again"
WORLD = """name = "full"
generator = "stylegan2.pt"
{embedder}
inverter = "e4e.pt"
identity = "model_ir_se50.pth"
aligner = "ffhq"
recipe = "consistent"
"""

# Each step but the first is a command; {out} is the folder. `consistent` embeds a bank of 256
# sources first, most of its time here; `release` starts from the target's inversion.
STEPS = {
    "weights": "",
    "transfer": "predictor.cli transfer --target {out}/weights/0.png --sources {out}/weights/1.png "
    "--no-align --mode optimize --steps 2 --max-images 2",
    "optimize": "predictor.cli optimize --target {out}/weights/0.png --no-align --recipe release "
    "--steps 2 --max-images 2",
    "build": "data.build --targets generated:4 --recipe release --initial random --steps 2 "
    "--batch-size 2 --held-out 2 --max-images 2",
    "train": "train.mapper --pairs {out}/build --schedule pairs:3 transfer:2 --batch-size 2 "
    "--targets generated:4@17 --validation generated:1@23 --sources 2 --max-images 2",
    "edit": "predictor.cli transfer --target {out}/weights/1.png --num-sources 2 --mode instant "
    "--mapper {out}/train/mapper.safetensors --max-images 2",
    "compare": "eval.compare --mapper {out}/train/mapper.safetensors --only mapper --targets 2 "
    "--slow 1 --references 8 --sources 2 --max-images 2",
}
LAST = {"weights": "world.toml", "train": "mapper.safetensors"}  # file of a step; else report.json


def network_sizes(config: Config) -> StyleGAN2Config:
    """Return the sizes of the generator: those of config-f, if the width is 512."""
    sides = [2**power for power in range(2, config.resolution.bit_length())]
    return StyleGAN2Config(
        resolution=config.resolution,
        w_dim=config.width,
        z_dim=config.width,
        mapping_layers=8,
        channels=tuple(min(config.width, 32768 // side) for side in sides),
    )


def check_config(config: Config) -> None:
    """Raise a ValueError for an option that cannot be."""
    if not 32 <= config.resolution <= 1024 or config.width < 1 or not 0 < config.limit < math.inf:
        raise ValueError(
            "expected --resolution of 32 to 1024, --width of 1 or more and --limit above 0, found "
            f"{config.resolution}, {config.width} and {config.limit}"
        )
    network_sizes(config)


# Weights


def seeded_generator(sizes: StyleGAN2Config) -> StyleGAN2:
    """Make a generator whose images keep in bounds; what training moves off zero is moved."""
    generator = StyleGAN2(sizes).eval().requires_grad_(False)
    for rgb in generator.to_rgbs:
        rgb.get_parameter("weight").mul_(0.3)  # levels add up, and pictures end at 1
    for conv in generator.convs:
        conv.get_parameter("noise_strength").fill_(0.1)
    w: Tensor = generator.mapping_network(torch.randn(1024, generator.z_dim))
    generator.mean_w.copy_(w.mean(dim=0))
    return generator


def seeded_body(network: nn.Module) -> dict[str, Tensor]:
    """Return weights that neither lose a picture over 50 layers nor blow it up."""
    for parameter in network.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return network.state_dict()


def seeded_clip() -> dict[str, Tensor]:
    """Return weights that tell pictures apart: fresh ones are too small to."""
    clip = open_clip.CLIP(**open_clip.get_model_config(CLIP))
    for parameter in clip.visual.parameters():
        if parameter.ndim > 1:
            parameter.mul_(2)
    state: dict[str, Tensor] = clip.state_dict()
    return state


def embedder_lines(clip: Path | None) -> str:
    """Return the lines of a world file that name a folder of open_clip or, without one, the seeded
    weights beside the file."""
    named = [CLIP, f"{CLIP}.safetensors"] if clip is None else [str(clip.absolute())]
    pairs = zip(("embedder", "pretrained"), map(json.dumps, named), strict=False)
    return "\n".join(f"{key} = {value}" for key, value in pairs)


@torch.no_grad()
def make_weights(config: Config) -> float:
    """Write weights, two pictures as if aligned, and last the world file.

    Returns:
        The most GiB that this process held.
    """
    folder = config.out / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = seeded_generator(network_sizes(config))
        state = rosinality_state(generator)
        average = state.pop("latent_avg")
        torch.save({"g_ema": state, "latent_avg": average}, folder / "stylegan2.pt")
        encoder = seeded_body(Encoder4Editing(generator.num_ws, generator.w_dim))
        inverter = {
            "state_dict": {f"encoder.{name}": value for name, value in encoder.items()},
            "latent_avg": average.repeat(generator.num_ws, 1),
            "opts": argparse.Namespace(encoder_type="Encoder4Editing"),
        }
        torch.save(inverter, folder / "e4e.pt")
        torch.save(seeded_body(ArcFace()), folder / "model_ir_se50.pth")
        if config.clip is None:
            save_file(seeded_clip(), folder / f"{CLIP}.safetensors")
    for index, ws in enumerate(random_latents(generator, [1, 2]).split(1)):
        (picture,) = tensor_to_pictures(generator.synthesis(ws))
        write_picture(picture, folder / f"{index}.png")
    world = WORLD.format(embedder=embedder_lines(config.clip))
    command.write_file(folder / "world.toml", world)
    return peak_bytes() / GIB


# Steps


def run_command(words: list[str], log: Path) -> float:
    """Run Python with some arguments, and return the most GiB that it held.

    Raises:
        ChildProcessError: it failed; the message has the last line of its output.
    """
    with log.open("ab") as file:
        file.write(f"\n$ python {shlex.join(words)}\n".encode())
        file.flush()
        with subprocess.Popen([sys.executable, *words], stdout=file, stderr=file) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(errors="replace").splitlines()[-1]
        raise ChildProcessError(
            f"{words[1]} ended with code {process.returncode}, see {log}: {last}"
        )
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB


Alone = Callable[..., Any]
Command = Callable[[list[str], Path], float]


def run_steps(config: Config, report: dict[str, Any], run_command: Command, alone: Alone) -> None:
    """Do every step that is not done, and add it to the report.

    Raises:
        ChildProcessError: a step failed.
        ValueError: a step held more than the limit.
    """
    done, out = report.setdefault("steps", {}), config.out
    for name, text in STEPS.items():
        if name not in done or not (out / name / LAST.get(name, "report.json")).is_file():
            words = [word.replace("{out}", str(out)) for word in text.split()]
            words += ["--world", str(out / "weights" / "world.toml"), "--out", str(out / name)]
            start = time.perf_counter()
            if name == "weights":
                peak = alone(make_weights, config)
            else:
                peak = run_command(["-m", *words], out / "log.txt")
            done[name] = {"seconds": time.perf_counter() - start, "peak_gib": peak}
            write_reports(out, report)
            print(f"{name}: {done[name]['seconds']:.1f} s, {peak:.2f} GiB", flush=True)
        if (peak := done[name]["peak_gib"]) > config.limit:
            raise ValueError(
                f"step {name}: expected {config.limit:g} GiB at most, found a peak of {peak:.2f}"
            )


# Memory


def networks(config: Config) -> tuple[StyleGAN2, ClipEmbedder]:
    """Make generator and embedder with random weights."""
    return random_networks(
        Sizes(
            resolution=config.resolution,
            channels=network_sizes(config).channels,
            w_dim=config.width,
            clip=CLIP if config.clip is None else f"local-dir:{config.clip}",
        )
    )


def measured(
    config: Config, precision: Precision, sources: int, at_once: int, again: bool
) -> dict[str, float]:
    """Return the GiB of this process before a step of `release`, the most GiB, and seconds."""
    generator, embedder = networks(config)
    generator.checkpoint_layers = again
    scene = Scene(generator=generator, embedder=embedder, max_images=at_once)
    recipe = dataclasses.replace(RECIPES["release"], steps=1, sources=sources)
    ws, target = random_latents(generator, range(sources)), torch.ones(1, embedder.embed_dim)
    before, start = psutil.Process().memory_info().rss / GIB, time.perf_counter()
    with in_precision(ws.device, precision):
        scene.search(target, recipe, ws[:1], [0], bank=ws)
    seconds = time.perf_counter() - start
    return {"before": before, "peak": peak_bytes() / GIB, "seconds": seconds}


def kept_bytes(
    generator: StyleGAN2, embedder: ClipEmbedder, sources: int, precision: Precision
) -> Counter[str]:
    """Count the bytes kept for the backward pass by each layer of the generator, by its number.

    "outside" are those of everything else, "outputs" those of the convolutions' outputs. Works on
    shapes alone, nothing is computed.
    """
    kept: Counter[str] = Counter()
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no other takes the place of one
    inside, hooks = ["outside"], []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage
            kept[inside[-1]] += storage.nbytes()
        return tensor

    def enter(name: str, *_: object) -> None:
        inside.append(name)

    def leave(layer: nn.Module, _: object, output: Tensor) -> None:
        inside.pop()
        if isinstance(layer, StyledConv):  # colours are added up and forgotten
            kept["outputs"] += output.untyped_storage().nbytes()

    for index, layer in enumerate([*generator.convs, *generator.to_rgbs]):
        hooks.append(layer.register_forward_pre_hook(partial(enter, str(index))))
        hooks.append(layer.register_forward_hook(leave))
    scene = Scene(generator=generator, embedder=embedder)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        in_precision(torch.device("cpu"), precision),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        ws = torch.zeros(sources, generator.num_ws, generator.w_dim, requires_grad=True)
        scene.features(ws, RECIPES["release"].preprocess)
    resize_matrix.cache_clear()  # of a matrix without numbers
    for hook in hooks:
        hook.remove()
    return kept


def counted(config: Config) -> dict[str, float]:
    """Return the GiB a source that a step keeps, layers kept and computed again, and of weights."""
    generator, embedder = networks(config)
    gib: dict[str, float] = {}
    for precision in PRECISIONS:
        # What does not grow with the sources, such as weights, is in both counts.
        kept = kept_bytes(generator, embedder, 2, precision)
        kept.subtract(kept_bytes(generator, embedder, 1, precision))
        outputs, outside = kept.pop("outputs"), kept.pop("outside")
        gib[precision] = (outside + kept.total()) / GIB
        gib[f"{precision}{AGAIN}"] = (outside + outputs + max(kept.values())) / GIB
    with torch.device("meta"):
        others = [Encoder4Editing(generator.num_ws, generator.w_dim), ArcFace()]
    parameters = [p for part in (generator, embedder, *others) for p in part.parameters()]
    return gib | {"weights": sum(4 * p.numel() for p in parameters) / GIB}


def row_name(precision: Precision, sources: int, at_once: int, again: bool) -> str:
    """Return the name of a measured step in the reports."""
    return f"{precision}, {sources} sources, {at_once} at once{AGAIN if again else ''}"


def run_memory(config: Config, report: dict[str, Any], alone: Alone) -> None:
    """Count, measure what is not measured, and add it to the report."""
    memory = report.setdefault("memory", {"measured": {}, "fits": {}})
    memory["counted"] = count = alone(counted, config)
    rows = memory["measured"]
    for precision in PRECISIONS:
        for sources, at_once, again in MEASURED:
            name = row_name(precision, sources, at_once, again)
            if name not in rows:
                rows[name] = alone(measured, config, precision, sources, at_once, again)
                write_reports(config.out, report)
                print(f"{name}: {rows[name]['peak']:.2f} GiB", flush=True)
        room = [USABLE * card - count["weights"] for card in CARDS]
        for again in (False, True):
            kind = f"{precision}{AGAIN if again else ''}"
            one, four = (rows[row_name(precision, n, n, again)]["peak"] for n in (1, 4))
            ways = {"counted": count[kind], "measured": max(four - one, 1 / GIB) / 3}
            for way, a_source in ways.items():
                most = [max(0, int(free / a_source)) for free in room]
                memory["fits"][f"{kind}, {way}"] = [round(a_source, 3), *most]
    write_reports(config.out, report)


# The report


def memory_lines(memory: dict[str, Any]) -> list[str]:
    """Return the tables of `--memory`."""
    steps = [
        [name, f"{row['before']:.2f}", f"{row['peak']:.2f}", f"{row['seconds']:.1f}"]
        for name, row in memory["measured"].items()
    ]
    fits = [[name, *map(str, row)] for name, row in memory["fits"].items()]
    gib = "; ".join(f"{name} {value:.3f}" for name, value in memory["counted"].items())
    return [
        *table(["step of the optimizer", "before GiB", "peak GiB", "seconds"], steps),
        *table(["sources at once", "GiB a source", *(f"{card} GiB" for card in CARDS)], fits),
        f"Counted GiB, a source but for the weights: {gib}.",
    ]


def write_reports(out: Path, report: dict[str, Any]) -> None:
    """Write report.json and report.md."""
    settings = shlex.join(f"{name}={value}" for name, value in report["settings"].items())
    steps = [
        [name, f"{row['seconds']:.1f}", f"{row['peak_gib']:.2f}"]
        for name, row in report.get("steps", {}).items()
    ]
    lines = [f"# Full size: {settings}", "", *table(["step", "seconds", "peak GiB"], steps)]
    lines += memory_lines(report["memory"]) if "memory" in report else []
    command.write_json(out / "report.json", report)
    command.write_file(out / "report.md", "\n".join(lines) + "\n")


def run(config: Config, run_command: Command = run_command, alone: Alone = alone) -> dict[str, Any]:
    """Do what is not done, print report.md, and return the report.

    Args:
        run_command: runs Python with some arguments, and returns the most GiB that it held.
        alone: calls a function in a process of its own.

    Raises:
        ValueError, OSError: bad input, files that cannot be read or written, a step that failed or
            held too much.
    """
    check_config(config)
    command.make_folder(config.out)
    path = config.out / "report.json"
    settings = {name: getattr(config, name) for name in ("resolution", "width", "seed")}
    settings["clip"] = CLIP if config.clip is None else config.clip.name
    report: dict[str, Any] = {"settings": settings, "machine": machine()}
    if path.exists():
        report = json.loads(path.read_text())
    if report["settings"] != settings:
        raise ValueError(f"--out: {path} is of {report['settings']}: give another folder")
    if config.memory:
        run_memory(config, report, alone)
    else:
        run_steps(config, report, run_command, alone)
    print((config.out / "report.md").read_text())
    return report
