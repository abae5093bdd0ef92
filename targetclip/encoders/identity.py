"""Identity: embeddings whose cosine tells whether two images show the same person.

Knows the interface of an identity model, one small network for avatars, and its file. For
photographs ArcFace has the same interface. Knows nothing of generators, edits or faces.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import SIGNED, EmbedsImages, EncoderInput, preprocess_images
from targetclip.encoders.inverter import PictureEncoder, stored_config
from targetclip.recipes import Preprocess
from targetclip.weights import digest_of_weights, load_weights, read_tensors, save_half

FORMAT = "targetclip-identity/1"
MAKE = "for the bundled world make one with python -m train.world.identity"


@runtime_checkable
class IdentityModel(Protocol):
    """The interface of an identity model. Images are NCHW in [-1, 1]."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: embeddings compare within one model only."""

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Return unit vectors of square images of any size; a cosine of 1 is the same person."""


@torch.no_grad()
def identity_similarity(
    model: IdentityModel,
    before: Float[Tensor, "images 3 _ _"],
    after: Float[Tensor, "others 3 _ _"],
) -> Float[Tensor, " images"]:
    """Compare the people of two batches, row by row: cosines, 1 for the same. No gradient.

    Images are in [-1, 1]; the batches may differ in size in px.

    ValueError: the batches differ in length, or the images are not square.
    """
    if len(before) != len(after):
        raise ValueError(
            f"expected as many images after as before, found {len(before)} and {len(after)}"
        )
    return F.cosine_similarity(model.embed_images(before), model.embed_images(after), dim=1)


@dataclass(frozen=True)
class EmbedderWithIdentity:
    """An embedder and an identity model in one, so that both use the same rendering."""

    embedder: EmbedsImages
    identity: IdentityModel

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch both"]:
        """Return the embedding, then the identity features; differentiable."""
        embeddings = self.embedder.embed_images(images, preprocess)
        return torch.cat([embeddings.float(), self.identity.embed_images(images).float()], dim=1)


def feature_model(
    embedder: EmbedsImages, identity: IdentityModel | None, identity_weight: float
) -> EmbedsImages:
    """Return the embedder, joined with the identity model if the identity loss has a weight.
    ValueError: the loss has a weight, and there is no identity model."""
    if not identity_weight:
        return embedder
    if identity is None:
        raise ValueError(
            f"an identity loss of weight {identity_weight:g} needs an identity model, found none: "
            "name one in the world's file (identity), or do without that loss"
        )
    return EmbedderWithIdentity(embedder, identity)


@dataclass(frozen=True)
class IdentityConfig:
    """Sizes of an identity network."""

    resolution: int
    channels: tuple[int, ...]
    """Widths after each halving of the resolution."""
    hidden: int
    features: int


class AvatarIdentity(nn.Module):
    """Images of avatars to features of mean 0 that tell people apart by their cosine."""

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PictureEncoder(
            config.resolution, config.channels, config.hidden, config.features
        )
        self.input = EncoderInput(config.resolution, SIGNED, SIGNED, "bicubic")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and weights. Computed once; do not change weights after reading it."""
        return digest_of_weights(repr(self.config), self.state_dict())

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Return features of images of the network's own size, as training compares them."""
        features: Tensor = self.encoder(images)
        return features

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Return unit vectors of square images in [-1, 1] of any size, differentiably.
        ValueError: the images are not square."""
        resized = preprocess_images(images.float(), "consistent", self.input)
        # Features are trained to mean 0 over all people, so cosines of strangers are around 0.
        return F.normalize(self(resized), dim=1)


def save_identity(identity: AvatarIdentity, path: Path) -> None:
    """Write a model as one safetensors file, weights in half precision, config in metadata."""
    save_half(path, identity, {"format": FORMAT, "config": json.dumps(asdict(identity.config))})


def load_identity(path: str | Path) -> AvatarIdentity:
    """Read an identity model, frozen and in float32.
    FileNotFoundError: no such file. ValueError: not an identity file, or a damaged one."""
    path = Path(path)
    metadata, state = read_tensors(path, "identity", [FORMAT], MAKE)
    identity = AvatarIdentity(stored_config(IdentityConfig, metadata, path))
    load_weights(identity, state, path)
    return identity.eval().requires_grad_(False)
