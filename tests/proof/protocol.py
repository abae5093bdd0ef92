"""The release's protocol at full size: files of the release's shapes, on seeded weights.

    python -m tests.proof.protocol --out runs/protocol

Makes a generator of 1024 px, ArcFace and CLIP ViT-B/32 in their public layouts, latents [68, 18,
512], and two directions [1, 18, 512] with their target pictures: one of nothing, and a random one.
Runs `eval.referee --protocol targetclip` on them, and computes every number of its report again,
from the pictures that it kept. Pictures come out as noise: nothing is said of quality. Writes
proof.json: both numbers, seconds and memory.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.world import load_encoders, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for weights, files, the report and the pictures; new or empty."""
    sources: int = 68
    """Latents."""
    channels: int = 512
    """Most channels of a layer; 512 is config-f."""
    clip: Path | None = None
    """A folder of open_clip. Default: ViT-B/32 with seeded weights."""
    seed: int = 0
    """Of weights, latents and directions."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("tests.proof.protocol", Config)

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from eval.costs import machine
from eval.judging import RELEASED_STRENGTH
from eval.metrics import frechet_distance, released_score, spread
from targetclip.embedder import ImageEmbedder
from targetclip.encoders.arcface import ArcFace
from targetclip.encoders.identity import IdentityModel
from targetclip.generators.rosinality import rosinality_state
from targetclip.media.images import (
    picture_to_tensor,
    read_picture,
    tensor_to_pictures,
    write_picture,
)
from targetclip.scene import random_latents
from tests.proof.full_size import (
    CLIP,
    Command,
    embedder_lines,
    network_sizes,
    run_command,
    seeded_body,
    seeded_clip,
    seeded_generator,
)
from tests.proof.full_size import Config as FullSize

SIZE = 1024
LENGTH = 10.0  # of a direction; those of the release have 6 to 14
WORLD = """name = "protocol"
generator = "stylegan2.pt"
{embedder}
identity = "model_ir_se50.pth"
"""
# Numbers of pictures, of 8 bits, beside those of images before they are rounded.
COSINES, DISTANCES = 0.1, 0.02  # of 100, at most; of the distance, or of 1 where it is less


@torch.no_grad()
def make_files(config: Config) -> None:
    """Write weights and world file, latents, directions, their targets, and the sources' pictures.

    The target of a direction is what it makes of the first latent.
    """
    out = config.out
    for name in ("weights", "dirs", "targets", "faces"):
        command.make_folder(out / name)
    full = FullSize(out=out, resolution=SIZE)
    sizes = network_sizes(full)
    sizes = replace(sizes, channels=tuple(min(n, config.channels) for n in sizes.channels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        generator = seeded_generator(sizes)
        for rgb in generator.to_rgbs:  # pictures cut off what is beyond white and black
            rgb.get_parameter("weight").mul_(0.5)
        state = rosinality_state(generator)
        average = state.pop("latent_avg")
        torch.save({"g_ema": state, "latent_avg": average}, out / "weights" / "stylegan2.pt")
        torch.save(seeded_body(ArcFace()), out / "weights" / "model_ir_se50.pth")
        if config.clip is None:
            save_file(seeded_clip(), out / "weights" / f"{CLIP}.safetensors")
        latents = random_latents(generator, range(config.sources))
        latents += 0.1 * torch.randn(latents.shape)  # a face found has another w in each layer
        direction = torch.randn(1, *latents.shape[1:])
        directions = (0 * direction, direction * LENGTH / direction.norm())
    world = WORLD.format(embedder=embedder_lines(config.clip))
    command.write_file(out / "weights" / "world.toml", world)
    np.save(out / "w_plus.npy", latents.numpy())
    for i, direction in enumerate(directions):
        np.save(out / "dirs" / f"{i}.npy", direction.numpy())
        moved = generator.synthesis(latents[:1] + RELEASED_STRENGTH * direction)
        write_picture(tensor_to_pictures(moved)[0], out / "targets" / f"{i}.png")
    for i, ws in enumerate(latents.split(1)):
        [picture] = tensor_to_pictures(generator.synthesis(ws))
        write_picture(picture, out / "faces" / f"{i:03d}.png")


def embedded(
    model: ImageEmbedder | IdentityModel, paths: Iterable[Path], spoil: bool = False
) -> Float[Tensor, "pictures features"]:
    """Return a model's features of pictures; spoilt ones are shown in [0, 1]."""
    images = (picture_to_tensor(read_picture(path), SIZE) for path in sorted(paths))
    return torch.cat([model.embed_images(one / 2 + 0.5 if spoil else one) for one in images])


