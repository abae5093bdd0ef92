"""Rows of the pair dataset, and the chunks in which workers publish them.

Knows what a pair is, how rows are checked and how they become parquet; nothing of the folder of a
finished dataset or of how directions are found.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Array2D, Features, List, Value
from jaxtyping import Float32
from numpy import ndarray

SPLITS = ("train", "validation", "test")
GROUP_ROWS = 256  # rows of a parquet row group: a reader decodes a whole group to get one row
UNIT_TOLERANCE = 1e-3

# Stands in a chunk in place of its own hash while that is computed. Neither JSON nor file names
# hold a zero byte, so there is one such place.
SEAL = b"\0sha256:"
BLANK = SEAL + b"0" * 64

# Random floats do not repeat, so a dictionary only costs; their bytes sorted by place do compress.
# Of 18 x 512 directions this keeps 33 kB a row, Arrow's own settings 43, and it is faster.
WRITING: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["split", "recipe"],
    "use_byte_stream_split": ["embedding.list.element", "direction.list.element.list.element"],
    "write_page_checksum": True,
}

COLUMNS = {
    "id": ("string", "names the target; alone decides its split"),
    "split": ("string", "train, validation or test"),
    "origin": ("string", "where the target picture comes from"),
    "embedding": ("float32", "the target's embedding, of length 1"),
    "norm": ("float32", "length of the embedding before it was scaled to 1, above 0"),
    "direction": ("float32", "what is added to a source's W+ latent, unbounded"),
    "coefficients": ("float32", "factor of the direction for each source, 1 unless learned"),
    "loss": ("float32", "the optimizer's last weighted loss, on its own sources"),
    "transfer": ("float32", "mean cosine of its own edited sources to the target, -1 to 1"),
    "consistency": ("float32", "1 - consistency loss, on its own sources, at most 1"),
    "held_out_transfer": ("float32", "transfer on sources the optimizer never edited, -1 to 1"),
    "held_out_consistency": ("float32", "consistency on these, at most 1"),
    "held_out_before": ("float32", "transfer of these before they are edited, -1 to 1"),
    "steps": ("int32", "steps the optimizer took"),
    "seconds": ("float32", "time it took, its share of the batch"),
    "seed": ("int64", "of the optimizer's random numbers"),
    "recipe": ("string", "name of the optimizer's recipe"),
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A row: one target and its direction. COLUMNS describes the values."""

    id: str
    split: str
    origin: str
    embedding: Float32[ndarray, " embed"]
    norm: float
    direction: Float32[ndarray, "num_ws w_dim"]
    coefficients: Float32[ndarray, " sources"]
    loss: float
    transfer: float
    consistency: float
    held_out_transfer: float
    held_out_consistency: float
    held_out_before: float
    steps: int
    seconds: float
    seed: int
    recipe: str


@dataclass(frozen=True)
class Failure:
    """A target that gave no pair."""

    id: str
    """Empty if the picture could not be decoded, since the id is made of its pixels."""
    origin: str
    stage: str
    """decode or optimize."""
    reason: str


def features(embed: int, num_ws: int, w_dim: int) -> Features:
    """Return the columns of a dataset with embeddings [embed] and directions [num_ws, w_dim]."""
    arrays = {
        "embedding": List(Value("float32"), length=embed),
        "direction": Array2D((num_ws, w_dim), "float32"),
        "coefficients": List(Value("float32")),
    }
    return Features({n: arrays.get(n, Value(dtype)) for n, (dtype, _) in COLUMNS.items()})


def such_as(names: Sequence[str]) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def dimensions(columns: Features) -> tuple[int, int, int]:
    """Return embed, num_ws and w_dim of the columns of a pair dataset.
    ValueError: they are other columns."""
    direction = columns.get("direction")
    expected = Features()
    if isinstance(direction, Array2D):
        dims = (getattr(columns.get("embedding"), "length", -1), *direction.shape)
        expected = features(*dims)
        # Equal dicts may still differ in the order of the columns.
        if list(columns.items()) == list(expected.items()):
            return dims
    names = dict.fromkeys([*COLUMNS, *columns])
    different = [name for name in names if columns.get(name) != expected.get(name)]
    raise ValueError(
        "expected the columns of a pair dataset, found missing, added or of another type: "
        f"{such_as(different) or 'their order'}"
    )


def float_block(column: pa.ChunkedArray, shape: tuple[int, ...]) -> Float32[ndarray, "rows ..."]:
    """Return a column of nested lists as one array [rows, *shape].
    ValueError: a list is of another size, or null."""
    values = column.combine_chunks()
    values = values.storage if isinstance(values, pa.ExtensionArray) else values
    for size in shape:
        if values.null_count or set(pc.list_value_length(values).unique().to_pylist()) - {size}:
            raise ValueError(f"expected arrays of {list(shape)}, found other ones or nulls")
        values = values.flatten()
    block: Float32[ndarray, "rows ..."] = values.to_numpy(zero_copy_only=False)
    return block.reshape(len(column), *shape)


