"""The attribute reader: a picture of the bundled world to what can be seen on it.

An independent judge, used by evaluation alone and seen by no training loss: it says which essence
an edit brought and which identity it kept, in the words of `data.drawn.readings` and without CLIP.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.drawn.readings import OUTPUTS, READINGS
from data.drawn.sketch import SIZE
from targetclip.encoders.inverter import PictureEncoder

BUNDLED = Path(__file__).parent / "reader.safetensors"
FORMAT = "targetclip-reader/1"


class AttributeReader(nn.Module):
    """Images [batch, 3, 64, 64] in [-1, 1] to readings [batch, OUTPUTS] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PictureEncoder(SIZE, (48, 96, 144, 192), 384, OUTPUTS)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch outputs"]:
        return torch.sigmoid(self.encoder(images))


def save_reader(reader: AttributeReader, path: Path) -> None:
    """Write the reader as safetensors in half precision, with the names of what it reads."""
    half = {name: t.detach().half().contiguous() for name, t in reader.state_dict().items()}
    names = [reading.name for reading in READINGS]
    save_file(half, path, {"format": FORMAT, "readings": json.dumps(names)})


def load_reader(path: Path = BUNDLED) -> AttributeReader:
    """Read the reader's weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a reader's file, a damaged one, or one that reads other attributes.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such reader file: make one with python -m train.drawn.reader"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    names = json.dumps([reading.name for reading in READINGS])
    if metadata.get("format") != FORMAT or metadata.get("readings") != names:
        raise ValueError(
            f"{path}: not a reader of this project's faces: "
            "make one with python -m train.drawn.reader"
        )
    reader = AttributeReader()
    try:
        reader.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: the weights do not fit a reader: get the file again") from error
    return reader.eval().requires_grad_(False)


def mean_errors(
    found: Float[Tensor, "batch outputs"],
    truth: Float[Tensor, "batch outputs"],
    seen: Bool[Tensor, "batch outputs"],
) -> dict[str, float]:
    """Mean absolute error of each reading, over the faces that show it."""
    errors = {}
    for reading in READINGS:
        where = seen[:, reading.start]
        error = (found[where, reading.span] - truth[where, reading.span]).abs().mean()
        errors[reading.name] = float(error)
    return errors


def agreement(
    found: Float[Tensor, "batch outputs"], truth: Float[Tensor, "batch outputs"], name: str
) -> float:
    """How often two readings agree on whether glasses, a hat or a beard is there."""
    at = next(reading.start for reading in READINGS if reading.name == name)
    limit = 0.25 if name == "beard" else 0.5  # presence is half of the beard's scale
    return float(((found[:, at] > limit) == (truth[:, at] > limit)).float().mean())
