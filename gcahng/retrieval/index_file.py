"""An index on disk with what it needs to answer: names, labels, the network, the metric.

The file: 8 bytes `MAGIC`; version (4 bytes), lengths of the header, of the names and of the payload (8 bytes each, all
little-endian); the header (JSON, padded so that the payload is aligned); labels (int64);
names (see `gcahng.retrieval.embeddings`); the payload as `gcahng.retrieval.index` writes it; SHA-256 of the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from gcahng.errors import UserError
from gcahng.files import atomic_write
from gcahng.progress import Progress
from gcahng.retrieval.embeddings import EmbeddingSet, decode_names, encode_names
from gcahng.retrieval.index import Index, IndexSettings, SearchResult, build_index, read_index
from gcahng.retrieval.items import EmbeddingModel, Items, items_from, model_from

MAGIC = b"GCAHNGIX"
VERSION = 1

_LENGTHS = struct.Struct("<IQQQ")
_START = len(MAGIC) + _LENGTHS.size
_DIGEST_SIZE = hashlib.sha256().digest_size
_BLOCK = 1 << 22
# Of the payload, so that its rows can be mapped into memory: as numpy aligns the data of its files.
_ALIGNMENT = 64


@dataclass(frozen=True)
class IndexFile:
    """An index and what its rows stand for.

    Attributes:
        index: what is searched.
        items: names and labels of its rows.
        model: the network whose embeddings are in it; None: not known, then only the dimension is checked.
    """

    index: Index
    items: Items
    model: EmbeddingModel | None

    def __len__(self) -> int:
        return len(self.items)

    def check(self, what: str, embeddings: EmbeddingSet) -> None:
        """Refuse embeddings that cannot be compared with those in the index.

        A side whose network is not known is compared by its dimension alone.

        Raises:
            UserError: another dimension, network or preprocessing; `what` names the embeddings.
        """
        dim = embeddings.embeddings.shape[1]
        if dim != self.index.dim:
            raise UserError(f"{what} has {dim} channels; the index has {self.index.dim}")
        if self.model is not None and embeddings.model is not None:
            difference = self.model.difference(embeddings.model)
            if difference:
                raise UserError(f"{what} does not fit the index: {difference}")

    def check_new(self, what: str, items: Items) -> None:
        """UserError where images among `items`, named by `what`, are in the index already."""
        there = set(self.items.identities())
        again = [name for place, name in items.identities() if place is not None and (place, name) in there]
        if again:
            raise UserError(
                f"{len(again)} of the {len(items)} images of {what} are in the index already, such as {again[0]}; "
                "--allow_duplicates adds them once more"
            )

    def add(
        self,
        what: str,
        embeddings: EmbeddingSet,
        *,
        allow_duplicates: bool = False,
        progress: Progress | None = None,
    ) -> IndexFile:
        """The index with the rows of `embeddings` after its own; `self` is not to be used afterwards.

        Args:
            what: names the embeddings in an error.
            embeddings: what to add.
            allow_duplicates: add images that are in the index already once more.
            progress: called with the rows added so far and all of them.

        Raises:
            UserError: they do not fit; images that are in the index already, without `allow_duplicates`.
        """
        self.check(what, embeddings)
        if not allow_duplicates:
            self.check_new(what, embeddings.items)
        self.index.add(embeddings.embeddings, progress=progress)
        return IndexFile(self.index, self.items.followed_by(embeddings.items), self.model or embeddings.model)

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
        """The k nearest rows of every query, see `gcahng.retrieval.index.Index.search`.

        Args:
            what: names the queries in an error.
            queries: their embeddings.
            k: rows a query; all of them where the index has fewer.
            effort: of an approximate index.
            leave_out_same: leave out rows that are the query's own image, for queries that are in the index; where too
                few others are left, -1 ends a query's rows.
            progress: called with the queries searched so far and all of them.

        Raises:
            UserError: the queries do not fit the index; k out of range; `leave_out_same` and queries without names.
        """
        self.check(what, queries)
        if k < 1:
            raise UserError(f"k is {k}; it must be at least 1")
        if not leave_out_same:
            return self.index.search(queries.embeddings, min(k, len(self)), effort=effort, progress=progress)
        if any(map(queries.items.nameless, range(len(queries)))):
            # Row 3 of this file need not be row 3 of the one that the index was built of.
            raise UserError(
                f"leave_out_same needs to know the queries' own images, and {what} has vectors without names; a .csv "
                "with a column path beside a .npy names them"
            )
        own, theirs = self.items.identities(), queries.items.identities()
        more = Counter(own).most_common(1)[0][1]
        found = self.index.search(queries.embeddings, min(k + more, len(self)), effort=effort, progress=progress)
        rows = found.indices.tolist()
        same = torch.tensor([[own[i] == query for i in near] for query, near in zip(theirs, rows, strict=True)])
        order = same.sort(dim=1, stable=True).indices[:, :k]  # the others first, in their order
        gone = same.gather(1, order)
        nothing = -torch.inf if self.index.metric == "cosine" else torch.inf
        return SearchResult(
            found.indices.gather(1, order).masked_fill(gone, -1),
            found.values.gather(1, order).masked_fill(gone, nothing),
        )


def build(
    embeddings: EmbeddingSet,
    kind: str = "flat",
    metric: str = "cosine",
    settings: IndexSettings | None = None,
    progress: Progress | None = None,
) -> IndexFile:
    """An index of `embeddings`, to be saved; arguments as in `gcahng.retrieval.index.build_index`."""
    values = embeddings.embeddings
    index = build_index(values, kind, metric=metric, backend=_builder(kind), settings=settings, progress=progress)
    return IndexFile(index, embeddings.items, embeddings.model)


def save(path: Path | str, contents: IndexFile) -> None:
    """Write an index, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    index, items = contents.index, contents.items
    header = {
        "kind": index.kind,
        "metric": index.metric,
        "normalised": index.metric == "cosine",
        "dim": index.dim,
        "rows": len(items),
        "model": None if contents.model is None else asdict(contents.model),
        **items.header(),
    }
    try:
        atomic_write(path, lambda file: _write(file, json.dumps(header).encode(), items, index))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def load(
    path: Path | str, *, to_add: bool = False, device: torch.device | str = "cpu", progress: Progress | None = None
) -> IndexFile:
    """Read an index; every byte of it is checked first.

    Args:
        path: the file.
        to_add: it will be added to and saved, rather than searched.
        device: what the search runs on, see `gcahng.retrieval.index.read_index`.
        progress: called with the bytes checked so far and all of them.

    Raises:
        UserError: it cannot be read, is no index, is of a later version, is truncated or damaged; faiss is needed and
            not installed.
    """
    try:
        with open(path, "rb") as file:
            header, items = _read_checked(path, file, progress)
            backend = _builder(header["kind"]) if to_add else "auto"
            index = read_index(file, header["kind"], header["metric"], backend=backend, device=device)
            model = model_from(header["model"])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no index that gcahng can read ({type(error).__name__}: {error})") from error
    if (len(index), index.dim) != (len(items), header["dim"]):
        raise UserError(
            f"{path} holds {len(index)} rows of {index.dim} channels; its header says {len(items)} of {header['dim']}"
        )
    return IndexFile(index, items, model)


