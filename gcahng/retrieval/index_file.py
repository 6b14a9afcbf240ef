"""An index on disk, together with names, labels, the network and the metric, which a search needs.

A file has, in this order:

- 8 bytes `MAGIC`;
- the version (4 bytes) and the lengths of the header, the names and the payload (8 bytes each), all little-endian;
- the header in JSON, padded so that the payload is aligned;
- the labels, int64;
- the names, as `gcahng.retrieval.items.encode_names` writes them;
- the payload, as `Index.write` writes it;
- the SHA-256 of everything before.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gcahng.bounds import check_number
from gcahng.errors import UserError
from gcahng.files import atomic_write, regular_file, writing
from gcahng.progress import Progress
from gcahng.retrieval.embeddings import EmbeddingSet
from gcahng.retrieval.index import KINDS, METRICS, Index, IndexSettings, SearchResult, build_index, read_index
from gcahng.retrieval.items import EmbeddingModel, Items, decode_names, encode_names, items_from, model_from

MAGIC = b"GCAHNGIX"
VERSION = 1

_LENGTHS = struct.Struct("<IQQQ")
_START = len(MAGIC) + _LENGTHS.size
_DIGEST_SIZE = hashlib.sha256().digest_size
_BLOCK = 1 << 22
# Alignment of the payload, the same as in numpy's files, so that its rows can be mapped into memory.
_ALIGNMENT = 64


@dataclass(frozen=True)
class IndexFile:
    """An index and the meaning of its rows.

    Attributes:
        index: the index that is searched.
        items: names and labels of its rows.
        model: the network whose embeddings are in the index. None if it is not known; then only the dimension of other
            embeddings is checked.
    """

    index: Index
    items: Items
    model: EmbeddingModel | None

    def __len__(self) -> int:
        return len(self.items)

    def check(self, what: str, embeddings: EmbeddingSet) -> None:
        """Check that embeddings can be compared with those in the index.

        If the network of either side is not known, only the dimension is checked.

        Args:
            what: name of the embeddings, for errors.
            embeddings: the embeddings to check.

        Raises:
            UserError: the embeddings have another dimension, network or preprocessing, or one side is normalized and
                the other is not, where distances are Euclidean.
        """
        dim = embeddings.embeddings.shape[1]
        if dim != self.index.dim:
            raise UserError(f"{what} has {dim} channels; it must have {self.index.dim}, like the index")
        if self.model is not None and embeddings.model is not None:
            difference = self.model.difference(embeddings.model)
            if difference:
                raise UserError(f"{what} does not fit the index: {difference}")
            if self.index.metric == "euclidean" and self.model.normalized != embeddings.model.normalized:
                which = ("is not", "are") if self.model.normalized else ("is", "are not")
                raise UserError(
                    f"{what} does not fit the index: it {which[0]} normalized and the rows of the index {which[1]}, "
                    "which changes Euclidean distances; gcahng embed --normalize decides it"
                )

    def check_new(self, what: str, items: Items) -> None:
        """Check that no image of `items` is in the index already.

        Args:
            what: name of the items, for errors.
            items: the items to check.

        Raises:
            UserError: an image is.
        """
        own = set(self.items.identities())
        duplicates = [name for place, name in items.identities() if place is not None and (place, name) in own]
        if duplicates:
            raise UserError(
                f"{len(duplicates)} of the {len(items)} images of {what} are in the index already, such as "
                f"{duplicates[0]}; --allow_duplicates adds them once more"
            )

    def add(
        self,
        what: str,
        embeddings: EmbeddingSet,
        *,
        allow_duplicates: bool = False,
        progress: Progress | None = None,
    ) -> IndexFile:
        """Append the rows of `embeddings`.

        Args:
            what: name of the embeddings, for errors.
            embeddings: what to add.
            allow_duplicates: allow images that are in the index already.
            progress: called with the rows added so far and in total.

        Returns:
            The larger index. `self` must not be used afterwards.

        Raises:
            UserError: the embeddings do not fit the index, or an image is in the index already and `allow_duplicates`
                is False.
        """
        self.check(what, embeddings)
        if not allow_duplicates:
            self.check_new(what, embeddings.items)
        self.index.add(embeddings.embeddings, progress=progress)
        model = self.model or embeddings.model
        if model is not None and embeddings.model is not None and model.exif_rotate is None:
            model = replace(model, exif_rotate=embeddings.model.exif_rotate)
        return IndexFile(self.index, self.items.followed_by(embeddings.items), model)

    def search(
        self,
        what: str,
        queries: EmbeddingSet,
        k: int = 10,
        *,
        effort: int | None = None,
        leave_out_same: bool = False,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Find the k nearest rows of every query, see `gcahng.retrieval.index.Index.search`.

        Args:
            what: name of the queries, for errors.
            queries: embeddings of the queries.
            k: rows per query; all rows if the index has fewer.
            effort: effort of the search in an approximate index.
            leave_out_same: leave out rows that are the query's own image, for queries that are in the index. If too few
                others remain, the rows of a query end with -1.
            progress: called with the queries searched so far and in total.

        Returns:
            The nearest rows of every query.

        Raises:
            UserError: the queries do not fit the index, k is out of range, or `leave_out_same` is True and the queries
                have no names.
        """
        self.check(what, queries)
        check_number("k", k)
        if not leave_out_same:
            return self.index.search(queries.embeddings, min(k, len(self)), effort=effort, progress=progress)
        if any(map(queries.items.nameless, range(len(queries)))):
            # Row 3 of this file need not be row 3 of the file that the index was built from.
            raise UserError(
                f"leave_out_same needs the names of the images, and {what} has vectors without names; a .csv with a "
                "column path beside the .npy names them"
            )
        own, theirs = self.items.identities(), queries.items.identities()
        most_copies = Counter(own).most_common(1)[0][1]
        nearest = self.index.search(
            queries.embeddings, min(k + most_copies, len(self)), effort=effort, progress=progress
        )
        rows = nearest.indices.tolist()
        is_same = torch.tensor([[own[i] == query for i in near] for query, near in zip(theirs, rows, strict=True)])
        order = is_same.sort(dim=1, stable=True).indices[:, :k]  # other images first, in their order
        left_out = is_same.gather(1, order)
        nothing = -torch.inf if self.index.metric == "cosine" else torch.inf
        return SearchResult(
            nearest.indices.gather(1, order).masked_fill(left_out, -1),
            nearest.values.gather(1, order).masked_fill(left_out, nothing),
        )


