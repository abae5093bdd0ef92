"""Faces of the bundled generator, of one style: their attributes, z and w.

Each value of an attribute has a coordinate of w: `codes` goes there, `strongest` comes back. Each
attribute has a coordinate of z, cut into an interval for each value. The mapping network computes w
from z exactly, and is not learned.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.avatars import Drawn, Options, bank, draw, render
from targetclip.generators.stylegan2 import SQRT2, EqualizedLinear, Mapping, normalize_latent

STYLE = "avataaars"
SIZE = 128  # px
W_DIM = 256  # as many hidden units of the mapping network are needed, not as many values
SCALE = 2.0
RAMP = 0.05  # part of an interval of z in which one value fades into the next
NONE = "none"

HAIR_COLOURS = {
    "black": "#231c1c", "brown": "#6b4028", "auburn": "#a55728", "blonde": "#e0b860",
    "white": "#f3efe8", "grey": "#979797", "red": "#c8281e", "orange": "#f28322",
    "pink": "#f46fae", "purple": "#8547c4", "blue": "#3f74d8", "green": "#3fa84c",
}  # fmt: skip
HAT_COLOURS = {
    "black": "#262e33", "white": "#efefef", "grey": "#8d9093", "red": "#e03c3c",
    "yellow": "#f7c948", "green": "#35a86b", "blue": "#3d6fd9", "pink": "#ff5c9e",
    "purple": "#8a56c9",
}  # fmt: skip
HATS = ("hat", "hijab", "turban", "winterHat02", "winterHat03", "winterHat04", "winterHat1")
HAIR = (
    NONE, "sides", "bigHair", "bob", "bun", "curly", "curvy", "dreads", "dreads02", "frida",
    "frizzle", "fro", "shaggyMullet", "shortCurly", "shortFlat", "shortWaved", "straight01",
    "straight02", "theCaesar",
)  # fmt: skip
GLASSES = ("kurt", "prescription01", "prescription02", "round", "sunglasses", "wayfarers")
SHADES = ("kurt", "sunglasses", "wayfarers")  # hide eyes and brows
BEARDS = ("beardLight", "beardMedium", "beardMajestic", "moustacheFancy", "moustacheMagnum")
MOUTHS = ("default", "smile", "sad", "serious", "screamOpen", "grimace", "tongue", "twinkle")
EYES = ("default", "closed", "happy", "side", "squint", "surprised", "wink")
EYEBROWS = (
    "default", "angryNatural", "raisedExcited", "sadConcerned", "unibrowNatural", "upDown",
)  # fmt: skip
CLOTHES = (
    "blazerAndShirt", "collarAndSweater", "hoodie", "overall", "shirtCrewNeck", "shirtScoopNeck",
    "shirtVNeck",
)  # fmt: skip
CLOTHES_COLOURS = (
    "#262e33", "#5199e4", "#48b98a", "#ff5c5c", "#ffafb9", "#ffe680", "#e6e6e6", "#8a56c9",
)  # fmt: skip
BACKGROUNDS = (
    "#b6e3f4", "#c0aede", "#ffd5dc", "#ffdfbf", "#cdeed6", "#fff3b0", "#e8e8e8", "#9db7d6",
)  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """One thing that differs between faces. Values are DiceBear's own names, or hex colours."""

    name: str
    values: tuple[str, ...]
    essence: bool
    """Whether a caption may say it; the rest is who somebody is."""
    first: float | None = None
    """Share of the first value. None: all are as common."""

    def shares(self) -> list[float]:
        """Return how common each value is."""
        count = len(self.values)
        if self.first is None:
            return [1 / count] * count
        return [self.first] + [(1 - self.first) / (count - 1)] * (count - 1)

    def limits(self) -> list[float]:
        """Return where the intervals of its values meet, of z ~ N(0, 1)."""
        return [NormalDist().inv_cdf(end) for end in accumulate(self.shares()[:-1])]


