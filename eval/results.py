"""Find the results that a tool left: which picture is of which target and source, by names alone.

Knows how tools name files, and tables of results; nothing of what pictures show.
"""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from predictor.cli.options import NAMED, pictures_of
from targetclip.media.images import is_picture

Pair = tuple[str, str]
"""The names of a target and of a source."""

LAYOUTS = {  # names of results, without suffix; n counts sources in their natural order
    "targetclip": "{target}/{source}",
    "targetclip transfer": "{target}/edited_{source}",
    "StyleCLIP": "{target}/inference_results/{n:05d}",
    "DeltaEdit": "{target}/{after:04d}",  # after = n + 1
    "HairFastGAN": "{source}_{target}_{target}",
}
SECONDS = "seconds.txt"  # in a folder of results: the seconds of one
FAULTS = {
    "missing": "missing",
    "surplus": "of no target and source",
    "mis_sized": "not of their source's size, and resized",
    "damaged": "not readable, and left out",
}


@dataclass
class Results:
    """The results of one tool, and what is wrong with them."""

    name: str
    layout: str
    files: dict[Pair, Path]
    surplus: list[str] = field(default_factory=list)
    seconds: float | None = None
    """Of a result."""
    missing: list[str] = field(default_factory=list)
    mis_sized: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    ids: dict[Pair, str] = field(default_factory=dict)
    """Of the pictures that could be read."""
    pixels: dict[Pair, dict[str, float]] = field(default_factory=dict)
    """Scores that compare a result with its source pixel by pixel."""

    @property
    def faults(self) -> dict[str, list[str]]:
        """The names of files, by the kinds of FAULTS."""
        return {kind: getattr(self, kind) for kind in FAULTS}


def fault_lines(tool: Results) -> list[str]:
    """Return a line for each kind of fault that a tool's files have, with the first names."""
    lines = []
    for kind, words in FAULTS.items():
        if names := tool.faults[kind]:
            shown = "; ".join(names[:NAMED]) + ("; ..." if len(names) > NAMED else "")
            lines.append(f"{tool.name}: {len(names)} {words}: {shown}")
    return lines


def by_name(flag: str, folder: Path) -> dict[str, Path]:
    """Return the pictures of a folder by their names without suffix, in natural order.
    FileNotFoundError, ValueError: no folder, no picture in it, or two of one name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{flag}: expected a folder of pictures, found none at {folder}")
    paths: dict[str, Path] = {}
    for path in pictures_of(flag, [folder], []):
        if (other := paths.setdefault(path.stem, path)) != path:
            raise ValueError(
                f"{flag}: expected a name for each picture, found {other.name!r} and "
                f"{path.name!r} in {str(folder)!r}: rename one"
            )
    return paths


def name_in(names: Collection[str], given: str) -> str:
    """Return the one of some names that a file name or path means; empty if it means none."""
    meant = (given, Path(given).name, Path(given).stem)
    return next((name for name in meant if name in names), "")


def read_table(path: Path, sources: Sequence[str], targets: Sequence[str]) -> Results:
    """Read a table with the columns source, target and result, paths from the table's folder on.
    ValueError: not a table, or one without these columns."""
    found = Results(path.stem, "table", {})
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--results: {path}: not a table: {error}") from error
    for i, row in enumerate(rows):
        source, target, result = (row.get(name) or "" for name in ("source", "target", "result"))
        if not (source and target and result):
            raise ValueError(
                f"--results: {path}: expected the columns source, target and result, found "
                f"{', '.join(k for k, v in row.items() if k and v) or 'none'} in row {i + 1}"
            )
        pair, file = (name_in(targets, target), name_in(sources, source)), path.parent / result
        if not all(pair) or pair in found.files:
            found.surplus.append(result)
        elif file.is_file():
            found.files[pair] = file
    return found


def seconds_of(folder: Path) -> float | None:
    """Return the seconds of a result that a folder's file says; None without the file.
    ValueError: it holds something else."""
    path = folder / SECONDS
    if not path.is_file():
        return None
    text = path.read_text(errors="replace").strip()
    try:
        if 0 <= (seconds := float(text)) < float("inf"):
            return seconds
    except ValueError:
        pass
    raise ValueError(f"--results: {path}: expected the seconds of a result, found {text[:40]!r}")


def read_folder(folder: Path, sources: Sequence[str], targets: Sequence[str]) -> Results:
    """Find results in a folder, by the names of the tool whose layout finds most.
    ValueError: no layout finds any."""
    pictures = sorted(path for path in folder.rglob("*") if is_picture(path) and path.is_file())
    named: dict[str, Path] = {}
    for path in pictures:
        named.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    found: dict[str, dict[Pair, Path]] = {
        tool: {
            (target, source): named[name]
            for target in targets
            for n, source in enumerate(sources)
            if (name := layout.format(target=target, source=source, n=n, after=n + 1)) in named
        }
        for tool, layout in LAYOUTS.items()
    }
    tool = max(found, key=lambda tool: len(found[tool]))  # the first of equal ones
    files = found[tool]
    if not files:
        shown = f", such as {str(pictures[0].relative_to(folder))!r}" if pictures else ""
        raise ValueError(
            f"--results: {str(folder)!r}: expected pictures such as '{targets[0]}/{sources[0]}.png'"
            f", by the names of targets and sources, found {len(pictures)} of other names{shown}: "
            "rename them, or give a .csv of source, target and result"
        )
    taken = set(files.values())
    surplus = [str(path.relative_to(folder)) for path in pictures if path not in taken]
    return Results(folder.resolve().name, tool, files, surplus, seconds_of(folder))


def find_results(path: Path, sources: Sequence[str], targets: Sequence[str]) -> Results:
    """Find the results in a folder or a table.
    FileNotFoundError: neither is there. ValueError: as `read_folder` and `read_table`."""
    if path.is_dir():
        found = read_folder(path, sources, targets)
    elif path.suffix.lower() == ".csv" and path.is_file():
        found = read_table(path, sources, targets)
    else:
        raise FileNotFoundError(f"--results: expected a folder or a .csv, found none at {path}")
    pairs = [(target, source) for target in targets for source in sources]
    found.missing = ["/".join(pair) for pair in pairs if pair not in found.files]
    return found


def judged_part(result: Image.Image, source: Image.Image) -> Image.Image:
    """Return the last of several pictures of a source's shape in a row, as DeltaEdit joins them."""
    width = max(1, round(result.height * source.width / source.height))
    if result.width % width or result.width == width:
        return result
    return result.crop((result.width - width, 0, result.width, result.height))
