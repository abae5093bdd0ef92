"""Target pictures: of folders, of datasets, samples of a generator, avatars.

Knows pictures, their ids and their splits; nothing of embeddings or of pairs. A target's id depends
on the picture and not on its place. Files and rows are named by their pixels. Pictures made from
seeds are named by kind, seed and index, since their pixels may differ in the last bit from one
machine to the next.
"""

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import datasets
import torch
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from data.illustrated.avatars import HELD_OUT, TRAINED, Options, check_dicebear, draw, render
from data.illustrated.codes import SIZE, VALUES, draw_face, indices_from_z
from data.illustrated.shown import sample
from data.pairs import such_as
from data.publish import sha256_of
from targetclip.command import nearest, one_line
from targetclip.generators import Generator
from targetclip.media.images import (
    READABLE_SUFFIXES,
    decode_picture,
    is_picture,
    read_picture,
    tensor_to_pictures,
)
from targetclip.scene import random_latents
from targetclip.seeds import DEFAULT_TARGETS, seed_of
from targetclip.world import DEFAULT_WORLD, World

logger = logging.getLogger(__name__)

DRAWN = ("avataaars", "styles", "held-out")
KINDS = ("generated", "mixed", *DRAWN, "dataset")
SEEDED = re.compile(
    r"(generated|mixed|avataaars|styles|held-out):([1-9][0-9]{0,14})(?:@([0-9]{1,15}))?"
)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
FORMS = (
    "a folder of pictures, dataset:PATH_OR_NAME[#SPLIT[#COLUMN]], generated:N[@SEED], "
    "mixed:N[@SEED], avataaars:N[@SEED], styles:N[@SEED] or held-out:N[@SEED], with N from 1 on"
)


@dataclass(frozen=True)
class Target:
    """A picture whose essence is wanted."""

    id: str
    """16 hex digits."""
    origin: str
    """Such as faces/joker.png, org/name:train:12 or generated:12 (@SEED if not the default)."""
    picture: Image.Image
    """RGB."""


@dataclass(frozen=True)
class BadTarget:
    """A candidate that gives no target."""

    origin: str
    reason: str
    """One line."""


@runtime_checkable
class TargetSet(Protocol):
    """Candidates in a fixed order; iteration decodes or renders one at a time."""

    @property
    def spec(self) -> str: ...

    def identity(self) -> str:
        """Return a hex digest that changes when the targets change."""

    def __len__(self) -> int:
        """Return the number of candidates, good or bad, without decoding any."""

    def __iter__(self) -> Iterator[Target | BadTarget]: ...

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        """Return the candidates but the first `start`, which are not decoded."""


def split_of(target_id: str) -> Literal["train", "validation", "test"]:
    """Return the split of a target, by its id alone: 90, 5 and 5 % of all ids."""
    digest = hashlib.sha256(target_id.encode()).digest()
    percentile = int.from_bytes(digest[:8], "big") % 100
    if percentile < 90:
        return "train"
    return "validation" if percentile < 95 else "test"


def of_split(targets: TargetSet, split: str, count: int) -> Iterator[Target]:
    """Return the first targets of a split; bad candidates are left out."""
    good = (target for target in targets if isinstance(target, Target))
    return itertools.islice((target for target in good if split_of(target.id) == split), count)


def digest_of(*parts: object) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def picture_id(picture: Image.Image) -> str:
    """Return the id of an RGB picture, by its size and pixels."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}/".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()[:16]


def printable(text: str) -> str:
    """Return a name as one line of valid Unicode: file names may hold line breaks, or any bytes."""
    return text if text.isprintable() else repr(text)[1:-1]


def brief(error: object) -> str:
    """Return the message of an error as one line of at most 300 characters."""
    return one_line(error)[:300]


def decoded(origin: str, path: str, content: bytes | None = None) -> Target | BadTarget:
    """Decode a picture file, given by its bytes or else by its path."""
    try:
        if content is not None:
            picture = decode_picture(content, origin)
        elif path:
            picture = read_picture(path)
        else:
            raise ValueError(f"{origin!r} holds no picture")
    except (ValueError, OSError) as error:
        # Without the path of this machine.
        return BadTarget(origin, brief(str(error).replace(repr(str(Path(path))), repr(origin))))
    return Target(picture_id(picture), origin, picture)


# Folders


def raise_it(error: OSError) -> None:
    """Raise an error of os.walk, which else leaves out unreadable folders."""
    raise error


def relative(folder: str, parent: str, name: str) -> str:
    """Return the path of a file relative to a folder above it."""
    return Path(parent, name).relative_to(folder).as_posix()


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file; empty where it cannot be read, as behind a broken link."""
    try:
        return sha256_of(path) if path.is_file() else ""
    except (FileNotFoundError, PermissionError):
        return ""


