"""An index for faiss alone, without gcahng.

`X.faiss` is read by `faiss.read_index`, and `X.csv` says what its ids are: a line `id,path,label,same_as` for each row,
in order. Ids are the rows of the index. "cosine" is faiss's inner product of rows of norm 1, so queries have to be
scaled to norm 1; "euclidean" is faiss's METRIC_L2, whose values are squared distances.

Where some rows are copies of others, an approximate index has only the first of each, and `same_as` of the others is
the id of that one. A flat index has them all.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, BinaryIO

from gcahng.errors import UserError
from gcahng.extras import require_faiss
from gcahng.files import atomic_write, writing
from gcahng.progress import Progress
from gcahng.retrieval.index_base import Index
from gcahng.retrieval.index_faiss import FaissIndex
from gcahng.retrieval.index_file import load
from gcahng.retrieval.items import Items


def export_faiss(index: Path | str, out: Path | str, progress: Progress | None = None) -> str:
    """Write X.faiss and X.csv, each whole or not at all, the .faiss last.

    Args:
        index: an index that `gcahng.retrieval.index_file.save` wrote.
        out: X.faiss.
        progress: called with the bytes of the index checked so far and in total.

    Returns:
        What the file holds, in a line.

    Raises:
        UserError: `out` has another suffix, a file is there already or cannot be written, faiss is missing, or `index`
            is not an index or is damaged.
    """
    out = Path(out)
    if out.suffix != ".faiss":
        raise UserError(f"out is {out}; its name must end in .faiss")
    table = out.with_suffix(".csv")
    for path in (out, table):
        if path.exists():
            raise UserError(f"out is {out}, and {path} exists; both must be new files")
    require_faiss("exporting to faiss")
    contents = load(index, progress=progress)
    plain, same_as = _plain(contents.index), {}
    if contents.index.kind != "flat":
        same_as = contents.index.copies.originals()
    for path, write in (
        (table, lambda file: _write_table(file, contents.items, same_as)),
        (out, lambda file: _write(file, plain)),
    ):
        with writing(path):
            atomic_write(path, write)
    metric = {"cosine": "inner product of rows of norm 1", "euclidean": "squared Euclidean distance"}
    left_out = f", {len(same_as)} copies left out" if same_as else ""
    return f"{plain.ntotal} rows of {plain.d} channels, {metric[contents.index.metric]}{left_out}"


def _plain(index: Index) -> Any:
    """An index of faiss whose ids are rows."""
    import faiss

    assert isinstance(index, FaissIndex), "faiss is installed"
    if not index.copies.any:
        return index.raw
    if index.kind == "flat":
        plain = FaissIndex.empty(index.dim, "flat", index.metric, "Flat").raw
        for rows in index.every_row():
            plain.add(rows)
        return plain
    # The constructor wants an index that is empty, and `add_with_ids` would then add the rows once more.
    rows, index.raw.ntotal = index.raw.ntotal, 0
    plain = faiss.IndexIDMap2(index.raw)
    plain.ntotal = index.raw.ntotal = rows
    faiss.copy_array_to_vector(index.copies.first_rows(), plain.id_map)
    plain.construct_rev_map()
    return plain


def _write(file: BinaryIO, plain: Any) -> None:
    import faiss

    faiss.write_index(plain, faiss.PyCallbackIOWriter(file.write))


def _write_table(file: BinaryIO, items: Items, same_as: dict[int, int]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "path", "label", "same_as"])
    for row, name in enumerate(items.names):
        rows.writerow([row, items.path(row) or name, items.class_name(row) or "", same_as.get(row, "")])
    text.detach()  # this flushes, and leaves the file open for the caller
