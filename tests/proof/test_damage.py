"""The judge of the proof by fault sees what is there to see, and is no rubber stamp."""

import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pairs_made import FEATURES, NUM_WS, W_DIM, name_of, pair, split_of_index

from data.card import DatasetInfo
from data.dataset import merge
from data.pairs import SPLITS, chunk_bytes
from data.publish import publish_file
from tests.proof.damage import KINDS, check_damages, flip_bit, rows_of, truncate, unequal_rows

ROWS = 20
IDS = {name_of(i): split_of_index(i) for i in range(ROWS)}
Row = dict[str, Any]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A dataset of 20 pairs and several training shards."""
    chunk = tmp_path / "000000.parquet"
    publish_file(chunk, chunk_bytes([pair(i) for i in range(ROWS)], [], FEATURES))
    info = DatasetInfo(
        name="made",
        generator="generator",
        resolution=16,
        num_ws=NUM_WS,
        w_dim=W_DIM,
        embedder="embedder",
        embedder_fingerprint="fingerprint",
        preprocess="consistent",
        recipe="consistent",
        settings={},
        truncation=1.0,
        precision="bf16",
        seed=0,
        targets=("avataaars:20",),
        sources="sources",
        held_out="other sources",
        licence="mit",
        licence_text="MIT.",
        command="python -m data.build",
    )
    merge([chunk], tmp_path / "made", FEATURES, info, rows_per_shard=4)
    return tmp_path / "made"


def one_bit_more(value: float) -> float:
    """The next float32."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    (found,) = struct.unpack("<f", struct.pack("<i", bits + 1))
    return float(found)


def change_direction(rows: list[Row]) -> None:
    rows[3]["direction"][2][1] = one_bit_more(rows[3]["direction"][2][1])


def shorten_coefficients(rows: list[Row]) -> None:
    rows[3]["coefficients"].append(0.0)


def change_seed(rows: list[Row]) -> None:
    rows[3]["seed"] += 1


def change_recipe(rows: list[Row]) -> None:
    rows[3]["recipe"] = "paper"


def lose_column(rows: list[Row]) -> None:
    del rows[3]["loss"]


CHANGES = {
    "direction": change_direction,
    "coefficients": shorten_coefficients,
    "seed": change_seed,
    "recipe": change_recipe,
    "loss": lose_column,
}


def test_rows_are_read_in_the_order_of_splits_and_shards(made: Path) -> None:
    assert len(list((made / "data").glob("train-*"))) > 2
    in_order = [name for split in SPLITS for name, where in IDS.items() if where == split]
    assert [row["id"] for row in rows_of(made)] == in_order


def test_the_same_rows_are_equal_whatever_time_they_took(made: Path) -> None:
    found = rows_of(made)
    for row in found:
        row["seconds"] += 1
    assert unequal_rows(found, rows_of(made)) == []


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_row_is_reported_with_its_column(made: Path, column: str) -> None:
    found = rows_of(made)
    CHANGES[column](found)
    problems = unequal_rows(found, rows_of(made))
    assert problems == [f"{found[3]['id']}: {column} differ"]
    assert unequal_rows(rows_of(made), found) == problems


def test_zeros_of_either_sign_are_told_apart(made: Path) -> None:
    found, expected = rows_of(made), rows_of(made)
    found[3]["direction"][0][0], expected[3]["direction"][0][0] = -0.0, 0.0
    assert len(unequal_rows(found, expected)) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.pop(),
        lambda rows: rows.append(dict(rows[0])),
        lambda rows: rows.insert(0, rows.pop(1)),
        lambda rows: rows.clear(),
    ],
)
def test_a_missing_repeated_or_moved_row_is_reported(
    made: Path, change: Callable[[list[Row]], object]
) -> None:
    found = rows_of(made)
    change(found)
    (problem,) = unequal_rows(found, rows_of(made))
    assert problem.startswith("other targets or another order")


def test_one_bit_is_flipped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for seed in range(20):
        path.write_bytes(bytes(50))
        flip_bit(path, random.Random(seed))
        assert len(path.read_bytes()) == 50
        assert sum(byte.bit_count() for byte in path.read_bytes()) == 1


def test_a_truncated_file_is_a_beginning(tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytes(range(50))
    for seed in range(20):
        path.write_bytes(content)
        truncate(path, random.Random(seed))
        assert len(path.read_bytes()) < 50
        assert content.startswith(path.read_bytes())


def test_every_damage_is_named_and_the_dataset_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    named, wrong = check_damages(made, tmp_path / "copy", IDS, random.Random(0))
    assert wrong == []
    assert sorted(named.elements()) == sorted(KINDS)
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "copy").exists()


def name_nothing(out: Path, splits: Mapping[str, str]) -> list[str]:
    return []


def name_too_much(out: Path, splits: Mapping[str, str]) -> list[str]:
    return [f"{path.relative_to(out)}: altered" for path in (out / "data").iterdir()]


def name_another(out: Path, splits: Mapping[str, str]) -> list[str]:
    return ["README.md: altered", "1 expected but in no file that can be read: " + "0" * 16]


@pytest.mark.parametrize("verify", [name_nothing, name_too_much, name_another])
def test_a_verify_that_names_no_file_or_the_wrong_one_is_reported(
    made: Path, tmp_path: Path, verify: Any
) -> None:
    named, wrong = check_damages(made, tmp_path / "copy", IDS, random.Random(0), verify)
    assert not named
    assert len([line for line in wrong if "verify says" in line]) == len(KINDS)
