"""The flags of the `targetclip` command, and the request that they and a world amount to.

Knows what flags exclude and what a world lacks; nothing of how a request is carried out. Importing
it does not import torch, so that a wrong command line is refused at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from predictor import Mode
from targetclip.command import Precision, choose_precision
from targetclip.recipes import RECIPES, Initial, Recipe
from targetclip.world import World, load_world

MAX_SOURCES = 1000  # more than a person looks at; the grid is one picture
MAX_STRENGTH = 100.0  # far beyond it images overflow
NUM_SOURCES, WINDOW = 6, 5
STEPS_FROM_MEAN = 300  # of a search for latents that no inverter starts
OF_OPTIMIZER = ("recipe", "initial", "steps", "patience")
# Containers that targetclip.media.frames reads.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp"),
)
VIDEO, FOLDER = "edited.mp4", "frames"  # written of clips


def check_range(flag: str, value: float | None, limit: float) -> None:
    """Raise a ValueError for NaN, or a number beyond the limit on either side."""
    if value is not None and not abs(value) <= limit:
        raise ValueError(f"--{flag}: expected a number within {limit:g} of 0, found {value}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of every command that finds a direction."""

    target: tuple[Path, ...] = ()
    """Pictures whose essence is wanted."""
    text: tuple[str, ...] = ()
    """Texts that describe an essence, such as "green hair and round glasses"."""
    weights: tuple[float, ...] | None = None
    """Of the targets, pictures first, then texts; a negative one takes an essence away.
    Default: equal ones, of sum 1."""
    out: Path
    """Folder to write into; made if missing."""
    world: str = "sketch64"
    """Name of a bundled world, or the path of a world's .toml file."""
    recipe: str | None = None
    """Recipe of the optimizer: release, paper, consistent or identity. Default: the world's."""
    initial: Initial | None = None
    """Where the optimizer starts. Default: the recipe's."""
    steps: int | None = None
    """Steps of the optimizer. Default: the recipe's."""
    patience: int | None = None
    """Stop early when the loss has not improved for so many steps."""
    align: Annotated[bool | None, tyro.conf.DisallowNone] = None
    """Find the face in each picture that is inverted, cut it out as FFHQ's faces are, and put it
    back when it is edited. --no-align: the pictures are such squares already. Default: the
    world's."""
    invert_steps: int | None = None
    """Steps of a search that brings inverted pictures closer to the originals. Default: 0, or 300
    in a world without an inverter."""
    seed: int = 0
    """Of all random numbers: sources, starts, and those of the optimizer."""
    device: str | None = None
    """Device by torch's name. Default: an accelerator if there is one."""
    precision: Precision | None = None
    """Of the search for directions; pictures are rendered in fp32. Default: accelerate's, or else
    fp32."""
    max_images: int | None = None
    """Images rendered at once; less needs less memory. Default: 64, or a whole step of the
    optimizer."""
    checkpoint_layers: bool = False
    """Keep three fifths of an image's activations for the backward pass, and compute the rest
    again: for where not even --max-images 1 fits. The result is the same."""

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

    def given(self, names: Sequence[str]) -> list[str]:
        """Return those of the named options that were given."""
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class Transfer(Options):
    """Give sources the essence of one target or of several."""

    sources: tuple[Path, ...] | None = None
    """Pictures to edit, or one clip: a video file or a folder of frames. They are inverted first.
    Default: generated ones."""
    num_sources: int | None = None
    """How many sources to generate instead. Default: 6."""
    face: int | None = None
    """Which face of each photo, 0 being the largest. Of a clip: in the first frame that has it,
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


@dataclass(frozen=True, kw_only=True)
class Optimize(Options):
    """Find the direction of a target by the optimizer, and save it."""


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


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line and its world, checked against each other, with nothing left to decide."""

    world: World
    out: Path
    pictures: tuple[Path, ...]
    texts: tuple[str, ...]
    """Targets: pictures, then texts."""
    weights: tuple[float, ...]
    """One for each target."""
    mode: Mode | None
    """How directions are found; None: `direction` is applied."""
    falls_back: bool
    """No mode was given, and it is "optimize" because there is no mapper."""
    recipe_name: str
    recipe: Recipe
    mapper: Path | None
    direction: Path | None
    sources: tuple[Path, ...] | None
    """Pictures or one clip; None: `num_sources` are generated."""
    num_sources: int
    face: int
    smooth: int
    align: bool
    """Whether faces are cut out of pictures that are inverted."""
    invert_steps: int
    """Of the search for a picture's latents; 0: the inverter's answer is taken."""
    inverts_target: bool
    """Whether a search could start at the inversion of a target."""
    strength: float
    identity_floor: float | None
    layers: dict[str, float]
    """Factors of the coarse, the middle and the fine layers."""
    seed: int
    device: str | None
    precision: Precision
    max_images: int | None
    checkpoint_layers: bool

    @property
    def clip(self) -> Path | None:
        """The clip that is edited."""
        return self.sources[0] if self.sources and is_clip(self.sources[0]) else None

    @property
    def inverts(self) -> bool:
        """Whether any picture could be inverted."""
        return self.sources is not None or self.inverts_target


