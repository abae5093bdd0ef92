"""Chunks: what is written is read again, what is no pair is refused, and damage is noticed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs_made import EMBED, FAILED, FEATURES, NUM_WS, W_DIM, name_of, one_line_error, pair

from data.pairs import Failure, chunk_bytes, read_chunk


def test_a_chunk_of_the_same_rows_is_the_same_bytes() -> None:
    rows = [pair(i) for i in range(4)]
    assert chunk_bytes(rows, FAILED, FEATURES) == chunk_bytes(rows, FAILED, FEATURES)


def test_arrays_of_another_width_are_refused_in_one_line() -> None:
    message = one_line_error(lambda: chunk_bytes([pair(0), pair(1, embed=9)], [], FEATURES))
    assert name_of(1) in message and "[8]" in message and "[9]" in message
    message = one_line_error(lambda: chunk_bytes([pair(0, w_dim=7)], [], FEATURES))
    assert "[4, 6]" in message and "[4, 7]" in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"embedding": np.full(EMBED, np.nan, np.float32)}, "not finite"),
        ({"direction": np.full((NUM_WS, W_DIM), np.inf, np.float32)}, "not finite"),
        ({"coefficients": np.array([1, np.nan], np.float32)}, "not finite"),
        ({"held_out_transfer": float("nan")}, "not finite"),
        ({"embedding": np.ones(EMBED, np.float32)}, "not of length 1"),
        ({"split": "training"}, "split other than"),
    ],
)
def test_a_row_that_is_no_pair_is_not_written(change: dict[str, Any], part: str) -> None:
    rows = [pair(0), replace(pair(1), **change), pair(2)]
    message = one_line_error(lambda: chunk_bytes(rows, [], FEATURES))
    assert part in message and name_of(1) in message and name_of(0) not in message


def test_any_change_of_a_chunk_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    failure = Failure("", "x", "decode", "a reason with \0sha256:" + "0" * 64)
    content = chunk_bytes([pair(0)], [failure], FEATURES)
    path.write_bytes(content)
    assert read_chunk(path)[1] == [failure]
    for place in range(0, len(content), 29):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        assert str(path) in one_line_error(lambda: read_chunk(path))
    for size in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "truncated" in one_line_error(lambda: read_chunk(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no chunk"):
        read_chunk(path)
