"""The flags of the `targetclip` command, in the groups that --help shows.

Each group checks the range of its own values; what flags exclude and what a world lacks is checked
in predictor.cli.options. Importing it does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from predictor import Mode
from targetclip.command import Precision, check_least
from targetclip.recipes import Initial
from targetclip.world import DEFAULT_WORLD

MAX_SOURCES = 1000  # more than a person looks at
MAX_STRENGTH = 100.0  # far beyond it images overflow

Morph = Literal["gif", "mp4"]
Value = TypeVar("Value")
UNSAID = tyro.conf.arg(help_behavior_hint="")  # the help text itself says what the default is
Optional = Annotated[Value | None, UNSAID]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff, UNSAID]


def group(title: str) -> object:
    """Return the mark of a group of flags; its title stands in --help."""
    return tyro.conf.arg(name=title)


def listed(metavar: str) -> object:
    """Return the mark of a flag that takes several values."""
    return tyro.conf.arg(metavar=f"{metavar} [{metavar} ...]", help_behavior_hint="")


def check_range(flag: str, value: float | None, limit: float) -> None:
    """Raise a ValueError for NaN, or a number beyond the limit on either side."""
    if value is not None and not abs(value) <= limit:
        raise ValueError(f"--{flag}: expected a number within {limit:g} of 0, found {value}")


@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """The target whose essence is transferred. Several targets give several results."""

    target: Annotated[tuple[Path, ...], listed("PICTURE")] = ()
    """Target pictures, or folders of them."""
    text: Annotated[tuple[str, ...], listed("TEXT")] = ()
    """Texts that describe a target, such as "green hair and round glasses"."""
    mix: Switch = False
    """Mix all targets into one result: pictures in equal parts, every text with the weight 1."""
    weights: Annotated[tuple[float, ...] | None, listed("NUMBER")] = None
    """Mix all targets by these weights, pictures first, then texts.
    A negative weight takes an essence away. In a mixture, and with any weights, what a text does
    not name is left out of the mapper's answer; the optimizer's stays as it is."""

    def __post_init__(self) -> None:
        if not self.target and not self.text:
            raise ValueError("expected a target: give --target PICTURE or --text TEXT")
        for weight in self.weights or ():
            check_range("weights", weight, MAX_STRENGTH)
        if self.weights is not None and not any(self.weights):
            raise ValueError("--weights: expected one that is not 0, found none")


@dataclass(frozen=True, kw_only=True)
class InversionFlags:
    """How pictures become latents."""

    align: Optional[bool] = None
    """Cut out the face of each picture, as FFHQ's faces are, and put it back edited.
    --no-align: pictures are such squares already. Default: the world's."""
    invert_steps: Optional[int] = None
    """Steps of a search that brings latents closer to the picture.
    Default: 0, or 300 in a world without an inverter."""

    def __post_init__(self) -> None:
        check_least(self, invert_steps=0)


@dataclass(frozen=True, kw_only=True)
class PictureFlags:
    """The pictures that are edited."""

    sources: Annotated[tuple[Path, ...] | None, listed("PICTURE")] = None
    """Source pictures, folders of them, or one video; or one .npy or .pt file of latents,
    [sources, num_ws, w_dim]. Default: generated sources."""
    num_sources: Optional[int] = None
    """Number of sources to generate. Default: 6."""
    clip: Switch = False
    """The folder given as --sources holds the frames of one clip."""
    face: Optional[int] = None
    """Which face of a photo is edited, by size. Default: 0, the largest.
    Of a clip: in the first frame that shows so many."""
    smooth: Optional[int] = None
    """Frames of a clip over which faces and latents are smoothed, an odd number. Default: 5."""

    def __post_init__(self) -> None:
        if self.sources is not None and self.num_sources is not None:
            raise ValueError("--sources and --num-sources exclude each other: give one of them")
        if self.sources is not None and not self.sources:
            raise ValueError("--sources: expected one or more pictures, found none")
        if self.num_sources is not None and not 1 <= self.num_sources <= MAX_SOURCES:
            raise ValueError(
                f"--num-sources: expected 1 to {MAX_SOURCES}, found {self.num_sources}"
            )
        if self.face is not None and (self.face < 0 or self.sources is None):
            raise ValueError(
                f"--face: expected 0 or more, and --sources to find it in, found {self.face}"
            )
        if self.smooth is not None and (self.smooth < 1 or self.smooth % 2 == 0):
            raise ValueError(f"--smooth: expected an odd number of frames, found {self.smooth}")


