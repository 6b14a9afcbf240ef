"""The picture of a search: each query and the images found for it."""

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
from gcahng.retrieval.items import Items
from gcahng.runs.plots import draw_head, draw_picture, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Side of the largest image that is drawn, in pixels: a cell of the picture is smaller.
_SIDE = 160
# Queries in one picture: matplotlib takes long with more, and nobody looks at them.
MOST_QUERIES = 100


@dataclass(frozen=True)
class Hit:
    """An image that was found.

    Attributes:
        row: of the index.
        value: its cosine similarity or its Euclidean distance.
        right: whether it is of the query's class; None: one of them has no label.
    """

    row: int
    value: float
    right: bool | None


class Pictures:
    """The images of items, read when they are asked for; those of a data set in memory are loaded once."""

    def __init__(self) -> None:
        self._loaded: dict[str, DataSplits] = {}

    def get(self, items: Items, row: int) -> Tensor | None:
        """(H, W, 3) in [0, 1], or None where nothing is known of the image but its name.

        Raises:
            UserError: the image file cannot be read.
        """
        path = items.path(row)
        if path is not None:
            image = read_rgb(path)
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
    """Draw the queries, one a row, each followed by what was found, nearest first, with its value and its class.

    Found images of the query's class have a green solid frame, others a red dashed frame with a cross; where a label is
    missing, a gray one. An image that is not known is an empty cell with its name.

    Args:
        queries: what was searched for.
        items: of the index.
        hits: what was found for each query.
        metric: "cosine" or "euclidean", what the values are.
        out_png: where to write; replaced as a whole or not at all.
        pictures: where the images come from.

    Raises:
        UserError: matplotlib is missing; no queries or too many; an image file that cannot be read, a file that cannot
            be written.
    """
    if not 1 <= len(queries) <= MOST_QUERIES:
        raise UserError(f"a picture shows 1 to {MOST_QUERIES} queries, got {len(queries)}; choose some with --rows")
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
    for row, found in enumerate(hits):
        ax = figure.add_subplot(grid[row, 0])
        _draw(ax, pictures.get(queries, row), _caption(queries, row), None)
        for column, hit in enumerate(found, start=2):
            caption = f"{hit.value:.3f}  {_caption(items, hit.row, 12)}"
            _draw(figure.add_subplot(grid[row, column]), pictures.get(items, hit.row), caption, hit.right)
    known = [hit.right for found in hits for hit in found if hit.right is not None]
    draw_head(figure, head / height, "Search", _summary(metric, known), key=bool(known))
    try:
        save_png(figure, out_png)
    except OSError as error:
        raise UserError(f"{out_png} cannot be written: {error.strerror or error}") from error


def _caption(items: Items, row: int, longest: int = 18) -> str:
    """The class of a row, or else its name, cut to what a cell holds."""
    text = items.class_name(row) or Path(items.names[row]).name
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _draw(ax: Axes, picture: Tensor | None, caption: str, right: bool | None) -> None:
    if picture is None:
        ax.text(0.5, 0.5, "no image", ha="center", va="center", fontsize=8, transform=ax.transAxes)
        picture = torch.ones(8, 8, 3)
    draw_picture(ax, picture, caption, right)


def _summary(metric: str, known: list[bool]) -> str:
    """What the picture shows, and how many of the images with labels are right."""
    value = {"cosine": "cosine similarity", "euclidean": "Euclidean distance"}[metric]
    text = f"Query (left), then the nearest images of the index with their {value}."
    return f"{text} {sum(known)} of {len(known)} are of the query's class." if known else text
