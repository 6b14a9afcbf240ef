"""The index: the stored listing of a data set, so that the next start does not have to look at every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gcahng.data.listing import SPLITS, DataSetFiles, Listing, SplitFiles, leaves_folder

_SCHEMA = 1


def read_index(name: str, data_files: DataSetFiles) -> Listing | None:
    """The stored listing of these label files; None if there is none that is intact and up to date."""
    for path in _index_paths(name, data_files):
        try:
            checksum, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != checksum:
                continue
            values = json.loads(body)
            if values["schema"] != _SCHEMA or values["key"] != data_files.key:
                continue
            splits = {split: SplitFiles(**values["splits"][split]) for split in SPLITS if split in values["splits"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # The index may come from somebody else's archive, so its paths are checked.
        if not any(leaves_folder(image) for files in splits.values() for image in files.paths):
            return Listing(data_files.root, splits)
    return None


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
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            if path.parent != data_files.root:
                path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
            return path
        except OSError:  # A read-only folder or a full disk is no error, since an index only saves time.
            with suppress(OSError):
                temporary.unlink()
    return None


def _index_paths(name: str, data_files: DataSetFiles) -> Iterator[Path]:
    yield data_files.root / f".gcahng-{name}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcahng"
    yield cache / f"{name}-{hashlib.sha256(os.fsencode(data_files.root.resolve())).hexdigest()[:16]}.json"
