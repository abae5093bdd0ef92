"""Worlds: a small TOML file that names a generator, an embedder, an inverter and defaults.

Knows the file and how to load its parts; nothing of what is done with them. Paths in the file are
relative to it. Bundled worlds are `worlds/NAME/world.toml`, and what of theirs does not ship is in
`home()/NAME`; a user's own is a path to a file.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from targetclip.embedder import HUB, LOCAL_DIR, WEIGHT_SUFFIXES, ClipEmbedder
from targetclip.encoders.arcface import load_arcface
from targetclip.encoders.e4e import load_e4e
from targetclip.encoders.identity import IdentityModel, load_identity
from targetclip.encoders.inverter import LatentInverter, load_inverter
from targetclip.generators import load_generator
from targetclip.generators.stylegan2 import StyleGAN2
from targetclip.recipes import RECIPES
from targetclip.scene import Scene
from targetclip.world_files import Facts, WorldFile, home, parse_facts, require

BUNDLED = Path(__file__).parent / "worlds"
NEEDED = ("name", "generator", "embedder")
OPTIONAL = ("makes", "pretrained", "inverter", "identity", "aligner", "mapper", "recipe")
FILES = ("generator", "embedder", "inverter", "identity", "mapper")
NUMBERS = {"strength": 1.0, "truncation": 0.7}


def is_bundled(path: Path) -> bool:
    """Whether a world file ships with the project."""
    return path.absolute().parent.parent == BUNDLED


@dataclass(frozen=True)
class World:
    """What a world file says. `load_scene` reads the networks it names."""

    path: Path
    """The world file itself."""
    name: str
    makes: str | None
    """What its pictures show, for people who choose a world."""
    generator: Path
    """Checkpoint for `load_generator`."""
    embedder: str
    """A local directory, or the name of an open_clip model."""
    pretrained: str | None
    """Tag or file of the embedder's weights, where `embedder` is a name."""
    inverter: Path | None
    """Inverter file; None: only a search finds latents of pictures."""
    identity: Path | None
    """Identity file; None: nothing says whether an edited face is still the same person."""
    aligner: Literal["ffhq"] | None
    """How pictures are aligned before they are inverted unless told otherwise; None: they are only
    cropped to a square."""
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
    files: tuple[WorldFile, ...]
    """Every file it names, and what it says of where they come from."""

    @property
    def given(self) -> str:
        """What to give as --world to get it."""
        return self.path.parent.name if is_bundled(self.path) else str(self.path)


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


def read_texts(content: dict[str, object], path: Path) -> dict[str, str]:
    """The values that are texts, by their keys."""
    texts = {"recipe": "consistent"}
    for key in (*NEEDED, *OPTIONAL):
        value = content.get(key, texts.get(key))
        if isinstance(value, str):
            texts[key] = value
        elif key in content:
            raise ValueError(f"{path}: {key} must be a text, found {value!r}")
    if texts["recipe"] not in RECIPES:
        raise ValueError(
            f"{path}: recipe must be one of {', '.join(RECIPES)}, found {texts['recipe']!r}"
        )
    if RECIPES[texts["recipe"]].identity_weight and "identity" not in texts:
        raise ValueError(
            f"{path}: recipe {texts['recipe']!r} has an identity loss: name an identity model, or "
            "another recipe"
        )
    if texts.get("aligner", "ffhq") != "ffhq":
        raise ValueError(f"{path}: aligner must be 'ffhq' or left out, found {texts['aligner']!r}")
    return texts