def build(
    embeddings: EmbeddingSet,
    kind: str = "flat",
    metric: str = "cosine",
    settings: IndexSettings | None = None,
    progress: Progress | None = None,
) -> IndexFile:
    """Build an index of `embeddings` that can be saved. The arguments are those of `build_index`."""
    values = embeddings.embeddings
    index = build_index(values, kind, metric=metric, backend=_builder(kind), settings=settings, progress=progress)
    return IndexFile(index, embeddings.items, embeddings.model)


def save(path: Path | str, contents: IndexFile) -> None:
    """Write an index. The file is written whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    index, items = contents.index, contents.items
    header = {
        "kind": index.kind,
        "metric": index.metric,
        "normalised": index.metric == "cosine",  # the key has this spelling in files already written
        "dim": index.dim,
        "rows": len(items),
        "model": None if contents.model is None else asdict(contents.model),
        **items.header(),
    }
    with writing(path):
        atomic_write(path, lambda file: _write(file, json.dumps(header).encode(), items, index))


def load(
    path: Path | str, *, to_add: bool = False, device: torch.device | str = "cpu", progress: Progress | None = None
) -> IndexFile:
    """Read an index. Every byte is checked first.

    Args:
        path: the file.
        to_add: the index will be added to and saved, rather than searched.
        device: device that the search runs on, see `gcahng.retrieval.index.read_index`.
        progress: called with the bytes checked so far and in total.

    Raises:
        UserError: the file cannot be read, is not an index, is of a later version, is truncated or is damaged, or faiss
            is needed and not installed.
    """
    try:
        with open(regular_file(path), "rb") as file:
            header, items = _read_checked(path, file, progress)
            backend = _builder(header["kind"]) if to_add else "auto"
            index = read_index(file, header["kind"], header["metric"], backend=backend, device=device)
            model = model_from(header["model"])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not an index that gcahng can read ({type(error).__name__}: {error})") from error
    if (len(index), index.dim) != (len(items), header["dim"]):
        raise UserError(
            f"{path} has {len(index)} rows of {index.dim} channels; by its header it must have {len(items)} of "
            f"{header['dim']}"
        )
    return IndexFile(index, items, model)


def read_header(path: Path, progress: Progress | None = None) -> tuple[dict[str, Any], Items]:
    """Read the header and the items of an index without its vectors. Every byte is checked.

    Args:
        path: the file.
        progress: called with the bytes checked so far and in total.

    Raises:
        UserError: in the same cases as `load`.
    """
    try:
        with open(regular_file(path), "rb") as file:
            return _read_checked(path, file, progress)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _builder(kind: str) -> str:
    """The backend for adding rows. When a "flat" index grows, faiss copies all its rows; torch keeps blocks."""
    return "torch" if kind == "flat" else "auto"


class _HashingWriter:
    """Writes to a file and hashes what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.written = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self._file.write(view)
        self.written += len(view)
        return len(view)


