"""Generators: their interface, and reading one from a checkpoint file.

Knows the three file formats by their suffix. The network is in `stylegan2.py`; each layout has its
own reader.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from targetclip.generators.nvidia import read_nvidia
from targetclip.generators.rosinality import read_rosinality, read_safetensors
from targetclip.generators.stylegan2 import StyleGAN2
from targetclip.media.images import refuse_picture

READERS = {".pt": read_rosinality, ".pkl": read_nvidia, ".safetensors": read_safetensors}


@runtime_checkable
class Generator(Protocol):
    """The interface of a generator: z to W+ to an image, always the same image.

    Images are NCHW in [-1, 1], a little beyond where the network overshoots.
    """

    @property
    def resolution(self) -> int:
        """Height and width of the images, in pixels."""

    @property
    def z_dim(self) -> int:
        """Length of the Gaussian latent z."""

    @property
    def w_dim(self) -> int:
        """Length of one w vector."""

    @property
    def num_ws(self) -> int:
        """Number of w vectors in W+."""

    @property
    def fingerprint(self) -> str:
        """Digest of the weights: a direction is valid for the generator it was found on."""

    @property
    def mean_w(self) -> Float[Tensor, " w_dim"]:
        """The average w, towards which truncation pulls."""

    def mapping(
        self, z: Float[Tensor, "batch z_dim"], truncation: float = 1.0
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Map z ~ N(0, I) to W+; `truncation` 1 leaves w as it is, 0 gives the average."""

    def synthesis(
        self, ws: Float[Tensor, "batch num_ws w_dim"], resolution: int | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Render W+ latents to images in [-1, 1]; deterministic, differentiable in `ws`.

        `resolution` ends early, with smaller images without the finest details; None: all levels.
        """


def load_generator(path: str | Path) -> StyleGAN2:
    """Read a StyleGAN2 checkpoint; no code in the file is ever run.

    `.pt` is a rosinality checkpoint, `.pkl` a pickle of NVIDIA's stylegan2-ada-pytorch,
    `.safetensors` a file of `save_safetensors`. The network is on the CPU in float32, in eval mode,
    without gradients for its weights.

    FileNotFoundError: no such file. ValueError: another suffix, or a file that is not such a
    checkpoint.
    """
    path = Path(path)
    refuse_picture(path, "a generator checkpoint")
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(
            f"{path}: expected a generator checkpoint ending in .pt (rosinality), .pkl (NVIDIA "
            f"stylegan2-ada-pytorch) or .safetensors, found {path.suffix or 'no suffix'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such generator checkpoint")
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_render_size(generator: Generator, size: int | None, flag: str) -> None:
    """Raise a ValueError that begins with `flag` if a generator cannot end at a size in px."""
    if size is None:
        return
    try:
        generator.synthesis(generator.mean_w.expand(1, generator.num_ws, -1), size)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
