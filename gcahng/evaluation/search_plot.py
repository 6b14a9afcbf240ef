"""The picture of a search: each query and its nearest images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gcahng.data import DataSplits, ImageFiles, load_data
from gcahng.data.config import DataConfig
from gcahng.data.reading import read_rgb
from gcahng.errors import UserError
from gcahng.evaluation.image_inputs import choose_split
from gcahng.files import writing
from gcahng.retrieval.items import Items
from gcahng.runs.plots import draw_head, draw_picture, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The side in pixels of the largest image that is drawn; the cells of the picture are smaller.
_SIDE = 160
# With more queries in a picture matplotlib takes long, and nobody looks at them.
MOST_QUERIES = 100


@dataclass(frozen=True)
class Hit:
    """One of the nearest images of a query.

    Attributes:
        row: its row in the index.
        value: its cosine similarity to the query, or its Euclidean distance.
        right: whether it is of the query's class; None: one of both has no label.
    """

    row: int
    value: float
    right: bool | None


class Pictures:
    """Reads the images of items when they are asked for, and a data set that lies in memory only once.

    Args:
        exif_rotate: whether image files are rotated as their EXIF orientation says.
    """

    def __init__(self, exif_rotate: bool = False) -> None:
        self._exif_rotate = exif_rotate
        self._loaded: dict[str, DataSplits] = {}

    def get(self, items: Items, row: int) -> Tensor | None:
        """The image of an item.

        Args:
            items: that it is one of.
            row: its place among them.

        Returns:
            (H, W, 3) in [0, 1], or None where only the name of the image is known.

        Raises:
            UserError: the image file cannot be read.
        """
        path = items.path(row)
        if path is not None:
            image = read_rgb(path, exif_rotate=self._exif_rotate)
            image.thumbnail((_SIDE, _SIDE))
            return torch.from_numpy(np.array(image)).float() / 255
        source, place = items.place(row)
        if source.data is None or source.split is None:
            return None
        known = {name: value for name, value in source.data.items() if name in DataConfig.__dataclass_fields__}
        config = DataConfig(**known)
        if repr(config) not in self._loaded:
            self._loaded[repr(config)] = load_data(config)
        images = choose_split(self._loaded[repr(config)], source.split, config.name)
        assert not isinstance(images, ImageFiles), "images of files have a root"
        pixels = images.images[place].float() / 255
        return pixels[..., None].expand(-1, -1, 3) if pixels.ndim == 2 else pixels.permute(1, 2, 0)


def plot_search(
    queries: Items, items: Items, hits: list[list[Hit]], metric: str, out_png: Path, pictures: Pictures | None = None
) -> None:
    """Draw the queries, one in each row, followed by their nearest images with value and class, nearest first.

    Images of the query's class have a green solid frame and others a red dashed frame with a cross. The frame is gray
    where a label is missing. Where only the name of an image is known, its cell is empty.

    Args:
        queries: what was searched for.
        items: of the index.
        hits: the nearest images of each query.
        metric: "cosine" or "euclidean", which says what the values are.
        out_png: the picture, which is replaced as a whole or not at all.
        pictures: reads the images.

    Raises:
        UserError: matplotlib is missing, there are no queries or too many, an image file cannot be read, or the picture
            cannot be written.
    """
    if not 1 <= len(queries) <= MOST_QUERIES:
        raise UserError(
            f"there are {len(queries)} queries; a picture shows 1 to {MOST_QUERIES}: choose some with --rows"
        )
    pictures = pictures or Pictures()
    columns = max(1, max(map(len, hits)))
    head = 0.62  # inches for title and key
    width = max(4.6, 0.3 + 1.15 * (columns + 1))
    figure = new_figure(width, head + 0.1 + 1.42 * len(queries), layout=None)
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        len(queries),
        columns + 2,
        width_ratios=[1.0, 0.12] + [1.0] * columns,  # a gap sets the query apart
        left=0.02,
        right=0.98,
        bottom=0.36 / height,
        top=1 - (head + 0.08) / height,
        wspace=0.12,
        hspace=0.42,
    )
    for row, hits_of_query in enumerate(hits):
        ax = figure.add_subplot(grid[row, 0])
        _draw(ax, pictures.get(queries, row), _caption(queries, row), None)
        for column, hit in enumerate(hits_of_query, start=2):
            caption = f"{hit.value:.3f}  {_caption(items, hit.row, 12)}"
            _draw(figure.add_subplot(grid[row, column]), pictures.get(items, hit.row), caption, hit.right)
    known = [hit.right for hits_of_query in hits for hit in hits_of_query if hit.right is not None]
    draw_head(figure, head / height, "Search", _summary(metric, known), key=bool(known))
    with writing(out_png):
        save_png(figure, out_png)


def _caption(items: Items, row: int, longest: int = 18) -> str:
    """The class of a row, or its name where it has no class, cut to the width of a cell."""
    text = items.class_name(row) or Path(items.names[row]).name
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _draw(ax: Axes, picture: Tensor | None, caption: str, right: bool | None) -> None:
    if picture is None:
        ax.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=8, transform=ax.transAxes)
        picture = torch.ones(8, 8, 3)
    draw_picture(ax, picture, caption, right)


def _summary(metric: str, known: list[bool]) -> str:
    """What the picture shows, and how many of the images with a label are right."""
    value = {"cosine": "cosine similarity", "euclidean": "Euclidean distance"}[metric]
    text = f"Query (left), then the nearest images of the index with their {value}."
    return f"{text} {sum(known)} of {len(known)} are of the query's class." if known else text