def _write(file: BinaryIO, header: bytes, items: Items, index: Index) -> None:
    # The length of the payload is known only after it is written. The file therefore starts with zeros, which are
    # replaced at the end. The digest takes the lengths last, so that it can be computed while writing.
    names = encode_names(items.names)
    header += b" " * (-(_START + len(header) + 8 * len(items) + len(names)) % _ALIGNMENT)
    file.write(MAGIC + bytes(_LENGTHS.size))
    body = _HashingWriter(file)
    body.write(header)
    body.write(items.labels.numpy().astype("<i8"))
    body.write(names)
    before = body.written
    index.write(body)  # type: ignore[arg-type]  # only its `write` is used
    lengths = MAGIC + _LENGTHS.pack(VERSION, len(header), len(names), body.written - before)
    body.digest.update(lengths)
    file.write(body.digest.digest())
    file.seek(0)
    file.write(lengths)


def _read_checked(path: Path, file: BinaryIO, progress: Progress | None) -> tuple[dict[str, Any], Items]:
    """Read the header and the items, and leave the file at the start of the payload."""
    start = file.read(_START)
    if start[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} is not an index of gcahng; it must be a file that gcahng index build wrote")
    if len(start) < _START:
        raise UserError(f"{path} is truncated; build the index again")
    version, header_size, names_size, payload_size = _LENGTHS.unpack_from(start, len(MAGIC))
    if version != VERSION:
        raise UserError(
            f"{path} has version {version}; it must have version {VERSION}, which this version of gcahng reads"
        )
    size = os.fstat(file.fileno()).st_size
    if header_size + names_size + payload_size > size:
        raise UserError(f"{path} is truncated or damaged; build the index again")
    digest, done, end = hashlib.sha256(), _START, size - _DIGEST_SIZE
    while done < end:
        block = file.read(min(_BLOCK, end - done))
        if not block:
            break
        digest.update(block)
        done += len(block)
        if progress is not None:
            progress(done, end)
    digest.update(start)
    if digest.digest() != file.read(_DIGEST_SIZE):
        raise UserError(f"{path} is truncated or damaged, because its checksum is wrong; build the index again")
    file.seek(_START)
    # What follows has the right checksum, so that only a program that wrote it wrongly can have made it unreadable.
    try:
        header = json.loads(file.read(header_size))
        rows, dim = header["rows"], header["dim"]
        if not (isinstance(rows, int) and 0 < rows <= size and isinstance(dim, int) and dim > 0):
            raise ValueError(f"it has {rows!r} rows of {dim!r} channels")
        labels = torch.from_numpy(np.frombuffer(file.read(8 * rows), "<i8").astype(np.int64))
        items = items_from(decode_names(file.read(names_size)), labels, header)
        model_from(header["model"])
        for name, allowed in {"kind": KINDS, "metric": METRICS, "normalised": (True, False)}.items():
            if header[name] not in allowed:
                raise ValueError(f"{name} is {header[name]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not an index that gcahng can read ({type(error).__name__}: {error})") from error
    return header, items
