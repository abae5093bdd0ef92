"""Measure the bundled world on faces none of its networks was trained on.

Tells whether generator, CLIP model, inverter and attribute reader are what a study needs, and
writes sheets of pictures: reproductions, inversions, interpolations, edits of one layer.

    python -m eval.studies.world_quality --out runs/world
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("eval.studies.world_quality")

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from data.drawn.captions import caption, has
from data.drawn.faces import faces_from_z, psnr, sample_z, to_images, wide_face, ws_from_z
from data.drawn.readings import truth_of
from data.drawn.sketch import HAIR_COLOURS, Face, draw, stepped_name
from eval.metrics import reading_columns
from eval.reader import AttributeReader, agreement, load_reader, mean_errors
from targetclip import command
from targetclip.embedder import ClipEmbedder
from targetclip.generators.stylegan2 import StyleGAN2
from targetclip.media.images import labelled_grid, tensor_to_pictures, write_picture
from targetclip.scene import Scene
from targetclip.seeds import WORLD_TARGETS
from targetclip.world import DEFAULT_WORLD, load_scene, load_world

# Prompts of CLIP, in a few words people would use: what a face wears, and that it wears none.
PROMPTS = {
    "glasses": (["glasses", "spectacles", "sunglasses", "dark glasses"], ["no glasses"]),
    "hat": (["a hat", "a beanie", "a top hat"], ["no hat", "a bare head"]),
    "beard": (["a beard", "a full beard", "a long beard"], ["no beard", "a shaven chin"]),
}
SHOWN = 32  # faces on the sheets


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for report.json and sheets of pictures."""
    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    faces: int = 500
    """Faces for generator, inverter and reader, at least 32."""
    captions: int = 1000
    """Faces for CLIP, in each of plain and other style, at least 100 and better twice as many."""


def check_reader(
    reader: AttributeReader,
    images: Float[Tensor, "batch 3 height width"],
    truth: Float[Tensor, "batch outputs"],
    seen: Bool[Tensor, "batch outputs"],
) -> dict[str, Any]:
    """Compare the readings of faces with the parameters they were drawn from."""
    readings = reader(images.clamp(-1, 1))
    identity = seen & reading_columns(essence=False)
    names = ("glasses", "hat", "beard")
    return {
        "agreement": {name: agreement(readings, truth, name) for name in names},
        "identity_error": float((readings - truth).abs()[identity].mean()),
        "error": mean_errors(readings, truth, seen),
    }