def bad_rows(table: pa.Table, columns: Features) -> dict[str, list[str]]:
    """Return the ids of rows that are no pairs, by what is wrong with them.
    ValueError: there are nulls, or arrays of other shapes."""
    nulls = [name for name in columns if table[name].null_count]
    if nulls:
        raise ValueError(f"expected a value in every row, found nulls in {', '.join(nulls)}")
    embed, num_ws, w_dim = dimensions(columns)
    embeddings = float_block(table["embedding"], (embed,))
    directions = float_block(table["direction"], (num_ws, w_dim))
    finite = np.isfinite(embeddings).all(axis=1) & np.isfinite(directions).all(axis=(1, 2))
    for name, feature in columns.items():
        if feature == Value("float32"):
            finite &= np.isfinite(table[name].to_numpy())
    coefficients = table["coefficients"].combine_chunks()
    rows = pc.list_parent_indices(coefficients).to_numpy()
    finite[rows[~np.isfinite(coefficients.flatten().to_numpy(zero_copy_only=False))]] = False
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    splits = np.isin(table["split"].to_pylist(), SPLITS)
    wrong = {
        "values that are not finite": ~finite,
        "an embedding that is not of length 1": finite & (abs(lengths - 1) > UNIT_TOLERANCE),
        f"a split other than {', '.join(SPLITS)}": ~splits,
    }
    ids = np.array(table["id"].to_pylist(), dtype=object)
    return {kind: ids[where].tolist() for kind, where in wrong.items() if where.any()}


def parquet_bytes(
    groups: Iterable[pa.Table], schema: pa.Schema, note: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of a parquet file, a row group for each table.

    Made in memory, because Arrow's own file writer, as datasets drives it, ends the process on a
    full disk.
    """
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, **WRITING) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=GROUP_ROWS)
        if note:
            writer.add_key_value_metadata(note)
    return buffer.getvalue()


def sealed(content: bytes) -> bytes:
    """Return a file with its own SHA-256 in it, computed while that was blank.

    Page checksums cover the rows alone: neither the failures nor the names of columns.
    """
    head, tail = content.rsplit(BLANK, 1)
    return head + SEAL + hashlib.sha256(content).hexdigest().encode() + tail


def is_sealed(content: bytes) -> bool:
    """Tell whether a file is as it was when it was sealed."""
    head, seal, tail = content.rpartition(SEAL)
    blank = head + BLANK + tail[64:]
    return bool(seal) and tail[:64] == hashlib.sha256(blank).hexdigest().encode()


def chunk_bytes(pairs: Sequence[Pair], failures: Sequence[Failure], features: Features) -> bytes:
    """Return pairs and failures as a parquet file; the failures are in its metadata.
    ValueError: an array of another shape than `features` has, a value that is not finite, an
    embedding that is not of length 1, an unknown split."""
    embed, num_ws, w_dim = dimensions(features)
    for pair in pairs:
        if pair.embedding.shape != (embed,) or pair.direction.shape != (num_ws, w_dim):
            raise ValueError(
                f"target {pair.id}: expected an embedding [{embed}] and a direction [{num_ws}, "
                f"{w_dim}], found {list(pair.embedding.shape)} and {list(pair.direction.shape)}; "
                "build pairs of another model into another folder"
            )
    rows: dict[str, list[Any]] = {name: [getattr(pair, name) for pair in pairs] for name in COLUMNS}
    # Names of files may hold bytes that are not UTF-8.
    rows["origin"] = [o.encode("utf-8", "backslashreplace").decode() for o in rows["origin"]]
    rows["direction"] = [list(direction) for direction in rows["direction"]]
    metadata = {"failures": json.dumps([asdict(failure) for failure in failures])}
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, **metadata})
    arrays = [pa.array(rows[column.name], type=column.type) for column in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    for kind, ids in bad_rows(table, features).items():
        raise ValueError(
            f"target {such_as(ids)}: expected a pair, found {kind}; make it a failure instead"
        )
    return sealed(parquet_bytes([table], schema, {"seal": BLANK.decode()}))


def read_chunk(path: Path) -> tuple[pa.Table, list[Failure]]:
    """Read a chunk: its rows, with COLUMNS as columns, and its failures.
    FileNotFoundError: no such file. ValueError: it is truncated, altered, or no chunk."""
    if not path.is_file():
        raise FileNotFoundError(f"no chunk at {str(path)!r}; run the build again")
    content = path.read_bytes()
    # Checked before Arrow decodes it, which need not survive a damaged file.
    if not is_sealed(content):
        raise ValueError(
            f"{str(path)!r} is truncated or altered: it is not what its own SHA-256 says; "
            "delete it and run the build again"
        )
    file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
    table = file.read(use_threads=False)
    failures = [Failure(**failure) for failure in json.loads(table.schema.metadata[b"failures"])]
    return table, failures
