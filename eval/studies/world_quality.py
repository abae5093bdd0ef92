"""Measure the bundled world on faces none of its networks was trained on.

Says whether generator, CLIP model, inverter and attribute reader are what a study needs, and writes
sheets of pictures to look at: reproductions, inversions, interpolations, edits of one layer.

    python -m eval.studies.world_quality --out runs/world
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from data.drawn.captions import caption, has
from data.drawn.faces import (
    faces_from_z,
    psnr,
    sample_z,
    to_images,
    wide_face,
    ws_from_z,
)
from data.drawn.readings import truth_of
from data.drawn.sketch import HAIR_COLOURS, Face, draw, stepped_name
from eval.metrics import reading_columns
from eval.reader import AttributeReader, agreement, load_reader, mean_errors
from targetclip.embedder import ClipEmbedder
from targetclip.media.images import labelled_grid, tensor_to_pictures
from targetclip.world import Parts, load_parts, load_world

# What is asked of CLIP: with and without, in a few words people would use.
PROMPTS = {
    "glasses": (["glasses", "spectacles", "sunglasses", "dark glasses"], ["no glasses"]),
    "hat": (["a hat", "a beanie", "a top hat"], ["no hat", "a bare head"]),
    "beard": (["a beard", "a full beard", "a long beard"], ["no beard", "a shaven chin"]),
}
SEED = 3_000_017  # neither that of training nor of validation


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for report.json and sheets of pictures."""
    world: str = "sketch64"
    faces: int = 500
    """Faces for generator, inverter and reader."""
    captions: int = 1000
    """Faces for CLIP, in each of plain and other style."""


def check_reader(
    reader: AttributeReader,
    images: Float[Tensor, "batch 3 height width"],
    truth: Float[Tensor, "batch outputs"],
    seen: Bool[Tensor, "batch outputs"],
) -> dict[str, Any]:
    """What the reader makes of faces whose parameters are known."""
    found = reader(images.clamp(-1, 1))
    identity = seen & reading_columns(essence=False)
    return {
        "agreement": {name: agreement(found, truth, name) for name in ("glasses", "hat", "beard")},
        "identity_error": float((found - truth).abs()[identity].mean()),
        "error": mean_errors(found, truth, seen),
    }


def retrieval(image: Float[Tensor, "n embed"], text: Float[Tensor, "n embed"]) -> float:
    """How often a picture finds its caption among 100."""
    right = [
        (i @ t.T).argmax(dim=1) == torch.arange(len(i))
        for i, t in zip(image.split(100), text.split(100), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def check_clip(embedder: ClipEmbedder, styled: bool, count: int) -> dict[str, float]:
    """Captions found among 100, and accuracy of prompts for hair colour and for what is worn."""
    faces = [wide_face(SEED, i, styled=float(styled), extra=0.0) for i in range(count)]
    # A grey picture shows no hair colour.
    faces = [(face, extras, style) for face, extras, style in faces if not style.grey]
    faces = faces[: len(faces) // 100 * 100]
    images = to_images(np.stack([np.asarray(draw(*triple)) for triple in faces]))
    image = F.normalize(embedder.embed_images(images), dim=1)
    rng = np.random.default_rng(SEED)
    texts = [caption(face, extras, rng, complete=True) for face, extras, _ in faces]

    def likeness(prompts: list[str]) -> Float[Tensor, " faces"]:
        """Cosine to the mean of some prompts, as CLIP is asked in zero-shot tests."""
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
        there = torch.tensor([has(face, name) for face, _, _ in faces])
        said = likeness(worn) > likeness(bare)
        figures[name] = float((said == there).float().mean())
    return figures


def write_sheets(
    parts: Parts,
    ws: Float[Tensor, "batch num_ws w_dim"],
    drawn: Float[Tensor, "batch 3 height width"],
    out: Path,
) -> None:
    """Pictures to look at: reproductions, inversions, interpolations, edits of one layer."""
    generator = parts.generator

    def save(name: str, rows: dict[str, Float[Tensor, "batch 3 height width"]]) -> None:
        pictures = {label: tensor_to_pictures(images) for label, images in rows.items()}
        labelled_grid(None, pictures).save(out / f"{name}.png")

    def save_pairs(name: str, images: Float[Tensor, "batch 3 height width"]) -> None:
        rows: dict[str, Tensor] = {}
        for i in range(0, 32, 8):
            rows |= {f"drawn {i}": drawn[i : i + 8], f"{name} {i}": images[i : i + 8]}
        save(name, rows)

    save_pairs("generated", generator.synthesis(ws[:32]))
    if parts.inverter is not None:
        save_pairs("inverted", generator.synthesis(parts.inverter(drawn[:32])))
    steps = torch.linspace(0, 1, 9)[:, None, None]
    between = {f"{i} to {i + 1}": ws[i] + steps * (ws[i + 1] - ws[i]) for i in range(0, 12, 2)}
    save("interpolated", {label: generator.synthesis(rows) for label, rows in between.items()})
    layers = {}
    for i in range(6):
        rows = ws[i].repeat(generator.num_ws, 1, 1)
        for layer in range(generator.num_ws):
            rows[layer, layer] = ws[i + 8, layer]
        layers[f"{i} with one layer of {i + 8}: layers 0 to {len(rows) - 1}"] = rows
    save("layers", {label: generator.synthesis(rows) for label, rows in layers.items()})


@torch.no_grad()
def run(config: Config) -> None:
    parts = load_parts(load_world(config.world), torch.get_default_device())
    generator = parts.generator
    reader = load_reader()
    config.out.mkdir(parents=True, exist_ok=True)

    z = sample_z(config.faces, generator.z_dim, SEED)
    parameters = faces_from_z(z).numpy()
    drawn = to_images(np.stack([np.asarray(draw(Face(*row))) for row in parameters.tolist()]))
    truth, seen = (torch.from_numpy(array) for array in truth_of(parameters))
    ws = ws_from_z(generator, z)
    made = torch.cat([generator.synthesis(part) for part in ws.split(64)])
    report: dict[str, Any] = {
        "faces": config.faces,
        "generator": {"psnr": psnr(made, drawn), "psnr_mixed": psnr(made[1::2], drawn[1::2])},
        "reader": {
            "drawn": check_reader(reader, drawn, truth, seen),
            "generated": check_reader(reader, made, truth, seen),
        },
        "clip": {
            "plain": check_clip(parts.embedder, False, config.captions),
            "other style": check_clip(parts.embedder, True, config.captions),
        },
    }
    if parts.inverter is not None:
        again = torch.cat([generator.synthesis(parts.inverter(part)) for part in drawn.split(64)])
        report["inverter"] = {
            "psnr": psnr(again, drawn),
            **check_reader(reader, again, truth, seen),
        }
    (config.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_sheets(parts, ws, drawn, config.out)
    print(json.dumps(report, indent=2))


def main() -> None:
    run(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    main()