@dataclass(frozen=True)
class FolderTargets:
    """The pictures below a folder; a JPEG's id may change with the version of its decoder."""

    spec: str
    names: tuple[str, ...]
    """Relative paths."""
    others: tuple[str, ...] = ()
    """Relative paths of what else is there, except hidden files; no part of the identity."""

    def stats(self) -> list[tuple[str, int, int]]:
        """Return relative path, size and mtime in ns of each file; quicker than `identity`."""
        paths = [Path(self.spec, name) for name in self.names]
        stats = [path.stat() if path.exists() else path.lstat() for path in paths]
        shown = map(printable, self.names)
        return [(n, s.st_size, s.st_mtime_ns) for n, s in zip(shown, stats, strict=True)]

    def identity(self) -> str:
        """Return a hash of relative paths and of the files' bytes; reads them all."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(os.fsencode(name) + b"\0")
            digest.update(content_hash(Path(self.spec, name)).encode() + b"\n")
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Target | BadTarget]:
        return self.starting_at(0)

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        folder = Path(self.spec).resolve().name
        for name in self.names[start:]:
            yield decoded(printable(f"{folder}/{name}"), str(Path(self.spec, name)))


def open_folder(spec: str) -> FolderTargets:
    """Open the pictures below a folder, of all kinds that `read_picture` reads.

    Hidden files and folders are left out. Other files and linked folders are left out as well, and
    a warning counts and names them.

    Raises:
        ValueError: there is no picture.
        OSError: a folder may not be read.
    """
    names: list[str] = []
    others: list[str] = []
    for parent, folders, files in os.walk(spec, onerror=raise_it):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [relative(spec, parent, f) for f in folders if Path(parent, f).is_symlink()]
        for name in (name for name in files if not name.startswith(".")):
            path = Path(parent, name)
            # To read the start of a pipe would be to wait for a writer.
            taken = (path.suffix or path.is_file()) and is_picture(path)
            (names if taken else others).append(relative(spec, parent, name))
    others.sort()
    left_out = such_as([printable(name) for name in others])
    advice = (
        f"expected files ending in {', '.join(READABLE_SUFFIXES)}, or pictures without an ending; "
        "save pictures of other kinds as PNG or JPEG"
    )
    if not names:
        found = f"{len(others)} others: {left_out}" if others else "none but hidden ones"
        raise ValueError(f"no pictures below {spec!r}: {advice}; found {found}")
    if others:
        total = len(names) + len(others)
        logger.warning(
            "%s: %d of %d are not taken: %s; %s", spec, len(others), total, left_out, advice
        )
    return FolderTargets(spec, tuple(sorted(names)), tuple(others))


# Datasets


def load_split(name: str, split: str) -> tuple[datasets.Dataset, str]:
    """Load a split of a dataset in a folder or on the hub; an empty `split` is train.

    Returns:
        The split and its name.
    """
    folder, asked = Path(name), split or "train"
    if not folder.is_dir() and (folder.exists() or not HUB_NAME.fullmatch(name)):
        raise FileNotFoundError(f"expected a folder or a name on the hub, found {name!r}; check it")
    saved = [folder / "state.json", folder / "dataset_dict.json"]
    try:
        if not any(path.is_file() for path in saved):
            return datasets.load_dataset(name, split=asked), asked
        loaded = datasets.load_from_disk(name)
    except Exception as error:  # of the library, of Arrow, of the hub or of the network
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        raise ValueError(
            f"dataset {name!r}, split {asked!r} cannot be loaded: "
            f"{type(cause or error).__name__}, {brief(cause or error)}; "
            "check the name, the split and the network"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        # A dataset saved on its own is one split; it need not know which.
        loaded = {str(loaded.split or asked): loaded}
        asked = split or next(iter(loaded))
    if asked not in loaded:
        raise ValueError(
            f"expected #SPLIT of {name!r} to be one of {list(loaded)}, found {asked!r}"
        )
    return loaded[asked], asked


@dataclass(frozen=True)
class DatasetTargets:
    """The pictures of one column of a Hugging Face dataset's split."""

    spec: str
    dataset: datasets.Dataset
    name: str
    split: str
    column: str
    rows: tuple[int, ...] | None = None
    """Numbers in the whole split, of the rows that `dataset` holds. None: it holds all of them."""

    def identity(self) -> str:
        """Return a hash of the dataset's own fingerprint, the split and the column."""
        fingerprint = self.dataset._fingerprint
        return digest_of("dataset", fingerprint, len(self.dataset), self.split, self.column)

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Target | BadTarget]:
        return self.starting_at(0)

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        rows = self.dataset.with_format(None).select_columns([self.column])
        rows = rows.cast_column(self.column, datasets.Image(decode=False))
        for index in range(start, len(rows)):
            cell = rows[index][self.column] or {"path": None, "bytes": None}
            row = index if self.rows is None else self.rows[index]
            origin = printable(f"{self.name}:{self.split}:{row}")
            yield decoded(origin, cell["path"] or "", cell["bytes"])


