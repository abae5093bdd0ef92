"""The end of a build: its chunks become a dataset, once, and are checked.

Knows the folders of a build; nothing of how directions are found or who finds them.
"""

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from data.card import FAILURES, SUMS, DatasetInfo
from data.claims import claim, clock_ns, owner_name
from data.dataset import mean_scores, merge, verify
from data.pairs import features
from data.plan import RECORD, Plan, check_plan, load_plan
from data.publish import replace_file
from data.worker import chunk_name

REPORT = "report.json"
PACKAGES = ("torch", "open_clip_torch", "accelerate", "datasets", "numpy", "pyarrow")


def report_of(out: Path, plan: Plan) -> dict[str, Any]:
    """Counts and mean scores of a merged dataset, and what it was made with."""
    return {
        "splits": mean_scores(out),
        "failures": len((out / FAILURES).read_text().splitlines()),
        "settings": plan.settings,
        "batch_size": plan.batch_size,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
    }


def remove_leftovers(out: Path, work: Path, lease: float) -> None:
    """Remove what killed workers left; what is younger than a lease may be a living one's."""
    before = clock_ns(work) - int(lease * 1e9)
    left = [
        path for name in ("claims", "checkpoints", "attempts") for path in work.glob(f"{name}/*")
    ]
    left += [
        path for folder in (work / "chunks", out / "data", out) for path in folder.glob(".*.tmp")
    ]
    for path in left:
        with suppress(FileNotFoundError):
            if path.stat().st_mtime_ns < before:
                path.unlink()


def merge_all(out: Path, work: Path, plan: Plan, info: DatasetInfo) -> dict[str, Any]:
    """Make the dataset of all chunks, and its report.

    Raises:
        FileNotFoundError: a chunk is not done.
        ValueError, OSError: as `data.dataset.merge` does.
    """
    chunks = [work / "chunks" / f"{chunk_name(chunk)}.parquet" for chunk in range(plan.chunks)]
    missing = [path.stem for path in chunks if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {plan.chunks} chunks are not done, {missing[0]} the first: "
            "run the build again, without --only merge"
        )
    columns = features(plan.embeddings.shape[1], info.num_ws, info.w_dim)
    merge(chunks, out, columns, info, plan.failures)
    report = report_of(out, plan)
    replace_file(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    return report


def merge_once(
    out: Path,
    work: Path,
    plan: Plan,
    info: DatasetInfo,
    lease: float,
    began: int,
    check: Callable[[], None],
) -> dict[str, Any]:
    """The report of the merged dataset: merged here, or by another process since `began`.

    Args:
        began: a time of the file system's clock, in ns.
        check: raises to stop waiting for another process.
    """
    while True:
        while (held := claim(work / "claims", "merge", owner_name(), lease)) is None:
            check()
            time.sleep(0.5)
        try:
            # Workers finish together. One merge is enough, and who has seen it end may be reading.
            merged = (out / SUMS).is_file() and (out / REPORT).is_file()
            if merged and (out / REPORT).stat().st_mtime_ns > began:
                report: dict[str, Any] = json.loads((out / REPORT).read_text())
                return report
            with held.kept_alive():
                report = merge_all(out, work, plan, info)
                remove_leftovers(out, work, lease)
                return report
        except FileNotFoundError:
            if held.heartbeat():
                raise
            # Halted for longer than the lease: another has merged meanwhile, and swept away what
            # this one was writing. Look again.
        finally:
            held.release()


def verify_build(out: Path, work: Path) -> list[str]:
    """Everything wrong with the dataset, and with its plan where that is still there."""
    folder = work / "plan"
    if not (folder / RECORD).is_file():
        return verify(out)
    try:
        expected = load_plan(folder).splits()
    except ValueError as error:
        return [str(error), *verify(out)]
    return [*check_plan(folder), *verify(out, expected)]
