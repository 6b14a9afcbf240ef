"""Embeddings in a Parquet table: columns `path`, `label` and `embedding`, and the rest as JSON in its metadata.

pandas, Polars, DuckDB and Spark read it. `embedding` is a list of D float32; `label` is null for a row without a label.
A table of another program needs only a column `embedding` (or `embeddings`) with lists of equal length.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import regular_file
from gcahng.retrieval.items import Items

# The key of the rest in the table's metadata, and one that says that there is such a key. Parquet has no checksum of
# its metadata, and a table whose first key is damaged would pass for one of another program.
_KEY, _MARK = b"gcahng", b"written_by"
# Rows that are written or read at once: 64 MiB with 512 channels.
_ROWS = 1 << 15


def write(file: BinaryIO, values: Tensor, items: Items, about: dict[str, Any]) -> None:
    """Write a table, in pieces.

    Args:
        file: an open binary file.
        values: (n, D) embeddings.
        items: names and labels of the rows.
        about: the rest.

    Raises:
        UserError: pyarrow is missing.
    """
    require("pyarrow", extra="parquet", purpose="writing a .parquet file")
    import pyarrow as pa
    import pyarrow.parquet as pq

    dim = values.shape[1]
    names = [name.encode("utf-8", "surrogateescape") for name in items.names]
    # Text is UTF-8 in Parquet, and a file's name need not be.
    text = pa.string() if all(map(_is_text, items.names)) else pa.binary()
    columns = [("path", text), ("label", pa.string()), ("embedding", pa.list_(pa.float32(), dim))]
    schema = pa.schema(columns, metadata={_KEY: json.dumps(about).encode(), _MARK: b"gcahng"})
    # Without dictionaries and statistics: embeddings do not repeat.
    with pq.ParquetWriter(
        file, schema, use_dictionary=["label"], write_statistics=False, compression={"path": "zstd", "label": "zstd"}
    ) as table:
        for start in range(0, len(values), _ROWS):
            rows = values[start : start + _ROWS].detach().cpu().float().contiguous().numpy()
            labels = [items.class_name(row) for row in range(start, start + len(rows))]
            lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), dim)
            arrays = [pa.array(names[start : start + len(rows)], pa.binary()).cast(text), pa.array(labels), lists]
            table.write_batch(pa.record_batch([arrays[0], arrays[1].cast(pa.string()), arrays[2]], schema=schema))


def read(path: Path) -> tuple[Tensor, list[str], list[str | None], dict[str, Any] | None]:
    """Read a table.

    Returns:
        The embeddings (n, D) float32, the name of each row (its number where there is no column `path`), the name of
        its class (None where it has none), and the rest (None in a table of another program).

    Raises:
        UserError: pyarrow is missing, or the file cannot be read, is damaged, or has no embeddings.
    """
    require("pyarrow", extra="parquet", purpose=f"reading {path}")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(regular_file(path), page_checksum_verification=True) as table:
            schema, count = table.schema_arrow, table.metadata.num_rows
            about = _about(table)
            column = next((name for name in ("embedding", "embeddings") if name in schema.names), None)
            if column is None:
                raise UserError(f"{path} has no column embedding; it has {', '.join(schema.names)}")
            values: np.ndarray | None = None
            names: list[Any] = []
            labels: list[Any] = []
            for batch in table.iter_batches(_ROWS, columns=[n for n in ("path", "label", column) if n in schema.names]):
                rows = _rows(path, batch.column(column))
                if values is None:
                    values = np.empty((count, rows.shape[1]), np.float32)
                if rows.shape[1] != values.shape[1]:
                    raise UserError(f"{path} has embeddings of {values.shape[1]} and of {rows.shape[1]} channels")
                values[len(names) : len(names) + len(rows)] = rows
                known = {name: batch.column(name).to_pylist() for name in ("path", "label") if name in schema.names}
                names += known.get("path", [str(row) for row in range(len(names), len(names) + len(rows))])
                labels += known.get("label", [None] * len(rows))
            if len(names) != count:
                raise ValueError(f"it has {len(names)} rows, and by its footer {count}")
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, RuntimeError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a Parquet table of embeddings or is damaged ({reason})") from error
    if values is None:
        raise UserError(f"{path} has no rows; it must have embeddings")
    decoded = [name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else str(name) for name in names]
    return torch.from_numpy(values), decoded, [None if label is None else str(label) for label in labels], about


def _about(table: Any) -> dict[str, Any] | None:
    """What gcahng wrote with a table (a `ParquetFile`); None in one of another program.

    Raises:
        ValueError: the metadata is damaged.
    """
    metadata = table.metadata.metadata or {}
    if (_KEY in metadata) != (metadata.get(_MARK) == b"gcahng"):
        raise ValueError("a key of its metadata is missing")
    writer = table.metadata.created_by
    if not metadata and (not writer or writer.startswith("parquet-cpp-arrow")):
        raise ValueError("it has no metadata, which pyarrow always writes")
    return json.loads(metadata[_KEY]) if _KEY in metadata else None


def _rows(path: Path, column: Any) -> np.ndarray:
    """The embeddings (b, D) float32 of a column of lists."""
    import pyarrow as pa

    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise UserError(f"{path} has embeddings of type {kind}; they must be lists of floating-point numbers")
    values = column.flatten()
    if column.null_count or values.null_count or len(values) % len(column):
        raise UserError(f"{path} has rows without an embedding or of unequal length; each must have D numbers")
    dim = len(values) // len(column)
    if not pa.types.is_fixed_size_list(kind) and set(column.value_lengths().to_pylist()) != {dim}:
        raise UserError(f"{path} has rows without an embedding or of unequal length; each must have D numbers")
    with np.errstate(over="ignore"):  # what float32 does not hold becomes infinite, which is refused later
        return values.to_numpy(zero_copy_only=False).astype(np.float32, copy=False).reshape(len(column), dim)


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
