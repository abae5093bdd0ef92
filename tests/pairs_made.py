"""Pairs made of an index, and what their tests share."""

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from data.pairs import Failure, Pair, features

EMBED, NUM_WS, W_DIM = 8, 4, 6
FEATURES = features(EMBED, NUM_WS, W_DIM)
FAILED = [
    Failure("", "faces/empty.png", "decode", "'faces/empty.png' is an empty file"),
    Failure("f" * 16, "avataaars:3", "optimize", "the loss was NaN\nat step 3, naïve"),
]


def split_of_index(index: int) -> str:
    return {4: "validation", 7: "test"}.get(index % 10, "train")


def name_of(index: int) -> str:
    return hashlib.sha256(str(index).encode()).hexdigest()[:16]


def pair(index: int, embed: int = EMBED, num_ws: int = NUM_WS, w_dim: int = W_DIM) -> Pair:
    rng = np.random.default_rng(index)
    embedding = rng.normal(size=embed)
    scores = rng.normal(size=8).astype(np.float32).tolist()
    return Pair(
        id=name_of(index),
        split=split_of_index(index),
        origin=f"faces/{index}.png",
        embedding=(embedding / np.linalg.norm(embedding)).astype(np.float32),
        norm=scores[0] ** 2,
        direction=rng.normal(size=(num_ws, w_dim)).astype(np.float32),
        coefficients=rng.normal(size=1 + index % 3).astype(np.float32),
        loss=scores[1],
        transfer=scores[2],
        consistency=scores[3],
        held_out_transfer=scores[4],
        held_out_consistency=scores[5],
        held_out_before=scores[6],
        steps=150 + index,
        seconds=scores[7] ** 2,
        seed=2**62 + index,
        recipe="consistent",
    )


def one_line_error(action: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)
