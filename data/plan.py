"""The plan of a build: its targets in order, all that is needed of them, and what they are made of.

A plan never changes once it is there. It holds every target's embedding (and start, where the
recipe wants the inversion), so a worker needs no picture; and it names everything a direction
depends on, so nothing else can be mixed into the same folder. Knows nothing of who does the work.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.json  # type: ignore[import-untyped]
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from data.pairs import Failure
from data.publish import fault_point, full_disk_explained, replace_file, sha256_of, sync_folder
from data.targets import BadTarget, DatasetTargets, FolderTargets, Target, TargetSet, split_of
from targetclip.recipes import with_defaults
from targetclip.seeds import seed_of

FORMAT = "targetclip-plan/1"
RECORD = "plan.json"
TARGETS, FAILURES = "targets.jsonl", "failures.jsonl"
EMBEDDINGS, INITIAL = "embeddings.f32", "initial.f32"
PARTS = (TARGETS, FAILURES, EMBEDDINGS, INITIAL)
PICTURES = 32  # embedded at once
SAVE_SECONDS = 20.0  # of planning that a kill may cost

Prepare = Callable[[list[Target], list[int]], tuple[Tensor, Tensor | None]]
"""Raw embeddings [targets embed] of some targets and, if the recipe wants them, their starts."""


class PlanTaken(Exception):
    """Another process makes the plan now, or has made it."""


@dataclass(frozen=True)
class Plan:
    """What is to be done. `settings` is all that a direction depends on, by name."""

    folder: Path
    settings: dict[str, Any]
    batch_size: int
    """Targets of a chunk, which are optimized together."""
    targets: pa.Table
    """Columns id, split, origin, seed; a row a target, in order."""
    embeddings: Float[ndarray, "targets embed"]
    """Raw."""
    initial: Float[ndarray, "targets num_ws w_dim"] | None
    """Where directions start; None: at zero."""
    failures: tuple[Failure, ...]
    """Candidates that gave no target."""

    @property
    def chunks(self) -> int:
        """Number of chunks; chunk 12 has the name `000012`."""
        return -(-len(self.targets) // self.batch_size)

    def rows(self, chunk: int) -> slice:
        """Which targets a chunk has."""
        return slice(chunk * self.batch_size, min((chunk + 1) * self.batch_size, len(self.targets)))

    def splits(self) -> dict[str, str]:
        """The split of every target that must have a row or a failure."""
        columns = self.targets.to_pydict()
        return dict(zip(columns["id"], columns["split"], strict=True))


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as `recipe.steps`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = value
    return found


def check_settings(folder: Path, planned: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse to mix: raise a ValueError that names the first settings that are not as planned."""
    before, now = (
        flat({**each, "recipe": with_defaults(each["recipe"])} if "recipe" in each else each)
        for each in (planned, json.loads(json.dumps(found)))
    )
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        told = "; ".join(
            f"{name}: planned {before.get(name)!r}, found {now.get(name)!r}" for name in changed[:3]
        )
        raise ValueError(
            f"{str(folder)!r} was planned with other settings ({told}); "
            "give another --out, or the planned settings again"
        )


def public_spec(targets: TargetSet) -> str:
    """The spec of a set of targets without the path of this machine."""
    if isinstance(targets, FolderTargets):
        return Path(targets.spec).resolve().name
    if isinstance(targets, DatasetTargets):
        return f"dataset:{targets.name}#{targets.split}#{targets.column}"
    return targets.spec


def describe(targets: TargetSet, identity: str | None = None) -> dict[str, Any]:
    """What the plan remembers of a set of targets."""
    identity = identity or targets.identity()
    return {"spec": public_spec(targets), "count": len(targets), "identity": identity}


def quick_look(targets: TargetSet) -> str | None:
    """Hash of a folder's names, sizes and times, which is read at once; None of other sets."""
    if not isinstance(targets, FolderTargets):
        return None
    return format(seed_of(*targets.stats()), "x")


def check_targets(plan: Plan, sets: Iterable[TargetSet]) -> None:
    """Refuse other targets than the planned ones; files are read only if they look changed.

    Raises:
        ValueError: a set is missing, new, or has changed.
    """
    planned = plan.settings["targets"]
    looks = json.loads((plan.folder / RECORD).read_text())["looks"]
    found = []
    for index, targets in enumerate(sets):
        same = index < len(planned) and looks[index] and looks[index] == quick_look(targets)
        found.append(describe(targets, planned[index]["identity"] if same else None))
    named = {f"target set {i}": value for i, value in enumerate(planned)}
    check_settings(plan.folder, named, {f"target set {i}": value for i, value in enumerate(found)})


