"""The StyleGAN2 network (Karras et al. 2020), once, in plain PyTorch operations.

Knows the network and nothing of files: `rosinality.py` and `nvidia.py` read checkpoints into it.
Convolution weights are shared by the whole batch: a style scales the input channels and the
demodulation scales the output channels, which equals modulating the weights of each sample
(paper section 2.2, equations 1 and 3) without a grouped convolution.

Outputs of layers have the channels_last layout: convolutions, the low-pass filter and the products
with the RGB weights read it as it is; the other layout would be copied before and after. On CUDA
devices two layers are computed in another way, which gives the same maps but for rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from targetclip.weights import digest_of_weights

MAPPING_LR_MULTIPLIER = 0.01  # weights of the mapping network are stored a hundred times larger
DEMODULATION_EPSILON = 1e-8
SQRT2 = math.sqrt(2.0)
RGB_ROWS = 1024  # pixels whose colours are one matrix product on CUDA devices; a power of two
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # even and odd rows, even and odd columns

Enlarge = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From maps [batch, in, h, w], a weight [out, in, 3, 3] and a low-pass filter [4, 4] to maps
[batch, out, 2 h, 2 w]."""


@dataclass(frozen=True, kw_only=True)
class StyleGAN2Config:
    """Sizes of one network; the shapes in a checkpoint give all but the last."""

    resolution: int
    w_dim: int
    z_dim: int
    mapping_layers: int
    channels: tuple[int, ...]
    """Widths at 4, 8, ... `resolution` pixels."""
    conv_clamp: float | None = None
    """Bounds every layer's output to [-conv_clamp, conv_clamp]. None: no bound."""

    def __post_init__(self) -> None:
        if self.resolution < 4 or self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution must be a power of two from 4 up, found {self.resolution}"
            )
        expected = int(math.log2(self.resolution)) - 1
        if len(self.channels) != expected:
            raise ValueError(
                f"a {self.resolution} px network has {expected} widths, for 4 to {self.resolution} "
                f"px, found {len(self.channels)}: {self.channels}"
            )

    @property
    def num_ws(self) -> int:
        """Number of w vectors: one for each convolution, and one for the last RGB layer."""
        return 2 * len(self.channels)


