"""The request that the flags of the `targetclip` command and a world amount to.

Knows what flags exclude, what paths name and what a world lacks; nothing of how a request is
carried out. Importing it does not import torch, so that a wrong command line is refused at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from predictor import Mode
from predictor.cli.flags import (
    EditFlags,
    ModeFlags,
    Morph,
    Optimize,
    ShowFlags,
    SourceFlags,
    Transfer,
    given,
)
from targetclip.command import Precision, choose_precision, nearest
from targetclip.recipes import Recipe, recipe_named
from targetclip.world import World, load_world

# Containers that targetclip.media.frames reads.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp"),
)
PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
LATENT_SUFFIXES = (".npy", ".pt")  # of files that targetclip.directions reads
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pkl", ".npy")
URL = re.compile(r"(https?|ftps?|file|s3|gs|hf|data):", re.IGNORECASE)
NAMED = 5  # files that are left out, at most, in a warning
NUM_SOURCES, WINDOW = 6, 5
STEPS_FROM_MEAN = 300  # of a search for latents that no inverter starts
OF_OPTIMIZER = ("recipe", "initial", "steps", "patience", "render_size")
STRONG = 3.0  # times the usual strength, from which on pictures fall apart


# Paths


def is_video(path: Path) -> bool:
    """Tell whether a path is that of a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def refuse_url(flag: str, text: str) -> None:
    """Raise a ValueError for a URL."""
    if URL.match(text):
        raise ValueError(f"{flag}: expected a file, found the URL {text!r}: download it first")


def missing(flag: str, path: Path, kind: str) -> FileNotFoundError:
    """Return the error for a file that is not there, with what was probably meant."""
    hint = "check the path"
    if flag == "--target" and not path.suffix and len(path.parts) == 1:
        hint = f"a text is given by --text {str(path)!r}"
    elif path.parent.is_dir():
        near = nearest(path.name, sorted(one.name for one in path.parent.iterdir()))
        hint = f"did you mean {str(path.with_name(near))!r}?" if near is not None else hint
    return FileNotFoundError(f"{flag}: no {kind} at {str(path)!r}; {hint}")


def check_picture(flag: str, path: Path) -> None:
    """Check a path that must be that of a picture or of a folder.
    FileNotFoundError: nothing is there. ValueError: a URL, a video, or a file of weights or of a
    direction."""
    refuse_url(flag, str(path))
    if not path.exists():
        raise missing(flag, path, "picture")
    if is_video(path):
        hint = "a clip is a source: --sources" if flag == "--target" else "give it alone"
        raise ValueError(f"{flag}: expected pictures, found the video {str(path)!r}: {hint}")
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise ValueError(
            f"{flag}: expected a picture, found {str(path)!r}: a direction is given by "
            "--direction, a mapper by --mapper, one file of latents alone by --sources"
        )


def check_weights(flag: str, path: Path | None, kind: str) -> None:
    """Check a path that must be that of a file of weights.
    FileNotFoundError: nothing is there. ValueError: a URL, a folder, or a picture."""
    if path is None:
        return
    refuse_url(flag, str(path))
    if path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES):
        raise ValueError(
            f"{flag}: expected a {kind} file, found the picture {str(path)!r}: "
            "a target is given by --target"
        )
    if path.is_dir():
        raise ValueError(f"{flag}: expected a {kind} file, found the folder {str(path)!r}")
    if not path.exists():
        raise missing(flag, path, f"{kind} file")


def check_text(text: str) -> None:
    """Raise a ValueError for a text that names a file, or looks like a path or a URL."""
    path = Path(text)
    known = path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, *WEIGHT_SUFFIXES)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # longer than any path, or with a null character
        is_file = False
    if URL.match(text) or known or (is_file and (path.suffix or len(path.parts) > 1)):
        raise ValueError(
            f"--text: expected words, found {text!r}, the name of a file: a picture is given by "
            "--target"
        )