@torch.no_grad()
def scores_of_pictures(out: Path) -> dict[str, dict[str, float]]:
    """Return what the report says of `published`, computed from pictures alone."""
    world = load_world(str(out / "weights" / "world.toml"))
    embedder, identity = load_encoders(world, torch.device("cpu"))
    assert identity is not None
    faces, targets = [*(out / "faces").iterdir()], sorted((out / "targets").iterdir())
    made = [[*path.iterdir()] for path in sorted((out / "pictures" / "published").iterdir())]
    seen = torch.stack([embedded(embedder, paths) for paths in made])
    kept = torch.stack([embedded(identity, paths) for paths in made])
    spoilt = torch.stack([embedded(identity, paths, spoil=True) for paths in made])
    goals = embedder.embed_pictures([read_picture(path) for path in targets])
    shown, people = embedded(embedder, faces), embedded(identity, faces)
    return {
        "semantic": released_score(seen, goals[:, None]),
        "identity_released": released_score(spoilt, people[None]),
        "identity": released_score(kept, people[None]),
        "target_identity": released_score(kept, embedded(identity, targets)[:, None]),
        "fid": spread(torch.tensor([frechet_distance(row, shown) for row in seen])),
    }


def check(config: Config, report: dict[str, Any], again: dict[str, dict[str, float]]) -> None:
    """Raise a ValueError where the report does not say what was run, or other numbers."""
    facts = {
        "sources": [*range(config.sources)],
        "targets": ["targets/0.png", "targets/1.png"],
        "strength": RELEASED_STRENGTH,
        "references": config.sources,
        "notes": [],
    }
    for name, expected in facts.items():
        if report[name] != expected:
            raise ValueError(f"{name}: expected {expected}, found {report[name]}")
    found = report["methods"]["published"]
    if found.keys() != again.keys():
        raise ValueError(f"expected the scores {[*again]}, found {[*found]}")
    for score, row in again.items():
        for name, value in row.items():
            most = DISTANCES * max(1.0, value) if score == "fid" else COSINES
            if not abs(found[score][name] - value) <= most:
                raise ValueError(
                    f"{score}, {name}: the pictures have {value:.3f}, the report "
                    f"{found[score][name]:.3f}"
                )


def run(config: Config, run_command: Command = run_command) -> dict[str, Any]:
    """Make the files, run the command, and hold its report against the pictures.

    Args:
        run_command: runs Python with some arguments, and returns the most GiB that it held.

    Raises:
        ValueError, OSError: bad input, files that cannot be written, a command that failed, or
            numbers that are not those of the pictures.
    """
    command.check_least(config, sources=2, channels=1)
    command.make_folder(config.out)
    if any(config.out.iterdir()):
        raise ValueError(f"--out: expected an empty folder, found files in {str(config.out)!r}")
    out = config.out
    command.say("making files", error=True)
    make_files(config)
    flags = {
        "--world": out / "weights" / "world.toml",
        "--sources": out / "w_plus.npy",
        "--targets": out / "targets",
        "--direction": out / "dirs",
        "--references": out / "faces",
        "--out": out,
    }
    given = [str(word) for pair in flags.items() for word in pair]
    start = time.perf_counter()
    words = ["-m", "eval.referee", "--protocol", "targetclip", "--keep-pictures", *given]
    peak = run_command(words, out / "log.txt")
    seconds = time.perf_counter() - start
    report = json.loads((out / "report.json").read_text())
    again = scores_of_pictures(out)
    costs = {"seconds": seconds, "peak_gib": peak, "machine": machine()}
    both = {"report": report["methods"]["published"], "pictures": again}
    command.write_json(out / "proof.json", costs | both)
    check(config, report, again)
    command.say_next(out, "report.md, proof.json", f"{seconds:.0f} s, {peak:.2f} GiB: read both")
    return report
