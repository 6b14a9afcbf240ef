"""What the package knows of a data set before it has seen its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from gcahng.data.listing import DataMismatch, DataSetFiles, Difference, read_bytes


class Counts(NamedTuple):
    """Images and classes of a split."""

    images: int
    classes: int


@dataclass(frozen=True)
class DataSetSpec:
    """A data set that is read from files.

    Attributes:
        name: as `data.name` has it.
        title: what papers call it.
        find: its files below (root, csv); raises `DataMismatch` where they are not.
        layout: the files that are expected, a line each.
        source: where to get them.
        trap: the image-level split that is taken for this one, and how to tell.
        recall_at: the usual K of Recall@K.
        expected: counts of each split, "query" being "test"; empty where any will do.
    """

    name: str
    title: str
    find: Callable[[Path, Path | None], DataSetFiles]
    layout: str
    source: str
    trap: str
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    expected: Mapping[str, Counts] = field(default_factory=dict)


def not_found(name: str, root: Path, lacks: Iterable[str], layout: str, source: str) -> DataMismatch:
    """The error of a folder that has not the files of data set `name`."""
    expected = "; ".join(layout.splitlines())
    return DataMismatch(
        Difference(
            f"{root} is not the folder of {name}: it has no {', no '.join(lacks)}",
            f"expected there: {expected}. {source}",
        )
    )


def missing_from(base: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that `base` lacks; a name with a slash at its end is a folder's."""
    return [name for name in names if not ((base / name).is_dir() if name.endswith("/") else (base / name).is_file())]


def key_of(*parts: str, files: Iterable[Path] = ()) -> str:
    """A hash of `parts` and of the content of label files."""
    digest = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape"))
    for file in files:
        digest.update(hashlib.sha256(read_bytes(file)).digest())
    return digest.hexdigest()
