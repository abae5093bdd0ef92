"""Compare datasets that must be equal, and damage datasets to check what `verify` says of them.

Knows the rows and the files of a finished dataset; nothing of builds. The judge of
`tests.proof.faults`.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data.dataset import verify
from data.pairs import SPLITS, such_as

FLIPS = 20  # bits, each in a dataset that is whole but for it
KINDS = ("truncated", "removed", "swapped", "extra", *["flipped"] * FLIPS)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return all rows of a dataset in their order."""
    shards = [path for split in SPLITS for path in sorted((out / "data").glob(f"{split}-*"))]
    return [row for path in shards for row in pq.read_table(path).to_pylist()]


def unequal_rows(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[str]:
    """Describe how rows differ in any column but `seconds`, bit by bit, in order, a line each."""
    ids, planned = [row["id"] for row in rows], [row["id"] for row in expected]
    if ids != planned:
        return [f"other targets or another order: {such_as(ids)}; expected {such_as(planned)}"]
    problems = []
    for row, other in zip(rows, expected, strict=True):
        # A float32 is a Python float exactly, and its repr tells it from any other, -0.0 from 0.0.
        named = {name for name in row.keys() | other.keys() if name not in row or name not in other}
        named |= {
            name for name in row.keys() & other.keys() if repr(row[name]) != repr(other[name])
        }
        if named - {"seconds"}:
            problems.append(f"{row['id']}: {such_as(sorted(named - {'seconds'}))} differ")
    return problems


def flip_bit(path: Path, rng: random.Random) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    """Leave only the beginning of a file."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def damage(out: Path, kind: str, rng: random.Random) -> set[str]:
    """Damage the training shards of a dataset in one of KINDS; return the names of wrong files."""
    one, other = rng.sample(sorted((out / "data").glob("train-*")), 2)
    wrong = {one}
    if kind == "flipped":
        flip_bit(one, rng)
    elif kind == "truncated":
        truncate(one, rng)
    elif kind == "removed":
        one.unlink()
    elif kind == "swapped":
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        wrong = {one, other}
    else:
        extra = out / "data/train-99998-of-99999.parquet"
        extra.write_bytes(one.read_bytes())
        wrong = {extra}
    return {path.relative_to(out).as_posix() for path in wrong}


def check_damages(
    out: Path,
    copy: Path,
    splits: Mapping[str, str],
    rng: random.Random,
    verify: Callable[[Path, Mapping[str, str]], list[str]] = verify,
) -> tuple[Counter[str], list[str]]:
    """Damage copies of a dataset, and check that `verify` names the damaged files alone.

    Args:
        out: a whole dataset of two training shards or more.
        copy: folder of the copies, one after the other; must not exist.
        splits: the split of every target that must be in it.

    Returns:
        How many damages of each kind are named, and a line for each that is not.
    """
    named: Counter[str] = Counter()
    problems = verify(out, splits)
    for kind in KINDS:
        shutil.copytree(out, copy, ignore=shutil.ignore_patterns(".*"))
        expected = damage(copy, kind, rng)
        lines = verify(copy, splits)
        # Other lines, which count ids, begin with several words.
        files = {line.partition(": ")[0] for line in lines if " " not in line.partition(": ")[0]}
        if files == expected:
            named[kind] += 1
        else:
            problems.append(f"{kind} {', '.join(sorted(expected))}: verify says {lines}")
        shutil.rmtree(copy)
    return named, problems