ATTRIBUTES = (
    Attribute("top", HAIR + HATS, True),
    Attribute("hairColor", tuple(HAIR_COLOURS.values()), True),
    Attribute("hatColor", tuple(HAT_COLOURS.values()), True),
    Attribute("accessories", (NONE, *GLASSES), True, 0.5),
    Attribute("facialHair", (NONE, *BEARDS), True, 0.5),
    Attribute("mouth", MOUTHS, True),
    Attribute("eyes", EYES, False),
    Attribute("eyebrows", EYEBROWS, False),
    Attribute("skinColor", ("#614335", "#ae5d29", "#d08b5b", "#edb98a", "#ffdbb4"), False),
    Attribute("clothes", CLOTHES, False),
    Attribute("clothesColor", CLOTHES_COLOURS, False),
    Attribute("backgroundColor", BACKGROUNDS, False),
)
Indices = Int[Tensor, "batch attributes"]  # of a value for each attribute
COUNTS = [len(attribute.values) for attribute in ATTRIBUTES]
VALUES = sum(COUNTS)


def indices_from_z(z: Float[Tensor, "batch z_dim"]) -> Indices:
    """Return the values that latents z ~ N(0, I) stand for, scaled as the mapping scales them."""
    unit = normalize_latent(z)
    columns = [
        torch.bucketize(unit[:, i].contiguous(), unit.new_tensor(attribute.limits()))
        for i, attribute in enumerate(ATTRIBUTES)
    ]
    return torch.stack(columns, dim=1)


def set_mapping(mapping: Mapping) -> None:
    """Give a mapping network of two layers the weights that turn z into codes.
    ValueError: it has another number of layers.

    Two hidden units make a ramp from 0 to 1 at every limit: the leaky ReLU of x less that of
    x - width is 0.2 width before it and width after it. The amount of a value is the ramp where its
    interval begins less the one where it ends: never negative, so the second leaky ReLU keeps it.
    """
    layers = [layer for layer in mapping.layers if isinstance(layer, EqualizedLinear)]
    if len(layers) != 2:
        raise ValueError(f"expected a mapping of 2 layers, found {len(layers)}")
    weights = [torch.zeros_like(layer.weight) for layer in layers]
    biases = [torch.zeros_like(layer.bias) for layer in layers]
    unit = value = 0
    for column, attribute in enumerate(ATTRIBUTES):
        biases[1][value] = 1.0  # the first value, until its interval ends
        edges = [-2.5, *attribute.limits(), 2.5]
        for before, end, after in zip(edges, edges[1:-1], edges[2:], strict=False):
            width = RAMP * min(end - before, after - end)
            weights[0][unit : unit + 2, column] = 1.0
            biases[0][unit] = -end + width / 2
            biases[0][unit + 1] = -end - width / 2
            for row, sign in ((value, -1.0), (value + 1, 1.0)):
                step = sign / (0.8 * width * SQRT2)
                weights[1][row, unit], weights[1][row, unit + 1] = step, -step
                biases[1][row] -= sign * 0.25
            unit, value = unit + 2, value + 1
        value += 1
    scales = (1.0, SCALE / SQRT2)
    with torch.no_grad():
        for layer, weight, bias, scale in zip(layers, weights, biases, scales, strict=True):
            layer.weight.copy_(scale * weight / layer.weight_gain)
            layer.bias.copy_(scale * bias / layer.bias_gain)
        mapping.w_avg.copy_(codes(shares().to(mapping.w_avg)))


def one_hot(indices: Indices) -> Float[Tensor, "batch values"]:
    """Return an amount of 1 for every value that is there, and 0 for the others."""
    columns = [F.one_hot(indices[:, i], count) for i, count in enumerate(COUNTS)]
    return torch.cat(columns, dim=1).float()


def shares() -> Float[Tensor, " values"]:
    """Return how common each value is among z ~ N(0, I)."""
    return torch.tensor([share for attribute in ATTRIBUTES for share in attribute.shares()])


