"""Faces of the bundled generator: attributes, the codes in w that stand for them, and z.

Knows what the generator can draw, one style only (avataaars): twelve attributes with a few values
each. A value has a fixed code, a face's code is their sum, so w says exactly what a picture shows:
`codes` goes there, `strongest` comes back.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from data.illustrated.avatars import Options, bank, draw, render

STYLE = "avataaars"
SIZE = 128  # px
W_DIM = 256  # a power of two, see `basis`
SCALE = 2.0
SHARPNESS = 6.0
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
BEARDS = ("beardLight", "beardMedium", "beardMajestic", "moustacheFancy", "moustacheMagnum")


@dataclass(frozen=True)
class Attribute:
    """One thing that differs between faces. Values are DiceBear's own names, or hex colours."""

    name: str
    values: tuple[str, ...]
    essence: bool
    """Whether a caption may say it; the rest is who somebody is."""
    bias: float = 0.0
    """Added to the first value's coordinate of z: how much likelier it is than the others."""


ATTRIBUTES = (
    Attribute("top", HAIR + HATS, True),
    Attribute("hairColor", tuple(HAIR_COLOURS.values()), True),
    Attribute("hatColor", tuple(HAT_COLOURS.values()), True),
    Attribute("accessories", (NONE, *GLASSES), True, 1.3),
    Attribute("facialHair", (NONE, *BEARDS), True, 1.2),
    Attribute(
        "mouth",
        ("default", "smile", "sad", "serious", "screamOpen", "grimace", "tongue", "twinkle"),
        True,
    ),
    Attribute(
        "eyes", ("default", "closed", "happy", "side", "squint", "surprised", "wink"), False
    ),
    Attribute(
        "eyebrows",
        ("default", "angryNatural", "raisedExcited", "sadConcerned", "unibrowNatural", "upDown"),
        False,
    ),
    Attribute("skinColor", ("#614335", "#ae5d29", "#d08b5b", "#edb98a", "#ffdbb4"), False),
    Attribute(
        "clothes",
        (
            "blazerAndShirt", "collarAndSweater", "hoodie", "overall", "shirtCrewNeck",
            "shirtScoopNeck", "shirtVNeck",
        ),
        False,
    ),
    Attribute(
        "clothesColor",
        (
            "#262e33", "#5199e4", "#48b98a", "#ff5c5c", "#ffafb9", "#ffe680", "#e6e6e6", "#8a56c9",
        ),
        False,
    ),
    Attribute(
        "backgroundColor",
        (
            "#b6e3f4", "#c0aede", "#ffd5dc", "#ffdfbf", "#cdeed6", "#fff3b0", "#e8e8e8", "#9db7d6",
        ),
        False,
    ),
)  # fmt: skip
COUNTS = [len(attribute.values) for attribute in ATTRIBUTES]
VALUES = sum(COUNTS)


def indices_from_z(z: Float[Tensor, "batch z_dim"]) -> Int[Tensor, "batch attributes"]:
    """Return the values that latents z ~ N(0, I) stand for: the largest coordinate of each group.

    z is scaled to a mean square of 1 first, as the mapping network scales it.
    """
    return torch.stack([group.argmax(dim=1) for group in groups_of(z)], dim=1)


def groups_of(z: Float[Tensor, "batch z_dim"]) -> list[Float[Tensor, "batch values"]]:
    """Return the coordinates of z that stand for each attribute, with the first value's bias.

    Raises:
        ValueError: z has fewer coordinates than there are values.
    """
    if z.shape[1] < VALUES:
        raise ValueError(f"expected z of {VALUES} coordinates or more, found {z.shape[1]}")
    unit = z * torch.rsqrt(z.square().mean(dim=1, keepdim=True) + 1e-8)
    groups = [group.clone() for group in unit[:, :VALUES].split(COUNTS, dim=1)]
    for group, attribute in zip(groups, ATTRIBUTES, strict=True):
        group[:, 0] += attribute.bias
    return groups


def amounts_from_z(z: Float[Tensor, "batch z_dim"]) -> Float[Tensor, "batch values"]:
    """Return how much of each value latents have: a softmax, which a network can learn.

    The largest amount of a group is that of `indices_from_z`; near a tie both have about a half.
    """
    return torch.cat([F.softmax(SHARPNESS * group, dim=1) for group in groups_of(z)], dim=1)


def one_hot(indices: Int[Tensor, "batch attributes"]) -> Float[Tensor, "batch values"]:
    """Return an amount of 1 for every value that is there, and 0 for the others."""
    columns = [F.one_hot(indices[:, i], count) for i, count in enumerate(COUNTS)]
    return torch.cat(columns, dim=1).float()


def shares() -> Float[Tensor, " values"]:
    """Return how common each value is among z ~ N(0, I), from a fixed sample."""
    z = torch.randn(20_000, W_DIM, generator=torch.Generator().manual_seed(0))
    return one_hot(indices_from_z(z)).mean(dim=0)