def load_plan(folder: Path) -> Plan:
    """Read a plan.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another version, or a file is not as large as it was.
    """
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"no plan at {str(folder)!r}; plan first (--targets)")
    record = json.loads((folder / RECORD).read_text())
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{str(folder)!r}: expected a plan of format {FORMAT}, found {record.get('format')}; "
            "build into another --out"
        )
    for name, size in record["sizes"].items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            raise ValueError(f"{str(folder / name)!r}: expected {size} bytes, found {actual}")
    count, embed = record["targets"], record["embed"]
    shape = tuple(record["initial"]) if record["initial"] else None
    schema = pa.schema(
        {"id": pa.string(), "split": pa.string(), "origin": pa.string(), "seed": pa.int64()}
    )
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    failures = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
    return Plan(
        folder,
        record["settings"],
        record["batch_size"],
        pyarrow.json.read_json(folder / TARGETS, parse_options=options),
        np.memmap(folder / EMBEDDINGS, np.float32, "r", shape=(count, embed)),
        None
        if shape is None
        else np.memmap(folder / INITIAL, np.float32, "r", shape=(count, *shape)),
        tuple(Failure(**failure) for failure in failures),
    )


def check_plan(folder: Path) -> list[str]:
    """What has changed of a plan's files since it was made, a line each."""
    hashes = json.loads((folder / RECORD).read_text())["sha256"]
    altered = [name for name, digest in hashes.items() if sha256_of(folder / name) != digest]
    return [f"{name}: altered since it was planned" for name in altered]


@dataclass
class Draft:
    """A plan in the making, in a folder of its maker's own; `taken` candidates are done with."""

    folder: Path
    taken: int
    sizes: dict[str, int]
    initial: list[int] | None = None
    embed: int = 0

    def save(self, files: Mapping[str, BinaryIO]) -> None:
        """Make all that has been written so far count."""
        with full_disk_explained(self.folder, sum(file.tell() for file in files.values())):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        self.sizes = {name: file.tell() for name, file in files.items()}
        record = {name: value for name, value in asdict(self).items() if name != "folder"}
        replace_file(self.folder / "draft.json", json.dumps(record).encode())
        fault_point("after-draft")


def new_draft(folder: Path, settings: Mapping[str, Any]) -> Draft:
    """A folder to plan in: a copy of the furthest draft that another left, or an empty one.

    A copy and not the folder itself: whoever left it may only be halted, and write on.
    """
    folder.mkdir(parents=True)
    planned = json.dumps(settings, sort_keys=True)
    replace_file(folder / "settings.json", planned.encode())
    draft, furthest = Draft(folder, 0, dict.fromkeys(PARTS, 0)), folder
    for path in folder.parent.glob("draft.*"):
        try:
            if path != folder and (path / "settings.json").read_text() == planned:
                record = json.loads((path / "draft.json").read_text())
                if record["taken"] > draft.taken:
                    draft, furthest = Draft(folder, **record), path
        except (FileNotFoundError, ValueError):
            continue
    with full_disk_explained(folder, sum(draft.sizes.values())):
        for name, size in draft.sizes.items():
            (folder / name).touch()
            if furthest != folder:
                shutil.copyfile(furthest / name, folder / name)
                os.truncate(folder / name, size)
    return draft


def remove_drafts(work: Path, but: Path) -> None:
    """Remove what others planned in; one of them that was only halted will find itself replaced."""
    for path in set(work.glob("draft.*")) - {but}:
        shutil.rmtree(path, ignore_errors=True)


def candidates(sets: Iterable[TargetSet], start: int) -> Iterator[Target | BadTarget]:
    """All candidates from one on; those before it are not decoded."""
    for targets in sets:
        yield from targets.starting_at(min(start, len(targets)))
        start = max(0, start - len(targets))


def batches(found: Iterable[Target | BadTarget]) -> Iterator[list[Target | BadTarget]]:
    """A few candidates at a time."""
    left = iter(found)
    while batch := list(itertools.islice(left, PICTURES)):
        yield batch