def retrieval(image: Float[Tensor, "n embed"], text: Float[Tensor, "n embed"]) -> float:
    """Return how often a picture finds its caption among 100, from 0 to 1."""
    right = [
        (i @ t.T).argmax(dim=1) == torch.arange(len(i))
        for i, t in zip(image.split(100), text.split(100), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def check_clip(embedder: ClipEmbedder, styled: bool, count: int) -> dict[str, float]:
    """Return the rate of captions found among 100, and accuracies of prompts.

    Prompts ask for the hair colour, and for what a face wears.

    Raises:
        ValueError: fewer than 100 of the faces have colours.
    """
    faces = [wide_face(WORLD_TARGETS, i, styled=float(styled), extra=0.0) for i in range(count)]
    # A grey picture shows no hair colour.
    faces = [(face, extras, style) for face, extras, style in faces if not style.grey]
    faces = faces[: len(faces) // 100 * 100]
    if not faces:
        raise ValueError(f"--captions: expected 100 or more in colour, found fewer among {count}")
    images = to_images(np.stack([np.asarray(draw(*triple)) for triple in faces]))
    image = F.normalize(embedder.embed_images(images), dim=1)
    rng = np.random.default_rng(WORLD_TARGETS)
    texts = [caption(face, extras, rng, complete=True) for face, extras, _ in faces]

    def likeness(prompts: list[str]) -> Float[Tensor, " faces"]:
        """Return cosines to the mean of some prompts, as zero-shot tests of CLIP do."""
        text = F.normalize(embedder.embed_texts([f"a face with {p}" for p in prompts]), dim=1)
        return image @ F.normalize(text.mean(dim=0), dim=0)

    colours = list(HAIR_COLOURS)
    named = [colours.index(stepped_name(HAIR_COLOURS, face.hair_colour)) for face, _, _ in faces]
    guessed = torch.stack([likeness([f"{colour} hair"]) for colour in colours]).argmax(dim=0)
    figures = {
        "caption_among_100": retrieval(image, F.normalize(embedder.embed_texts(texts), dim=1)),
        "hair_colour": float((guessed == torch.tensor(named)).float().mean()),
    }
    for name, (worn, bare) in PROMPTS.items():
        truth = torch.tensor([has(face, name) for face, _, _ in faces])
        figures[name] = float(((likeness(worn) > likeness(bare)) == truth).float().mean())
    return figures


def write_sheets(
    scene: Scene,
    ws: Float[Tensor, "batch num_ws w_dim"],
    drawn: Float[Tensor, "batch 3 height width"],
    inverted: Float[Tensor, "batch 3 height width"] | None,
    out: Path,
) -> None:
    """Write sheets of pictures: reproductions, inversions, interpolations, edits of one layer."""

    def save(name: str, rows: dict[str, Float[Tensor, "batch 3 height width"]]) -> None:
        pictures = {label: tensor_to_pictures(images) for label, images in rows.items()}
        write_picture(labelled_grid(None, pictures), out / f"{name}.png")

    def save_pairs(name: str, images: Float[Tensor, "batch 3 height width"]) -> None:
        rows: dict[str, Tensor] = {}
        for i in range(0, SHOWN, 8):
            rows |= {f"drawn {i}": drawn[i : i + 8], f"{name} {i}": images[i : i + 8]}
        save(name, rows)

    save_pairs("generated", scene.render(ws[:SHOWN]))
    if inverted is not None:
        save_pairs("inverted", inverted)
    steps = torch.linspace(0, 1, 9)[:, None, None]
    between = {f"{i} to {i + 1}": ws[i] + steps * (ws[i + 1] - ws[i]) for i in range(0, 12, 2)}
    save("interpolated", {label: scene.render(rows) for label, rows in between.items()})
    layers = {}
    for i in range(6):
        rows = ws[i].repeat(scene.generator.num_ws, 1, 1)
        for layer in range(len(rows)):
            rows[layer, layer] = ws[i + 8, layer]
        layers[f"{i} with one layer of {i + 8}: layers 0 to {len(rows) - 1}"] = rows
    save("layers", {label: scene.render(rows) for label, rows in layers.items()})


@torch.no_grad()
def run(config: Config) -> dict[str, Any]:
    """Measure everything, write report.json and the sheets, print and return the report.

    Raises:
        FileNotFoundError, ValueError: options or parts of the world that cannot be.
        OSError: --out cannot be written into.
    """
    command.check_least(config, faces=SHOWN, captions=100)
    world = load_world(config.world)
    command.say(f"loading world {world.name}", error=True)
    scene, reader = load_scene(world), load_reader()
    generator, embedder = scene.generator, scene.embedder
    if not isinstance(generator, StyleGAN2) or not isinstance(embedder, ClipEmbedder):
        raise ValueError("--world: expected StyleGAN2 and a CLIP model, found others")
    command.make_folder(config.out)
    z = sample_z(config.faces, generator.z_dim, WORLD_TARGETS)
    parameters = faces_from_z(z).numpy()
    drawn = to_images(np.stack([np.asarray(draw(Face(*row))) for row in parameters.tolist()]))
    truth, seen = (torch.from_numpy(array) for array in truth_of(parameters))
    ws = ws_from_z(generator, z)
    made = scene.render(ws)
    report: dict[str, Any] = {
        "faces": config.faces,
        "generator": {"psnr": psnr(made, drawn), "psnr_mixed": psnr(made[1::2], drawn[1::2])},
        "reader": {
            "drawn": check_reader(reader, drawn, truth, seen),
            "generated": check_reader(reader, made, truth, seen),
        },
        "clip": {
            "plain": check_clip(embedder, False, config.captions),
            "other style": check_clip(embedder, True, config.captions),
        },
    }
    inverted = None
    if scene.inverter is not None:
        inverted = scene.render(torch.cat([scene.inverter(part) for part in drawn.split(64)]))
        report["inverter"] = {
            "psnr": psnr(inverted, drawn),
            **check_reader(reader, inverted, truth, seen),
        }
    command.write_json(config.out / "report.json", report)
    write_sheets(scene, ws, drawn, inverted, config.out)
    print(json.dumps(report, indent=2))
    command.say_next(config.out, "report.json, sheets of pictures", "look at them", error=True)
    return report


def main() -> None:
    command.main(run, Config, __doc__, "python -m eval.studies.world_quality", exclusive=True)