def pictures_of(flag: str, paths: Iterable[Path], notes: list[str]) -> tuple[Path, ...]:
    """Return the paths of pictures; a folder gives its pictures in natural order.

    Args:
        notes: the names of files in folders that are no pictures are added here.

    Raises:
        FileNotFoundError, ValueError: as `check_picture`; a folder without pictures.
    """
    result: list[Path] = []
    for path in paths:
        check_picture(flag, path)
        if not path.is_dir():
            result.append(path)
            continue
        from targetclip.media.frames import natural_order  # which import torch
        from targetclip.media.images import is_picture

        entries = [one for one in path.iterdir() if not one.name.startswith(".")]
        pictures = sorted((one for one in entries if is_picture(one)), key=natural_order)
        others = sorted(one.name for one in entries if one not in pictures)
        if not pictures:
            raise ValueError(f"{flag}: expected pictures in the folder {str(path)!r}, found none")
        if others:
            named = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
            notes.append(f"{path}: {len(pictures)} pictures taken, {len(others)} left out: {named}")
        result += pictures
    return tuple(result)


# The request

LAYERS = ("coarse", "middle", "fine")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command line and its world, checked against each other, with nothing left to decide."""

    command: str
    """"transfer" or "optimize"."""
    world: World
    pictures: tuple[Path, ...]
    texts: tuple[str, ...]
    """Targets: pictures, then texts."""
    weights: tuple[float, ...]
    """One for each target, where they are mixed; otherwise all are 1."""
    mixes: bool
    """Whether weights count. Of a text's answer, what the text does not name is then left out."""
    separate: bool
    """Whether each of several targets has a result of its own."""
    mode: Mode | None
    """How directions are found; None: `direction` is applied."""
    falls_back: bool
    """No mode was given, and it is "optimize" because there is no mapper."""
    recipe_name: str
    recipe: Recipe
    mapper: Path | None
    keep_identity: float | None
    """Place on the mapper's trade-off; None: its default, if it reads one."""
    direction: Path | None
    sources: tuple[Path, ...] | None
    """Pictures; None: latents, a clip, or `num_sources` that are generated."""
    latents: Path | None
    """The file of latents that are edited."""
    clip: Path | None
    """The video, or the folder of frames, that is edited."""
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
    """Factors of the coarse, the middle and the fine layers of the whole direction."""
    own_layers: tuple[dict[str, float], ...]
    """Those of each target alone: some only in a mixture."""
    one_direction: bool
    """Whether the mapper's correction for each source is left out."""
    strip: bool
    """Whether the sources at several strengths are shown."""
    morph: Morph | None
    """The kind of file that shows the sources as they change; None: none."""
    seed: int
    out: Path
    overwrite: bool
    quiet: bool
    json: bool
    device: str | None
    precision: Precision
    max_images: int | None
    checkpoint_layers: bool
    notes: tuple[str, ...]
    """Warnings on the command line."""
    line: str
    """The command line, as a shell takes it; "" where there is none."""

    @property
    def inverts_sources(self) -> bool:
        """Whether sources are pictures that are inverted."""
        return self.sources is not None or self.clip is not None

    @property
    def inverts(self) -> bool:
        """Whether any picture could be inverted."""
        return self.inverts_sources or self.inverts_target

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Pictures, latents and clips that are read while results are written."""
        alone = [path for path in (self.latents, self.clip) if path is not None]
        return (*self.pictures, *(self.sources or ()), *alone)


def layers_of(
    edit: EditFlags, targets: int, mixes: bool
) -> tuple[dict[str, float], tuple[dict[str, float], ...]]:
    """Return the factors of layers of the whole direction, and of each target those of its own.
    ValueError: neither one factor nor, where targets are mixed, one for each of them."""
    layers, own = dict.fromkeys(LAYERS, 1.0), tuple(dict[str, float]() for _ in range(targets))
    for group in LAYERS:
        factors = getattr(edit, group)
        if len(factors) == 1:
            layers[group] = factors[0]
            continue
        if not mixes or len(factors) != targets:
            several = f", or {targets}, one for each target of the mixture"
            if not mixes:
                several = "" if edit.direction else ", or one for each target of a mixture (--mix)"
            expected = "1 factor" + ("" if mixes and targets == 1 else several)
            raise ValueError(f"--{group}: expected {expected}, found {len(factors)}")
        for its, factor in zip(own, factors, strict=True):
            its[group] = factor
    return layers, own


def check_finding(options: Transfer) -> None:
    """Raise a ValueError for flags that exclude each other."""
    target, edit, search = options.target, options.edit, options.search
    mode = search.mode
    if edit.direction is not None:
        if target.mix:
            raise ValueError("--mix is for finding a direction: drop it or --direction")
        finding = given(search, (*OF_OPTIMIZER, "mode", "mapper", "keep_identity"))
        for name in finding + given(target, ["weights"]):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for finding a direction: drop it or --direction")
    if mode == "instant":
        for name in given(search, OF_OPTIMIZER):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is the optimizer's: drop it or --mode instant")
    if mode == "refine":
        for name in given(search, ("initial", "steps")):
            raise ValueError(f"--{name}: a refinement has its own: drop it or --mode refine")
    if mode == "optimize" and edit.one_direction:
        raise ValueError("--one-direction: the optimizer finds no other: drop one of them")
    for other in given(search, ("mapper", "keep_identity")):
        flag = "--" + other.replace("_", "-")
        if mode == "optimize":
            raise ValueError(f"{flag}: --mode optimize asks no mapper: drop one of them")
        for name in given(search, OF_OPTIMIZER) if mode is None else ():
            flags = f"--{name.replace('_', '-')} and {flag}"
            raise ValueError(f"{flags} need a mode: add --mode auto, or drop one")


def clip_of(flags: SourceFlags) -> Path | None:
    """Return the clip among the sources, if it is one.
    ValueError: a clip among other sources, or flags of clips without one."""
    paths = flags.sources or ()
    for path in paths:
        refuse_url("--sources", str(path))
    videos = [path for path in paths if is_video(path)]
    if videos and len(paths) > 1:
        raise ValueError(
            f"--sources: expected pictures or one clip alone, found {str(videos[0])!r} among "
            f"{len(paths)} sources"
        )
    if flags.clip and not videos:
        if len(paths) != 1 or not paths[0].is_dir():
            raise ValueError("--clip: expected --sources with one folder of frames, or a video")
        return paths[0]
    if flags.smooth is not None and not videos:
        raise ValueError("--smooth is for clips: drop it, or give a video, or a folder and --clip")
    return videos[0] if videos else None


def latents_of(flags: SourceFlags) -> Path | None:
    """Return the file of latents that is the only source, if it is one.
    FileNotFoundError, ValueError: as `check_weights`."""
    if flags.sources is None or len(flags.sources) != 1:
        return None
    [path] = flags.sources
    if path.suffix.lower() not in LATENT_SUFFIXES or path.is_dir():
        return None
    check_weights("--sources", path, "latent")
    return path


def strength_notes(
    strength: float,
    usual: float,
    layers: Mapping[str, float],
    own_layers: Sequence[Mapping[str, float]] = (),
) -> list[str]:
    """Return a warning for an edit that goes much further than is usual."""
    factors = [
        abs(factor * its.get(group, 1.0))
        for group, factor in layers.items()
        for its in own_layers or [{}]
    ]
    furthest = abs(strength) * max(factors)
    limit = STRONG * max(1.0, abs(usual))
    if furthest <= limit:
        return []
    return [
        f"strength {furthest:g} is far beyond the usual {usual:g}: pictures fall apart; "
        f"give --strength of {limit:g} at most"
    ]


def check_show(flags: ShowFlags, clip: Path | None) -> None:
    """Raise a ValueError for a strip or a morph that cannot be made."""
    for flag, is_given in {"--strip": flags.strip, "--morph": flags.morph is not None}.items():
        if is_given and clip is not None:
            raise ValueError(
                f"{flag} is for pictures, and {str(clip)!r} is a clip: drop it, or give pictures "
                "as --sources"
            )
    if flags.morph == "mp4" and find_spec("av") is None:
        raise ValueError(
            '--morph mp4 needs PyAV: pip install "targetclip[video]", or give --morph gif'
        )


def resolve(options: Transfer | Optimize, line: str = "") -> Request:
    """Return the request of a command line, after checking it against the world.

    Args:
        line: the command line, for those who look at its results.

    Raises:
        FileNotFoundError: no such world or picture.
        ValueError: a damaged world file, or options that the world or each other do not allow.
    """
    command = "transfer"
    if isinstance(options, Optimize):  # a transfer by the optimizer, less the edit
        command = "optimize"
        options = Transfer(
            target=options.target,
            source=SourceFlags(**vars(options.source)),
            edit=EditFlags(),
            show=ShowFlags(),
            search=ModeFlags(**vars(options.search), mode="optimize"),
            output=options.output,
            machine=options.machine,
        )
    check_finding(options)
    target, source, edit, search = options.target, options.source, options.edit, options.search
    machine = options.machine
    world = load_world(machine.world)
    name = search.recipe or world.recipe
    changes = {key: getattr(search, key) for key in given(search, OF_OPTIMIZER[1:])}
    recipe = replace(recipe_named(name), **changes)
    mode, mapper = search.mode, search.mapper or world.mapper
    if mode is None and edit.direction is None:
        mode = "optimize" if mapper is None or given(search, OF_OPTIMIZER) else "auto"
    for text in target.text:
        check_text(text)
    check_weights("--mapper", search.mapper, "mapper")
    check_weights("--direction", edit.direction, "direction")
    notes: list[str] = []
    clip = clip_of(source)
    check_show(options.show, clip)
    pictures = pictures_of("--target", target.target, notes)
    sources, latents = None, latents_of(source)
    if source.sources is not None and clip is None and latents is None:
        sources = pictures_of("--sources", source.sources, notes)
    count = len(pictures) + len(target.text)
    if target.weights is not None and len(target.weights) != count:
        found = len(target.weights)
        raise ValueError(f"--weights: expected {count}, one for each target, found {found}")
    if target.mix and count == 1:
        raise ValueError("--mix: expected two targets or more, found 1: drop it, or add a target")
    mixes = target.mix or target.weights is not None
    separate = count > 1 and not mixes and edit.direction is None
    # Pictures share a whole. A text adds what it names, and is short already.
    share = 1.0 if separate else 1 / max(1, len(pictures))
    equal = (share,) * len(pictures) + (1.0,) * len(target.text)
    search_steps = STEPS_FROM_MEAN if world.inverter is None else 0
    layers, own_layers = layers_of(edit, count, mixes)
    strength = world.strength if edit.strength is None else edit.strength
    falls_back = mapper is None and search.mode is None and edit.direction is None
    request = Request(
        command=command,
        world=world,
        pictures=pictures,
        texts=target.text,
        weights=target.weights or equal,
        mixes=mixes,
        separate=separate,
        mode=mode,
        falls_back=falls_back and not given(search, OF_OPTIMIZER),
        recipe_name=name,
        recipe=recipe,
        mapper=mapper,
        keep_identity=search.keep_identity,
        direction=edit.direction,
        sources=sources,
        latents=latents,
        clip=clip,
        num_sources=source.num_sources or NUM_SOURCES,
        face=source.face or 0,
        smooth=source.smooth or WINDOW,
        align=world.aligner is not None if source.align is None else source.align,
        invert_steps=search_steps if source.invert_steps is None else source.invert_steps,
        inverts_target=bool(pictures)
        and mode in ("auto", "optimize")
        and recipe.initial == "inversion",
        strength=strength,
        identity_floor=edit.identity_floor,
        layers=layers,
        own_layers=own_layers,
        one_direction=edit.one_direction,
        seed=search.seed,
        **vars(options.show),
        **vars(options.output),
        device=machine.device,
        precision=choose_precision(machine.precision),
        max_images=machine.max_images,
        checkpoint_layers=machine.checkpoint_layers,
        notes=(*notes, *strength_notes(strength, world.strength, layers, own_layers)),
        line=line,
    )
    check_inversion(source, request)
    check_world(request)
    return request


def check_inversion(flags: SourceFlags, request: Request) -> None:
    """Raise a ValueError for options of an inversion that cannot be or does not happen."""
    if flags.invert_steps == 0 and request.world.inverter is None:
        raise ValueError(
            f"--invert-steps: world {request.world.name!r} has no inverter, so a search finds "
            "latents: expected 1 or more, found 0"
        )
    asked = {"--align": flags.align, "--invert-steps": flags.invert_steps is not None}
    for flag in (flag for flag, is_given in asked.items() if is_given and not request.inverts):
        raise ValueError(
            f"{flag}: no picture is inverted here: drop it, or give pictures as --sources or "
            "--initial inversion"
        )
    if flags.face is not None and not (request.align and request.inverts_sources):
        raise ValueError("--face: no face is looked for here: drop it, or give --align")


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
    if request.keep_identity is not None and request.mapper is None:
        raise ValueError(
            f"--keep-identity: world {name!r} has no mapper that could read it: give --mapper"
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
