"""What the rows of embeddings stand for: names, labels, the location of the images, and the network."""

from __future__ import annotations

import os
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from gcahng.errors import UserError


@dataclass(frozen=True)
class EmbeddingModel:
    """The network that made embeddings, of which kind of images. Only embeddings of the same can be compared.

    Attributes:
        fingerprint: SHA-256 of its weights and of everything else that decides its output.
        backbone: its name.
        path: the file that it was loaded from.
        resize: length in pixels that the shorter side of an image file is scaled to.
        crop: side in pixels of the square that is cut from the middle of an image file.
        normalized: whether the embeddings were scaled to norm 1 after the network. For cosine similarity this makes no
            difference.
        exif_rotate: whether image files were rotated as their EXIF orientation says; None: there were no files.
    """

    fingerprint: str
    backbone: str
    path: str
    resize: int
    crop: int
    normalized: bool = False
    exif_rotate: bool | None = False

    def difference(self, other: EmbeddingModel) -> str | None:
        """Why embeddings of `self` and `other` cannot be compared; None if they can."""
        if self.fingerprint != other.fingerprint:
            return (
                f"{self.backbone} {self.fingerprint[:12]} ({self.path}) and "
                f"{other.backbone} {other.fingerprint[:12]} ({other.path}) are different networks"
            )
        if (self.resize, self.crop) != (other.resize, other.crop):
            return (
                f"images were resized to {self.resize} and cropped to {self.crop} pixels for one, and to "
                f"{other.resize} and {other.crop} pixels for the other"
            )
        if None not in (self.exif_rotate, other.exif_rotate) and self.exif_rotate != other.exif_rotate:
            return "images were rotated as their EXIF orientation says for one of them, and not for the other"
        return None


@dataclass(frozen=True)
class Source:
    """Where a run of consecutive rows comes from.

    Attributes:
        rows: number of rows.
        root: folder that the names are paths in; None if the images are not files.
        data: options of the data set (`DataConfig` as a dict) that the rows are from; None if they are from none.
        split: split of the data set.
        first: place in the split of the first row. The other rows follow in order. It has no meaning for files.
    """

    rows: int
    root: str | None = None
    data: dict[str, Any] | None = None
    split: str | None = None
    first: int = 0

    def continues_with(self, other: Source) -> bool:
        """Whether the rows of `other` continue these, so that both can be one source."""
        alike = replace(other, rows=self.rows, first=self.first) == self
        return alike and (self.root is not None or other.first == self.first + self.rows)


@dataclass(frozen=True)
class Items:
    """The names and labels of n rows.

    Attributes:
        names: name of each row: its path below the root of its source, or its name in its data set.
        labels: (n,) int64 places in `class_names`; -1 for a row without a label.
        class_names: names of the classes.
        sources: where the rows come from, in order.

    Raises:
        UserError: names, labels and sources have different numbers of rows.
    """

    names: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.names) or sum(source.rows for source in self.sources) != len(self.names):
            raise UserError(
                f"names, labels and sources have {len(self.names)}, {len(self.labels)} and "
                f"{sum(source.rows for source in self.sources)} rows; these must be equal"
            )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labeled(self) -> bool:
        """Whether every row has a label."""
        return len(self) > 0 and bool((self.labels >= 0).all())

    def class_name(self, row: int) -> str | None:
        """The class of row `row`; None if it has no label."""
        label = int(self.labels[row])
        return None if label < 0 else self.class_names[label]

    def place(self, row: int) -> tuple[Source, int]:
        """The source of row `row`, and its place in the split of that source."""
        for source in self.sources:
            if row < source.rows:
                return source, source.first + row
            row -= source.rows
        raise IndexError(row)

    def path(self, row: int) -> Path | None:
        """The image file of row `row`; None if it is not a file."""
        root = self.place(row)[0].root
        return None if root is None else Path(root, self.names[row])

    def identities(self) -> list[tuple[str | None, str]]:
        """What identifies the image of each row: its path, or else its data set, split and name.

        If neither is known, the identity is (None, name).
        """
        identities: list[tuple[str | None, str]] = []
        for source in self.sources:
            names = self.names[len(identities) : len(identities) + source.rows]
            if source.root is not None:
                identities += [("file", os.path.join(source.root, name)) for name in names]
            else:
                place = f"{source.data['name']} {source.split}" if source.data else None
                identities += [(place, name) for name in names]
        return identities

    def nameless(self, row: int) -> bool:
        """Whether only the number of row `row` is known, as in `unnamed`."""
        source, place = self.place(row)
        return source.root is None and source.data is None and self.names[row] == str(place)

    def subset(self, rows: list[int]) -> Items:
        """The rows `rows` in this order, with all class names."""
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
        """The rows of `self` and then those of `other`. Classes with the same name become one."""
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
        """Everything but names and labels, in a form that JSON can store."""
        return {"class_names": list(self.class_names), "sources": [asdict(source) for source in self.sources]}


def items_from(names: tuple[str, ...], labels: Tensor, header: dict[str, Any]) -> Items:
    """The inverse of `Items.header`.

    Raises:
        UserError, KeyError, TypeError, ValueError: the header does not belong to these rows.
    """
    class_names = tuple(header["class_names"])
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError("a class has a name that is no text")
    if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(f"it has labels beyond its {len(class_names)} classes")
    return Items(names, labels, class_names, tuple(map(_source_from, header["sources"])))


def _source_from(values: dict[str, Any]) -> Source:
    """A source as JSON holds it, whose values have been looked at."""
    source = Source(**values)
    whole = (source.rows, source.first)
    texts = (source.root, source.split, *([] if source.data is None else [source.data["name"]]))
    if not all(isinstance(n, int) and n >= 0 for n in whole) or not all(t is None or isinstance(t, str) for t in texts):
        raise ValueError(f"it has a source {values}")
    return source


def model_from(values: dict[str, Any] | None) -> EmbeddingModel | None:
    """The inverse of `dataclasses.asdict`; None for None.

    Fields of a later version are ignored. What an earlier version did not write has its default.

    Raises:
        KeyError: a field without a default is missing.
        TypeError: there are no fields, or one is of another type.
    """
    if values is None:
        return None
    known = fields(EmbeddingModel)
    model = EmbeddingModel(**{f.name: values[f.name] for f in known if f.name in values or f.default is MISSING})
    for name, kind in get_type_hints(EmbeddingModel).items():
        if not isinstance(value := getattr(model, name), kind):
            raise TypeError(f"the {name} of its model is {value!r}")
    return model


def unnamed(rows: int) -> Items:
    """Items for rows about which nothing is known. Their names are their numbers."""
    return Items(tuple(map(str, range(rows))), torch.full((rows,), -1), (), (Source(rows),))


def encode_names(names: tuple[str, ...]) -> bytes:
    """Encode names as UTF-8 with a zero byte after each. Bytes of file names that are not UTF-8 are preserved."""
    return "".join(f"{name}\0" for name in names).encode("utf-8", "surrogateescape")


def decode_names(content: bytes) -> tuple[str, ...]:
    """The inverse of `encode_names`."""
    return tuple(content.decode("utf-8", "surrogateescape").split("\0")[:-1])
