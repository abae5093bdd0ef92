"""The attribute reader: a picture of the bundled world to which values its face shows.

An independent judge, used by evaluation alone and seen by no other training: it says which essence
an edit brought and which identity it kept, in the attributes of `data.illustrated.codes` and
without CLIP. Its readings are shares that add up to 1 for each attribute, so a known face is read
as ones and zeros.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from data.illustrated import codes
from data.illustrated.codes import ATTRIBUTES, BEARDS, COUNTS, GLASSES, HATS, SHADES, SIZE, VALUES
from targetclip.embedder import SIGNED, EncoderInput, preprocess_images
from targetclip.encoders.inverter import PictureEncoder
from targetclip.weights import digest_of_weights, load_weights, read_tensors, save_half

BUNDLED = Path(__file__).parent / "reader.safetensors"
FORMAT = "targetclip-avatar-reader/1"
HAIR_COLOURS = tuple(codes.HAIR_COLOURS)
NAMES = [attribute.name for attribute in ATTRIBUTES]
PRESENT = {
    "glasses": ("accessories", GLASSES),
    "beard": ("facialHair", tuple(name for name in BEARDS if name.startswith("beard"))),
    "hat": ("top", HATS),
}
INPUT = EncoderInput(SIZE, SIGNED, SIGNED, "bicubic")


@dataclass(frozen=True)
class Reading:
    """One attribute, or whether something is there at all: its place among the readings."""

    name: str
    start: int
    size: int
    """Values, each with a share; 2 of what is absent or there."""
    essence: bool

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)


def list_readings() -> tuple[Reading, ...]:
    """Return a reading of each attribute, then of each kind of PRESENT."""
    sizes = [(a.name, len(a.values), a.essence) for a in ATTRIBUTES]
    sizes += [(kind, 2, True) for kind in PRESENT]
    readings, start = [], 0
    for name, size, essence in sizes:
        readings.append(Reading(name, start, size, essence))
        start += size
    return tuple(readings)


READINGS = list_readings()
OUTPUTS = READINGS[-1].start + READINGS[-1].size
SPANS = {reading.name: reading.span for reading in READINGS}


def among(name: str, values: tuple[str, ...]) -> list[int]:
    """Return the places of some values of an attribute among the readings."""
    known = ATTRIBUTES[NAMES.index(name)].values
    return [SPANS[name].start + known.index(value) for value in values]


def with_presence(shares: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch outputs"]:
    """Return readings: shares of all values, and whether each kind of PRESENT is there."""
    parts = [shares]
    for name, values in PRESENT.values():
        there = shares[..., among(name, values)].sum(dim=-1)
        parts.append(torch.stack([1 - there, there], dim=-1))
    return torch.cat(parts, dim=-1)


def seen_identity(readings: Float[Tensor, "*batch outputs"]) -> Bool[Tensor, "*batch outputs"]:
    """Return which identity readings a picture shows: shades hide eyes and brows."""
    seen = torch.tensor([not r.essence for r in READINGS for _ in range(r.size)])
    seen = seen.to(readings.device).expand(readings.shape).clone()
    hidden = readings[..., among("accessories", SHADES)].sum(dim=-1, keepdim=True) > 0.5
    for name in ("eyes", "eyebrows"):
        seen[..., SPANS[name]] &= ~hidden
    return seen


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

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what is read and of the weights. Do not change weights after reading it."""
        return digest_of_weights(described(), self.state_dict())

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch outputs"]:
        """Return the readings of square images in [-1, 1] of any size.
        ValueError: the images are not square."""
        return self.read(preprocess_images(images.float(), "consistent", INPUT))[1]

    def values(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch attributes"]:
        """Return the likeliest value of each attribute, shown or not."""
        groups = self(images).split(COUNTS, dim=1)
        return torch.stack([group.argmax(dim=1) for group in groups], dim=1)

    def levels(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the output of each convolution."""
        levels = [images.clamp(-1, 1)]
        for conv in self.encoder.convs:
            levels.append(conv(levels[-1]))
        return levels[1:]

    def read(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch features"], Float[Tensor, "batch outputs"]]:
        """Return the penultimate layer, and the readings."""
        last = self.levels(images)[-1]
        features = nn.functional.leaky_relu(self.encoder.hidden(last.flatten(1)), 0.2)
        groups = self.encoder.out(features).float().split(COUNTS, dim=1)
        return features, with_presence(torch.cat([group.softmax(dim=1) for group in groups], 1))

    @torch.no_grad()
    def present(self, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
        """Return whether "glasses", "beard" and "hat" are there (boolean [batch]).

        And "hair_colour", an index into HAIR_COLOURS; of no meaning where no hair shows.
        """
        _, readings = self.read(images)
        found = {kind: readings[:, SPANS[kind]][:, 1] > 0.5 for kind in PRESENT}
        return found | {"hair_colour": readings[:, SPANS["hairColor"]].argmax(dim=1)}


def save_reader(reader: AvatarReader, path: Path) -> None:
    """Write the reader as safetensors in half precision, with the names of what it reads."""
    save_half(path, reader, {"format": FORMAT, "reads": described()})


def described() -> str:
    """Return what a reader's outputs are, to be compared with what a file was made for."""
    return json.dumps({attribute.name: attribute.values for attribute in ATTRIBUTES})


def load_reader(path: Path = BUNDLED) -> AvatarReader:
    """Read the reader's weights.
    FileNotFoundError: no such file. ValueError: not a reader's file, a damaged one, or one that
    reads other attributes."""
    advice = "make one with python -m train.world.reader"
    metadata, state = read_tensors(path, "reader", (FORMAT,), advice)
    if metadata.get("reads") != described():
        raise ValueError(f"{path}: reads other attributes than this version: {advice}")
    reader = AvatarReader()
    load_weights(reader, state, path)
    return reader.eval().requires_grad_(False)