def codes(amounts: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch w_dim"]:
    """Return the w of amounts of each value: a coordinate for each, and zeros."""
    return F.pad(SCALE * amounts, (0, W_DIM - VALUES))


def strongest(w: Float[Tensor, "batch w_dim"]) -> Indices:
    """Return the value of each attribute that w has most of, which its picture shows."""
    groups = w[:, :VALUES].split(COUNTS, dim=1)
    return torch.stack([group.argmax(dim=1) for group in groups], dim=1)


def blend(
    indices: Indices, other: Indices, generator: torch.Generator, layers: int = 1, part: float = 0.6
) -> Float[Tensor, "batch layers values"]:
    """Draw amounts in which other values are mixed in, yet those of `indices` are the strongest.

    A generator that learns from such blends shows the stronger value when a latent is edited, not a
    mixture. A `part` of the attributes are blended: 1 to 2 times the value, 0 to 1 times another,
    and less than nothing of a third, where that is not the value.
    """
    shape = (len(indices), layers, len(COUNTS))
    drawn = torch.rand((4, *shape), generator=generator, device=generator.device)
    # The same for all layers of every second face, as an edit by one direction in W is.
    drawn[:, ::2] = drawn[:, ::2, :1]
    blended = drawn[0] < part
    third = other.roll(1, 0)
    own = (1 + drawn[1]).where(blended, 1.0)
    mixed = drawn[2].where(blended, 0.0)
    less = drawn[3].where(blended & (third != indices)[:, None], 0.0)
    attributes = [i for i, count in enumerate(COUNTS) for _ in range(count)]
    amounts: Tensor = own[..., attributes] * one_hot(indices)[:, None]
    for factor, values in ((mixed, other), (-less, third)):
        amounts = amounts + factor[..., attributes] * one_hot(values)[:, None]
    return amounts


def visible(indices: Indices) -> Bool[Tensor, "batch attributes"]:
    """Return which attributes a face's picture shows: a hat hides hair, shades hide eyes."""
    columns = {attribute.name: i for i, attribute in enumerate(ATTRIBUTES)}

    def among(name: str, *values: str) -> Bool[Tensor, " batch"]:
        known = ATTRIBUTES[columns[name]].values
        chosen = torch.tensor([known.index(value) for value in values])
        return torch.isin(indices[:, columns[name]], chosen)

    seen = torch.ones(indices.shape, dtype=torch.bool)
    seen[:, columns["hatColor"]] = among("top", *HATS)
    seen[:, columns["hairColor"]] = ~(among("top", NONE, *HATS) & among("facialHair", NONE))
    for hidden in ("eyes", "eyebrows"):
        seen[:, columns[hidden]] = ~among("accessories", *SHADES)
    return seen


def options_of(indices: Iterable[int]) -> Options:
    """Return DiceBear options of a face given as one index of a value for each attribute."""
    options: Options = {"seed": "avatar"}
    for attribute, index in zip(ATTRIBUTES, indices, strict=True):
        value = attribute.values[index]
        if attribute.name.endswith("Color"):
            options[attribute.name] = [value]
        elif value == NONE:
            options[f"{attribute.name}Probability"] = 0
        else:
            options |= {f"{attribute.name}Variant": value, f"{attribute.name}Probability": 100}
    # A beard has the colour of the hair, so that hair colour shows under a hat as well.
    return options | {"facialHairColor": options["hairColor"], "accessoriesColor": ["#262e33"]}


def draw_face(indices: Sequence[int]) -> Drawn:
    """Return the picture of a face as for `options_of`, and the value of each attribute."""
    values = {a.name: a.values[i] for a, i in zip(ATTRIBUTES, indices, strict=True)}
    return render(draw(STYLE, options_of(indices))[0], SIZE), values


def face_bank(
    folder: Path, count: int, seed: int
) -> tuple[Float[Tensor, "count z_dim"], UInt8[Tensor, "count 128 128 3"]]:
    """Return latents and their pictures, rendered on first use and kept in `folder`."""
    z = torch.randn(count, W_DIM, generator=torch.Generator().manual_seed(seed))
    keys = indices_from_z(z).tolist()
    return z, bank(folder, f"faces-{count}", keys, draw_face, SIZE)[0]
