"""Who is on a picture: embeddings whose cosine says whether two images show the same person.

Knows what the project asks of such a model, one small network for drawn faces, and its file. For
photographs the same is asked of ArcFace. Knows nothing of generators, edits or what a face is.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import EmbedsImages, EncoderInput, preprocess_images
from targetclip.encoders.inverter import PictureEncoder
from targetclip.recipes import Preprocess

FORMAT = "targetclip-identity/1"


@runtime_checkable
class IdentityModel(Protocol):
    """What the project asks of an identity model. Images are NCHW in [-1, 1]."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: embeddings compare within one model only."""

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Unit vectors of square images of any size; a cosine of 1 says the same person."""


@torch.no_grad()
def identity_similarity(
    model: IdentityModel,
    before: Float[Tensor, "images 3 _ _"],
    after: Float[Tensor, "others 3 _ _"],
) -> Float[Tensor, " images"]:
    """How alike the people of two batches are, row by row: cosines, 1 the same. No gradient.

    Images are in [-1, 1]; the batches may differ in size in px.

    Raises:
        ValueError: the batches differ in length, or the images are not square.
    """
    if len(before) != len(after):
        raise ValueError(
            f"expected as many images after as before, found {len(before)} and {len(after)}"
        )
    return F.cosine_similarity(model.embed_images(before), model.embed_images(after), dim=1)


@dataclass(frozen=True)
class EmbedderWithIdentity:
    """An embedder and an identity model that look at the same renderings, made once."""

    embedder: EmbedsImages
    identity: IdentityModel

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch both"]:
        """The embedder's numbers, then the identity model's; differentiable."""
        seen = self.embedder.embed_images(images, preprocess)
        return torch.cat([seen.float(), self.identity.embed_images(images).float()], dim=1)


def feature_model(
    embedder: EmbedsImages, identity: IdentityModel | None, identity_weight: float
) -> EmbedsImages:
    """What a search looks through: an embedder, beside an identity model where that has a weight.

    Raises:
        ValueError: it has a weight, and there is none.
    """
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

    resolution: int = 64
    channels: tuple[int, ...] = (32, 48, 64, 96)
    """Widths after each halving of the resolution."""
    hidden: int = 128
    features: int = 39


class SketchIdentity(nn.Module):
    """Who is on a drawn face: images to features of mean 0, compared by their cosine."""

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PictureEncoder(
            config.resolution, config.channels, config.hidden, config.features
        )
        half = (0.5, 0.5, 0.5)  # values stay in [-1, 1]
        self.wanted = EncoderInput(config.resolution, half, half, "bicubic")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and weights. Computed once; do not change weights after reading it."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Features of images of the network's own size, which training compares with the truth."""
        features: Tensor = self.encoder(images)
        return features

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Unit vectors of square images in [-1, 1] of any size, differentiably.

        Raises:
            ValueError: the images are not square.
        """
        resized = preprocess_images(images.float(), "consistent", self.wanted)
        # Trained to mean 0 over all people, so two of them are as often unlike as alike.
        return F.normalize(self(resized), dim=1)


def save_identity(identity: SketchIdentity, path: Path) -> None:
    """Write a model as one safetensors file, weights in half precision, config in metadata."""
    half = {name: t.detach().half().contiguous() for name, t in identity.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(identity.config))}
    save_file(half, path, metadata)


def load_identity(path: str | Path) -> SketchIdentity:
    """Read an identity model, frozen and in float32.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an identity file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such identity file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, found {metadata.get('format')}: "
            "make one with python -m train.drawn.identity"
        )
    try:
        stored = json.loads(metadata["config"])
        config = IdentityConfig(**{**stored, "channels": tuple(stored["channels"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the config is damaged ({error}): get the file again") from error
    identity = SketchIdentity(config)
    try:
        identity.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the weights do not fit the config: get the file again"
        ) from error
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path}: the weights hold NaN or infinity: get the file again")
    return identity.eval().requires_grad_(False)
