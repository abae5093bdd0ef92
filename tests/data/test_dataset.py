"""Pairs on disk: what is written is read again, the same bytes every time, and damage is named."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Array2D, load_dataset
from pairs_made import (
    EMBED,
    FAILED,
    FEATURES,
    NUM_WS,
    W_DIM,
    name_of,
    one_line_error,
    pair,
    split_of_index,
)

from data.card import MEANS, DatasetInfo
from data.dataset import load_pairs, merge, networks_of, verify
from data.pairs import COLUMNS, SPLITS, WRITING, Failure, chunk_bytes, features, read_chunk

ROOT = Path(__file__).parents[2]
INFO = DatasetInfo(
    name="tiny pairs",
    generator="ab" * 32,
    resolution=16,
    num_ws=NUM_WS,
    w_dim=W_DIM,
    embedder="tiny",
    embedder_fingerprint="cd" * 32,
    preprocess="consistent",
    recipe="consistent",
    settings={"steps": 3, "weight_decay": 3e-3, "patience": None},
    truncation=0.7,
    precision="bf16",
    seed=5,
    targets=("faces", "avataaars:8"),
    sources="16 generated ones, seeds 100 to 115",
    held_out="4 generated ones, seeds 900 to 903",
    licence="cc-by-nc-4.0",
    licence_text="The generator's weights are for non-commercial use.",
    command="python -m data.build --out pairs --targets faces avataaars:8",
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, and no cache but the one a test gives."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"a test reached for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    usual = tmp_path / "usual_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", usual)
    yield
    assert not usual.exists()


def write_chunks(folder: Path, sizes: list[int], failures: list[Failure] = FAILED) -> list[Path]:
    """Chunks of so many pairs each; the failures are in the last one."""
    folder.mkdir()
    paths, start = [], 0
    for number, size in enumerate(sizes):
        content = chunk_bytes(
            [pair(i) for i in range(start, start + size)],
            failures if number == len(sizes) - 1 else [],
            FEATURES,
        )
        paths.append(folder / f"{number:05d}.parquet")
        paths[-1].write_bytes(content)
        start += size
    return paths


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """20 pairs of three chunks, at most 6 in a shard: three shards of train, one of the others."""
    out = tmp_path / "pairs"
    merge(write_chunks(tmp_path / "chunks", [7, 1, 12]), out, FEATURES, INFO, rows_per_shard=6)
    return out


def loaded(out: Path, tmp_path: Path) -> Any:
    return load_dataset(str(out), cache_dir=str(tmp_path / "cache"))


def expected_ids(count: int = 20) -> dict[str, str]:
    return {name_of(i): split_of_index(i) for i in range(count)} | {"f" * 16: "train"}


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def list_again(out: Path) -> None:
    """Write SHA256SUMS anew, so that only what is in the files can give them away."""
    names = [name for name in contents(out) if name != "SHA256SUMS"]
    lines = [f"{hashlib.sha256((out / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (out / "SHA256SUMS").write_text("".join(lines))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the rows of a shard and list it as if they had always been so."""
    pq.write_table(change(pq.read_table(path)), path, **WRITING)
    list_again(path.parents[1])


def set_column(name: str, values: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], Any]:
    def change(table: pa.Table) -> pa.Table:
        column = table.schema.get_field_index(name)
        kind = table.schema.field(name)
        changed = pa.array(values(table[name].to_pylist()), type=kind.type)
        return table.set_column(column, kind, changed)

    return change


def assert_named(problems: list[str], *parts: str) -> None:
    assert any(all(part in line for part in parts) for line in problems), problems
    assert not any("\n" in line for line in problems)


TRAIN = "data/train-00000-of-00003.parquet"
NEXT = "data/train-00001-of-00003.parquet"
VALIDATION = "data/validation-00000-of-00001.parquet"