def open_dataset(spec: str) -> DatasetTargets:
    """Open `dataset:PATH_OR_NAME[#SPLIT[#COLUMN]]`; only a name that is no folder asks the hub."""
    parts = spec.removeprefix("dataset:").split("#")
    if not parts[0] or len(parts) > 3:
        raise ValueError(f"expected dataset:PATH_OR_NAME[#SPLIT[#COLUMN]], found {spec!r}")
    name, split, column = (*parts, "", "")[:3]
    dataset, split = load_split(name, split)
    if not len(dataset):
        raise ValueError(f"expected rows in {name!r}, split {split!r}, found none; give another")
    images = [key for key, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    column = column or next(iter(images), "")
    if column not in images:
        raise ValueError(
            f"expected one of the Image columns of {name!r}, {images}, found {column!r}; its "
            f"columns are {list(dataset.features)}"
        )
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return DatasetTargets(spec, dataset, shown, split, column)


# Pictures from seeds


def layer_thirds(num_ws: int) -> list[int]:
    """Return 0, 1 or 2 for each layer: coarse, middle or fine."""
    return [(i >= num_ws // 3) + (i >= 2 * num_ws // 3) for i in range(num_ws)]


def render_sample(
    generator: Generator, truncation: float, kind: str, seed: int, index: int
) -> Image.Image:
    """Render a sample of the generator; a mixed one has a z for each third of the layers."""
    layers = list(range(generator.num_ws))
    thirds = layer_thirds(len(layers)) if kind == "mixed" else [0] * len(layers)
    seeds = [seed_of(kind, seed, index, third) for third in range(max(thirds) + 1)]
    ws = random_latents(generator, seeds, truncation)[thirds, layers][None]
    with torch.no_grad():
        return tensor_to_pictures(generator.synthesis(ws))[0]


def face_at(seed: int, index: int) -> list[int]:
    """Return the values of the face that avataaars:N@SEED shows at an index (see `codes`)."""
    numbers = torch.Generator().manual_seed(seed_of("avataaars", seed, index))
    values: list[int] = indices_from_z(torch.randn(1, VALUES, generator=numbers))[0].tolist()
    return values


def avatar_at(kind: str, seed: int, index: int) -> tuple[str, Options]:
    """Return style and options of the avatar that styles:N@SEED or held-out:N@SEED shows."""
    styles = HELD_OUT if kind == "held-out" else TRAINED
    style = styles[index % len(styles)]
    return style, sample(style, seed, index // len(styles))


def draw_avatar(kind: str, seed: int, index: int) -> Image.Image:
    """Draw a picture of one of the kinds DRAWN, 128 by 128 px."""
    if kind == "avataaars":
        return Image.fromarray(draw_face(face_at(seed, index))[0])
    return Image.fromarray(render(draw(*avatar_at(kind, seed, index))[0], SIZE))


@dataclass(frozen=True)
class SeededTargets:
    """Pictures made one at a time from a seed and an index; none depends on their number."""

    spec: str
    count: int
    seed: int
    named_by: tuple[str | int | float, ...]
    """All that a picture depends on but its index."""
    render: Callable[[int], Image.Image]

    def identity(self) -> str:
        """Return a hash of all that the pictures depend on but the code that draws them."""
        return digest_of(*self.named_by, "first", self.count)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Target | BadTarget]:
        return self.starting_at(0)

    def starting_at(self, start: int) -> Iterator[Target | BadTarget]:
        for index in range(start, self.count):
            at = f"@{self.seed}" if self.seed != DEFAULT_TARGETS else ""
            origin = f"{self.named_by[0]}:{index}{at}"
            try:
                picture = self.render(index)
            except ValueError as error:  # weights or latents that overflow
                yield BadTarget(origin, brief(error))
                continue
            yield Target(digest_of(*self.named_by, index)[:16], origin, picture)


def open_seeded(
    parts: re.Match[str], generator: Generator | None, truncation: float
) -> SeededTargets:
    """Open KIND:N or KIND:N@SEED.

    Raises:
        ValueError: a generator is needed and not given, or the extra that draws avatars is missing.
    """
    spec, kind, count = parts[0], parts[1], int(parts[2])
    seed = DEFAULT_TARGETS if parts[3] is None else int(parts[3])
    if kind in DRAWN:
        check_dicebear(repr(spec))
        return SeededTargets(spec, count, seed, (kind, seed), partial(draw_avatar, kind, seed))
    if generator is None:
        raise ValueError(f"expected a generator to make {spec!r} with, found none; give one")
    named_by = (kind, seed, generator.fingerprint, float(truncation))
    render = partial(render_sample, generator, truncation, kind, seed)
    return SeededTargets(spec, count, seed, named_by, render)


def open_targets(
    spec: str, generator: Generator | None = None, truncation: float = 1.0
) -> TargetSet:
    """Open one source of targets; no picture is decoded yet.

    - a folder: every picture below it.
    - dataset:PATH_OR_NAME[#SPLIT[#COLUMN]]: on the Hugging Face hub, or a folder that its library
      reads or has saved. The defaults are train and the first Image column.
    - generated:N[@SEED]: samples of `generator` at `truncation`; mixed:N[@SEED]: with three z
      each, for coarse, middle and fine layers.
    - avataaars:N[@SEED]: faces in the style of the bundled generator, which it can show;
      styles:N[@SEED]: of all styles that networks are trained on, in turn; held-out:N[@SEED]: of
      those that no network has seen, for tests alone (see `check_trainable`).

    A smaller N gives the start of a larger one. The default SEED, 4,000,037, differs from every
    seed used to train or judge the bundled world's networks.

    Raises:
        ValueError: no such form, nothing in it, or as `open_seeded`.
        FileNotFoundError: a dataset's folder is not there.
        OSError: a folder may not be read.
    """
    if spec.startswith("dataset:"):
        return open_dataset(spec)
    seeded = SEEDED.fullmatch(spec)
    if seeded is not None:
        return open_seeded(seeded, generator, truncation)
    if os.path.isdir(spec):
        return open_folder(spec)
    found = "a file: give its folder" if os.path.exists(spec) else "none of these"
    kind, colon, rest = spec.partition(":")
    near = nearest(kind, KINDS) if colon else None
    meant = f": did you mean {near + colon + rest!r}?" if near not in (None, kind) else ""
    raise ValueError(f"expected targets as {FORMS}; found {spec!r}, which is {found}{meant}")


def sampled(targets: TargetSet, count: int | None, seed: int) -> TargetSet:
    """Return so many candidates of a set: of pictures made from seeds the first, of others some at
    random. All of them for None, or where there are no more."""
    if count is None or count >= len(targets):
        return targets
    if isinstance(targets, SeededTargets):
        spec = re.sub(r":\d+", f":{count}", targets.spec, count=1)
        return replace(targets, spec=spec, count=count)
    numbers = torch.Generator().manual_seed(seed_of("sampled targets", seed))
    chosen = sorted(torch.randperm(len(targets), generator=numbers)[:count].tolist())
    if isinstance(targets, FolderTargets):
        return replace(targets, names=tuple(targets.names[i] for i in chosen))
    assert isinstance(targets, DatasetTargets)
    return replace(targets, dataset=targets.dataset.select(chosen), rows=tuple(chosen))


def default_targets(world: World, seed: int, count: int, samples: int = 0) -> tuple[str, ...]:
    """Return specs of a world's own targets, for commands that are given none.

    Those of the default world are avatars, `count` in its generator's style and `count` of all
    styles that networks are trained on, and `samples` of its generator, plain and mixed. Those of
    any other world are all `count + samples` of its generator, plain and as many mixed.
    """
    counts = {"avataaars": count, "styles": count, "generated": samples, "mixed": samples}
    if world.argument != DEFAULT_WORLD:
        counts = dict.fromkeys(("generated", "mixed"), count + samples)
    return tuple(f"{kind}:{number}@{seed}" for kind, number in counts.items() if number)


def portable(spec: str) -> str:
    """Return a spec without paths of this machine: of a folder its name alone."""
    kind, colon, rest = spec.partition(":")
    if not colon:
        return Path(spec).resolve().name
    path, mark, more = rest.partition("#")
    if kind == "dataset" and Path(path).is_dir():
        return f"{kind}:{Path(path).resolve().name}{mark}{more}"
    return spec


def hub_datasets(specs: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the datasets on the Hub that are among the specs."""
    names = [spec[8:].partition("#")[0] for spec in specs if spec.startswith("dataset:")]
    return tuple(dict.fromkeys(name for name in names if not Path(name).is_dir()))


def check_trainable(specs: Iterable[str], flag: str = "--targets") -> None:
    """Raise a ValueError that begins with `flag` for targets of the styles that are kept for tests.

    Called wherever something is learned or chosen by targets.
    """
    for spec in specs:
        if spec.startswith("held-out:"):
            raise ValueError(
                f"{flag}: expected targets to learn from, found {spec!r}, of the styles that "
                f"are kept for tests; give {spec.replace('held-out', 'styles')!r}"
            )