def read_numbers(content: dict[str, object], path: Path) -> dict[str, float]:
    """The values that are numbers, by their keys."""
    numbers = {}
    for key, default in NUMBERS.items():
        value = content.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{path}: {key} must be a number, found {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{path}: {key} must be finite, found {value!r}")
        numbers[key] = float(value)
    return numbers


def read_neutral(content: dict[str, object], path: Path) -> tuple[str, ...]:
    """The neutral texts."""
    neutral = content.get("neutral", [])
    if not isinstance(neutral, list) or not all(isinstance(text, str) for text in neutral):
        raise ValueError(f"{path}: neutral must be a list of texts, found {neutral!r}")
    return tuple(neutral)


def place(path: Path, name: str) -> Path:
    """Where a file that a world file names belongs: beside it, or at home if it does not ship."""
    beside = path.parent / name
    if beside.exists() or not is_bundled(path):
        return beside
    return home() / path.parent.name / name


def embedder_file(texts: dict[str, str], path: Path, facts: Facts) -> WorldFile:
    """The embedder as a file: its weights, its folder, or what open_clip knows by a name."""
    name, pretrained = texts["embedder"], texts.get("pretrained")
    if pretrained is not None:
        weights = place(path, pretrained)
        if weights.is_file() or Path(pretrained).suffix in WEIGHT_SUFFIXES:
            return WorldFile(role="embedder", name=pretrained, path=weights, facts=facts)
    folder = place(path, name.removeprefix(LOCAL_DIR))
    if folder.is_dir() or (pretrained is None and not name.startswith(HUB)):
        if facts.hub or facts.sha256 or isinstance(facts.size, int):
            raise ValueError(
                f"{path}: files.embedder: {name!r} is a folder: leave out hub, sha256 and a size "
                "in bytes"
            )
        return WorldFile(role="embedder", name=name, path=folder, facts=facts, folder=True)
    shown = name if pretrained is None else f"{name} ({pretrained})"
    return WorldFile(role="embedder", name=shown, path=None, facts=facts)


def read_files(
    content: dict[str, object], texts: dict[str, str], path: Path
) -> dict[str, WorldFile]:
    """The files that a world file names, by their keys, with what its tables say of them."""
    tables = content.get("files", {})
    if not isinstance(tables, dict):
        raise ValueError(f"{path}: files must be tables such as [files.generator]")
    for role in tables:
        if role not in FILES or role not in texts:
            named = ", ".join(f"files.{role}" for role in FILES if role in texts)
            raise ValueError(f"{path}: unknown files.{role}: this world can have {named}")
    files = {}
    for role in FILES:
        facts = Facts()
        if role in tables:
            facts = parse_facts(tables[role], f"{path}: files.{role}")
        if role == "embedder":
            files[role] = embedder_file(texts, path, facts)
        elif role in texts:
            files[role] = WorldFile(
                role=role, name=texts[role], path=place(path, texts[role]), facts=facts
            )
    return files


def parse_world(content: dict[str, object], path: Path) -> World:
    """Check the content of a world file; paths become absolute or relative to the caller."""
    if missing := sorted(set(NEEDED) - content.keys()):
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    known = {*NEEDED, *OPTIONAL, *NUMBERS, "neutral", "files"}
    if unknown := sorted(content.keys() - known):
        raise ValueError(
            f"{path}: unknown {', '.join(unknown)}: expected {', '.join(sorted(known))}"
        )
    texts = read_texts(content, path)
    files = read_files(content, texts, path)
    embedder, pretrained = texts["embedder"], texts.get("pretrained")
    if (folder := place(path, embedder)).is_dir():
        embedder = str(folder)
    weights = files["embedder"]
    if weights.path is not None and not weights.folder:
        pretrained = str(weights.path)
    return World(
        path=path,
        name=texts["name"],
        makes=texts.get("makes"),
        generator=place(path, texts["generator"]),
        embedder=embedder,
        pretrained=pretrained,
        inverter=place(path, texts["inverter"]) if "inverter" in texts else None,
        identity=place(path, texts["identity"]) if "identity" in texts else None,
        aligner="ffhq" if "aligner" in texts else None,
        recipe=texts["recipe"],
        mapper=place(path, texts["mapper"]) if "mapper" in texts else None,
        neutral=read_neutral(content, path),
        files=tuple(files.values()),
        **read_numbers(content, path),
    )


def load_any_inverter(path: Path, generator: StyleGAN2, device: torch.device) -> LatentInverter:
    """Read an inverter of either kind, told by the suffix, that fits the generator."""
    if path.suffix == ".safetensors":
        return load_inverter(path, generator.fingerprint).to(device)
    if path.suffix == ".pt":
        return load_e4e(path, generator.num_ws, generator.w_dim).to(device)
    raise ValueError(
        f"{path}: expected an inverter ending in .safetensors (train.drawn.inverter) or .pt (e4e), "
        f"found {path.suffix or 'no suffix'}"
    )


def load_any_identity(path: Path, device: torch.device) -> IdentityModel:
    """Read an identity model of either kind, told by the suffix."""
    if path.suffix == ".safetensors":
        return load_identity(path).to(device)
    if path.suffix in (".pth", ".pt"):
        return load_arcface(path).to(device)
    raise ValueError(
        f"{path}: expected an identity model ending in .safetensors (train.drawn.identity), "
        f".pth or .pt (ArcFace), found {path.suffix or 'no suffix'}"
    )


def load_scene(
    world: World,
    device: torch.device | None = None,
    *,
    max_images: int | None = None,
    checkpoint_layers: bool = False,
) -> Scene:
    """Load the networks of a world.

    Args:
        device: None: torch's default.
        max_images: see `Scene`.
        checkpoint_layers: see `StyleGAN2`.

    Raises:
        FileNotFoundError: a file is not there; the message says where to get it.
        ValueError: as the readers of the parts.
    """
    for file in world.files:
        # Another mapper may be given instead; ClipEmbedder knows more of what an embedder can be.
        if file.role not in ("mapper", "embedder"):
            require(file, world.given)
    device = device or torch.get_default_device()
    generator = load_generator(world.generator).to(device)
    generator.checkpoint_layers = checkpoint_layers
    inverter = identity = None
    if world.inverter is not None:
        inverter = load_any_inverter(world.inverter, generator, device)
    if world.identity is not None:
        identity = load_any_identity(world.identity, device)
    return Scene(
        generator=generator,
        embedder=ClipEmbedder.load(world.embedder, world.pretrained).to(device),
        inverter=inverter,
        identity=identity,
        truncation=world.truncation,
        max_images=max_images,
    )
