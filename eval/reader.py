"""The attribute reader: images of the bundled world to readings of what they show.

An independent judge, which evaluation alone uses and no training loss sees. It measures which
essence an edit brought and which identity it kept, by the readings of `data.drawn.readings` and
without CLIP.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data.drawn.readings import OUTPUTS, READINGS
from data.drawn.sketch import SIZE
from targetclip.encoders.inverter import PictureEncoder
from targetclip.weights import load_weights, read_tensors, save_half

BUNDLED = Path(__file__).parent / "reader.safetensors"
FORMAT = "targetclip-reader/1"
MAKE = "make one with python -m train.drawn.reader"


class AttributeReader(nn.Module):
    """Images [batch, 3, 64, 64] in [-1, 1] to readings [batch, OUTPUTS] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PictureEncoder(SIZE, (48, 96, 144, 192), 384, OUTPUTS)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch outputs"]:
        return torch.sigmoid(self.encoder(images))


def names_of_readings() -> str:
    """Return the names of the readings, as a reader's file records them."""
    return json.dumps([reading.name for reading in READINGS])


def save_reader(reader: AttributeReader, path: Path) -> None:
    """Write the reader as safetensors in half precision, with the names of its readings."""
    save_half(path, reader, {"format": FORMAT, "readings": names_of_readings()})


def load_reader(path: Path = BUNDLED) -> AttributeReader:
    """Load a reader from its file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a reader's file, a damaged one, or one with other readings.
    """
    metadata, state = read_tensors(path, "reader", [FORMAT], MAKE)
    if metadata.get("readings") != names_of_readings():
        raise ValueError(f"{path}: not a reader of this project's faces: {MAKE}")
    reader = AttributeReader()
    load_weights(reader, state, path)
    return reader.eval().requires_grad_(False)


def mean_errors(
    readings: Float[Tensor, "batch outputs"],
    truth: Float[Tensor, "batch outputs"],
    shown: Bool[Tensor, "batch outputs"],
) -> dict[str, float]:
    """Return the mean absolute error of each reading, over the faces that show it."""
    errors = {}
    for reading in READINGS:
        rows = shown[:, reading.start]
        error = (readings[rows, reading.span] - truth[rows, reading.span]).abs().mean()
        errors[reading.name] = float(error)
    return errors


def agreement(
    readings: Float[Tensor, "batch outputs"], truth: Float[Tensor, "batch outputs"], name: str
) -> float:
    """Return how often two readings agree that glasses, a hat or a beard is there, in [0, 1]."""
    column = next(reading.start for reading in READINGS if reading.name == name)
    limit = 0.25 if name == "beard" else 0.5  # a beard is there from half of its scale on
    agree = (readings[:, column] > limit) == (truth[:, column] > limit)
    return float(agree.float().mean())
