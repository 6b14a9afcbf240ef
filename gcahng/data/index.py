"""The index: a data set's listing, kept so that the next start need not look at every file."""

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


def read_index(name: str, found: DataSetFiles) -> Listing | None:
    """The listing that was kept of these label files; None where there is none, or only a stale or damaged one."""
    for path in _index_paths(name, found):
        try:
            checksum, _, body = path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != checksum:
                continue
            values = json.loads(body)
            if values["schema"] != _SCHEMA or values["key"] != found.key:
                continue
            splits = {split: SplitFiles(**values["splits"][split]) for split in SPLITS if split in values["splits"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
        # An index may come with somebody's archive.
        if not any(leaves_folder(image) for files in splits.values() for image in files.paths):
            return Listing(found.root, splits)
    return None


def write_index(name: str, found: DataSetFiles, listing: Listing) -> Path | None:
    """Keep a listing, in the data set's folder or else in the user's cache; returns where, None if neither can be."""
    values = {"schema": _SCHEMA, "key": found.key, "splits": {n: asdict(files) for n, files in listing.splits.items()}}
    body = json.dumps(values).encode()
    content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    for path in _index_paths(name, found):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            if path.parent != found.root:
                path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
            return path
        except OSError:  # read-only, or no space: an index only saves time
            with suppress(OSError):
                temporary.unlink()
    return None


def _index_paths(name: str, found: DataSetFiles) -> Iterator[Path]:
    yield found.root / f".gcahng-{name}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcahng"
    yield cache / f"{name}-{hashlib.sha256(os.fsencode(found.root.resolve())).hexdigest()[:16]}.json"