@dataclass(frozen=True, kw_only=True)
class SourceFlags(InversionFlags, PictureFlags):  # in --help, the last one's come first
    """The pictures that are edited."""

    def __post_init__(self) -> None:
        InversionFlags.__post_init__(self)
        PictureFlags.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class EditFlags:
    """How far sources go along the direction."""

    direction: Optional[Path] = None
    """Direction file to apply: ours, or a .npy or .pt of TargetCLIP's release.
    The target is then only scored against."""
    strength: Optional[float] = None
    """How far along the direction; 0 changes nothing. Default: the world's, mostly 1."""
    identity_floor: Optional[float] = None
    """Lower the strength until sources keep this identity similarity on average; 1 is all."""
    coarse: tuple[float, ...] = (1.0,)
    """Factor of the coarse layers, 4 and 8 px: shape. In a mixture also one for each target."""
    middle: tuple[float, ...] = (1.0,)
    """Factor of the middle layers, 16 and 32 px: features; or one for each target."""
    fine: tuple[float, ...] = (1.0,)
    """Factor of the fine layers, from 64 px on: colours; or one for each target."""
    one_direction: Switch = False
    """Move all sources alike: leave out what the mapper adds to the direction for each of them."""

    def __post_init__(self) -> None:
        check_range("strength", self.strength, MAX_STRENGTH)
        for flag in ("coarse", "middle", "fine"):
            if not getattr(self, flag):
                raise ValueError(f"--{flag}: expected a number, found none")
            for factor in getattr(self, flag):
                check_range(flag, factor, MAX_STRENGTH)
        # Written so that NaN fails too.
        if self.identity_floor is not None and not -1 <= self.identity_floor <= 1:
            raise ValueError(
                f"--identity-floor: expected a number from -1 to 1, found {self.identity_floor}"
            )


@dataclass(frozen=True, kw_only=True)
class ShowFlags:
    """What shows the edit, beside the sheet and index.html."""

    strip: Switch = False
    """Write strip.png: the first 12 sources, from unedited to beyond the strength."""
    morph: Optional[Morph] = None
    """Write morph.gif or morph.mp4: the first 12 sources move from unedited to edited and back.
    mp4 needs the extra "video"."""


@dataclass(frozen=True, kw_only=True)
class FinderFlags:
    """How a direction is found."""

    mode: Optional[Mode] = None
    """instant: the mapper's answer, unchecked.
    auto: that answer, refined or optimized where its score on probe sources falls short.
    refine: that answer, always refined.
    optimize: the optimizer's result, without a mapper.
    Default: auto, or optimize where there is no mapper."""
    mapper: Optional[Path] = None
    """Mapper file. Default: the world's."""
    keep_identity: Optional[float] = None
    """Place on the trade-off, for a mapper that reads it: from 0, most essence, to 1, most identity
    kept. Default: the mapper's."""

    def __post_init__(self) -> None:
        # Written so that NaN fails too.
        if self.keep_identity is not None and not 0 <= self.keep_identity <= 1:
            raise ValueError(
                f"--keep-identity: expected a number from 0 to 1, found {self.keep_identity}"
            )


@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """How the optimizer finds a direction."""

    recipe: Optional[str] = None
    """Recipe of the optimizer: release, paper, consistent or identity. Default: the world's."""
    initial: Optional[Initial] = None
    """Where the optimizer starts. Default: the recipe's."""
    steps: Optional[int] = None
    """Steps of the optimizer. Default: the recipe's."""
    patience: Optional[int] = None
    """Stop when the loss has not improved for so many steps. Default: never."""
    render_size: Optional[int] = None
    """Size in px of the images that the optimizer renders, without the generator's finest levels.
    Default: the generator's own."""
    seed: int = 0
    """Seed of all random numbers: generated sources, starts, and those of the optimizer."""

    def __post_init__(self) -> None:
        check_least(self, steps=1, patience=1)


