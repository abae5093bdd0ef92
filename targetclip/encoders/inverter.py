"""From a picture back to a latent: a small convolutional encoder into W+.

Knows one network and its file. It plays e4e's part in worlds whose generator is small; one file is
one inverter, and belongs to one generator.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

FORMAT = "targetclip-inverter/1"


@dataclass(frozen=True)
class InverterConfig:
    """Sizes of an inverter; `generator` is the fingerprint of the generator it inverts."""

    resolution: int
    num_ws: int
    w_dim: int
    generator: str
    channels: tuple[int, ...] = (48, 96, 128, 128)
    """Widths after each halving of the resolution."""
    hidden: int = 384


@runtime_checkable
class LatentInverter(Protocol):
    """What the project asks of an inverter: images in [-1, 1] to W+ latents."""

    def __call__(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]: ...


class PictureEncoder(nn.Module):
    """Convolutions that halve the resolution down to 4 px or so, then two linear layers."""

    def __init__(self, resolution: int, channels: tuple[int, ...], hidden: int, out: int) -> None:
        super().__init__()
        widths = (3, *channels)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 4, stride=2, padding=1),
                nn.GroupNorm(8, b),
                nn.LeakyReLU(0.2),
                nn.Conv2d(b, b, 3, padding=1),
                nn.LeakyReLU(0.2),
            )
            for a, b in pairwise(widths)
        )
        side = resolution >> len(channels)
        self.hidden = nn.Linear(channels[-1] * side * side, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch out"]:
        x = images
        for conv in self.convs:
            x = conv(x)
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.2)
        out: Tensor = self.out(x)
        return out


class Inverter(nn.Module):
    """Images [batch, 3, R, R] in [-1, 1] to W+ [batch, num_ws, w_dim], as offsets from mean w."""

    mean_w: Tensor

    def __init__(self, config: InverterConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PictureEncoder(
            config.resolution, config.channels, config.hidden, config.num_ws * config.w_dim
        )
        self.register_buffer("mean_w", torch.zeros(config.w_dim))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        size = self.config.resolution
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"expected images of shape [batch, 3, {size}, {size}], found {list(images.shape)}"
            )
        offsets = self.encoder(images).unflatten(1, (self.config.num_ws, self.config.w_dim))
        ws: Tensor = self.mean_w + offsets
        return ws


def save_inverter(inverter: Inverter, path: Path) -> None:
    """Write an inverter as one safetensors file, weights in half precision, config in metadata."""
    half = {name: t.detach().half().contiguous() for name, t in inverter.state_dict().items()}
    metadata = {"format": FORMAT, "config": json.dumps(asdict(inverter.config))}
    save_file(half, path, metadata)


def load_inverter(path: str | Path, generator: str) -> Inverter:
    """Read an inverter and check that it belongs to a generator, given by its fingerprint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an inverter file, a damaged one, or one made for another generator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such inverter file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, found {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, found {metadata.get('format')}: "
            "make one with python -m train.drawn.inverter"
        )
    try:
        stored = json.loads(metadata["config"])
        config = InverterConfig(**{**stored, "channels": tuple(stored["channels"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the config is damaged ({error}): get the file again") from error
    if config.generator != generator:
        raise ValueError(
            f"{path} inverts generator {config.generator[:12]}, but the generator loaded is "
            f"{generator[:12]}: train one for it with python -m train.drawn.inverter"
        )
    inverter = Inverter(config)
    try:
        inverter.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the weights do not fit the config: get the file again"
        ) from error
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise ValueError(f"{path}: the weights hold NaN or infinity: get the file again")
    return inverter.eval().requires_grad_(False)
