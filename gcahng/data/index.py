"""The index: the stored listing of a data set, so that the next start does not have to look at every file."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gcahng.data.listing import SPLITS, DataSetFiles, Listing, SplitFiles, leaves_folder
from gcahng.errors import UserNote
from gcahng.files import atomic_write, regular_file

_SCHEMA = 1


def read_index(name: str, data_files: DataSetFiles) -> Listing | None:
    """The stored listing of these label files; None if there is none that is intact and up to date.

    A `UserNote` names an index that is damaged.
    """
    for path in _index_paths(name, data_files):
        try:
            content = regular_file(path).read_bytes()
        except OSError:
            continue
        checksum, _, body = content.partition(b"\n")
        try:
            if hashlib.sha256(body).hexdigest().encode() != checksum:
                raise ValueError("another checksum")
            values = json.loads(body)
            if values["schema"] != _SCHEMA or values["key"] != data_files.key:
                continue
            splits = {split: _split_files(values["splits"][split]) for split in SPLITS if split in values["splits"]}
            if not {"train", "test"} <= splits.keys():
                raise ValueError("a split is missing")
        except (ValueError, KeyError, TypeError, RecursionError):
            warnings.warn(f"{path} is damaged; the files are listed anew", UserNote, stacklevel=3)
            continue
        # The index may come from somebody else's archive, so its paths are checked.
        if not any(leaves_folder(image) for files in splits.values() for image in files.paths):
            return Listing(data_files.root, splits)
    return None


def _split_files(values: dict[str, Any]) -> SplitFiles:
    """The files of a split.

    Raises:
        ValueError, TypeError: the values are not those of a split.
    """
    files = SplitFiles(**values)
    kinds = ((files.paths, str), (files.labels, int), (files.class_names, str), (files.sizes, int))
    if not all(type(column) is list and all(type(value) is kind for value in column) for column, kind in kinds):
        raise TypeError("another type")
    if not 0 < len(files.paths) == len(files.labels) == len(files.sizes):
        raise ValueError("another length")
    if not (min(files.labels) >= 0 and max(files.labels) < len(files.class_names) and min(files.sizes) >= 0):
        raise ValueError("out of range")
    return files


def write_index(name: str, data_files: DataSetFiles, listing: Listing) -> Path | None:
    """Store a listing in the data set's folder, or else in the user's cache.

    Returns:
        The path of the index; None if neither place can be written.
    """
    values = {
        "schema": _SCHEMA,
        "key": data_files.key,
        "splits": {n: asdict(files) for n, files in listing.splits.items()},
    }
    body = json.dumps(values).encode()
    content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    for path in _index_paths(name, data_files):
        with suppress(OSError):  # a read-only folder or a full disk is no error, since an index only saves time
            atomic_write(path, lambda file: file.write(content))
            return path
    return None


def _index_paths(name: str, data_files: DataSetFiles) -> Iterator[Path]:
    yield data_files.root / f".gcahng-{name}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gcahng"
    yield cache / f"{name}-{hashlib.sha256(os.fsencode(os.path.realpath(data_files.root))).hexdigest()[:16]}.json"