def blur_kernel(gain: float) -> Float[Tensor, "4 4"]:
    """Return the [1, 3, 3, 1] low-pass filter of every released StyleGAN2, times `gain`."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = taps[:, None] * taps[None, :]
    return kernel * (gain / kernel.sum())


def take_blur(tensors: dict[str, Tensor], name: str, gain: float, tolerance: float) -> None:
    """Remove a low-pass filter, a constant, from a checkpoint; ValueError for any but ours."""
    kernel, expected = tensors.pop(name), blur_kernel(gain)
    if kernel.shape != expected.shape or not torch.allclose(
        kernel.float(), expected, atol=tolerance
    ):
        raise ValueError(
            f"expected {name} to be the [1, 3, 3, 1] low-pass filter, found another one: "
            "only networks trained with the released filter are supported"
        )


class EqualizedLinear(nn.Module):
    """A linear layer whose weight is rescaled at run time (equalized learning rate)."""

    def __init__(
        self, in_features: int, out_features: int, lr_multiplier: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch out"]:
        return F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)


class Mapping(nn.Module):
    """z to w: normalisation, then fully connected layers with leaky ReLU."""

    w_avg: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        widths = [config.z_dim] + [config.w_dim] * config.mapping_layers
        self.layers = nn.ModuleList(
            EqualizedLinear(a, b, MAPPING_LR_MULTIPLIER) for a, b in pairwise(widths)
        )
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(self, z: Float[Tensor, "batch z_dim"]) -> Float[Tensor, "batch w_dim"]:
        x = normalize_latent(z)
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.2) * SQRT2
        return x


def normalize_latent(z: Float[Tensor, "batch z_dim"]) -> Float[Tensor, "batch z_dim"]:
    """Scale each z to a mean square of 1, the first step of the mapping network."""
    return z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)


class Interleave(torch.autograd.Function):
    """Interleave four images of even and odd rows and columns (see `PHASES`) into one."""

    @staticmethod
    def forward(ctx: Any, *phases: Tensor) -> Tensor:
        first, last = phases[0], phases[-1]
        size = [a + b for a, b in zip(first.shape[2:], last.shape[2:], strict=True)]
        whole = torch.empty(
            *first.shape[:2], *size,
            dtype=first.dtype, device=first.device, memory_format=torch.channels_last,
        )  # fmt: skip
        for (row, column), phase in zip(PHASES, phases, strict=True):
            whole[:, :, row::2, column::2] = phase
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient[:, :, row::2, column::2] for row, column in PHASES)


def transposed_convolution(
    x: Float[Tensor, "batch channels height width"], weight: Float[Tensor, "out channels 3 3"]
) -> Float[Tensor, "batch out out_height out_width"]:
    """Compute `conv_transpose2d` of stride 2: height h becomes 2 h + 1.

    Even rows of the result depend on two rows of the kernel, odd rows on the third; so do columns.
    Each of the four parts is a convolution of stride 1, several times as fast as one of stride 2 on
    a CPU in bfloat16.
    """
    weight = weight.transpose(0, 1)
    phases = [F.conv_transpose2d(x, weight[:, :, row::2, column::2]) for row, column in PHASES]
    whole: Tensor = Interleave.apply(*phases)
    return whole


def enlarged(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "out channels 3 3"],
    blur: Float[Tensor, "4 4"],
) -> Float[Tensor, "batch out out_height out_width"]:
    """Convolve to twice the size, and filter what the stride leaves uneven."""
    return depthwise(transposed_convolution(x, weight), blur, padding=1)


def folded_weight(
    weight: Float[Tensor, "out channels 3 3"], blur: Float[Tensor, "4 4"]
) -> Float[Tensor, "phases channels 3 3"]:
    """Return the weight of a convolution whose outputs are the four phases of `enlarged`."""
    with torch.autocast(weight.device.type, enabled=False):
        whole = F.conv2d(weight.reshape(-1, 1, 3, 3), blur[None, None], padding=3)
    whole = whole.flip(2, 3).view(*weight.shape[:2], 6, 6)
    phases = [whole[:, :, 1 - row :: 2, 1 - column :: 2] for row, column in PHASES]
    return torch.cat(phases).contiguous(memory_format=torch.channels_last)


def enlarged_by_one(
    x: Float[Tensor, "batch channels height width"], folded: Float[Tensor, "phases channels 3 3"]
) -> Float[Tensor, "batch out out_height out_width"]:
    """Compute `enlarged` by one convolution of stride 1, from a `folded_weight`.

    It takes four times the operations and moves fewer bytes. On a GPU a whole step of a search in
    bfloat16 takes half to two thirds of the time by it, on a CPU this part in float32 about twice.
    """
    x = F.conv2d(x, folded, padding=1)
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(batch, height, width, 2, 2, -1).transpose(2, 3)
    return rows.reshape(batch, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def rows_of(x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch height row"]:
    """View images of the layout channels last as rows of width times channels numbers.

    A factor for each channel is an inner loop of that length on a CPU, instead of one of a few
    channels: a third of the time in bfloat16.
    """
    return x.permute(0, 2, 3, 1).flatten(2)


def images_of(
    rows: Float[Tensor, "batch height row"], width: int
) -> Float[Tensor, "batch channels height width"]:
    """Undo `rows_of`."""
    images: Tensor = rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
    return images


def row_of(
    factors: Float[Tensor, "batch channels"], width: int, dtype: torch.dtype
) -> Float[Tensor, "batch 1 row"]:
    """Repeat a factor for each channel along a row."""
    return factors.to(dtype).repeat(1, width)[:, None]


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, optional x2 upsampling, fixed noise, bias, leaky ReLU."""

    noise: Tensor
    blur: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        resolution: int,
        w_dim: int,
        upsample: bool,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.affine = EqualizedLinear(w_dim, in_channels, bias=1.0)
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(1, 1, resolution, resolution))
        self.register_buffer("blur", blur_kernel(4.0), persistent=False)
        self.upsample = upsample
        self.clamp = clamp
        self.enlarge: Enlarge | None = None
        """How to enlarge. None: as suits the device."""
        self.folded: tuple[object, Tensor] | None = None
        """The state of the weight when it was last folded, and its `folded_weight`."""

    def upsampled(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out out_height out_width"]:
        """Convolve to twice the size, in the way that suits the device."""
        if self.enlarge is not None or not x.is_cuda:
            return (self.enlarge or enlarged)(x, self.weight, self.blur)
        if self.weight.requires_grad:
            return enlarged_by_one(x, folded_weight(self.weight, self.blur))
        state = self.weight.data_ptr(), self.weight._version  # other ones after any change
        if self.folded is None or self.folded[0] != state:
            self.folded = state, folded_weight(self.weight, self.blur)
        return enlarged_by_one(x, self.folded[1])

    def forward(
        self, x: Float[Tensor, "batch channels height width"], w: Float[Tensor, "batch w_dim"]
    ) -> Float[Tensor, "batch out out_height out_width"]:
        style = self.affine(w)
        gain = 1 / math.sqrt(self.weight[0].numel())
        # Equation 3: the norm of each modulated filter, without building the filters.
        power = F.linear(style.square(), self.weight.square().sum(dim=(2, 3)) * gain**2)
        demodulation = torch.rsqrt(power + DEMODULATION_EPSILON) * SQRT2
        # The gain belongs to the weight, but scaling the style is cheaper.
        width = x.shape[3]
        x = images_of(rows_of(x) * row_of(style * gain, width, x.dtype), width)
        x = self.upsampled(x) if self.upsample else F.conv2d(x, self.weight, padding=1)
        # The factor sqrt(2) after the leaky ReLU is applied before it, where it costs nothing.
        bias = (self.bias * SQRT2).to(x.dtype)
        noise = (self.noise_strength * SQRT2 * self.noise[:, 0, :, :, None]).to(x.dtype)
        offset = (noise + bias).flatten(2)
        width = x.shape[3]
        rows = torch.addcmul(offset, rows_of(x), row_of(demodulation, width, x.dtype))
        x = images_of(F.leaky_relu(rows, 0.2, inplace=True), width)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


def depthwise(
    x: Float[Tensor, "batch channels height width"], kernel: Float[Tensor, "k k"], padding: int
) -> Float[Tensor, "batch channels out_height out_width"]:
    """Filter every channel with the same kernel."""
    channels = x.shape[1]
    weight = kernel.to(x.dtype).expand(channels, 1, *kernel.shape)
    return F.conv2d(x, weight, padding=padding, groups=channels)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation."""

    def __init__(self, in_channels: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.affine = EqualizedLinear(w_dim, in_channels, bias=1.0)
        self.clamp = clamp

    def forward(
        self, x: Float[Tensor, "batch channels height width"], w: Float[Tensor, "batch w_dim"]
    ) -> Float[Tensor, "batch 3 height width"]:
        style = self.affine(w) / math.sqrt(x.shape[1])
        # Three output channels: modulating the small weight is cheaper than scaling x.
        weight = self.weight[:, :, 0, 0].t() * style[:, :, None]
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        if x.is_cuda and rows.shape[1] > RGB_ROWS:
            # The gradient of the weight is a product along the rows: in one piece it takes a third
            # of a step at 1024 px.
            pieces = rows.unflatten(1, (-1, RGB_ROWS))
            rows = torch.matmul(pieces, weight[:, None]).flatten(1, 2) + self.bias
        else:
            rows = torch.matmul(rows, weight) + self.bias
        rgb: Tensor = rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)


class StyleGAN2(nn.Module):
    """A StyleGAN2 generator with skip connections and fixed noise; see `Generator`.

    With `checkpoint_layers` set, a layer stores only its input and is computed again in the
    backward pass. Gradients stay the same to the last bit, for less memory and more time.
    """

    rgb_kernel: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.resolution, self.z_dim = config.resolution, config.z_dim
        self.num_ws, self.w_dim = config.num_ws, config.w_dim
        self.checkpoint_layers = False
        self.mapping_network = Mapping(config)
        self.const = nn.Parameter(torch.randn(1, config.channels[0], 4, 4))
        self.convs = nn.ModuleList()
        self.to_rgbs = nn.ModuleList()
        previous = config.channels[0]
        for level, width in enumerate(config.channels):
            size = 4 * 2**level
            w_dim, clamp = config.w_dim, config.conv_clamp
            if level > 0:
                self.convs.append(
                    StyledConv(previous, width, size, w_dim, upsample=True, clamp=clamp)
                )
            self.convs.append(StyledConv(width, width, size, w_dim, upsample=False, clamp=clamp))
            self.to_rgbs.append(ToRGB(width, w_dim, clamp))
            previous = width
        self.register_buffer("rgb_kernel", blur_kernel(4.0), persistent=False)

    @property
    def mean_w(self) -> Float[Tensor, " w_dim"]:
        """The average w, towards which truncation pulls."""
        return self.mapping_network.w_avg

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of sizes and weights. Computed once; do not change weights after reading it."""
        return digest_of_weights(repr(self.config), self.state_dict())

    def mapping(
        self, z: Float[Tensor, "batch z_dim"], truncation: float = 1.0
    ) -> Float[Tensor, "batch num_ws w_dim"]:
        """Map z ~ N(0, I) to W+, with all `num_ws` vectors equal.

        `truncation` 1 leaves w as it is, 0 gives the average, 0.7 is usual.
        """
        w: Tensor = self.mapping_network(z)
        w = self.mean_w + truncation * (w - self.mean_w)
        return w[:, None, :].expand(-1, self.num_ws, -1).contiguous()

    def synthesis(
        self, ws: Float[Tensor, "batch num_ws w_dim"], resolution: int | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """Render W+ latents to images in [-1, 1]; deterministic, differentiable in `ws`.

        Args:
            resolution: end early, with images of this size that lack the details of finer levels.
                None: all levels.

        Raises:
            ValueError: latents of another shape, or a size that no level has.
        """
        sizes = [4 << level for level in range(len(self.to_rgbs))]
        if resolution is not None and resolution not in sizes:
            raise ValueError(f"expected a size in px of {sizes}, found {resolution}")
        if ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(
                f"expected ws of shape [batch, {self.num_ws}, {self.w_dim}], "
                f"found {list(ws.shape)}: is this latent from another generator?"
            )
        recompute = self.checkpoint_layers and ws.requires_grad and torch.is_grad_enabled()

        def run(layer: nn.Module, x: Tensor, w: Tensor) -> Tensor:
            if not recompute:
                return layer(x, w)  # type: ignore[no-any-return]
            return checkpoint(  # type: ignore[no-any-return]
                layer, x, w, use_reentrant=False, preserve_rng_state=False
            )

        x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        rgb: Tensor | None = None
        levels = len(sizes) if resolution is None else sizes.index(resolution) + 1
        for level, to_rgb in enumerate(self.to_rgbs[:levels]):
            if level > 0:
                x = run(self.convs[2 * level - 1], x, ws[:, 2 * level - 1])
            x = run(self.convs[2 * level], x, ws[:, 2 * level])
            # The RGB layer shares its w with the next level's first convolution.
            level_rgb = run(to_rgb, x, ws[:, 2 * level + 1])
            # Colours add up over the levels: half precision would lose the faint ones.
            level_rgb = level_rgb.to(torch.promote_types(level_rgb.dtype, torch.float32))
            if rgb is not None:  # doubled in size
                kernel = self.rgb_kernel.to(rgb.dtype).expand(3, 1, 4, 4)
                level_rgb = level_rgb + F.conv_transpose2d(
                    rgb, kernel, stride=2, padding=1, groups=3
                )
            rgb = level_rgb
        assert rgb is not None
        return rgb


def shortened(keys: list[str]) -> str:
    """Return the first six keys and the number of the others, for a message."""
    shown = ", ".join(keys[:6]) or "none"
    return shown if len(keys) <= 6 else f"{shown} and {len(keys) - 6} more"


def build_network(
    config: StyleGAN2Config, names: dict[str, str], tensors: dict[str, Tensor]
) -> StyleGAN2:
    """Return a network with the weights of a checkpoint: float32, eval mode, no gradients.

    Args:
        names: the name in `tensors` of every parameter and buffer of `StyleGAN2`.
        tensors: may have more or fewer axes of length 1 than the network's.

    Raises:
        ValueError: a missing or unexpected key, another shape, or a value that is not finite.
    """
    missing = sorted(set(names.values()) - set(tensors))
    unexpected = sorted(set(tensors) - set(names.values()))
    if missing or unexpected:
        raise ValueError(
            f"the keys do not fit a {config.resolution} px StyleGAN2: "
            f"missing {shortened(missing)}, unexpected {shortened(unexpected)}"
        )
    # The initial weights are overwritten; drawing them must not change the caller's random state.
    with torch.random.fork_rng(devices=[]):
        network = StyleGAN2(config)
    state = {}
    for ours, own in network.state_dict().items():
        tensor = tensors[names[ours]]
        if tensor.squeeze().shape != own.squeeze().shape or not tensor.is_floating_point():
            raise ValueError(
                f"expected {names[ours]} to be floats of shape {list(own.shape)}, "
                f"found {tensor.dtype} of shape {list(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{names[ours]} holds values that are not finite: a damaged file?")
        state[ours] = tensor.reshape(own.shape)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