def is_clip(path: Path) -> bool:
    """Tell whether a source is a clip: a folder, or a video by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES or path.is_dir()


def resolve(options: Transfer | Optimize) -> Request:
    """Return the request of a command line, after checking it against the world.

    Raises:
        FileNotFoundError: no such world or picture.
        ValueError: a damaged world file, or options that the world or each other do not allow.
        FileExistsError: frames would be written into a folder that is not empty.
    """
    world = load_world(options.world)
    if isinstance(options, Optimize):  # a transfer by the optimizer, less the edit
        options = Transfer(**vars(options), mode="optimize")
    name, recipe = choose_recipe(options, world.recipe)
    mode, mapper = options.mode, options.mapper or world.mapper
    if mode is None and options.direction is None:
        mode = "optimize" if mapper is None or options.given(OF_OPTIMIZER) else "auto"
    count = len(options.target) + len(options.text)
    search_steps = STEPS_FROM_MEAN if world.inverter is None else 0
    request = Request(
        world=world,
        out=options.out,
        pictures=options.target,
        texts=options.text,
        weights=options.weights or (1 / count,) * count,
        mode=mode,
        falls_back=not options.given(("mode", "direction", *OF_OPTIMIZER)) and mapper is None,
        recipe_name=name,
        recipe=recipe,
        mapper=mapper,
        direction=options.direction,
        sources=options.sources,
        num_sources=options.num_sources or NUM_SOURCES,
        face=options.face or 0,
        smooth=options.smooth or WINDOW,
        align=world.aligner is not None if options.align is None else options.align,
        invert_steps=search_steps if options.invert_steps is None else options.invert_steps,
        inverts_target=bool(options.target)
        and mode in ("auto", "optimize")
        and recipe.initial == "inversion",
        strength=world.strength if options.strength is None else options.strength,
        identity_floor=options.identity_floor,
        layers={group: getattr(options, group) for group in ("coarse", "middle", "fine")},
        seed=options.seed,
        device=options.device,
        precision=choose_precision(options.precision),
        max_images=options.max_images,
        checkpoint_layers=options.checkpoint_layers,
    )
    check_inversion(options, request)
    check_clip(options, request)
    check_world(request)
    return request


def choose_recipe(options: Options, default: str) -> tuple[str, Recipe]:
    """Return the recipe's name, and the recipe with the changes of the command line."""
    name = options.recipe or default
    if name not in RECIPES:
        raise ValueError(f"--recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    changes = {key: getattr(options, key) for key in options.given(OF_OPTIMIZER[1:])}
    return name, replace(RECIPES[name], **changes)


def check_inversion(options: Transfer, request: Request) -> None:
    """Raise a ValueError for options of an inversion that cannot be or does not happen."""
    if options.invert_steps == 0 and request.world.inverter is None:
        raise ValueError(
            f"--invert-steps: world {request.world.name!r} has no inverter, so a search finds "
            "latents: expected 1 or more, found 0"
        )
    flags = {"--align": options.align, "--invert-steps": options.invert_steps is not None}
    for flag in (flag for flag, given in flags.items() if given and not request.inverts):
        raise ValueError(
            f"{flag}: no picture is inverted here: drop it, or give --sources or "
            "--initial inversion"
        )
    if options.face is not None and not request.align:
        raise ValueError("--face: no face is looked for here: drop it, or give --align")


def check_clip(options: Transfer, request: Request) -> None:
    """Check the sources for clips.

    Raises:
        ValueError: a clip among other sources, smoothing without a clip, or a clip that the results
            would replace.
        FileExistsError: something is already where the frames would be written.
    """
    clips = [path for path in request.sources or () if is_clip(path)]
    if options.smooth is not None and not clips:
        raise ValueError("--smooth is for clips: drop it, or give a video or a folder of frames")
    if not request.sources or not clips:
        return
    clip, count = clips[0], len(request.sources)
    if count > 1:
        raise ValueError(
            f"--sources: expected pictures or one clip alone, found {str(clip)!r} among {count} "
            "sources"
        )
    written = request.out / (FOLDER if clip.is_dir() else VIDEO)
    if written.resolve() == clip.resolve():
        raise ValueError(f"--out: {str(written)!r} would replace the clip: give another folder")
    if clip.is_dir() and written.exists() and (written.is_file() or any(written.iterdir())):
        raise FileExistsError(
            f"--out: expected a new or an empty folder, found {str(written)!r}: give another one"
        )


def check_world(request: Request) -> None:
    """Raise a ValueError for a part that the world lacks, a FileNotFoundError for a picture."""
    world, name = request.world, request.world.name
    if request.texts and not world.neutral:
        raise ValueError(
            f"--text: world {name!r} has no neutral texts to measure others from: "
            "give --target, or add neutral to the world's file"
        )
    if request.mode in ("instant", "auto", "refine") and request.mapper is None:
        raise ValueError(
            f"--mode {request.mode}: world {name!r} has no mapper: give --mapper, or --mode "
            "optimize, or train one: python -m train.mapper --help"
        )
    # The mapper alone and its refinements do not follow the recipe's losses.
    follows = request.mode in ("auto", "optimize")
    if follows and request.recipe.identity_weight and world.identity is None:
        raise ValueError(
            f"--recipe: {request.recipe_name!r} has an identity loss, and world {name!r} no "
            "identity model: choose another, or name one in the world's file"
        )
    if request.identity_floor is not None and world.identity is None:
        raise ValueError(
            f"--identity-floor: world {name!r} has no identity model: choose a --strength"
        )
    for path in (*request.pictures, *(request.sources or ())):
        if not path.exists() and not is_clip(path):
            raise FileNotFoundError(f"no picture at {str(path)!r}; check the path")
