"""What the `targetclip` command takes, and which of it excludes what.

Knows flags; nothing of what they make happen.
"""

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Annotated, Any

import tyro

from predictor.transfer import Mode
from targetclip.recipes import Initial

MAX_SOURCES = 1000  # more than a person looks at; the grid is one picture
MAX_STRENGTH = 100.0  # far beyond it images overflow


def check_range(flag: str, value: float | None, limit: float) -> None:
    """Raise a ValueError for a number beyond the limit, on either side, or NaN."""
    if value is not None and not abs(value) <= limit:
        raise ValueError(f"--{flag}: expected a number within {limit:g} of 0, found {value}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    target: tuple[Path, ...] = ()
    """Pictures whose essence is wanted."""
    text: tuple[str, ...] = ()
    """Texts that describe an essence, such as "green hair and round glasses"."""
    weights: tuple[float, ...] | None = None
    """Of the targets, pictures first, then texts; a negative one takes an essence away.
    Default: all the same, 1 together."""
    out: Path
    """Folder to write into; made if missing."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    recipe: str | None = None
    """Recipe of the optimizer: release, paper, consistent or identity. Default: the world's."""
    initial: Initial | None = None
    """What the optimizer starts from. Default: the recipe's."""
    steps: int | None = None
    """Steps of the optimizer. Default: the recipe's."""
    patience: int | None = None
    """Stop early when the loss has not improved for so many steps."""
    align: Annotated[bool | None, tyro.conf.DisallowNone] = None
    """Find the face in each picture that is inverted, cut it out as FFHQ's faces are, and put it
    back when it is edited; --no-align takes pictures that are such squares already. Default: as the
    world says."""
    invert_steps: int | None = None
    """Steps of a search that brings inverted pictures closer to what they show. Default: 0, or 300
    in a world without an inverter."""
    seed: int = 0
    """Decides everything random: sources, starts, what the optimizer draws."""
    device: str | None = None
    """Where to compute, as torch names it. Default: an accelerator if there is one."""
    max_images: int = 64
    """Images rendered at once; less needs less memory."""
    checkpoint_layers: bool = False
    """Keep three fifths of what an image holds for the backward pass, and compute the rest again:
    where not even --max-images 1 fits. The result is the same."""

    def __post_init__(self) -> None:
        for name in ("steps", "patience", "max_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: expected 1 or more, found {value}")
        if self.invert_steps is not None and self.invert_steps < 0:
            raise ValueError(f"--invert-steps: expected 0 or more, found {self.invert_steps}")
        count = len(self.target) + len(self.text)
        if not count:
            raise ValueError("expected a target: give --target PICTURE or --text TEXT")
        if self.weights is not None:
            if len(self.weights) != count:
                raise ValueError(
                    f"--weights: expected {count}, one for each target, found {len(self.weights)}"
                )
            for weight in self.weights:
                check_range("weights", weight, MAX_STRENGTH)
            if not any(self.weights):
                raise ValueError("--weights: expected one that is not 0, found none")

    def target_weights(self) -> Sequence[float]:
        """One for each target."""
        count = len(self.target) + len(self.text)
        return [1 / count] * count if self.weights is None else self.weights

    def given(self, names: Sequence[str]) -> list[str]:
        """Those of the named options that were given."""
        return [name for name in names if getattr(self, name) is not None]


OF_OPTIMIZER = ("recipe", "initial", "steps", "patience")


@dataclass(frozen=True, kw_only=True)
class Transfer(Options):
    """Give sources the essence of one target or of several."""

    sources: tuple[Path, ...] | None = None
    """Pictures to edit, or one clip: a video file or a folder of frames. They are inverted first.
    Default: generated ones."""
    num_sources: int | None = None
    """How many sources to generate instead. Default: 6."""
    face: int | None = None
    """Which face of each photo, 0 being the largest; of a clip, in the first frame that has it,
    from where it is followed. Default: 0."""
    smooth: int | None = None
    """Over how many frames of a clip faces and latents are smoothed, an odd number; 1 smooths
    nothing. Default: 5."""
    mode: Mode | None = None
    """How the direction is found: by the mapper alone (instant); by the mapper, checked on probe
    sources, refined or optimized where that falls short (auto); by the mapper and always refined
    (refine); by the optimizer alone (optimize). Default: auto where there is a mapper."""
    mapper: Path | None = None
    """Mapper file. Default: the world's."""
    direction: Path | None = None
    """Apply this direction file instead of finding one, ours or a .npy or .pt of TargetCLIP's
    release; the target is what it is scored against."""
    strength: float | None = None
    """How far along the direction; 0 changes nothing. Default: the world's."""
    identity_floor: float | None = None
    """Go only so far that sources keep, on average, this identity similarity, 1 being all."""
    coarse: float = 1.0
    middle: float = 1.0
    fine: float = 1.0
    """How much of the direction its coarse layers take (4 and 8 px: shape), its middle ones (16
    and 32 px: features) and its fine ones (from 64 px on: colours)."""

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.direction is not None:
            for name in self.given((*OF_OPTIMIZER, "weights", "mode", "mapper")):
                raise ValueError(f"--{name} is for finding a direction: drop it or --direction")
        if self.mode == "instant":
            for name in self.given(OF_OPTIMIZER):
                raise ValueError(f"--{name} is the optimizer's: drop it or --mode instant")
        if self.mode == "refine":
            for name in self.given(("initial", "steps")):
                raise ValueError(f"--{name}: a refinement has its own: drop it or --mode refine")
        if self.mode == "optimize" and self.mapper is not None:
            raise ValueError("--mapper: --mode optimize asks no mapper: drop one of them")
        if self.mode is None and self.mapper is not None:
            for name in self.given(OF_OPTIMIZER):
                raise ValueError(f"--{name} and --mapper need a mode: add --mode auto, or drop one")
        for flag in ("strength", "coarse", "middle", "fine"):
            check_range(flag, getattr(self, flag), MAX_STRENGTH)
        # Written so that NaN fails too.
        if self.identity_floor is not None and not -1 <= self.identity_floor <= 1:
            raise ValueError(
                f"--identity-floor: expected a number from -1 to 1, found {self.identity_floor}"
            )

    def layers(self) -> dict[str, float]:
        """The factors of the groups of layers."""
        return {"coarse": self.coarse, "middle": self.middle, "fine": self.fine}


@dataclass(frozen=True, kw_only=True)
class Optimize(Options):
    """Find the direction of a target by the optimizer, and save it."""


@dataclass(frozen=True)
class WorldList:
    """List the bundled worlds: what they make, and whether their files are there."""


@dataclass(frozen=True)
class WorldCheck:
    """Say of each file of a world whether it is there and right, and where to get it."""

    world: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORLD")]
    """Name of a bundled world, or the path of a world's .toml file."""
    download: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Fetch what is missing and has a copy on the Hugging Face hub. Nothing is fetched without."""


Asked = Transfer | Optimize | WorldList | WorldCheck
Worlds = (
    Annotated[WorldList, tyro.conf.subcommand("list")]
    | Annotated[WorldCheck, tyro.conf.subcommand("check")]
)
Command = (
    Annotated[Transfer, tyro.conf.subcommand("transfer")]
    | Annotated[Optimize, tyro.conf.subcommand("optimize")]
    | Annotated[Worlds, tyro.conf.subcommand("world", description="See which worlds there are.")]
)


def applied(options: Transfer) -> dict[str, Any]:
    """What a report says of how a direction was applied, beside its strength."""
    layers = {name: factor for name, factor in options.layers().items() if factor != 1}
    floor = {} if options.identity_floor is None else {"identity_floor": options.identity_floor}
    return layers | floor


def usage_line(box: str) -> str:
    """What a usage error says, without tyro's frame, title and the help below it."""
    rows = [row.strip("│╭╮╰╯ ") for row in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def says_something(row: str) -> bool:
        return bool(row.strip("─-"))

    # Where the terminal knows no frames there is a rule under the title instead.
    below_title = dropwhile(lambda row: not says_something(row), rows[1:])
    message = " ".join(takewhile(says_something, below_title))
    return re.sub(r"^Error parsing \w+: ", "", message)  # a class's name, where options disagree


def parse(description: str | None) -> Asked:
    """The command asked for; a usage error is one line, as every error is, and exit code 2."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            command: Asked = tyro.cli(Command, prog="targetclip", description=description)
    except SystemExit as ended:
        if ended.code:
            line = usage_line(box.getvalue())
            print(f"targetclip: {line} (see targetclip --help)", file=sys.stderr)
        raise
    return command
