"""What the package knows about a data set before it has seen the files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gcahng.data.listing import DataMismatch, DataSetFiles, Difference, read_bytes


class Counts(NamedTuple):
    """The number of images and classes of a split."""

    images: int
    classes: int


@dataclass(frozen=True)
class DataSetSpec:
    """A data set that is read from files.

    Attributes:
        name: the value of `data.name`.
        title: what papers call the data set.
        find: finds the files, given root and csv; raises `DataMismatch` if they are not there.
        layout: the expected files, one per line.
        source: where to get the files.
        trap: the image-level split that is often mistaken for this one, and how to recognize it.
        recall_at: the usual values of K for Recall@K.
        expected: the published counts of each split, with queries as "test"; empty if any number is right.
    """

    name: str
    title: str
    find: Callable[[Path, Path | None], DataSetFiles]
    layout: str
    source: str
    trap: str
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    expected: Mapping[str, Counts] = field(default_factory=dict)


def not_found(name: str, root: Path, missing: Iterable[str], layout: str, source: str) -> DataMismatch:
    """The error for a folder that does not contain the files of the data set `name`."""
    expected = "; ".join(layout.splitlines())
    return DataMismatch(
        Difference(
            f"{root} is not the folder of {name}: it has no {', no '.join(missing)}",
            f"the expected files are: {expected}. {source}",
        )
    )


def missing_from(base: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not in `base`. A name that ends in a slash is a folder."""
    return [name for name in names if not ((base / name).is_dir() if name.endswith("/") else (base / name).is_file())]


def key_of(*parts: str, files: Iterable[Path] = ()) -> str:
    """A hash of `parts` and of the contents of label files."""
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape"))
    for file in files:
        digest.update(hashlib.sha256(read_bytes(file)).digest())
    return digest.hexdigest()
