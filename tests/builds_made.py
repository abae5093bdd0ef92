"""Small builds, and what their tests share."""

import os
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from data.build import Config
from data.targets import draw_avatar


def config(world: Path, out: Path, **changes: Any) -> Config:
    """A build of five targets in three chunks that takes a second."""
    small: dict[str, Any] = {
        "targets": ("avataaars:5",),
        "steps": 3,
        "batch_size": 2,
        "held_out": 2,
        "lease": 60.0,
    }
    return Config(out=out, world=str(world), **{**small, **changes})


def pictures(folder: Path) -> Path:
    """Two pictures, one of them twice, and a file that is none."""
    folder.mkdir(parents=True)
    for name, index in (("a.png", 0), ("b.png", 1), ("copy-of-a.png", 0)):
        draw_avatar("avataaars", 7, index).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def rows(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of each split of a dataset, in order, without the times they took."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "data").glob("*.parquet")):
        table = pq.read_table(path).drop_columns(["seconds"])
        found[path.name] = table.to_pylist()
    return found


def ids(out: Path) -> list[str]:
    """The ids of all rows."""
    return [row["id"] for split in rows(out).values() for row in split]


def long_ago(out: Path) -> None:
    """Make claims and temporary files look as if their makers had died an hour ago."""
    then = time.time() - 3600
    for path in [*(out / ".build" / "claims").glob("*"), *out.rglob(".*.tmp")]:
        os.utime(path, (then, then))
    for path in [*out.glob(".build/checkpoints/*"), *out.glob(".build/attempts/*")]:
        os.utime(path, (then, then))


def leftovers(out: Path) -> list[str]:
    """What a build leaves behind and nobody needs."""
    work = out / ".build"
    found = [*out.rglob(".*.tmp"), *work.glob("draft.*")]
    for name in ("claims", "checkpoints", "attempts"):
        found += (work / name).glob("*")
    return sorted(path.relative_to(out).as_posix() for path in found)
