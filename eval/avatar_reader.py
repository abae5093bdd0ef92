"""The attribute reader: a picture of the bundled world to which values its face shows.

An independent judge, used by evaluation alone and seen by no other training: it says which essence
an edit brought and which identity it kept, in the attributes of `data.illustrated.codes` and
without CLIP.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.illustrated.codes import (
    ATTRIBUTES,
    BEARDS,
    COUNTS,
    GLASSES,
    HATS,
    SIZE,
    VALUES,
)
from data.illustrated.codes import (
    HAIR_COLOURS as HAIR,
)
from targetclip.encoders.inverter import PictureEncoder
from targetclip.weights import load_weights, read_tensors, save_half

BUNDLED = Path(__file__).parent / "avatar_reader.safetensors"
FORMAT = "targetclip-avatar-reader/1"
HAIR_COLOURS = tuple(HAIR)
NAMES = [attribute.name for attribute in ATTRIBUTES]
PRESENT = {
    "glasses": ("accessories", GLASSES),
    "beard": ("facialHair", tuple(name for name in BEARDS if name.startswith("beard"))),
    "hat": ("top", HATS),
}


class AvatarReader(nn.Module):
    """Images [batch, 3, 128, 128] in [-1, 1] to a logit of every value of every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PictureEncoder(SIZE, (32, 48, 96, 128, 160), 384, VALUES)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch values"]:
        logits: Tensor = self.encoder(images)
        return logits

    def values(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch attributes"]:
        """Return the likeliest value of each attribute, shown or not."""
        groups = self(images).split(COUNTS, dim=1)
        return torch.stack([group.argmax(dim=1) for group in groups], dim=1)

    @torch.no_grad()
    def present(self, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """Return whether "glasses", "beard" and "hat" are there (boolean [batch]).

        And "hair_colour", an index into HAIR_COLOURS; of no meaning where no hair shows.
        """
        chances = dict(zip(NAMES, self(images).split(COUNTS, dim=1), strict=True))
        found = {}
        for kind, (name, values) in PRESENT.items():
            known = ATTRIBUTES[NAMES.index(name)].values
            where = torch.tensor([value in values for value in known], device=images.device)
            found[kind] = chances[name].softmax(dim=1)[:, where].sum(dim=1) > 0.5
        return found | {"hair_colour": chances["hairColor"].argmax(dim=1)}


def save_reader(reader: AvatarReader, path: Path) -> None:
    """Write the reader as safetensors in half precision, with the names of what it reads."""
    save_half(path, reader, {"format": FORMAT, "reads": described()})


def described() -> str:
    """Return what a reader's outputs are, to be compared with what a file was made for."""
    return json.dumps({attribute.name: attribute.values for attribute in ATTRIBUTES})


def load_reader(path: Path = BUNDLED) -> AvatarReader:
    """Read the reader's weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a reader's file, a damaged one, or one that reads other attributes.
    """
    advice = "make one with python -m train.world.reader"
    metadata, state = read_tensors(path, "reader", (FORMAT,), advice)
    if metadata.get("reads") != described():
        raise ValueError(f"{path}: reads other attributes than this version: {advice}")
    reader = AvatarReader()
    load_weights(reader, state, path)
    return reader.eval().requires_grad_(False)
