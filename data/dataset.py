"""The folder of a pair dataset: made of chunks, checked, loaded.

Knows files and what must be in them; nothing of how directions are found. A dataset is a folder:

    README.md  failures.jsonl  data/{train,validation,test}-00000-of-00001.parquet  SHA256SUMS

and report.json, which a build adds. A merge removes SHA256SUMS first and writes it last: a folder
without it is not finished.
"""

import glob
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Features

from data.card import CARD, FAILURES, MEANS, REPORT, SUMS, DatasetInfo, Survey, card
from data.pairs import (
    GROUP_ROWS,
    SPLITS,
    Failure,
    bad_rows,
    dimensions,
    parquet_bytes,
    read_chunk,
    such_as,
)
from data.publish import At, go_on, replace_file, sha256_of
from targetclip.command import one_line, sync_folder
from targetclip.recipes import Recipe
from targetclip.scene import Scene
from targetclip.weights import stored_recipe

SHARD_BYTES = 200_000_000  # about what a merge holds in memory
SHARD = re.compile(rf"data/({'|'.join(SPLITS)})-\d{{5}}-of-\d{{5}}\.parquet")


def survey_chunks(chunks: Sequence[Path], columns: Features) -> Survey:
    """Read every chunk once and return counts, sums and failures.
    FileNotFoundError, ValueError: a chunk is missing, damaged, of other dimensions, or repeats a
    target."""
    survey = Survey(totals={split: dict.fromkeys(MEANS, 0.0) for split in SPLITS})
    places: dict[str, Path] = {}
    for path in chunks:
        table, failures = read_chunk(path)
        dims = dimensions(Features.from_arrow_schema(table.schema))
        if dims != dimensions(columns):
            raise ValueError(
                f"{str(path)!r}: expected embed, num_ws, w_dim {dimensions(columns)}, found "
                f"{dims}; merge chunks of one plan only"
            )
        for target in [*table["id"].to_pylist(), *(f.id for f in failures if f.id)]:
            if target in places:
                raise ValueError(
                    f"target {target} is in {str(places[target])!r} and again in {str(path)!r}; "
                    "expected every target once"
                )
            places[target] = path
        survey.failures += failures
        splits = np.array(table["split"].to_pylist())
        for split in SPLITS:
            survey.rows[split] += int((splits == split).sum())
            for name in MEANS:
                values = table[name].to_numpy()[splits == split]
                survey.totals[split][name] += float(values.sum(dtype=np.float64))
    return survey


def tables_of(
    chunks: Sequence[Path], split: str, schema: pa.Schema, counts: Iterable[int]
) -> Iterator[pa.Table]:
    """Return the rows of a split as tables of so many rows, with one chunk in memory at a time."""
    paths, rows = iter(chunks), schema.empty_table()
    for count in counts:
        while len(rows) < count:
            chunk = read_chunk(next(paths))[0].replace_schema_metadata(schema.metadata)
            rows = pa.concat_tables([rows, chunk.filter(pc.equal(chunk["split"], split))])
        yield rows.slice(0, count)
        rows = rows.slice(count)


def split_of_shard(name: str) -> str:
    """Return the split in the name of a shard."""
    return name.removeprefix("data/").partition("-")[0]


def shards_of(
    chunks: Sequence[Path], survey: Survey, schema: pa.Schema, rows_per_shard: int
) -> Iterator[tuple[str, bytes]]:
    """Return the name and the content of every shard, one in memory at a time."""
    for split in SPLITS:
        rows = survey.rows[split]
        sizes = [min(rows_per_shard, rows - start) for start in range(0, rows, rows_per_shard)]
        # Groups end where shards do.
        groups = [
            [min(GROUP_ROWS, size - done) for done in range(0, size, GROUP_ROWS)] for size in sizes
        ]
        tables = tables_of(chunks, split, schema, itertools.chain.from_iterable(groups))
        for index, group in enumerate(groups):
            content = parquet_bytes(itertools.islice(tables, len(group)), schema)
            yield f"data/{split}-{index:05d}-of-{len(groups):05d}.parquet", content


