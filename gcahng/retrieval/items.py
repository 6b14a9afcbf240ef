"""What the rows of embeddings stand for: names, labels, where the images lie, and the network that embedded them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError


@dataclass(frozen=True)
class EmbeddingModel:
    """The network that made embeddings; only those of one network can be compared.

    Attributes:
        fingerprint: SHA-256 of its weights and of what else decides its output.
        backbone: its name.
        path: the file it was loaded from.
        resize: of image files, in pixels: the shorter side.
        crop: of image files, in pixels: the side of the square cut from the middle.
    """

    fingerprint: str
    backbone: str
    path: str
    resize: int
    crop: int

    def difference(self, other: EmbeddingModel) -> str | None:
        """What makes embeddings of `self` and of `other` incomparable; None: nothing."""
        if self.fingerprint != other.fingerprint:
            return (
                f"{self.backbone} {self.fingerprint[:12]} ({self.path}) and "
                f"{other.backbone} {other.fingerprint[:12]} ({other.path}) are different networks"
            )
        if (self.resize, self.crop) != (other.resize, other.crop):
            return (
                f"images were resized to {self.resize} and cropped to {self.crop} pixels in one, to {other.resize} and "
                f"{other.crop} in the other"
            )
        return None


@dataclass(frozen=True)
class Source:
    """Where consecutive rows come from.

    Attributes:
        rows: how many they are.
        root: folder that their names are paths below; None: the images are no files.
        data: the options of the data set (`gcahng.train.DataConfig`) they are a split of; None: no data set.
        split: of the data set.
        first: which image of the split the first row is; the others follow it. Of files it means nothing.
    """

    rows: int
    root: str | None = None
    data: dict[str, Any] | None = None
    split: str | None = None
    first: int = 0

    def continues_with(self, other: Source) -> bool:
        """Whether the rows of `other` go on where these end."""
        alike = replace(other, rows=self.rows, first=self.first) == self
        return alike and (self.root is not None or other.first == self.first + self.rows)


@dataclass(frozen=True)
class Items:
    """The names and labels of n rows.

    Attributes:
        names: of each row: its path below the root of its source, or what its data set calls it.
        labels: (n,) int64 places in `class_names`, -1 where a row has no label.
        class_names: the classes.
        sources: where the rows come from, in their order.
    """

    names: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.names) or sum(s.rows for s in self.sources) != len(self.names):
            raise UserError(
                f"names, labels and sources must be of as many rows, got {len(self.names)}, {len(self.labels)} and "
                f"{sum(s.rows for s in self.sources)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labeled(self) -> bool:
        """Whether every row has a label."""
        return len(self) > 0 and bool((self.labels >= 0).all())

    def class_name(self, row: int) -> str | None:
        """What row `row` shows; None where it has no label."""
        label = int(self.labels[row])
        return None if label < 0 else self.class_names[label]

    def place(self, row: int) -> tuple[Source, int]:
        """The source of row `row`, and which image of its split it is."""
        for source in self.sources:
            if row < source.rows:
                return source, source.first + row
            row -= source.rows
        raise IndexError(row)

    def path(self, row: int) -> Path | None:
        """The image file of row `row`; None where it is no file."""
        root = self.place(row)[0].root
        return None if root is None else Path(root, self.names[row])

    def identities(self) -> list[tuple[str | None, str]]:
        """What tells the image of each row from others: its path, or its data set, split and name; (None, name)
        where neither is known."""
        found: list[tuple[str | None, str]] = []
        for source in self.sources:
            names = self.names[len(found) : len(found) + source.rows]
            if source.root is not None:
                found += [("file", os.path.join(source.root, name)) for name in names]
            else:
                place = f"{source.data['name']} {source.split}" if source.data else None
                found += [(place, name) for name in names]
        return found

    def nameless(self, row: int) -> bool:
        """Whether nothing but its number is known of row `row`, as `unnamed` has it."""
        source, place = self.place(row)
        return source.root is None and source.data is None and self.names[row] == str(place)

    def subset(self, rows: list[int]) -> Items:
        """The rows `rows`, in this order, with all class names."""
        sources: list[Source] = []
        for row in rows:
            source, place = self.place(row)
            one = replace(source, rows=1, first=place if source.root is None else source.first)
            if sources and sources[-1].continues_with(one):
                sources[-1] = replace(sources[-1], rows=sources[-1].rows + 1)
            else:
                sources.append(one)
        names = tuple(self.names[row] for row in rows)
        return Items(names, self.labels[rows], self.class_names, tuple(sources))

    def followed_by(self, other: Items) -> Items:
        """The rows of both; classes of the same name are one class."""
        places = {name: i for i, name in enumerate(self.class_names)}
        for name in other.class_names:
            places.setdefault(name, len(places))
        renumber = torch.tensor([places[name] for name in other.class_names] + [-1])  # -1 stays -1
        return Items(
            self.names + other.names,
            torch.cat([self.labels, renumber[other.labels]]),
            tuple(places),
            self.sources + other.sources,
        )

    def header(self) -> dict[str, Any]:
        """What is in it but for names and labels, as JSON holds it."""
        return {"class_names": list(self.class_names), "sources": [asdict(source) for source in self.sources]}


def items_from(names: tuple[str, ...], labels: Tensor, header: dict[str, Any]) -> Items:
    """The inverse of `Items.header`.

    Raises:
        UserError, KeyError, TypeError: the header is not of these rows.
    """
    return Items(names, labels, tuple(header["class_names"]), tuple(Source(**source) for source in header["sources"]))


def model_from(values: dict[str, Any] | None) -> EmbeddingModel | None:
    """The inverse of `dataclasses.asdict`, None for None; fields of a later version are left out.

    Raises:
        KeyError: a field is missing.
    """
    return None if values is None else EmbeddingModel(**{f.name: values[f.name] for f in fields(EmbeddingModel)})


def unnamed(rows: int) -> Items:
    """Items of rows that nothing is known of: their numbers."""
    return Items(tuple(map(str, range(rows))), torch.full((rows,), -1), (), (Source(rows),))
