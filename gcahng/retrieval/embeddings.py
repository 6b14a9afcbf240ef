"""Embeddings in files, with the names and labels of their rows and the network that they come from.

There are three forms with the same content. `X.safetensors` is a single file. It has the tensors "embeddings" (n, D)
float32, "labels" (n,) int64 and "names" (bytes: UTF-8, with a zero byte after each name), and the rest as JSON in its
metadata. `X.parquet` is a table (`gcahng.retrieval.parquet`). In the third form, `X.npy` has the embeddings, `X.csv`
the path and label of each row, and `X.json` the rest. An `X.npy` without the other two, or with a .csv that has more
columns, can be read as well, and so can an `X.parquet` with a column of embeddings. So embeddings made by other
programs can be searched.

The rest has two checksums (`gcahng.retrieval.checksums`): that of the embeddings and that of everything else. Both are
compared whenever a file is read. Names and labels in an `X.csv` may be edited, which is only noted. What has no
checksums, as files of earlier versions, is read without.
"""

from __future__ import annotations

import csv
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError, UserNote
from gcahng.extras import require
from gcahng.files import atomic_write, regular_file, write_json, writing
from gcahng.paths import check_utf8
from gcahng.retrieval import checksums
from gcahng.retrieval.items import (
    EmbeddingModel,
    Items,
    Source,
    decode_names,
    encode_names,
    items_from,
    model_from,
    unnamed,
)
from gcahng.retrieval.rows import dtype_name

FORMAT = "gcahng-embeddings-1"
SUFFIXES = (".safetensors", ".npy", ".parquet")

_ANY_SUFFIX = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
# Bytes that are written or checked at once. They stay in a core's cache.
_BLOCK = 1 << 20

_noted: set[str] = set()


@dataclass(frozen=True)
class EmbeddingSet:
    """Embeddings and what their rows stand for.

    Attributes:
        embeddings: (n, D) float32 output of the network, not normalized. Those of a file are mapped into memory, so a
            page is loaded when it is first used.
        items: names and labels of the rows.
        model: the network; None if it is not known.
        key: a hash of the images and options that the embeddings were made with; None if it is not known.
    """

    embeddings: Tensor
    items: Items
    model: EmbeddingModel | None = None
    key: str | None = None

    def __len__(self) -> int:
        return len(self.embeddings)