def add_batch(
    draft: Draft,
    files: Mapping[str, BinaryIO],
    batch: list[Target | BadTarget],
    ids: dict[str, str],
    seed: int,
    prepare: Prepare,
) -> None:
    """Take a few candidates into a draft; `ids` are those it has, with their origins."""
    targets: list[Target] = []
    lines = dict.fromkeys(PARTS, b"")
    for found in batch:
        if isinstance(found, Target) and found.id in ids:
            found = BadTarget(found.origin, f"duplicate of {ids[found.id]}")
        if isinstance(found, Target):
            ids[found.id] = found.origin
            targets.append(found)
        else:
            failure = Failure("", found.origin, "decode", found.reason)
            lines[FAILURES] += json.dumps(asdict(failure)).encode() + b"\n"
    if targets:
        seeds = [seed_of("target", seed, target.id) for target in targets]
        embeddings, initial = prepare(targets, seeds)
        draft.embed = embeddings.shape[1]
        lines[EMBEDDINGS] = embeddings.float().cpu().numpy().tobytes()
        if initial is not None:
            draft.initial = list(initial.shape[1:])
            lines[INITIAL] = initial.float().cpu().numpy().tobytes()
        for target, own in zip(targets, seeds, strict=True):
            row = {"id": target.id, "split": split_of(target.id), "origin": target.origin}
            lines[TARGETS] += json.dumps({**row, "seed": own}).encode() + b"\n"
    with full_disk_explained(draft.folder, sum(file.tell() for file in files.values())):
        for name, content in lines.items():
            files[name].write(content)
    draft.taken += len(batch)


def fill(
    draft: Draft,
    files: Mapping[str, BinaryIO],
    sets: list[TargetSet],
    seed: int,
    prepare: Prepare,
    on_batch: Callable[[int, int], None],
) -> int:
    """Take all candidates that are left into a draft; the number of targets it has then."""
    ids: dict[str, str] = {}
    for line in (draft.folder / TARGETS).read_text().splitlines():
        row = json.loads(line)
        ids[row["id"]] = row["origin"]
    total, saved = sum(map(len, sets)), time.monotonic()
    for batch in batches(candidates(sets, draft.taken)):
        add_batch(draft, files, batch, ids, seed, prepare)
        try:
            on_batch(draft.taken, total)
        except Exception:
            draft.save(files)
            raise
        if time.monotonic() - saved > SAVE_SECONDS:
            draft.save(files)
            saved = time.monotonic()
    draft.save(files)
    return len(ids)


def make_plan(
    work: Path,
    owner: str,
    sets: list[TargetSet],
    settings: dict[str, Any],
    batch_size: int,
    prepare: Prepare,
    on_batch: Callable[[int, int], None],
) -> Plan:
    """Decode every candidate once, embed it, and write the plan to `work / "plan"`.

    Goes on where a run that was killed or stopped left off. If another process is the first to
    write the plan, its plan is returned: look at its settings.

    Args:
        prepare: embeds some targets; given their seeds as well.
        on_batch: called after every few candidates with the number of those done and of all; may
            raise to stop.

    Raises:
        PlanTaken: another process took over what this one had done.
        ValueError: no candidate gave a target.
        OSError: the plan cannot be written. A full disk is explained.
    """
    # A look before the files are read: what changes meanwhile will look changed.
    looks = [quick_look(targets) for targets in sets]
    settings = {**settings, "targets": [describe(targets) for targets in sets]}
    folder = work / f"draft.{owner}"
    files: dict[str, BinaryIO] = {}
    try:
        draft = new_draft(folder, settings)
        files |= {name: (folder / name).open("ab") for name in PARTS}
        draft.save(files)
        remove_drafts(work, but=folder)
        count = fill(draft, files, sets, settings["seed"], prepare, on_batch)
        if not count:
            raise ValueError(
                f"no target among {draft.taken} candidates; see {str(folder / FAILURES)!r}"
            )
        return publish_plan(work, draft, settings, batch_size, count, looks)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise PlanTaken from error
    finally:
        for file in files.values():
            with suppress(OSError):  # what counts has been saved
                file.close()


def publish_plan(
    work: Path,
    draft: Draft,
    settings: dict[str, Any],
    batch_size: int,
    count: int,
    looks: list[str | None],
) -> Plan:
    """Give a finished draft the plan's name, unless another has it already."""
    record = {
        "format": FORMAT,
        "settings": settings,
        "batch_size": batch_size,
        "targets": count,
        "embed": draft.embed,
        "initial": draft.initial,
        "sizes": draft.sizes,
        "sha256": {name: sha256_of(draft.folder / name) for name in PARTS},
        "looks": looks,
    }
    replace_file(draft.folder / RECORD, json.dumps(record, indent=2).encode())
    try:
        # A folder cannot be renamed onto one with something in it: the first one wins.
        os.rename(draft.folder, work / "plan")
    except OSError:
        if not (work / "plan" / RECORD).is_file():
            raise
    sync_folder(work)
    remove_drafts(work, but=work / "plan")
    return load_plan(work / "plan")
