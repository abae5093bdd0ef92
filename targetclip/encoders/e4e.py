"""e4e, the inverter of photographs of faces, with its public checkpoint.

Knows the network of "Designing an Encoder for StyleGAN Image Manipulation" (Tov et al. 2021) at
its last stage, and the layout of `e4e_ffhq_encode.pt`. Pictures must be aligned as e4e's training
pictures were; nothing here finds a face. The file does not say which generator it inverts: only
the number and length of the w vectors can be checked.
"""

import argparse
import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.embedder import SIGNED, EncoderInput, preprocess_images
from targetclip.encoders.arcface import STAGES, IrSe50, counted, fill
from targetclip.generators.rosinality import PARALLEL, read_checkpoint
from targetclip.generators.stylegan2 import EqualizedLinear

ENCODER_TYPE = "Encoder4Editing"
EXPECTED = 'an e4e checkpoint {"state_dict": {"encoder...": ...}, "latent_avg": ...}'
SIZE = 256
INPUT = EncoderInput(SIZE, SIGNED, SIGNED, "bilinear")
COARSE, MIDDLE = 3, 7  # heads 0 to 2 read the coarsest features, 3 to 6 the middle ones


class StyleHead(nn.Module):
    """Square features to one w vector, by convolutions that halve the size down to a pixel."""

    def __init__(self, channels: int, w_dim: int, halvings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(halvings):
            inputs = w_dim if index else channels
            layers += [nn.Conv2d(inputs, w_dim, 3, stride=2, padding=1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualizedLinear(w_dim, w_dim)

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch w_dim"]:
        w: Tensor = self.linear(self.convs(features).flatten(1))
        return w


def added(
    coarse: Float[Tensor, "batch channels _ _"], fine: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """Return the sum of two levels of the pyramid, at the size of the finer one."""
    size = list(fine.shape[-2:])
    return fine + F.interpolate(coarse, size, mode="bilinear", align_corners=True)


class Encoder4Editing(IrSe50):
    """Images of 256 px to W+ offsets: the first head's w, plus a delta for each later layer."""

    def __init__(self, num_ws: int, w_dim: int) -> None:
        super().__init__()
        (_, _), (fine, _), (middle, _), (width, _) = STAGES
        self.styles = nn.ModuleList(
            StyleHead(width, w_dim, halvings=4 + (index >= COARSE) + (index >= MIDDLE))
            for index in range(num_ws)
        )
        self.latlayer1 = nn.Conv2d(middle, width, 1)
        self.latlayer2 = nn.Conv2d(fine, width, 1)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        _, fine, middle, coarse = self.stages(images)
        middle = added(coarse, self.latlayer1(middle))
        fine = added(middle, self.latlayer2(fine))
        ws: list[Tensor] = []
        for index, head in enumerate(self.styles):
            ws.append(head(coarse if index < COARSE else middle if index < MIDDLE else fine))
        first, *deltas = ws
        return torch.stack([first, *(first + delta for delta in deltas)], dim=1)


class E4eInverter(nn.Module):
    """Square images of any size in [-1, 1] to W+ [batch, num_ws, w_dim]: offsets plus average.

    Resized to 256 px as Pillow's bilinear filter would. Raises ValueError for other shapes.
    """

    latent_avg: Tensor

    def __init__(self, encoder: Encoder4Editing, latent_avg: Float[Tensor, "num_ws w_dim"]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("latent_avg", latent_avg)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        offsets: Tensor = self.encoder(preprocess_images(images, "consistent", INPUT))
        return offsets + self.latent_avg


def average_of(latent_avg: object, num_ws: int, w_dim: int) -> Float[Tensor, "num_ws w_dim"]:
    """Return the average latent, stored as [w_dim], [1, w_dim] or [num_ws, w_dim]."""
    if not isinstance(latent_avg, Tensor) or not latent_avg.is_floating_point():
        raise ValueError(f"expected {EXPECTED}, found latent_avg of {type(latent_avg).__name__}")
    if list(latent_avg.shape) not in ([w_dim], [1, w_dim], [num_ws, w_dim]):
        raise ValueError(
            f"expected latent_avg of shape [{w_dim}] or [{num_ws}, {w_dim}], "
            f"found {list(latent_avg.shape)}"
        )
    if not latent_avg.isfinite().all():
        raise ValueError("latent_avg holds NaN or infinity: get the file again")
    return latent_avg.detach().float().expand(num_ws, w_dim).contiguous()


def encoder_type(options: object) -> object:
    """Return the kind of encoder that the options of a training name; None if they name none."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    return options.get("encoder_type") if isinstance(options, dict) else None


def inverter_of(checkpoint: object, num_ws: int, w_dim: int) -> E4eInverter:
    """Return the inverter of a loaded checkpoint; its decoder and most options are ignored."""
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(checkpoint, dict) or not isinstance(state, dict):
        keys = counted(set(map(str, checkpoint)) if isinstance(checkpoint, dict) else set())
        raise ValueError(f"expected {EXPECTED}, found {type(checkpoint).__name__}, keys: {keys}")
    # pSp's encoder has the same names and shapes, but all of its w vectors are absolute.
    if (kind := encoder_type(checkpoint.get("opts"))) not in (None, ENCODER_TYPE):
        raise ValueError(
            f"expected {EXPECTED}, found an encoder of the type {kind}, as of pSp: take the e4e "
            "that was trained with this generator"
        )
    prefix = "encoder."
    plain = {n.removeprefix(PARALLEL): value for n, value in state.items() if isinstance(n, str)}
    encoder = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    last = encoder.get("styles.0.linear.weight")
    if not isinstance(last, Tensor) or last.ndim != 2:
        raise ValueError(f"expected {EXPECTED}, found no encoder.styles.0.linear.weight")
    heads = len({match[0] for name in encoder if (match := re.match(r"styles\.\d+\.", name))})
    if (heads, len(last)) != (num_ws, w_dim):
        raise ValueError(
            f"this e4e gives {heads} w vectors of length {len(last)}, but the generator takes "
            f"{num_ws} of length {w_dim}: take the e4e that was trained with this generator"
        )
    average = average_of(checkpoint.get("latent_avg"), num_ws, w_dim)
    with torch.device("meta"):
        network = Encoder4Editing(num_ws, w_dim)
    fill(network, encoder, EXPECTED)
    return E4eInverter(network, average).eval()


def load_e4e(path: str | Path, num_ws: int, w_dim: int) -> E4eInverter:
    """Read the public checkpoint of e4e, for a generator with `num_ws` w vectors of `w_dim`.

    The network is on the CPU in float32, frozen. No code in the file is run.

    FileNotFoundError: no such file. ValueError: not an e4e checkpoint, a damaged one, or one for
    another generator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such e4e checkpoint; download e4e_ffhq_encode.pt")
    try:
        # Its training keeps the options as plain attributes.
        checkpoint = read_checkpoint(path, EXPECTED, [argparse.Namespace])
        return inverter_of(checkpoint, num_ws, w_dim)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
