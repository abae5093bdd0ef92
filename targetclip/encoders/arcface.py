"""ArcFace, the identity model of photographs, with its body IR-SE50 and its public checkpoint.

The body, which e4e has as well, is the improved residual network of 50 layers with squeeze and
excitation (Deng et al. 2019; squeeze and excitation: Hu et al. 2018), under the names of the public
checkpoints. Knows how such a file fills a network, how aligned FFHQ-like faces are cropped for
ArcFace, and the layout of `model_ir_se50.pth`. Pictures must be aligned as FFHQ's are; nothing here
finds a face. Errors of the body do not name the file: the loaders of the two networks do.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import SIGNED, EncoderInput, preprocess_images
from targetclip.generators.rosinality import PARALLEL, read_checkpoint
from targetclip.weights import digest_of_weights

EXPECTED = "ArcFace's IR-SE50 weights, a state dict as in model_ir_se50.pth"
SIZE, FACE, FEATURES = 256, 112, 512
ROWS, COLUMNS = slice(35, 223), slice(32, 220)  # the face in a picture of 256 px
INPUT = EncoderInput(SIZE, SIGNED, SIGNED, "bilinear")

STAGES = ((64, 3), (128, 4), (256, 14), (512, 3))  # channels and blocks
SQUEEZE = 16
COUNTER = "num_batches_tracked"  # of batch norm: only training reads it, and old files lack it


class SqueezeExcitation(nn.Module):
    """Scale every channel by a weight computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // SQUEEZE, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // SQUEEZE, channels, 1, bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        mean = x.mean(dim=(2, 3), keepdim=True)
        weights: Tensor = self.fc2(self.fc1(mean).relu()).sigmoid()
        return x * weights


class Block(nn.Module):
    """Normalize, convolve, PReLU, convolve with a stride, normalize, scale; plus a shortcut."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module
        if inputs == channels:
            self.shortcut_layer = nn.MaxPool2d(1, stride)  # every stride-th pixel as it is
        else:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, channels, 3, padding=1, bias=False),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            SqueezeExcitation(channels),
        )

    def forward(
        self, x: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch channels _ _"]:
        out: Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return out


class IrSe50(nn.Module):
    """The body: four stages, the first block of which halves the size."""

    def __init__(self) -> None:
        super().__init__()
        width = STAGES[0][0]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        )
        blocks = []
        for channels, count in STAGES:
            for index in range(count):
                blocks.append(Block(width, channels, stride=1 if index else 2))
                width = channels
        self.body = nn.Sequential(*blocks)

    def stages(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return every stage's output: 64, 128, 256, 512 channels at 1/2, 1/4, 1/8, 1/16 size."""
        x = self.input_layer(images)
        blocks, outputs = iter(self.body), []
        for _, count in STAGES:
            for _ in range(count):
                x = next(blocks)(x)
            outputs.append(x)
        return outputs


def counted(names: set[str]) -> str:
    """Return the number of names, and the first, for a message."""
    return f"{len(names)} (first {min(names)})" if names else "none"


def fill(network: nn.Module, state: Mapping[str, object], expected: str) -> None:
    """Give a network, made on the meta device, the weights of a checkpoint, and freeze it.

    The network is then in float32 and eval mode. It keeps the tensors of `state` without a copy.

    ValueError: a missing or unexpected key, another shape, or a value that is not finite.
    """
    own = {name: t for name, t in network.state_dict().items() if not name.endswith(COUNTER)}
    given = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    missing, unexpected = own.keys() - given.keys(), given.keys() - own.keys()
    if missing or unexpected:
        raise ValueError(
            f"expected {expected}, found other keys: missing {counted(missing)}, "
            f"unexpected {counted(unexpected)}"
        )
    weights = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(COUNTER)}
    for name, tensor in own.items():
        value = given[name]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected {name} to be a tensor of floats, found {kind}")
        if value.shape != tensor.shape:
            raise ValueError(
                f"expected {name} of shape {list(tensor.shape)}, found {list(value.shape)}"
            )
        if not value.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: get the file again")
        weights[name] = value.detach().float()
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)


# ArcFace


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
