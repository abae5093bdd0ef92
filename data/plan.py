"""The plan of a build: its targets in order, their embeddings, and all settings.

A plan never changes once it is there. It holds every target's embedding (and start, unless that is
zero), so a worker needs no picture. It names everything a direction depends on, so nothing else can
be mixed into the same folder. Knows nothing of who does the work.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.json  # type: ignore[import-untyped]
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from data.pairs import Failure
from data.publish import At, go_on, replace_file, sha256_of
from data.targets import (
    BadTarget,
    DatasetTargets,
    FolderTargets,
    Target,
    TargetSet,
    printable,
    split_of,
)
from targetclip.command import full_disk_explained, sync_folder
from targetclip.recipes import Recipe
from targetclip.seeds import seed_of

FORMAT = "targetclip-plan/1"
RECORD = "plan.json"
TARGETS, FAILURES = "targets.jsonl", "failures.jsonl"
EMBEDDINGS, INITIAL = "embeddings.f32", "initial.f32"
PARTS = (TARGETS, FAILURES, EMBEDDINGS, INITIAL)
PICTURES = 32  # embedded at once
SAVE_SECONDS = 20.0  # of planning that a kill may cost
NAMED = 1000  # files that are not taken; all are counted

Prepare = Callable[[list[Target], list[int]], tuple[Tensor, Tensor | None]]
"""Returns raw embeddings [targets, embed] of targets and, unless they are zero, their starts."""


class PlanTaken(Exception):
    """Another process makes the plan now, or has made it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The targets of a build and its settings."""

    folder: Path
    settings: dict[str, Any]
    """All that a direction depends on, by name."""
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
    not_taken: dict[str, Any]
    """`count` and `files` of what the folders of targets hold beside pictures."""

    @property
    def chunks(self) -> int:
        """Number of chunks; chunk 12 has the name `000012`."""
        return -(-len(self.targets) // self.batch_size)

    def rows(self, chunk: int) -> slice:
        """Return the targets of a chunk."""
        return slice(chunk * self.batch_size, min((chunk + 1) * self.batch_size, len(self.targets)))

    def splits(self) -> dict[str, str]:
        """Return the split of every target that must have a row or a failure."""
        columns = self.targets.to_pydict()
        return dict(zip(columns["id"], columns["split"], strict=True))


def changed_settings(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between nested settings, before and now, by names such as `recipe.steps`.

    Settings of a recipe that are newer than a file have their defaults there.
    """

    def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in settings.items():
            inner = isinstance(value, Mapping)
            values |= flat(value, f"{above}{name}.") if inner else {above + name: value}
        return values

    newer = {f"recipe.{f.name}": f.default for f in fields(Recipe) if f.default is not MISSING}
    old, new = flat(before), flat(now)
    pairs = {n: (old.get(n, newer.get(n)), new.get(n, newer.get(n))) for n in {**old, **new}}
    return {name: (then, value) for name, (then, value) in pairs.items() if then != value}


