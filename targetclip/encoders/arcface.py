"""ArcFace, the identity model of photographs, with the IR-SE50 body and its public checkpoint.

Knows the network (Deng et al. 2019), how aligned FFHQ-like faces are cropped for it, and the
layout of `model_ir_se50.pth`. Pictures must be aligned as FFHQ's are; nothing here finds a face.
"""

from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import SIGNED, EncoderInput, preprocess_images
from targetclip.encoders.irse import COUNTER, STAGES, IrSe50, fill
from targetclip.generators.rosinality import PARALLEL, read_checkpoint
from targetclip.weights import digest_of_weights

EXPECTED = "ArcFace's IR-SE50 weights, a state dict as in model_ir_se50.pth"
SIZE, FACE, FEATURES = 256, 112, 512
ROWS, COLUMNS = slice(35, 223), slice(32, 220)  # the face in a picture of 256 px
INPUT = EncoderInput(SIZE, SIGNED, SIGNED, "bilinear")


def aligned_face(images: Float[Tensor, "batch 3 _ _"]) -> Float[Tensor, "batch 3 112 112"]:
    """Cut the faces out of square pictures of any size, as the release does.

    Larger pictures are averaged down to 256 px as there; smaller ones, which the release does not
    know, are enlarged bilinearly. Raises ValueError for pictures that are not square.
    """
    height, width = images.shape[-2:]
    if height == width > SIZE:
        images = F.adaptive_avg_pool2d(images, SIZE)
    elif (height, width) != (SIZE, SIZE):
        images = preprocess_images(images, "consistent", INPUT)  # refuses what is not square
    return F.adaptive_avg_pool2d(images[:, :, ROWS, COLUMNS], FACE)


class ArcFace(IrSe50):
    """Faces of 112 px in [-1, 1] to features [batch, 512], compared by their cosine."""

    def __init__(self) -> None:
        super().__init__()
        width, side = STAGES[-1][0], FACE >> len(STAGES)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(width * side * side, FEATURES),
            nn.BatchNorm1d(FEATURES),
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights. Computed once; do not change weights after reading it."""
        weights = {k: t for k, t in self.state_dict().items() if not k.endswith(COUNTER)}
        return digest_of_weights(EXPECTED, weights)

    def forward(self, faces: Float[Tensor, "batch 3 112 112"]) -> Float[Tensor, "batch features"]:
        """Return features of any length, before normalization."""
        features: Tensor = self.output_layer(self.stages(faces)[-1])
        return features

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """Return unit vectors of square images in [-1, 1] of any size, differentiably.
        ValueError: the images are not square."""
        return F.normalize(self(aligned_face(images.float())), dim=1)


def load_arcface(path: str | Path) -> ArcFace:
    """Read the public IR-SE50 weights of ArcFace, on the CPU in float32, frozen.
    FileNotFoundError: no such file. ValueError: not such weights, or damaged ones. No code in the
    file is run."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such ArcFace weights; download model_ir_se50.pth")
    try:
        state = read_checkpoint(path, EXPECTED)
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError(f"expected {EXPECTED}, found {type(state).__name__}")
        with torch.device("meta"):
            network = ArcFace()
        fill(network, {name.removeprefix(PARALLEL): state[name] for name in state}, EXPECTED)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return network