def check_suffix(argument: str, path: Path) -> None:
    """Check that `path` has the suffix of a file of embeddings.

    Args:
        argument: name of the argument, for errors.
        path: the path to check.

    Raises:
        UserError: it has another suffix, or is a name that safetensors does not take.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{argument} is {path}; its name must end in {_ANY_SUFFIX}")
    if path.suffix == ".safetensors":
        check_utf8(argument, path, "safetensors")


def check_free(path: Path) -> None:
    """Check that writing X.npy would not overwrite an X.csv or X.json that has nothing to do with embeddings.

    Raises:
        UserError: it would.
    """
    if path.suffix != ".npy":
        return
    beside = path.with_suffix(".json")
    try:
        is_ours = json.loads(regular_file(beside).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_ours = False
    for other in (beside, path.with_suffix(".csv")):
        if other.exists() and not is_ours:
            raise UserError(f"out is {path}, and {other.name} beside it would be overwritten; it must be another path")


def write_embeddings(path: Path | str, embeddings: EmbeddingSet) -> None:
    """Write X.safetensors, X.parquet, or X.npy with X.csv and X.json.

    Each file is written whole or not at all, the .npy last.

    Args:
        path: path of the file; its suffix chooses the form.
        embeddings: what to write. Rows are copied in pieces, so mapped rows are never in memory as a whole.

    Raises:
        UserError: `path` has another suffix, pyarrow is needed and missing, or a file cannot be written.
    """
    path = Path(path)
    check_suffix("out", path)
    items, values = embeddings.items, embeddings.embeddings
    if values.ndim != 2 or len(values) != len(items):
        raise UserError(
            f"embeddings has shape {tuple(values.shape)} and {len(items)} names; it must be (n, D) with n names"
        )
    model = None if embeddings.model is None else asdict(embeddings.model)
    about = {"format": FORMAT, "model": model, "key": embeddings.key, **items.header()}
    about[checksums.KEY] = {"embeddings": checksums.of_embeddings(values), "rest": checksums.of_items(items, about)}
    with writing(path):
        if path.suffix == ".npy":
            write_json(path.with_suffix(".json"), about)
            atomic_write(path.with_suffix(".csv"), lambda file: _write_csv(file, items))
            atomic_write(path, lambda file: _write_npy(file, values))
        elif path.suffix == ".parquet":
            from gcahng.retrieval import parquet

            atomic_write(path, lambda file: parquet.write(file, values, items, about))
        else:
            atomic_write(path, lambda file: _write_safetensors(file, values, items, about))


def read_embeddings(path: Path | str) -> EmbeddingSet:
    """Read X.safetensors, X.parquet, or X.npy together with X.csv and X.json if they are there.

    Raises:
        UserError: a file cannot be read, is damaged or is not a file of embeddings, or a value is not finite.
    """
    path = Path(path)
    check_suffix("embeddings", path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; it must be a {_ANY_SUFFIX} file of embeddings")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)


def write_rows(file: BinaryIO, values: Tensor) -> None:
    """Write the rows (n, D) as little-endian float32, in pieces."""
    for rows in checksums.rows_as_bytes(values, _BLOCK):
        file.write(rows.data)


def _write_safetensors(file: BinaryIO, values: Tensor, items: Items, about: dict[str, Any]) -> None:
    # The writer of safetensors needs all tensors in memory, so the file is written here. The format is 8 bytes with the
    # length of a JSON header, the header, padded to 8 bytes, and the tensors without gaps. Labels come first, so that
    # they are aligned.
    names = encode_names(items.names)
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "gcahng": json.dumps(about)}}
    tensors: list[tuple[str, str, list[int], int, Callable[[], object]]] = [
        ("labels", "I64", [len(items)], 8 * len(items), lambda: file.write(_as_bytes(items.labels, "<i8"))),
        ("embeddings", "F32", list(values.shape), 4 * values.numel(), lambda: write_rows(file, values)),
        ("names", "U8", [len(names)], len(names), lambda: file.write(names)),
    ]
    start = 0
    for name, dtype, shape, size, _ in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for *_, write in tensors:
        write()


def _as_bytes(values: Tensor, dtype: str) -> bytes:
    return values.cpu().numpy().astype(dtype).tobytes()


def _read_safetensors(path: Path) -> EmbeddingSet:
    require("safetensors", extra="train", purpose=f"reading {path}")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular_file(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} has the format {metadata.get('format')!r}; it must be {FORMAT!r}")
            values, labels, names = (file.get_tensor(name) for name in ("embeddings", "labels", "names"))
        about = json.loads(metadata["gcahng"])
        items = items_from(decode_names(names.numpy().tobytes()), labels.clone(), about)
        return checked(path, EmbeddingSet(values, items, model_from(about["model"]), about["key"]), about)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise UserError(f"{path} is not a file of embeddings or is damaged ({error})") from error


def _write_npy(file: BinaryIO, values: Tensor) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(values.shape)})
    write_rows(file, values)


def _write_csv(file: BinaryIO, items: Items) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label"])
    rows.writerows((name, items.class_name(i) or "") for i, name in enumerate(items.names))
    text.detach()  # this flushes, and leaves the file open for the caller


def _read_npy(path: Path) -> EmbeddingSet:
    try:
        # Copy on write, because PyTorch warns about arrays that are read-only.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a header of Python 2 is none the worse
            values = np.lib.format.open_memmap(regular_file(path), mode="c")
        size, known = path.stat().st_size, values.offset + values.nbytes
        if size != known:
            raise ValueError(f"it has {size} bytes, and by its header {known}")
    except Exception as error:  # numpy reads a header by Python's own parser, which raises whatever it does
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a .npy file of numbers or is damaged ({reason})") from error
    if values.dtype.kind != "f":
        raise UserError(f"{path} contains {values.dtype} values; they must be floating point")
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is an error below
            values = np.asarray(values, dtype=np.float32, order="C")
    if not values.ndim:
        raise UserError(f"{path} contains a single number; it must contain embeddings (n, D), or one vector (D,)")
    rows = torch.from_numpy(values)
    rows = rows[None] if rows.ndim == 1 else rows  # a single vector
    about: dict[str, Any] | None = None
    model, key, items = None, None, unnamed(len(rows))
    if path.with_suffix(".csv").is_file():
        items = _read_csv(path.with_suffix(".csv"))
        if len(items) != len(rows):
            raise UserError(
                f"{path} has {len(rows)} rows and {path.with_suffix('.csv')} has {len(items)}; they must be equal"
            )
    if path.with_suffix(".json").is_file():
        beside = path.with_suffix(".json")
        try:
            about = json.loads(regular_file(beside).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{beside} has the format {about['format']!r}; beside {path} it must be {FORMAT!r}")
            model, key = model_from(about["model"]), about["key"]
            items = _with_classes(items, about)
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            if isinstance(error, UserError) and str(beside) in str(error):
                raise
            raise UserError(f"{beside} does not describe {path} or is damaged ({error})") from error
    return checked(path, EmbeddingSet(rows, items, model, key), about)


def _read_parquet(path: Path) -> EmbeddingSet:
    from gcahng.retrieval import parquet

    values, names, labels, about = parquet.read(path)
    try:
        if about is None:
            return checked(path, EmbeddingSet(values, _by_class_names(names, labels)), None)
        if about["format"] != FORMAT:
            raise UserError(f"{path} has the format {about['format']!r}; it must be {FORMAT!r}")
        items = _with_classes(_by_class_names(names, labels), about)
        return checked(path, EmbeddingSet(values, items, model_from(about["model"]), about["key"]), about)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        raise UserError(f"{path} is not a file of embeddings or is damaged ({error})") from error


def _read_csv(path: Path) -> Items:
    """Read names and labels from the columns path and label. The label may be missing."""
    names: list[str] = []
    labels: list[str] = []
    try:
        # UTF-8 from a spreadsheet starts with a byte order mark.
        with open(regular_file(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if "path" not in (reader.fieldnames or ()):
                raise UserError(f"{path} has no column path; its first line must be path,label")
            for row in reader:
                names.append(row["path"])
                labels.append(row.get("label") or "")
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _by_class_names(names, labels)


def _by_class_names(names: Sequence[str], classes: Sequence[str | None]) -> Items:
    """Items by the name of the class of each; "" or None for no class."""
    places: dict[str, int] = {}
    labels = [places.setdefault(name, len(places)) if name else -1 for name in classes]
    return Items(tuple(names), torch.tensor(labels, dtype=torch.int64), tuple(places), (Source(len(names)),))


def _with_classes(items: Items, about: dict[str, Any]) -> Items:
    """The items of a .csv with the class numbers and the sources of its .json."""
    places = {name: i for i, name in enumerate(about["class_names"])}
    renumber = torch.tensor([places[name] for name in items.class_names] + [-1])
    return items_from(items.names, renumber[items.labels], about)


def checked(path: Path, contents: EmbeddingSet, about: dict[str, Any] | None) -> EmbeddingSet:
    """Check what was read.

    Args:
        path: the file that it is from.
        contents: what was read.
        about: what gcahng wrote with it, where the checksums are; None: another program wrote it.

    Returns:
        `contents`.

    Raises:
        UserError: a shape, a type or a label is wrong, a value is not finite, or a checksum says that the file is
            damaged.
    """
    values = contents.embeddings
    if values.ndim != 2 or 0 in values.shape or values.dtype != torch.float32 or len(values) != len(contents.items):
        raise UserError(
            f"{path} contains {dtype_name(values)} of shape {tuple(values.shape)} and {len(contents.items)} names; it "
            "must contain float32 embeddings (n, D) and a name for each row"
        )
    start, not_finite, crc = 0, None, checksums.of_no_rows(values.shape)
    for rows in checksums.rows_as_bytes(values, _BLOCK):
        crc = checksums.with_rows(crc, rows)
        finite = np.isfinite(rows)  # ten times as fast as torch's
        if not_finite is None and not finite.all():
            not_finite = start + int((~finite).any(axis=1).argmax())
        start += len(rows)
    # First, because a value that is not finite may be one that was damaged.
    if about is not None:
        _compare(path, contents.items, about, checksums.as_text(crc))
    if not_finite is not None:
        raise UserError(f"{path} has non-finite values in row {not_finite}; they must be finite")
    return contents


def _compare(path: Path, items: Items, about: dict[str, Any], embeddings: str) -> None:
    """Compare the checksums in `about` with that of the embeddings and with that of the items and `about` itself."""
    beside = path.with_suffix(".json")
    written = about.get(checksums.KEY)
    if written is None:
        if "no checksum" not in _noted:
            _noted.add("no checksum")
            warnings.warn(
                f"{path} has no checksum, because an earlier version of gcahng wrote it; damage to it is not found",
                UserNote,
                stacklevel=4,
            )
        return
    if not isinstance(written, dict) or set(written) != {"embeddings", "rest"}:
        raise UserError(f"{path if path.suffix != '.npy' else beside} is damaged; its checksums cannot be read")
    if written["embeddings"] != embeddings:
        on_purpose = f"; if they were changed on purpose, remove {beside.name}" if path.suffix == ".npy" else ""
        raise UserError(
            f"{path} is damaged: the checksum of its embeddings is {embeddings}; it must be {written['embeddings']}"
            f"{on_purpose}"
        )
    rest = checksums.of_items(items, about)
    if written["rest"] == rest:
        return
    if path.suffix != ".npy":
        raise UserError(
            f"{path} is damaged: the checksum of its names and labels is {rest}; it must be {written['rest']}"
        )
    warnings.warn(
        f"{path.with_suffix('.csv')} or {beside.name} was changed since it was written; names and labels are taken as "
        "they are there",
        UserNote,
        stacklevel=4,
    )
