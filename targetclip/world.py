"""Worlds: a TOML file that names a generator, an embedder, an inverter and defaults.

Knows the file and how to load its networks. Paths in the file are relative to it, may begin with ~,
and may have backslashes on every system. Bundled worlds
are `worlds/NAME/world.toml`; their files that do not ship belong in `home()/NAME`. A user's own
world is the path of a file. Importing it does not import torch, so that usage errors are quick.
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from targetclip.command import did_you_mean
from targetclip.recipes import recipe_named
from targetclip.world_files import (
    HUB,
    LOCAL_DIR,
    WEIGHT_SUFFIXES,
    Facts,
    WorldFile,
    home,
    parse_facts,
    require,
    without_tilde,
)

if TYPE_CHECKING:
    import torch

    from targetclip.embedder import ClipEmbedder
    from targetclip.encoders.identity import IdentityModel
    from targetclip.encoders.inverter import LatentInverter
    from targetclip.generators import Generator
    from targetclip.scene import Scene

BUNDLED = Path(__file__).parent / "worlds"
DEFAULT_WORLD = "avatars"  # where nobody names one
NEEDED = ("name", "generator", "embedder")
OPTIONAL = ("makes", "pretrained", "inverter", "identity", "aligner", "mapper", "recipe")
FILES = ("generator", "embedder", "inverter", "identity", "mapper")
NUMBERS = {"strength": 1.0, "truncation": 0.7}
RECIPE = "consistent"


@dataclass(frozen=True, kw_only=True)
class World:
    """The content of a world file. `load_scene` reads the networks it names."""

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
    """Inverter file. None: only a search finds latents of pictures."""
    identity: Path | None
    """Identity file. None: identities of edited faces are not compared."""
    aligner: Literal["ffhq"] | None
    """How pictures are aligned before they are inverted. None: cropped to a square."""
    recipe: str
    """The optimizer's default recipe."""
    strength: float
    """Default strength of an edit."""
    truncation: float
    """Of generated sources: 1 is the generator's full variety, less is nearer its mean."""
    mapper: Path | None
    """Mapper file. None: only the optimizer finds directions."""
    neutral: tuple[str, ...]
    """Neutral texts that text targets are compared with. Empty: no text can be a target."""
    files: tuple[WorldFile, ...]
    """Every file that the world names, and its origin."""

    @property
    def argument(self) -> str:
        """The value of --world that names this world."""
        return self.path.parent.name if is_bundled(self.path) else str(self.path)


def is_bundled(path: Path) -> bool:
    """Tell whether a world file ships with the project."""
    return path.absolute().parent.parent == BUNDLED


def world_names() -> list[str]:
    """Return the names of the bundled worlds."""
    return sorted(path.parent.name for path in BUNDLED.glob("*/world.toml"))