def check_settings(folder: Path, planned: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare settings with the planned ones.
    ValueError: some differ; the message names the first three."""
    if changed := changed_settings(planned, json.loads(json.dumps(asked))):
        changes = "; ".join(
            f"{name}: planned {before!r}, found {now!r}"
            for name, (before, now) in [*changed.items()][:3]
        )
        raise ValueError(
            f"{str(folder)!r} was planned with other settings ({changes}); "
            "give another --out, or the planned settings again"
        )


def public_spec(targets: TargetSet) -> str:
    """Return the spec of a set of targets without the path of this machine."""
    if isinstance(targets, FolderTargets):
        return Path(targets.spec).resolve().name
    if isinstance(targets, DatasetTargets):
        return f"dataset:{targets.name}#{targets.split}#{targets.column}"
    return targets.spec


def describe(targets: TargetSet, identity: str | None = None) -> dict[str, Any]:
    """Return the plan's record of a set of targets."""
    identity = identity or targets.identity()
    return {"spec": public_spec(targets), "count": len(targets), "identity": identity}


def quick_look(targets: TargetSet) -> str | None:
    """Return a hash of a folder's names, sizes and times, which is quick; None for other sets."""
    if not isinstance(targets, FolderTargets):
        return None
    return format(seed_of(*targets.stats()), "x")


def not_taken(sets: Iterable[TargetSet]) -> dict[str, Any]:
    """Return the number of files in folders that are not taken, and the names of the first."""
    folders = [targets for targets in sets if isinstance(targets, FolderTargets)]
    files = [
        printable(f"{public_spec(folder)}/{name}") for folder in folders for name in folder.others
    ]
    return {"count": len(files), "files": files[:NAMED]}


def check_targets(plan: Plan, sets: Iterable[TargetSet]) -> None:
    """Compare targets with the planned ones; files are read only if they look changed.
    ValueError: a set is missing, new, or has changed."""
    planned = plan.settings["targets"]
    looks = json.loads((plan.folder / RECORD).read_text())["looks"]
    asked = []
    for index, targets in enumerate(sets):
        same = index < len(planned) and looks[index] and looks[index] == quick_look(targets)
        asked.append(describe(targets, planned[index]["identity"] if same else None))
    before, now = ({f"target set {i}": v for i, v in enumerate(vs)} for vs in (planned, asked))
    check_settings(plan.folder, before, now)


def load_plan(folder: Path) -> Plan:
    """Read a plan.
    FileNotFoundError: there is none. ValueError: it is of another version, or a file is not as
    large as it was."""
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
    count, initial = record["targets"], None
    if record["initial"]:
        initial = np.memmap(folder / INITIAL, np.float32, "r", shape=(count, *record["initial"]))
    schema = pa.schema(
        {"id": pa.string(), "split": pa.string(), "origin": pa.string(), "seed": pa.int64()}
    )
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    failures = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
    return Plan(
        folder=folder,
        settings=record["settings"],
        batch_size=record["batch_size"],
        targets=pyarrow.json.read_json(folder / TARGETS, parse_options=options),
        embeddings=np.memmap(folder / EMBEDDINGS, np.float32, "r", shape=(count, record["embed"])),
        initial=initial,
        failures=tuple(Failure(**failure) for failure in failures),
        not_taken=record.get("not_taken", {"count": 0, "files": []}),  # old plans count none
    )


def check_plan(folder: Path) -> list[str]:
    """Return the names of a plan's files that have changed since it was made, a line each."""
    hashes = json.loads((folder / RECORD).read_text())["sha256"]
    altered = [name for name, digest in hashes.items() if sha256_of(folder / name) != digest]
    return [f"{name}: altered since it was planned" for name in altered]


@dataclass(kw_only=True)
class Draft:
    """A plan in the making, in a folder of its maker's own."""

    folder: Path
    taken: int = 0
    """Candidates that are done with."""
    sizes: dict[str, int]
    """Bytes of each file that count."""
    initial: list[int] | None = None
    embed: int = 0

    def save(self, files: Mapping[str, BinaryIO], at: At) -> None:
        """Make all that has been written so far count."""
        with full_disk_explained(self.folder, sum(file.tell() for file in files.values())):
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        self.sizes = {name: file.tell() for name, file in files.items()}
        record = {name: value for name, value in asdict(self).items() if name != "folder"}
        replace_file(self.folder / "draft.json", json.dumps(record).encode(), at)
        at("after-draft")


def new_draft(folder: Path, settings: Mapping[str, Any], at: At) -> Draft:
    """Make a folder to plan in: a copy of the furthest draft that another left, or an empty one.

    A copy and not the folder itself: its maker may only be halted, and write on.
    """
    folder.mkdir(parents=True)
    planned = json.dumps(settings, sort_keys=True)
    replace_file(folder / "settings.json", planned.encode(), at)
    draft, furthest = Draft(folder=folder, sizes=dict.fromkeys(PARTS, 0)), folder
    for path in folder.parent.glob("draft.*"):
        try:
            if path != folder and (path / "settings.json").read_text() == planned:
                record = json.loads((path / "draft.json").read_text())
                if record["taken"] > draft.taken:
                    draft, furthest = Draft(folder=folder, **record), path
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
    """Remove the other drafts; a maker that was only halted will notice that it was replaced."""
    for path in set(work.glob("draft.*")) - {but}:
        shutil.rmtree(path, ignore_errors=True)


def candidates(sets: Iterable[TargetSet], start: int) -> Iterator[Target | BadTarget]:
    """Return all candidates from one on; those before it are not decoded."""
    for targets in sets:
        yield from targets.starting_at(min(start, len(targets)))
        start = max(0, start - len(targets))


def add_batch(
    draft: Draft,
    files: Mapping[str, BinaryIO],
    batch: list[Target | BadTarget],
    ids: dict[str, str],
    seed: int,
    prepare: Prepare,
) -> None:
    """Add a few candidates to a draft; `ids` are those it has, with their origins."""
    targets: list[Target] = []
    lines = dict.fromkeys(PARTS, b"")
    for candidate in batch:
        if isinstance(candidate, Target) and candidate.id in ids:
            candidate = BadTarget(candidate.origin, f"duplicate of {ids[candidate.id]}")
        if isinstance(candidate, Target):
            ids[candidate.id] = candidate.origin
            targets.append(candidate)
        else:
            failure = Failure("", candidate.origin, "decode", candidate.reason)
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


def make_plan(
    work: Path,
    owner: str,
    sets: list[TargetSet],
    settings: dict[str, Any],
    batch_size: int,
    prepare: Prepare,
    on_batch: Callable[[int, int], None],
    *,
    pictures: int = PICTURES,
    save_seconds: float | None = None,
    at: At = go_on,
) -> Plan:
    """Decode every candidate once, embed it, and write the plan to `work / "plan"`.

    Goes on where a run that was killed or stopped left off. If another process is the first to
    write the plan, its plan is returned: check its settings.

    Args:
        prepare: embeds some targets; gets their seeds as well.
        on_batch: is called after every few candidates with the number of those done and of all; may
            raise to stop.
        pictures: embedded at once.
        save_seconds: of planning that a kill may cost. None: `SAVE_SECONDS`.
        at: is called at the points before-write, after-write and after-draft.

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
    total, saved = sum(map(len, sets)), time.monotonic()
    save_seconds = SAVE_SECONDS if save_seconds is None else save_seconds
    try:
        draft = new_draft(folder, settings, at)
        files |= {name: (folder / name).open("ab") for name in PARTS}
        draft.save(files, at)
        remove_drafts(work, but=folder)
        rows = map(json.loads, (folder / TARGETS).read_text().splitlines())
        ids = {row["id"]: row["origin"] for row in rows}
        remaining = candidates(sets, draft.taken)
        while batch := list(itertools.islice(remaining, pictures)):
            add_batch(draft, files, batch, ids, settings["seed"], prepare)
            try:
                on_batch(draft.taken, total)
            except Exception:
                draft.save(files, at)
                raise
            if time.monotonic() - saved > save_seconds:
                draft.save(files, at)
                saved = time.monotonic()
        draft.save(files, at)
        if not ids:
            raise ValueError(
                f"no target among {draft.taken} candidates; see {str(folder / FAILURES)!r}"
            )
        record = {
            "settings": settings,
            "batch_size": batch_size,
            "looks": looks,
            "not_taken": not_taken(sets),
        }
        publish_plan(work, draft, record, at)
        return load_plan(work / "plan")
    except FileNotFoundError as error:
        if folder.is_dir():
            raise
        raise PlanTaken from error
    finally:
        for file in files.values():
            with suppress(OSError):  # what counts has been saved
                file.close()


def publish_plan(work: Path, draft: Draft, record: Mapping[str, Any], at: At) -> None:
    """Give a finished draft the plan's name, unless another has it already."""
    record = {
        "format": FORMAT,
        **record,
        "targets": len((draft.folder / TARGETS).read_text().splitlines()),
        "embed": draft.embed,
        "initial": draft.initial,
        "sizes": draft.sizes,
        "sha256": {name: sha256_of(draft.folder / name) for name in PARTS},
    }
    replace_file(draft.folder / RECORD, json.dumps(record, indent=2).encode(), at)
    try:
        # A folder cannot be renamed onto one with something in it: the first one wins.
        os.rename(draft.folder, work / "plan")
    except OSError:
        if not (work / "plan" / RECORD).is_file():
            raise
    sync_folder(work)
    remove_drafts(work, but=work / "plan")