def merge(
    chunks: Sequence[Path],
    out: Path,
    features: Features,
    info: DatasetInfo,
    failures: Sequence[Failure] = (),
    rows_per_shard: int | None = None,
    at: At = go_on,
) -> None:
    """Make a dataset folder of chunks, over what is there; the same chunks give the same bytes.

    Rows keep the order of `chunks` within their split. Memory holds a shard and a chunk.

    Args:
        failures: targets that are in no chunk; they are listed before those of the chunks.
        rows_per_shard: None: as many as 200 MB hold.
        at: is called at the points before-write, after-write and before-sums.

    Raises:
        FileNotFoundError, ValueError: a chunk is missing, damaged, of other dimensions, or repeats
            a target. Nothing in `out` has been touched.
        OSError: a file cannot be written. SHA256SUMS is missing then; merge again.
    """
    embed, num_ws, w_dim = dimensions(features)
    if (num_ws, w_dim) != (info.num_ws, info.w_dim):
        raise ValueError(
            f"expected directions [{info.num_ws}, {info.w_dim}], as the generator's, found columns "
            f"for [{num_ws}, {w_dim}]"
        )
    if rows_per_shard is None:
        rows_per_shard = max(1, SHARD_BYTES // (4 * (embed + num_ws * w_dim) + 256))
    if rows_per_shard < 1 or not chunks:
        raise ValueError(
            f"expected chunks and at least 1 row a shard, found {len(chunks)} chunks and "
            f"{rows_per_shard} rows"
        )
    survey = survey_chunks(chunks, features)
    survey.failures[:0] = failures
    (out / "data").mkdir(parents=True, exist_ok=True)
    (out / SUMS).unlink(missing_ok=True)
    sync_folder(out)
    sums: dict[str, str] = {}

    def write(name: str, content: bytes) -> None:
        replace_file(out / name, content, at)
        sums[name] = hashlib.sha256(content).hexdigest()

    for name, content in shards_of(chunks, survey, features.arrow_schema, rows_per_shard):
        write(name, content)
    for path in (out / "data").glob("*.parquet"):
        if f"data/{path.name}" not in sums:
            path.unlink()
    lines = [json.dumps(asdict(failure)) + "\n" for failure in survey.failures]
    write(FAILURES, "".join(lines).encode())
    write(CARD, card(info, features, survey).encode())
    at("before-sums")
    listing = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    replace_file(out / SUMS, "".join(listing).encode(), at)


def read_sums(out: Path) -> dict[str, str]:
    """Read the names and SHA-256 of the files of a dataset.
    FileNotFoundError: there is no dataset. ValueError: its merge did not finish, or the list is
    damaged."""
    path = out / SUMS
    if not out.is_dir() or not any(out.iterdir()):
        found = "no such folder" if not out.exists() else "none"
        raise FileNotFoundError(
            f"expected a dataset of pairs at {str(out)!r}, found {found}: give the --out of "
            "python -m data.build"
        )
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing: the merge did not finish; run it again")
    sums = {}
    for line in path.read_text("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        known = name in (CARD, FAILURES) or SHARD.fullmatch(name)
        if not known or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"{str(path)!r} is damaged: expected hash and file, found {line!r}")
        sums[name] = digest
    if not {CARD, FAILURES} <= sums.keys():
        raise ValueError(f"{str(path)!r} is damaged: expected {CARD} and {FAILURES} in it")
    return sums


def damage(name: str, content: bytes, owner: str | None) -> str:
    """Describe how a file differs from its line in the list."""
    if owner:
        return f"{name}: swapped, it holds the content of {owner}"
    if name.endswith(".parquet") and not content.endswith(b"PAR1"):
        return f"{name}: truncated, it ends after {len(content)} bytes without its footer"
    return f"{name}: altered, its SHA-256 is not that in {SUMS}"


@dataclass(frozen=True)
class Checked:
    """Ids and problems of a file of a dataset."""

    ids: list[str]
    problems: list[str]
    dims: tuple[int, int, int] | None = None
    """embed, num_ws, w_dim of a shard."""


def check_shard(name: str, content: bytes) -> Checked:
    """Check the rows of a shard; raises nearly anything for other files."""
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    columns = Features.from_arrow_schema(file.schema_arrow)
    dims = dimensions(columns)
    ids: list[str] = []
    wrong: dict[str, list[str]] = {}
    for batch in file.iter_batches(GROUP_ROWS, use_threads=False):
        table = pa.Table.from_batches([batch])
        elsewhere = table.filter(pc.not_equal(table["split"], split_of_shard(name)))
        wrong_here = bad_rows(table, columns)
        wrong_here["a split that is not the file's"] = elsewhere["id"].to_pylist()
        for kind, rows in wrong_here.items():
            wrong.setdefault(kind, []).extend(rows)
        ids += table["id"].to_pylist()
    lines = [f"{name}: {kind}: {such_as(rows)}" for kind, rows in wrong.items() if rows]
    return Checked(ids, lines, dims)


def check_file(name: str, content: bytes) -> Checked:
    """Check that a file is what its name says."""
    try:
        if name == FAILURES:
            failures = [Failure(**json.loads(line)) for line in content.splitlines()]
            return Checked([failure.id for failure in failures if failure.id], [])
        return Checked([], []) if name == CARD else check_shard(name, content)
    except Exception as error:  # files of another make raise nearly anything
        return Checked([], [f"{name}: cannot be read as what it is called: {one_line(error)}"])


def check_ids(checked: Mapping[str, Checked], expected: Mapping[str, str] | None) -> list[str]:
    """Describe ids that are there twice, missing, unexpected or in the wrong split."""
    places: dict[str, str] = {}
    problems = []
    for name, file in checked.items():
        for target in file.ids:
            if target in places:
                problems.append(f"{name}: {target} is twice, first in {places[target]}")
            places.setdefault(target, name)
    if expected is None:
        return problems
    rows = {target: name for target, name in places.items() if name != FAILURES}
    wrong = {
        "expected but in no file that can be read": [i for i in expected if i not in places],
        "not expected": [i for i in places if i not in expected],
        "in another split than expected": [
            i for i, name in rows.items() if expected.get(i, "") not in ("", split_of_shard(name))
        ],
    }
    return problems + [f"{len(ids)} {kind}: {such_as(ids)}" for kind, ids in wrong.items() if ids]


def verify(out: Path, expected_ids: Mapping[str, str] | None = None) -> list[str]:
    """Return all that is wrong with a dataset folder, a line each; empty if nothing is.

    Reads every file once, a shard in memory at a time. A file that is not as in SHA256SUMS is named
    and not decoded. No damage raises.

    Args:
        expected_ids: the split of every target that must have a row or a failure; no other may.
    """
    try:
        sums = read_sums(out)
    except (OSError, ValueError) as error:
        return [str(error)]
    problems: list[str] = []
    checked: dict[str, Checked] = {}
    owners = {digest: name for name, digest in sums.items()}
    for name in sums:
        try:
            content = (out / name).read_bytes()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            problems.append(f"{name}: {'missing' if gone else f'cannot be read: {error}'}")
            continue
        actual = hashlib.sha256(content).hexdigest()
        owner = owners.get(actual)
        if owner != name:
            problems.append(damage(name, content, owner))
        # Content in the wrong place is checked, once, as the file it belongs to.
        if owner and owner not in checked:
            checked[owner] = check_file(owner, content)
    for file in checked.values():
        problems += file.problems
    shapes = {name: file.dims for name, file in checked.items() if file.dims}
    usual = Counter(shapes.values()).most_common(1)
    for name, dims in shapes.items():
        if dims != usual[0][0]:
            problems.append(f"{name}: embed, num_ws, w_dim {dims}, elsewhere {usual[0][0]}")
    for path in sorted((out / "data").glob("[!.]*")):
        if f"data/{path.name}" not in sums:
            problems.append(f"data/{path.name}: extra, not in {SUMS}; a loader would read it")
    return problems + check_ids(checked, expected_ids)


def mean_scores(out: Path) -> dict[str, dict[str, float]]:
    """Return the number of pairs of each split that has any, and the means of their scores."""
    scores: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        shards = sorted((out / "data").glob(f"{split}-*.parquet"))
        if shards:
            table = pa.concat_tables([pq.read_table(path, columns=list(MEANS)) for path in shards])
            means = {name: float(pc.mean(table[name]).as_py()) for name in MEANS}
            scores[split] = {"pairs": len(table), **means}
    return scores


def build_settings(out: Path, *needed: str) -> dict[str, Any]:
    """Return the settings of the build that made pairs, those `needed` among them.
    FileNotFoundError: the dataset has no report.json. ValueError: it is damaged."""
    path = out / REPORT
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing; run the build again (--only merge)")
    try:
        settings = dict(json.loads(path.read_bytes())["settings"])
        return settings | {name: settings[name] for name in needed}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: expected the settings of a build; run it again"
        ) from error


