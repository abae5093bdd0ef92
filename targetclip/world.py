"""Worlds: a small TOML file that names a generator, an embedder, an inverter and defaults.

Knows the file and how to load its parts; nothing of what is done with them. Paths in the file are
relative to it. The bundled world is `worlds/sketch64/world.toml`; a user's own is a path to a file.
"""

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from targetclip.embedder import ClipEmbedder
from targetclip.generators import load_generator
from targetclip.generators.stylegan2 import StyleGAN2
from targetclip.identity import SketchIdentity, load_identity
from targetclip.inverter import Inverter, load_inverter
from targetclip.recipes import RECIPES

BUNDLED = Path(__file__).parent / "worlds"


@dataclass(frozen=True)
class World:
    """What a world file says. `load_parts` reads the networks it names."""

    name: str
    generator: Path
    """Checkpoint for `load_generator`."""
    embedder: str
    """A local directory, or the name of an open_clip model."""
    pretrained: str | None
    """Tag or file of the embedder's weights, where `embedder` is a name."""
    inverter: Path | None
    """Inverter file; None: pictures cannot be sources, and directions cannot start from one."""
    identity: Path | None
    """Identity file; None: nothing says whether an edited face is still the same person."""
    recipe: str
    """Recipe of the optimizer when none is asked for."""
    strength: float
    """Strength of an edit when none is asked for."""
    truncation: float
    """Of generated sources: 1 is the generator's full variety, less is nearer its mean."""
    mapper: Path | None
    """Mapper file; None: the optimizer alone finds directions."""
    neutral: tuple[str, ...]
    """Texts such as sources could have, to measure others from; none: no text is a target."""


@dataclass(frozen=True)
class Parts:
    """The loaded networks of a world, on one device."""

    generator: StyleGAN2
    embedder: ClipEmbedder
    inverter: Inverter | None
    identity: SketchIdentity | None


def world_names() -> list[str]:
    """Names of the bundled worlds."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/world.toml"))


def load_world(name: str) -> World:
    """Read a world given by the name of a bundled one or by the path of its TOML file.

    Raises:
        FileNotFoundError: no such world; the message lists the bundled ones.
        ValueError: the file is not a world file.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = BUNDLED / name / "world.toml"
        if name not in world_names():
            raise FileNotFoundError(
                f"unknown world {name!r}: expected {', '.join(world_names())} "
                "or the path of a world's .toml file"
            )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such world file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a world file: {error}") from error
    return parse_world(content, path)


def parse_world(content: dict[str, object], path: Path) -> World:
    """Check the content of a world file; paths become absolute or relative to the caller."""
    optional: dict[str, object] = {"pretrained": None, "inverter": None, "recipe": "consistent"}
    optional |= {"identity": None, "mapper": None, "neutral": []}
    numbers = {"strength": 1.0, "truncation": 0.7}
    content = {**optional, **numbers, **content}
    known = {f.name for f in fields(World)}
    if missing := sorted(known - content.keys()):
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    if unknown := sorted(content.keys() - known):
        raise ValueError(
            f"{path}: unknown {', '.join(unknown)}: expected {', '.join(sorted(known))}"
        )
    for key in known - {"neutral", *numbers}:
        if not isinstance(content[key], str) and not (key in optional and content[key] is None):
            raise ValueError(f"{path}: {key} must be a text, found {content[key]!r}")
    neutral = content["neutral"]
    if not isinstance(neutral, list) or not all(isinstance(text, str) for text in neutral):
        raise ValueError(f"{path}: neutral must be a list of texts, found {neutral!r}")
    for key in numbers:
        value = content[key]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} must be a number, found {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{path}: {key} must be finite, found {value!r}")
        numbers[key] = float(value)
    recipe = str(content["recipe"])
    if recipe not in RECIPES:
        raise ValueError(f"{path}: recipe must be one of {', '.join(RECIPES)}, found {recipe!r}")
    folder = path.parent
    embedder = str(content["embedder"])
    pretrained = None if content["pretrained"] is None else str(content["pretrained"])
    if pretrained is not None and (folder / pretrained).is_file():
        pretrained = str(folder / pretrained)
    return World(
        name=str(content["name"]),
        generator=folder / str(content["generator"]),
        # A directory beside the file, or else the name of an open_clip model.
        embedder=str(folder / embedder) if (folder / embedder).is_dir() else embedder,
        pretrained=pretrained,
        inverter=None if content["inverter"] is None else folder / str(content["inverter"]),
        identity=None if content["identity"] is None else folder / str(content["identity"]),
        recipe=recipe,
        mapper=None if content["mapper"] is None else folder / str(content["mapper"]),
        neutral=tuple(neutral),
        **numbers,
    )


def load_parts(world: World, device: torch.device) -> Parts:
    """Load the networks of a world; raises what their readers raise."""
    generator = load_generator(world.generator)
    inverter = None
    if world.inverter is not None:
        inverter = load_inverter(world.inverter, generator.fingerprint).to(device)
    return Parts(
        generator=generator.to(device),
        embedder=ClipEmbedder.load(world.embedder, world.pretrained).to(device),
        inverter=inverter,
        identity=None if world.identity is None else load_identity(world.identity).to(device),
    )
