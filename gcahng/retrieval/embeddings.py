"""Embeddings in files, with the names and labels of their rows and the network that they come from.

There are two forms with the same content. `X.safetensors` is a single file. It has the tensors "embeddings" (n, D)
float32, "labels" (n,) int64 and "names" (bytes: UTF-8, with a zero byte after each name), and the rest as JSON in its
metadata. In the other form, `X.npy` has the embeddings, `X.csv` the path and label of each row, and `X.json` the rest.
An `X.npy` without the other two, or with a .csv that has more columns, can be read as well. So embeddings made by other
programs can be searched.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import atomic_write, regular_file, write_json
from gcahng.retrieval.items import EmbeddingModel, Items, Source, items_from, model_from, unnamed
from gcahng.retrieval.rows import dtype_name

FORMAT = "gcahng-embeddings-1"
SUFFIXES = (".safetensors", ".npy")

# Bytes that are written or checked at once.
_BLOCK = 1 << 23


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
        UserError: it has another suffix.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{argument} is {path}; its name must end in {' or '.join(SUFFIXES)}")


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
    """Write X.safetensors, or X.npy with X.csv and X.json. Each file is written whole or not at all, the .npy last.

    Args:
        path: path of the file; its suffix chooses the form.
        embeddings: what to write. Rows are copied in pieces, so mapped rows are never in memory as a whole.

    Raises:
        UserError: `path` has another suffix, or a file cannot be written.
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
    try:
        if path.suffix == ".npy":
            write_json(path.with_suffix(".json"), about)
            atomic_write(path.with_suffix(".csv"), lambda file: _write_csv(file, items))
            atomic_write(path, lambda file: _write_npy(file, values))
        else:
            atomic_write(path, lambda file: _write_safetensors(file, values, items, about))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_embeddings(path: Path | str) -> EmbeddingSet:
    """Read X.safetensors, or X.npy together with X.csv and X.json if they are there.

    Raises:
        UserError: a file cannot be read, is damaged or is not a file of embeddings, or a value is not finite.
    """
    path = Path(path)
    check_suffix("embeddings", path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; it must be a {' or '.join(SUFFIXES)} file of embeddings")
    return _read_npy(path) if path.suffix == ".npy" else _read_safetensors(path)


def write_rows(file: BinaryIO, values: Tensor) -> None:
    """Write the rows (n, D) as little-endian float32, in pieces."""
    for rows in values.split(max(1, _BLOCK // (4 * max(1, values.shape[1])))):
        file.write(np.ascontiguousarray(rows.detach().cpu().float().numpy(), dtype="<f4").data)


def encode_names(names: tuple[str, ...]) -> bytes:
    """Encode names as UTF-8 with a zero byte after each. Bytes of file names that are not UTF-8 are preserved."""
    return "".join(f"{name}\0" for name in names).encode("utf-8", "surrogateescape")


def decode_names(content: bytes) -> tuple[str, ...]:
    """The inverse of `encode_names`."""
    return tuple(content.decode("utf-8", "surrogateescape").split("\0")[:-1])


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
        return _checked(path, EmbeddingSet(values, items, model_from(about["model"]), about["key"]))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
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
        values = np.load(regular_file(path), mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a .npy file of numbers or is damaged ({error})") from error
    if values.dtype.kind != "f":
        raise UserError(f"{path} contains {values.dtype} values; they must be floating point")
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        with np.errstate(over="ignore"):  # values too large for float32 become infinite, which is an error below
            values = np.asarray(values, dtype=np.float32, order="C")
    if not values.ndim:
        raise UserError(f"{path} contains a single number; it must contain embeddings (n, D), or one vector (D,)")
    rows = torch.from_numpy(values)
    rows = rows[None] if rows.ndim == 1 else rows  # a single vector
    model, key, items = None, None, unnamed(len(rows))
    if path.with_suffix(".csv").is_file():
        items = _read_csv(path.with_suffix(".csv"))
    if path.with_suffix(".json").is_file():
        beside = path.with_suffix(".json")
        try:
            about = json.loads(regular_file(beside).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{beside} has the format {about['format']!r}; beside {path} it must be {FORMAT!r}")
            model, key = model_from(about["model"]), about["key"]
            items = _with_classes(items, about)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{beside} does not describe {path} or is damaged ({error})") from error
    if len(items) != len(rows):
        raise UserError(
            f"{path} has {len(rows)} rows and {path.with_suffix('.csv')} has {len(items)}; they must be equal"
        )
    return _checked(path, EmbeddingSet(rows, items, model, key))


def _read_csv(path: Path) -> Items:
    """Read names and labels from the columns path and label. The label may be missing."""
    names: list[str] = []
    labels: list[int] = []
    places: dict[str, int] = {}
    try:
        # UTF-8 from a spreadsheet starts with a byte order mark.
        with open(regular_file(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restval="")
            if "path" not in (reader.fieldnames or ()):
                raise UserError(f"{path} has no column path; its first line must be path,label")
            for row in reader:
                names.append(row["path"])
                label = row.get("label") or ""
                labels.append(places.setdefault(label, len(places)) if label else -1)
    except (OSError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    source = Source(len(names))
    return Items(tuple(names), torch.tensor(labels, dtype=torch.int64), tuple(places), (source,))


def _with_classes(items: Items, about: dict[str, Any]) -> Items:
    """The items of a .csv with the class numbers and the sources of its .json."""
    places = {name: i for i, name in enumerate(about["class_names"])}
    renumber = torch.tensor([places[name] for name in items.class_names] + [-1])
    return items_from(items.names, renumber[items.labels], about)


def _checked(path: Path, contents: EmbeddingSet) -> EmbeddingSet:
    values, labels = contents.embeddings, contents.items.labels
    if values.ndim != 2 or 0 in values.shape or values.dtype != torch.float32 or len(values) != len(contents.items):
        raise UserError(
            f"{path} contains {dtype_name(values)} of shape {tuple(values.shape)} and {len(contents.items)} names; it "
            "must contain float32 embeddings (n, D) and a name for each row"
        )
    if int(labels.min()) < -1 or int(labels.max()) >= len(contents.items.class_names):
        raise UserError(f"{path} has labels beyond its {len(contents.items.class_names)} classes; it is damaged")
    start = 0
    for rows in values.split(max(1, _BLOCK // (4 * values.shape[1]))):
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            raise UserError(
                f"{path} has non-finite values in row {start + int((~finite).nonzero()[0])}; they must be finite"
            )
        start += len(rows)
    return contents