def networks_of(out: Path) -> tuple[str, str]:
    """Return the fingerprints of the generator and of the embedder that pairs were made with;
    raises as `build_settings`."""
    settings = build_settings(out, "generator", "embedder")
    return str(settings["generator"]), str(settings["embedder"])


def check_made_for(folder: Path, columns: Features, scene: Scene) -> None:
    """Raise a ValueError unless pairs of these columns are for a world's generator and embedder."""
    generator, embedder, sizes = scene.generator, scene.embedder, dimensions(columns)
    expected = (embedder.embed_dim, generator.num_ws, generator.w_dim)
    if sizes != expected:
        raise ValueError(
            f"--pairs: expected embed, num_ws, w_dim {expected}, as this world's, found {sizes} in "
            f"{str(folder)!r}; build pairs for this world, or give theirs as --world"
        )
    own = {"generator": generator.fingerprint, "embedder": embedder.fingerprint}
    for (name, fingerprint), other in zip(own.items(), networks_of(folder), strict=True):
        if fingerprint != other:
            raise ValueError(
                f"--pairs: expected pairs of {name} {fingerprint[:12]}, found {other[:12]} in "
                f"{str(folder)!r}; build pairs for this world, or give theirs as --world"
            )


def recipe_of(out: Path) -> Recipe | None:
    """Return the recipe that found the directions of pairs; None where the report tells of none
    that is known here, as of pairs that another program made. Raises as `build_settings`."""
    settings = build_settings(out).get("recipe")
    try:
        return stored_recipe(settings) if settings else None
    except (TypeError, ValueError):
        return None


def load_pairs(out: Path, split: str, cache_dir: Path | None = None) -> datasets.Dataset:
    """Load the rows of a split with COLUMNS as columns, numbers and arrays as torch tensors.

    Rows stay on disk, in the cache of `datasets`; no network is used.

    Args:
        cache_dir: None: the usual cache.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: the dataset is unfinished, has no rows of that split, a shard that is not as in
            SHA256SUMS, or other columns than a pair dataset.
    """
    sums = read_sums(out)
    names = [name for name in sums if name.startswith("data/") and split_of_shard(name) == split]
    if not names:
        raise ValueError(f"{str(out)!r} has no pairs of split {split!r}; look at its {CARD}")
    for name in names:
        if not (out / name).is_file():
            raise FileNotFoundError(f"{str(out / name)!r} is missing; merge the chunks again")
        if sha256_of(out / name) != sums[name]:
            raise ValueError(f"{str(out / name)!r} is not what {SUMS} says; merge the chunks again")
    pairs = datasets.load_dataset(
        "parquet",
        data_files={split: [glob.escape(str(out / name)) for name in names]},
        split=split,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    dimensions(pairs.features)
    return pairs.with_format("torch")
