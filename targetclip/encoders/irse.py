"""The improved residual network of 50 layers with squeeze and excitation (IR-SE50), and its files.

The body of ArcFace and of e4e. Knows its layers (Deng et al. 2019; squeeze and excitation: Hu et
al. 2018) under the names of the public checkpoints, and how such a file fills a network. Knows
nothing of faces or latents. Errors do not name the file: the loaders of the two networks do.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