def test_every_column_comes_back_bit_by_bit_through_load_dataset(
    dataset: Path, tmp_path: Path
) -> None:
    rows = loaded(dataset, tmp_path)
    assert set(rows) == set(SPLITS)
    assert rows["train"].features == FEATURES
    for split in SPLITS:
        expected = [pair(i) for i in range(20) if split_of_index(i) == split]
        assert rows[split]["id"][:] == [p.id for p in expected]
        for row, want in zip(rows[split].with_format("numpy"), expected, strict=True):
            assert set(row) == set(COLUMNS)
            for name in COLUMNS:
                found, value = row[name], getattr(want, name)
                if isinstance(value, np.ndarray):
                    assert found.shape == value.shape and found.dtype == np.float32
                    assert found.tobytes() == value.tobytes()
                else:
                    assert found == value, name


def test_every_column_comes_back_through_pandas_without_datasets(dataset: Path) -> None:
    code = f"""
import json, sys, pandas as pd
table = pd.read_parquet({str(dataset / VALIDATION)!r})
assert "datasets" not in sys.modules
table["direction"] = [[list(map(float, row)) for row in rows] for rows in table["direction"]]
print(table.to_json(orient="records", double_precision=15))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)
    expected = [pair(i) for i in range(20) if split_of_index(i) == "validation"]
    for row, want in zip(rows, expected, strict=True):
        assert list(row) == list(COLUMNS)
        assert row["seed"] == want.seed and row["steps"] == want.steps
        for name in ("embedding", "direction", "coefficients", "loss", "held_out_before"):
            found = np.array(row[name], dtype=np.float32)
            assert found.tobytes() == np.float32(getattr(want, name)).tobytes(), name


def test_pandas_beside_datasets_sees_the_same(dataset: Path) -> None:
    table = pd.read_parquet(dataset / VALIDATION)
    want = pair(4)
    assert table["id"][0] == want.id
    assert np.array_equal(np.array(table["direction"][0].tolist(), np.float32), want.direction)


@pytest.mark.parametrize(("embed", "num_ws", "w_dim"), [(512, 18, 512), (64, 10, 128)])
def test_the_sizes_in_use_go_through_a_chunk_and_a_shard(
    tmp_path: Path, embed: int, num_ws: int, w_dim: int
) -> None:
    columns = features(embed, num_ws, w_dim)
    path = tmp_path / "0.parquet"
    wanted = [pair(i, embed, num_ws, w_dim) for i in range(3)]
    path.write_bytes(chunk_bytes(wanted, [], columns))
    out = tmp_path / "pairs"
    merge([path], out, columns, replace(INFO, num_ws=num_ws, w_dim=w_dim))
    assert verify(out) == []
    rows = load_pairs(out, "train", tmp_path / "cache")
    assert torch.equal(rows[2]["direction"], torch.from_numpy(wanted[2].direction))


def test_load_pairs_gives_tensors_of_one_split(dataset: Path, tmp_path: Path) -> None:
    odd = dataset.rename(tmp_path / "pairs [v1] *")
    rows = load_pairs(odd, "validation", tmp_path / "cache")
    batch = rows[:2]
    assert batch["embedding"].shape == (2, EMBED) and batch["embedding"].dtype == torch.float32
    assert batch["direction"].shape == (2, NUM_WS, W_DIM)
    assert torch.equal(batch["direction"][1], torch.from_numpy(pair(14).direction))
    assert batch["id"] == [name_of(4), name_of(14)] and batch["seed"][0] == 2**62 + 4


def test_load_pairs_takes_nothing_unfinished_altered_or_strange(
    dataset: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="no pairs of split 'held'"):
        load_pairs(dataset, "held", cache)
    path = dataset / VALIDATION
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    with pytest.raises(ValueError, match="not what SHA256SUMS says"):
        load_pairs(dataset, "validation", cache)
    path.write_bytes(content)
    rewrite(path, lambda table: table.drop_columns(["steps"]))
    with pytest.raises(ValueError, match="another type: steps"):
        load_pairs(dataset, "validation", cache)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="validation-00000-of-00001"):
        load_pairs(dataset, "validation", cache)
    (dataset / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="the merge did not finish"):
        load_pairs(dataset, "train", cache)


def test_shards_hold_their_split_in_plan_order(dataset: Path) -> None:
    names = sorted(name for name in contents(dataset) if name.endswith(".parquet"))
    train = [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    assert names == ["data/test-00000-of-00001.parquet", *train, VALIDATION]
    rows = [pq.read_table(dataset / name).num_rows for name in train]
    assert rows == [6, 6, 4]
    ids = [i for name in train for i in pq.read_table(dataset / name)["id"].to_pylist()]
    assert ids == [name_of(i) for i in range(20) if split_of_index(i) == "train"]


def test_the_order_of_chunks_is_the_order_of_rows(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "chunks", [3, 3])
    merge(chunks[::-1], tmp_path / "pairs", FEATURES, INFO)
    table = pq.read_table(tmp_path / "pairs/data/train-00000-of-00001.parquet")
    assert table["id"].to_pylist() == [name_of(i) for i in (3, 5, 0, 1, 2)]


def test_the_same_rows_give_the_same_bytes_however_they_were_chunked(
    dataset: Path, tmp_path: Path
) -> None:
    before = contents(dataset)
    merge(sorted((tmp_path / "chunks").iterdir()), dataset, FEATURES, INFO, rows_per_shard=6)
    assert contents(dataset) == before
    other = tmp_path / "other"
    merge(write_chunks(tmp_path / "rechunked", [20]), other, FEATURES, INFO, rows_per_shard=6)
    assert contents(other) == before


def test_row_groups_are_small_and_do_not_follow_chunks(tmp_path: Path) -> None:
    merge(write_chunks(tmp_path / "chunks", [300, 1, 399]), tmp_path / "pairs", FEATURES, INFO)
    file = pq.ParquetFile(tmp_path / "pairs/data/train-00000-of-00001.parquet")
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert groups == [256, 256, 48]


def test_memory_does_not_grow_with_the_number_of_chunks(tmp_path: Path) -> None:
    columns, info = features(64, 10, 128), replace(INFO, num_ws=10, w_dim=128)
    chunks = [tmp_path / f"{number:02d}.parquet" for number in range(24)]
    for number, path in enumerate(chunks):
        rows = [pair(i, 64, 10, 128) for i in range(16 * number, 16 * number + 16)]
        path.write_bytes(chunk_bytes(rows, [], columns))
    usual = pa.default_memory_pool()
    peaks = []
    for used in (chunks[:6], chunks):
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            merge(used, tmp_path / f"pairs{len(used)}", columns, info, rows_per_shard=32)
            peaks.append(pool.max_memory() + tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
    assert peaks[1] < 1.2 * peaks[0], peaks


def test_a_split_without_rows_has_no_file_and_the_card_says_so(tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    merge(write_chunks(tmp_path / "chunks", [4]), out, FEATURES, INFO)
    assert [p.name for p in (out / "data").iterdir()] == ["train-00000-of-00001.parquet"]
    assert set(loaded(out, tmp_path)) == {"train"}
    assert "| test | none, so no file |" in (out / "README.md").read_text()
    assert verify(out) == []
    with pytest.raises(ValueError, match="no pairs of split 'test'"):
        load_pairs(out, "test", tmp_path / "cache")


def test_a_dataset_of_failures_alone_is_still_one(tmp_path: Path) -> None:
    out = tmp_path / "pairs"
    merge(write_chunks(tmp_path / "chunks", [0]), out, FEATURES, INFO)
    assert list((out / "data").iterdir()) == [] and verify(out, {"f" * 16: "test"}) == []


def test_failures_are_kept(dataset: Path, tmp_path: Path) -> None:
    lines = (dataset / "failures.jsonl").read_text().splitlines()
    assert [Failure(**json.loads(line)) for line in lines] == FAILED
    assert "1 at decode, 1 at optimize" in (dataset / "README.md").read_text()
    assert read_chunk(tmp_path / "chunks/00002.parquet")[1] == FAILED
    assert read_chunk(tmp_path / "chunks/00000.parquet")[1] == []


def test_failures_of_no_chunk_are_kept_too(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path / "chunks", [2], FAILED[1:])
    merge(chunks, tmp_path / "pairs", FEATURES, INFO, failures=FAILED[:1])
    lines = (tmp_path / "pairs/failures.jsonl").read_text().splitlines()
    assert [Failure(**json.loads(line)) for line in lines] == FAILED


def test_a_name_that_is_no_utf8_is_kept_readable(tmp_path: Path) -> None:
    strange = os.fsdecode(b"faces/\xff.png")
    path = tmp_path / "0.parquet"
    failure = Failure("", strange, "decode", f"{strange!r} is damaged")
    path.write_bytes(chunk_bytes([replace(pair(0), origin=strange)], [failure], FEATURES))
    table, failures = read_chunk(path)
    assert table["origin"].to_pylist() == ["faces/\\udcff.png"] and failures == [failure]
    merge([path], tmp_path / "pairs", FEATURES, INFO)
    assert verify(tmp_path / "pairs") == []


def test_the_card_says_how_and_how_good(dataset: Path) -> None:
    text = (dataset / "README.md").read_text()
    for part in (
        INFO.command,
        INFO.generator,
        INFO.embedder_fingerprint,
        INFO.licence_text,
        '"weight_decay": 0.003',
        "`faces`, `avataaars:8`",
        "license: cc-by-nc-4.0",
        f"float32 [{NUM_WS}, {W_DIM}]",
        *(f"`{name}`" for name in COLUMNS),
    ):
        assert part in text, part
    train = [pair(i) for i in range(20) if split_of_index(i) == "train"]
    means = [f"{np.mean([getattr(p, name) for p in train]):.4g}" for name in MEANS]
    assert f"| train | 16 | {' | '.join(means)} |" in text


def test_the_three_lines_of_the_card_load_the_pairs(dataset: Path, tmp_path: Path) -> None:
    code = (dataset / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code.count('"FOLDER_OR_NAME", ') == 1
    folders = f'"{dataset}", cache_dir="{tmp_path / "cache"}", '
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER_OR_NAME", ', folders), names)
    assert torch.equal(names["direction"], torch.from_numpy(pair(0).direction))


def test_the_columns_in_the_card_are_those_datasets_reads_back(dataset: Path) -> None:
    builder = datasets.load_dataset_builder(str(dataset), cache_dir=str(dataset.parent / "cache"))
    assert builder.info.features == FEATURES
    assert isinstance(builder.info.features["direction"], Array2D)
    train = builder.info.splits["train"]
    assert train.num_examples == 16 and train.num_bytes > 16 * 4 * 12


def test_a_licence_in_prose_is_refused() -> None:
    with pytest.raises(ValueError, match="licence by its name on the hub"):
        replace(INFO, licence="free for research")


def test_chunks_that_do_not_fit_together_leave_the_dataset_as_it_was(
    dataset: Path, tmp_path: Path
) -> None:
    before = contents(dataset)
    chunks = sorted((tmp_path / "chunks").iterdir())
    wide, again, cut = (tmp_path / name for name in ("wide", "again", "cut"))
    wide.write_bytes(chunk_bytes([pair(50, embed=9)], [], features(9, NUM_WS, W_DIM)))
    again.write_bytes(chunk_bytes([pair(3)], [], FEATURES))
    cut.write_bytes(chunks[0].read_bytes()[:-9])
    for extra, part in ((wide, "(9, 4, 6)"), (again, name_of(3)), (cut, "truncated")):
        message = one_line_error(lambda e=extra: merge([*chunks, e], dataset, FEATURES, INFO))
        assert str(extra) in message and part in message
    message = one_line_error(
        lambda: merge(chunks, dataset, FEATURES, replace(INFO, num_ws=18, w_dim=512))
    )
    assert "[18, 512]" in message
    message = one_line_error(lambda: merge([], dataset, FEATURES, INFO))
    assert "found 0 chunks" in message
    message = one_line_error(lambda: merge(chunks, dataset, FEATURES, INFO, rows_per_shard=0))
    assert "0 rows" in message
    assert contents(dataset) == before


def test_a_whole_dataset_has_no_problems(dataset: Path) -> None:
    assert verify(dataset) == []
    assert verify(dataset, expected_ids()) == []


def test_sha256sum_checks_the_files(dataset: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=dataset)
    assert done.returncode == 0
    listed = {line.split("  ")[1] for line in (dataset / "SHA256SUMS").read_text().splitlines()}
    assert listed == set(contents(dataset)) - {"SHA256SUMS"}


def test_a_truncated_shard_is_named(dataset: Path) -> None:
    whole = (dataset / TRAIN).read_bytes()
    for size in (0, 3, 500, len(whole) - 1):
        (dataset / TRAIN).write_bytes(whole[:size])
        problems = verify(dataset)
        assert_named(problems, TRAIN, "truncated", str(size))
        assert len(problems) == 1


def test_one_flipped_bit_is_named(dataset: Path) -> None:
    for name in (TRAIN, "README.md", "failures.jsonl"):
        content = (dataset / name).read_bytes()
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        (dataset / name).write_bytes(changed)
        problems = verify(dataset)
        assert len(problems) == 1
        assert_named(problems, name, "altered")
        (dataset / name).write_bytes(content)


def test_page_checksums_find_what_the_list_was_made_to_hide(dataset: Path) -> None:
    group = pq.ParquetFile(dataset / TRAIN).metadata.row_group(0)
    places = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    column = places["embedding.list.element"]
    content = bytearray((dataset / TRAIN).read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 9] ^= 4
    (dataset / TRAIN).write_bytes(content)
    list_again(dataset)
    assert_named(verify(dataset), TRAIN, "cannot be read", "CRC")


def test_a_missing_shard_is_named_with_the_ids_it_held(dataset: Path) -> None:
    (dataset / VALIDATION).unlink()
    assert verify(dataset) == [f"{VALIDATION}: missing"]
    assert_named(verify(dataset, expected_ids()), "2 expected", name_of(4), name_of(14))


def test_load_dataset_itself_misses_a_shard_that_is_gone(dataset: Path, tmp_path: Path) -> None:
    (dataset / TRAIN).unlink()
    with pytest.raises(datasets.exceptions.DatasetsError, match="train"):
        loaded(dataset, tmp_path)


def test_swapped_shards_are_named_with_each_other(dataset: Path) -> None:
    for other in (NEXT, VALIDATION):
        one, two = (dataset / TRAIN).read_bytes(), (dataset / other).read_bytes()
        (dataset / TRAIN).write_bytes(two)
        (dataset / other).write_bytes(one)
        problems = verify(dataset, expected_ids())
        assert len(problems) == 2
        assert_named(problems, f"{TRAIN}: swapped", other)
        assert_named(problems, f"{other}: swapped", TRAIN)
        (dataset / TRAIN).write_bytes(one)
        (dataset / other).write_bytes(two)


def test_a_copy_in_place_of_a_shard_costs_its_rows(dataset: Path) -> None:
    (dataset / TRAIN).write_bytes((dataset / NEXT).read_bytes())
    problems = verify(dataset, expected_ids())
    assert_named(problems, f"{TRAIN}: swapped", NEXT)
    assert_named(problems, "6 expected", name_of(0))
    assert len(problems) == 2


@pytest.mark.parametrize("name", ["train-00003-of-00004.parquet", "train-00001.parquet.tmp", "x"])
def test_an_extra_file_is_named(dataset: Path, name: str) -> None:
    (dataset / "data" / name).write_bytes((dataset / TRAIN).read_bytes())
    assert_named(verify(dataset), f"data/{name}", "extra")
    assert len(verify(dataset)) == 1


def test_hidden_files_of_the_builder_are_none_of_its_business(
    dataset: Path, tmp_path: Path
) -> None:
    (dataset / ".build/chunks").mkdir(parents=True)
    (dataset / ".build/chunks/00000.parquet").write_bytes(b"half")
    (dataset / "data/.train-00000-of-00003.parquet.1.ab.tmp").write_bytes(b"half")
    (dataset / "report.json").write_text("{}")
    assert verify(dataset) == []
    assert loaded(dataset, tmp_path)["train"].num_rows == 16


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            set_column("id", lambda ids: [name_of(4), *ids[1:]]),
            (name_of(4), "twice", VALIDATION, TRAIN),
        ),
        (set_column("id", lambda ids: ["f" * 16, *ids[1:]]), ("f" * 16, "twice", "failures.jsonl")),
        (
            set_column("split", lambda splits: ["test", *splits[1:]]),
            (TRAIN, "a split that is not the file's", name_of(0)),
        ),
        (
            set_column("direction", lambda rows: [[[float("nan")] * W_DIM] * NUM_WS, *rows[1:]]),
            (TRAIN, "not finite", name_of(0)),
        ),
        (
            set_column("transfer", lambda rows: [*rows[:-1], float("inf")]),
            (TRAIN, "not finite", name_of(6)),
        ),
        (
            set_column("embedding", lambda rows: [[0.5] * EMBED, *rows[1:]]),
            (TRAIN, "not of length 1", name_of(0)),
        ),
        (
            set_column("direction", lambda rows: [[[0.5] * W_DIM], *rows[1:]]),
            (TRAIN, "cannot be read", "[4, 6]"),
        ),
        (set_column("steps", lambda rows: [None, *rows[1:]]), (TRAIN, "nulls in steps")),
        (
            lambda table: table.set_column(13, "steps", table["steps"].cast("int64")),
            (TRAIN, "another type: steps"),
        ),
        (lambda table: table.drop_columns(["seed"]), (TRAIN, "another type: seed")),
    ],
)
def test_rows_that_are_wrong_are_named(
    dataset: Path, change: Callable[[pa.Table], pa.Table], parts: tuple[str, ...]
) -> None:
    rewrite(dataset / TRAIN, change)
    assert_named(verify(dataset), *parts)


def test_a_shard_of_other_dimensions_is_named(dataset: Path, tmp_path: Path) -> None:
    chunk = tmp_path / "wide"
    columns = features(9, NUM_WS, W_DIM)
    chunk.write_bytes(chunk_bytes([pair(4, embed=9)], [], columns))
    merge([chunk], tmp_path / "wide_pairs", columns, INFO)
    (dataset / VALIDATION).write_bytes((tmp_path / "wide_pairs" / VALIDATION).read_bytes())
    list_again(dataset)
    lines = [line for line in verify(dataset) if "(9, 4, 6)" in line]
    assert len(lines) == 1 and "(8, 4, 6)" in lines[0]


def test_what_is_not_parquet_is_named(dataset: Path) -> None:
    (dataset / TRAIN).write_bytes(b"PAR1 nothing of the kind PAR1")
    (dataset / "failures.jsonl").write_text('{"id": "x"}\n')
    list_again(dataset)
    problems = verify(dataset)
    assert_named(problems, TRAIN, "cannot be read")
    assert_named(problems, "failures.jsonl", "cannot be read")


def test_ids_are_held_against_those_expected(dataset: Path) -> None:
    expected = expected_ids() | {"0" * 16: "train", "1" * 16: "test"}
    assert verify(dataset, expected) == [
        f"2 expected but in no file that can be read: {'0' * 16}, {'1' * 16}"
    ]
    expected = expected_ids()
    del expected[name_of(2)], expected["f" * 16]
    assert_named(verify(dataset, expected), "2 not expected", name_of(2), "f" * 16)
    problems = verify(dataset, expected_ids() | {name_of(0): "test"})
    assert len(problems) == 1
    assert_named(problems, "another split than expected", name_of(0))


def test_many_ids_stay_one_line(dataset: Path) -> None:
    (problem,) = verify(dataset, expected_ids() | {f"{i:016}": "train" for i in range(5000)})
    assert "5000 expected" in problem and "and 4995 more" in problem and len(problem) < 300


def test_no_damage_raises(dataset: Path, tmp_path: Path) -> None:
    assert_named(verify(tmp_path / "nowhere"), "expected a dataset", "found no such folder")
    (dataset / TRAIN).unlink()
    (dataset / TRAIN).mkdir()
    assert_named(verify(dataset), TRAIN, "cannot be read")
    for text in ("", "nonsense\n", f"{'0' * 64}  ../secret\n", "\0"):
        (dataset / "SHA256SUMS").write_text(text)
        (problem,) = verify(dataset)
        assert "SHA256SUMS" in problem and "damaged" in problem


def test_an_unfinished_merge_is_called_one_and_merging_again_heals_it(
    dataset: Path, tmp_path: Path
) -> None:
    before = contents(dataset)
    chunks = sorted((tmp_path / "chunks").iterdir())
    for stop_at in range(5):
        written: list[str] = []

        def fail(point: str, stop: int = stop_at, log: Any = written) -> None:
            if point == "before-write" and len(log) == stop:
                raise OSError(28, "No space left on device")
            log += [point] * (point == "after-write")

        with pytest.raises(OSError, match="No space left"):
            merge(chunks[:2], dataset, FEATURES, INFO, at=fail)
        (problem,) = verify(dataset)
        assert "the merge did not finish" in problem
        merge(chunks, dataset, FEATURES, INFO, rows_per_shard=6)
        assert contents(dataset) == before


# Merges in a process of its own, as the environment and the arguments say.
MERGER = """
import dataclasses, json, resource, signal, sys
from pathlib import Path
from data.card import DatasetInfo
from data.dataset import merge
from data.pairs import features
from tests.proof.points import fault_at
chunks, out, info, limit, place, count = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    merge(sorted(Path(chunks).iterdir()), Path(out), features(8, 4, 6),
          DatasetInfo(**json.loads(info)), at=fault_at(place, int(count)))