def read_header(path: Path, progress: Progress | None = None) -> tuple[dict[str, Any], Items]:
    """The header and the items of an index, every byte checked, without loading its vectors.

    Raises:
        UserError: as `load`.
    """
    try:
        with open(path, "rb") as file:
            return _read_checked(path, file, progress)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _builder(kind: str) -> str:
    """The backend that grows an index: faiss copies all rows of a flat one when it does, torch keeps them in blocks."""
    return "torch" if kind == "flat" else "auto"


class _Digesting:
    """A file that is written to and digested as it goes."""

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
    # The payload's length is known once it is written: it comes first into the file as 0 and is set at the end. For the
    # digest the lengths come last, so that it can be made on the way.
    names = encode_names(items.names)
    header += b" " * (-(_START + len(header) + 8 * len(items) + len(names)) % _ALIGNMENT)
    file.write(MAGIC + bytes(_LENGTHS.size))
    body = _Digesting(file)
    body.write(header)
    body.write(items.labels.numpy().astype("<i8"))
    body.write(names)
    before = body.written
    index.write(body)  # type: ignore[arg-type]  # all it does is write
    lengths = MAGIC + _LENGTHS.pack(VERSION, len(header), len(names), body.written - before)
    body.digest.update(lengths)
    file.write(body.digest.digest())
    file.seek(0)
    file.write(lengths)


def _read_checked(path: Path, file: BinaryIO, progress: Progress | None) -> tuple[dict[str, Any], Items]:
    """Header and items; the file is left at the start of the payload."""
    start = file.read(_START)
    if start[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path} is no index of gcahng; name a file that gcahng index build wrote")
    if len(start) < _START:
        raise UserError(f"{path} is truncated; build the index again")
    version, header_size, names_size, payload_size = _LENGTHS.unpack_from(start, len(MAGIC))
    if version != VERSION:
        raise UserError(f"{path} is an index of version {version}; this version of gcahng reads version {VERSION}")
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
        raise UserError(f"{path} is truncated or damaged: its checksum is wrong; build the index again")
    file.seek(_START)
    header = json.loads(file.read(header_size))
    labels = torch.from_numpy(np.frombuffer(file.read(8 * header["rows"]), "<i8").astype(np.int64))
    return header, items_from(decode_names(file.read(names_size)), labels, header)