@dataclass(frozen=True, kw_only=True)
class ModeFlags(SearchFlags, FinderFlags):  # in --help, the last one's come first
    """How a direction is found."""

    def __post_init__(self) -> None:
        SearchFlags.__post_init__(self)
        FinderFlags.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where results go, and what is printed."""

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the results; made if missing. A run replaces what an earlier run wrote there."""
    overwrite: Switch = False
    """Write into --out even if it holds results that an earlier run did not list."""
    quiet: Switch = False
    """Print errors and warnings alone."""
    json: Switch = False
    """Print report.json, and nothing else, to standard output."""


@dataclass(frozen=True, kw_only=True)
class MachineFlags:
    """Where and how it is computed."""

    world: str = DEFAULT_WORLD
    """Name of a bundled world, or the path of a world's .toml file."""
    device: Optional[str] = None
    """Device by torch's name. Default: an accelerator if there is one."""
    precision: Optional[Precision] = None
    """Precision of the search; pictures are rendered in fp32. Default: accelerate's, or fp32."""
    max_images: Optional[int] = None
    """Images rendered at once; less needs less memory. Default: 64, fewer above 256 px,
    or a step of the optimizer."""
    checkpoint_layers: Switch = False
    """Compute activations twice, where not even --max-images 1 fits. Results are the same."""

    def __post_init__(self) -> None:
        check_least(self, max_images=1)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Give sources the essence of one target or of several."""

    target: Annotated[TargetFlags, group("target")]
    source: Annotated[SourceFlags, group("source")]
    edit: Annotated[EditFlags, group("edit")]
    show: Annotated[ShowFlags, group("show")]
    search: Annotated[ModeFlags, group("search")]
    output: Annotated[OutputFlags, group("output")]
    machine: Annotated[MachineFlags, group("machine")]


@dataclass(frozen=True, kw_only=True)
class Optimize:
    """Find the direction of a target by the optimizer, and save it."""

    target: Annotated[TargetFlags, group("target")]
    source: Annotated[InversionFlags, group("inversion")]
    search: Annotated[SearchFlags, group("search")]
    output: Annotated[OutputFlags, group("output")]
    machine: Annotated[MachineFlags, group("machine")]


@dataclass(frozen=True, kw_only=True)
class Studio:
    """Open a page in the browser: targets, sources, sliders, results (extra studio)."""

    world: Annotated[tuple[str, ...], listed("WORLD")] = (DEFAULT_WORLD,)
    """Worlds to choose from, the first by default: names of bundled ones, paths of .toml files."""
    host: str = "127.0.0.1"
    """Address to listen on. At 0.0.0.0 the network can open the page, without a password."""
    port: int = 7860
    """Port to listen on; 0: any that is free."""
    mapper: Optional[Path] = None
    """Mapper file of the first world. Default: the world's."""
    device: Optional[str] = None
    """Device by torch's name. Default: an accelerator if there is one."""
    no_browser: Switch = False
    """Only serve: open no browser."""

    def __post_init__(self) -> None:
        if not self.world:
            raise ValueError("--world: expected one world or more, found none")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port: expected 0 to {2**16 - 1}, found {self.port}")


@dataclass(frozen=True)
class WorldList:
    """List the bundled worlds: what they make, and whether their files are there."""


@dataclass(frozen=True)
class WorldCheck:
    """Check the files of a world: whether they are there and right, and where to get them."""

    world: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORLD")]
    """Name of a bundled world, or the path of a world's .toml file."""
    download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch missing files that have a copy on the Hugging Face hub."""


Asked = Transfer | Optimize | Studio | WorldList | WorldCheck
Worlds = (
    Annotated[WorldList, tyro.conf.subcommand("list")]
    | Annotated[WorldCheck, tyro.conf.subcommand("check")]
)
Command = (
    Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Optimize, tyro.conf.subcommand("optimize")]
    | Annotated[Studio, tyro.conf.subcommand("studio")]
    | Annotated[Worlds, tyro.conf.subcommand("world", description="See which worlds there are.")]
)


def given(flags: Any, names: Sequence[str]) -> list[str]:
    """Return those of the named flags of a group that were given, of flags without a default."""
    known = {field.name for field in fields(flags)}
    return [name for name in names if name in known and getattr(flags, name) is not None]