def basis() -> Float[Tensor, "values w_dim"]:
    """Return orthonormal rows, one a value: those of a Hadamard matrix, the same everywhere."""
    matrix = torch.ones(1, 1)
    while len(matrix) < W_DIM:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    rows: Tensor = matrix[-VALUES:] / W_DIM**0.5
    return rows


class Codebook:
    """Codes of attribute values in w: (amounts - their mean) @ orthonormal rows * SCALE."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.shares = shares().to(device)
        self.basis = basis().to(device)

    def codes(self, amounts: Float[Tensor, "*batch values"]) -> Float[Tensor, "*batch w_dim"]:
        """Return the w of amounts of each value."""
        w: Tensor = SCALE * (amounts - self.shares) @ self.basis
        return w

    def amounts(self, w: Float[Tensor, "*batch w_dim"]) -> Float[Tensor, "*batch values"]:
        """Return how much of each value w has; exact where w is a code."""
        amounts: Tensor = w @ self.basis.T / SCALE + self.shares
        return amounts

    def strongest(self, w: Float[Tensor, "batch w_dim"]) -> Int[Tensor, "batch attributes"]:
        """Return the value of each attribute that w has most of, which its picture shows."""
        groups = self.amounts(w).split(COUNTS, dim=1)
        return torch.stack([group.argmax(dim=1) for group in groups], dim=1)


def blend(
    indices: Int[Tensor, "batch attributes"],
    other: Int[Tensor, "batch attributes"],
    generator: torch.Generator,
    layers: int = 1,
    part: float = 0.6,
) -> Float[Tensor, "batch layers values"]:
    """Draw amounts in which other values are mixed in, yet those of `indices` are the strongest.

    Edits of latents add one code to whatever is there; a generator trained on such blends learns
    to show the stronger value, not a mixture.

    Args:
        layers: every one of these gets blends of its own for half of the faces.
        part: of the attributes that are blended: 1 to 2 times the value and 0 to 1 times another.
    """
    shape = (len(indices), layers, len(COUNTS))
    chance, own, mixed = torch.rand((3, *shape), generator=generator, device=generator.device)
    own = 1 + own
    # The same for all layers of every second face, as an edit by one direction in W is.
    for drawn in (chance, own, mixed):
        drawn[::2] = drawn[::2, :1]
    blended = chance < part
    own, mixed = own.where(blended, 1.0), mixed.where(blended, 0.0)
    attributes = [i for i, count in enumerate(COUNTS) for _ in range(count)]
    shown = own[..., attributes] * one_hot(indices)[:, None]
    amounts: Tensor = shown + mixed[..., attributes] * one_hot(other)[:, None]
    return amounts


def visible(indices: Int[Tensor, "batch attributes"]) -> Bool[Tensor, "batch attributes"]:
    """Return which attributes a face's picture shows: a hat hides hair, shades hide eyes."""
    name_of = {attribute.name: (i, attribute.values) for i, attribute in enumerate(ATTRIBUTES)}

    def among(name: str, values: Iterable[str]) -> Bool[Tensor, " batch"]:
        column, known = name_of[name]
        return torch.isin(indices[:, column], torch.tensor([known.index(v) for v in values]))

    seen = torch.ones(indices.shape, dtype=torch.bool)
    seen[:, name_of["hatColor"][0]] = among("top", HATS)
    hairless = among("top", (NONE, *HATS)) & among("facialHair", (NONE,))
    seen[:, name_of["hairColor"][0]] = ~hairless
    shaded = among("accessories", ("kurt", "sunglasses", "wayfarers"))
    seen[:, name_of["eyes"][0]] = ~shaded
    seen[:, name_of["eyebrows"][0]] = ~shaded
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


def draw_face(
    indices: Sequence[int],
) -> tuple[UInt8[ndarray, "128 128 3"], dict[str, str]]:
    """Render the picture of a face given as one index of a value for each attribute.

    Returns it with the value of each attribute.
    """
    values = zip(ATTRIBUTES, indices, strict=True)
    picture = render(draw(STYLE, options_of(indices))[0], SIZE)
    return picture, {attribute.name: attribute.values[index] for attribute, index in values}


def face_bank(
    folder: Path, count: int, seed: int
) -> tuple[Float[Tensor, "count z_dim"], UInt8[Tensor, "count 128 128 3"]]:
    """Return latents and their pictures, rendered on first use and kept in `folder`.

    Raises:
        ValueError: the file holds other pictures than these.
    """
    z = torch.randn(count, W_DIM, generator=torch.Generator().manual_seed(seed))
    keys = indices_from_z(z).tolist()
    return z, bank(folder / f"faces-{seed}-{count}.npy", keys, draw_face, SIZE)[0]
