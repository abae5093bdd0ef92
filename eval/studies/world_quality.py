"""Measure generator, inverter and reader of the bundled world on faces that trained none of them.

    python -m eval.studies.world_quality --out runs/world

Faces are drawn, generated from the codes of what they show, generated from z, and inverted. Writes
report.json, a table, and sheets of pictures: reproductions, inversions, interpolations, single
layers of others. What CLIP is worth its own training measures (`train.world.clip`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.seeds import WORLD_TARGETS
from targetclip.world import DEFAULT_WORLD, load_scene, load_world


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json, report.md and sheets of pictures."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    faces: int = 500
    """Faces to measure on, at least 32."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("eval.studies.world_quality", Config, exclusive=True)

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data.illustrated.avatars import check_dicebear, to_images
from data.illustrated.codes import W_DIM, codes, draw_face, indices_from_z, one_hot
from eval.judging import face_reader
from eval.reader import PRESENT, READINGS, AvatarReader
from eval.report import number, table
from eval.truth import Truth, truth_of
from targetclip.media.images import labelled_grid, tensor_to_pictures, write_picture
from targetclip.scene import Scene

SHOWN = 32  # faces on a sheet
Images = Float[Tensor, "faces 3 height width"]


def decibels(images: Images, truth: Images) -> float:
    """Return the peak signal-to-noise ratio in dB, mean over pictures, for images in [-1, 1]."""
    error = (images.clamp(-1, 1) - truth).square().mean(dim=(1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())


def agreement(reader: AvatarReader, images: Images, truth: Truth) -> dict[str, float]:
    """Return how often the reader says of pictures what they show, for each reading that shows.

    And `identity`, the mean over the readings of identity.
    """
    found = torch.cat([reader.read(part.clamp(-1, 1))[1].cpu() for part in images.split(64)])
    right = {}
    for reading in READINGS:
        seen = truth.seen[:, reading.start] | (reading.name in PRESENT)
        same = found[:, reading.span].argmax(1) == truth.readings[:, reading.span].argmax(1)
        right[reading.name] = float(same[seen].float().mean())
    kept = [right[reading.name] for reading in READINGS if not reading.essence]
    return right | {"identity": sum(kept) / len(kept)}


def pairs(drawn: Images, made: Images) -> dict[str, Tensor]:
    """Return rows of eight faces as drawn, each above what was made of them."""
    rows: dict[str, Tensor] = {}
    for i in range(0, SHOWN, 8):
        rows |= {f"drawn {i}": drawn[i : i + 8], f"made {i}": made[i : i + 8]}
    return rows


def mixtures(scene: Scene, ws: Float[Tensor, "faces num_ws w_dim"]) -> dict[str, dict[str, Tensor]]:
    """Return ways from face to face, and faces with one layer of another."""
    steps = torch.linspace(0, 1, 9, device=ws.device)[:, None, None]
    between, layers = {}, {}
    for i in range(0, 12, 2):
        between[f"{i} to {i + 1}"] = scene.render(ws[i] + steps * (ws[i + 1] - ws[i]))
        rows = ws[i].repeat(ws.shape[1], 1, 1)
        rows[range(len(rows)), range(len(rows))] = ws[i + 1]
        layers[f"{i} with one layer of {i + 1}, the first to the last"] = scene.render(rows)
    return {"interpolated": between, "layers": layers}


@torch.no_grad()
def run(config: Config) -> dict[str, Any]:
    """Measure, write the report and the sheets, print the table and return the report.

    Raises:
        FileNotFoundError, ValueError: options or parts of the world that cannot be.
        OSError: --out cannot be written into.
    """
    command.check_least(config, faces=SHOWN)
    check_dicebear("a face")
    command.say(f"loading world {config.world}", error=True)
    scene = load_scene(load_world(config.world), command.choose_device())
    reader, generator, device = face_reader(scene), scene.generator, scene.device
    if generator.w_dim != W_DIM:
        raise ValueError(
            f"--world: expected a generator of codes of {W_DIM} numbers, found {generator.w_dim}"
        )
    numbers = torch.Generator().manual_seed(WORLD_TARGETS)
    z = torch.randn(config.faces, generator.z_dim, generator=numbers)
    indices = indices_from_z(z)
    faces = indices.tolist()
    pictures = [draw_face(face)[0] for face in tqdm(faces, "draw", unit="face")]
    drawn, truth = (
        to_images(torch.from_numpy(np.stack(pictures))).to(device),
        truth_of([tuple(f) for f in faces]),
    )
    exact = codes(one_hot(indices))[:, None].repeat(1, generator.num_ws, 1).to(device)
    mapped = torch.cat([generator.mapping(part.to(device), 1.0) for part in z.split(64)])
    made = {"drawn": drawn, "from codes": scene.render(exact), "from z": scene.render(mapped)}
    if scene.inverter is not None:
        inverted = torch.cat([scene.inverter(part) for part in drawn.split(64)])
        made["inverted"] = scene.render(inverted)
    report: dict[str, dict[str, float | None]] = {
        name: {
            "psnr": None if images is drawn else decibels(images, drawn),
            **agreement(reader, images, truth),
        }
        for name, images in made.items()
    }
    command.make_folder(config.out)
    command.write_json(config.out / "report.json", {"faces": config.faces, **report})
    rows = [[name, *(number(value) for value in row.values())] for name, row in report.items()]
    text = "\n".join(table(["faces", "PSNR, dB", *list(report["drawn"])[1:]], rows))
    command.write_file(config.out / "report.md", text)
    sheets = {name: pairs(drawn, images) for name, images in made.items() if name != "drawn"}
    for name, sheet in (sheets | mixtures(scene, exact)).items():
        shown = {label: tensor_to_pictures(images) for label, images in sheet.items()}
        write_picture(labelled_grid(None, shown), config.out / f"{name.replace(' ', '_')}.png")
    print(text)
    command.say_next(config.out, "report.md, sheets of pictures", "look at them", error=True)
    return report