except OSError as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""


def merge_elsewhere(
    chunks: Path, out: Path, limit: int = 0, place: str = "", count: int = 1
) -> subprocess.CompletedProcess[str]:
    info = json.dumps({name: getattr(INFO, name) for name in INFO.__dataclass_fields__})
    return subprocess.run(
        [sys.executable, "-c", MERGER, str(chunks), str(out), info, str(limit), place, str(count)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    write_chunks(tmp_path / "chunks", [200])
    out = tmp_path / "pairs"
    done = merge_elsewhere(tmp_path / "chunks", out, limit=20_000)
    assert done.returncode == 7, done.stderr
    assert "OSError" in done.stdout and "train-00000-of-00001.parquet" in done.stdout
    assert_named(verify(out), "the merge did not finish")
    assert contents(out) == {}


def test_the_networks_of_a_dataset_are_read_from_its_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"report.json' is missing"):
        networks_of(tmp_path)
    report = tmp_path / "report.json"
    report.write_text('{"settings": {"generator": "a", "embedder": "b"}}')
    assert networks_of(tmp_path) == ("a", "b")
    for text in ("", "[]", '{"settings": {"generator": "a"}}', '{"settings": 1}', "\udc00"):
        report.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"report.json' is damaged"):
            networks_of(tmp_path)


@pytest.mark.parametrize(("place", "count"), [("before-sums", 1), ("after-write", 2)])
def test_a_merge_that_is_killed_leaves_nothing_that_passes(
    tmp_path: Path, place: str, count: int
) -> None:
    chunks, out = tmp_path / "chunks", tmp_path / "pairs"
    paths = write_chunks(chunks, [9])
    done = merge_elsewhere(chunks, out, place=place, count=count)
    assert done.returncode == -9, done.stderr
    assert_named(verify(out), "the merge did not finish")
    merge(paths, out, FEATURES, INFO)
    assert verify(out) == []
    assert loaded(out, tmp_path)["train"].num_rows == 7