def load_world(name: str) -> World:
    """Read a world: the name of a bundled one, or the path of a TOML file.
    FileNotFoundError: no such world; the message lists the bundled ones. ValueError: the file is
    not a world file."""
    path, names = without_tilde(name), world_names()
    if path.suffix != ".toml":
        path = BUNDLED / name / "world.toml"
        if name not in names:
            raise FileNotFoundError(
                f"unknown world {name!r}: expected {', '.join(names)} or the path of a world's "
                f".toml file{did_you_mean(name, names)}"
            )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such world file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark is no key
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a world file: {error}") from error
    try:
        return parse_world(content, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# Checking a world file: errors do not name the file, `load_world` does


def check_values(content: Mapping[str, Any]) -> None:
    """Raise a ValueError for a value of another type or out of range."""
    for key in (*NEEDED, *OPTIONAL):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{key} must be a text, found {content[key]!r}")
    for key in NUMBERS:
        value = content.get(key, 0.0)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{key} must be a number, found {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{key} must be finite, found {value!r}")
    neutral = content.get("neutral", [])
    if not isinstance(neutral, list) or not all(isinstance(text, str) for text in neutral):
        raise ValueError(f"neutral must be a list of texts, found {neutral!r}")
    recipe = content.get("recipe", RECIPE)
    if recipe_named(recipe, "recipe").identity_weight and "identity" not in content:
        raise ValueError(
            f"recipe {recipe!r} has an identity loss: name an identity model, or another recipe"
        )
    if content.get("aligner", "ffhq") != "ffhq":
        raise ValueError(f"aligner must be 'ffhq' or left out, found {content['aligner']!r}")


def place(path: Path, name: str) -> Path:
    """Return where a file of a world belongs: beside the world file, or at home."""
    name = name.replace("\\", "/")
    beside = path.parent / without_tilde(name)
    if beside.exists() or not is_bundled(path):
        return beside
    return home() / path.parent.name / name


def embedder_file(content: Mapping[str, Any], path: Path, facts: Facts) -> WorldFile:
    """Return the embedder as a file: its weights, its folder, or a name that open_clip knows."""
    name, pretrained = content["embedder"], content.get("pretrained")
    if pretrained is not None:
        weights = place(path, pretrained)
        if weights.is_file() or Path(pretrained).suffix in WEIGHT_SUFFIXES:
            return WorldFile(role="embedder", name=pretrained, path=weights, facts=facts)
    folder = place(path, name.removeprefix(LOCAL_DIR))
    if folder.is_dir() or (pretrained is None and not name.startswith(HUB)):
        if facts.hub or facts.sha256 or isinstance(facts.size, int):
            raise ValueError(
                f"files.embedder: {name!r} is a folder: leave out hub, sha256 and a size in bytes"
            )
        return WorldFile(role="embedder", name=name, path=folder, facts=facts, folder=True)
    shown = name if pretrained is None else f"{name} ({pretrained})"
    return WorldFile(role="embedder", name=shown, path=None, facts=facts)


def read_files(content: Mapping[str, Any], path: Path) -> dict[str, WorldFile]:
    """Return the files that a world file names, by their keys, with their tables."""
    tables = content.get("files", {})
    if not isinstance(tables, dict):
        raise ValueError("files must be tables such as [files.generator]")
    named = [role for role in FILES if role in content]
    if unknown := [role for role in tables if role not in named]:
        expected = ", ".join(f"files.{role}" for role in named)
        raise ValueError(f"unknown files.{unknown[0]}: this world can have {expected}")
    files = {}
    for role in named:
        facts = parse_facts(tables.get(role, {}), f"files.{role}")
        if role == "embedder":
            files[role] = embedder_file(content, path, facts)
        else:
            where = place(path, content[role])
            files[role] = WorldFile(role=role, name=content[role], path=where, facts=facts)
    return files


def parse_world(content: Mapping[str, Any], path: Path) -> World:
    """Check the content of a world file; paths become absolute or relative to the caller."""
    if missing := sorted(set(NEEDED) - content.keys()):
        raise ValueError(f"missing {', '.join(missing)}")
    known = {*NEEDED, *OPTIONAL, *NUMBERS, "neutral", "files"}
    if unknown := sorted(content.keys() - known):
        hint = did_you_mean(unknown[0], known)
        raise ValueError(f"unknown {', '.join(unknown)}: expected {', '.join(sorted(known))}{hint}")
    check_values(content)
    files = read_files(content, path)
    paths = {role: file.path for role, file in files.items()}
    folder = place(path, content["embedder"].removeprefix(LOCAL_DIR))
    weights = files["embedder"]
    has_weights = weights.path is not None and not weights.folder
    return World(
        path=path,
        name=content["name"],
        makes=content.get("makes"),
        generator=place(path, content["generator"]),
        embedder=str(folder) if folder.is_dir() else content["embedder"],
        pretrained=str(weights.path) if has_weights else content.get("pretrained"),
        inverter=paths.get("inverter"),
        identity=paths.get("identity"),
        aligner=content.get("aligner"),
        recipe=content.get("recipe", RECIPE),
        mapper=paths.get("mapper"),
        neutral=tuple(content.get("neutral", [])),
        files=tuple(files.values()),
        **{key: float(content.get(key, default)) for key, default in NUMBERS.items()},
    )


# Loading networks


def load_any_inverter(
    path: Path, generator: "Generator", device: "torch.device"
) -> "LatentInverter":
    """Read an inverter for a generator: `.safetensors` (train.world.inverter) or `.pt` (e4e)."""
    from targetclip.encoders.e4e import load_e4e
    from targetclip.encoders.inverter import load_inverter

    if path.suffix == ".safetensors":
        return load_inverter(path, generator.fingerprint).to(device)
    if path.suffix == ".pt":
        return load_e4e(path, generator.num_ws, generator.w_dim).to(device)
    raise ValueError(
        f"{path}: expected an inverter ending in .safetensors (train.world.inverter) or .pt (e4e), "
        f"found {path.suffix or 'no suffix'}"
    )


def load_any_identity(path: Path, device: "torch.device") -> "IdentityModel":
    """Read an identity model: `.safetensors` (train.world.identity), `.pth` or `.pt` (ArcFace)."""
    from targetclip.encoders.arcface import load_arcface
    from targetclip.encoders.identity import load_identity

    if path.suffix == ".safetensors":
        return load_identity(path).to(device)
    if path.suffix in (".pth", ".pt"):
        return load_arcface(path).to(device)
    raise ValueError(
        f"{path}: expected an identity model ending in .safetensors (train.world.identity), "
        f".pth or .pt (ArcFace), found {path.suffix or 'no suffix'}"
    )


def load_encoders(
    world: World, device: "torch.device"
) -> "tuple[ClipEmbedder, IdentityModel | None]":
    """Load the networks of a world that judge pictures: its embedder and its identity model.
    FileNotFoundError, ValueError: as `load_scene`."""
    from targetclip.embedder import ClipEmbedder

    identity = None
    if world.identity is not None:
        require(next(file for file in world.files if file.role == "identity"), world.argument)
        identity = load_any_identity(world.identity, device)
    return ClipEmbedder.load(world.embedder, world.pretrained).to(device), identity


def load_scene(
    world: World,
    device: "torch.device | None" = None,
    *,
    max_images: int | None = None,
    checkpoint_layers: bool = False,
) -> "Scene":
    """Load the networks of a world.

    Args:
        device: None: torch's default.
        max_images: see `Scene`.
        checkpoint_layers: see `StyleGAN2`.

    Raises:
        FileNotFoundError: a file is missing; the message says where to get it.
        ValueError: as the readers of the networks.
    """
    import torch

    from targetclip.generators import load_generator
    from targetclip.scene import Scene

    for file in world.files:
        # Another mapper may be given instead; ClipEmbedder checks every kind of embedder.
        if file.role not in ("mapper", "embedder"):
            require(file, world.argument)
    device = device or torch.get_default_device()
    generator = load_generator(world.generator).to(device)
    generator.checkpoint_layers = checkpoint_layers
    inverter = None
    if world.inverter is not None:
        inverter = load_any_inverter(world.inverter, generator, device)
    embedder, identity = load_encoders(world, device)
    return Scene(
        generator=generator,
        embedder=embedder,
        inverter=inverter,
        identity=identity,
        truncation=world.truncation,
        max_images=max_images,
    )
