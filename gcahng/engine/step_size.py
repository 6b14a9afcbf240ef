"""The sizes of a training step, and of the tiles that it is cut into."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from gcahng.engine.schedule import bands, default_tile_rows
from gcahng.errors import UserError


@dataclass(frozen=True)
class StepSize:
    """The sizes of a training step.

    Attributes:
        batch: samples n, a multiple of `views`.
        dim: channels D.
        layers: layers L.
        views: samples of a class, K.
        classes: training classes M.
        compute: dtype of products.
        accumulate: dtype of everything else.
        edge_dtype: dtype of stored edges.
        symmetric: whether half of the pairs are computed.
        stages: implementation of the stages; what counts is whether it is torch or a fused one.
        device: type of the device.
        ranks: processes that share the pairs of a batch; what is counted is the share of one of them.

    Raises:
        UserError: batch is not a multiple of views, or holds fewer than two classes.
    """

    batch: int
    dim: int
    layers: int
    views: int
    classes: int
    compute: torch.dtype = torch.float32
    accumulate: torch.dtype = torch.float32
    edge_dtype: torch.dtype = torch.float32
    symmetric: bool = True
    stages: str = "cpp"
    device: str = "cpu"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.views < 2 or self.batch % self.views or self.batch < 2 * self.views:
            raise UserError(
                f"batch is {self.batch} and views is {self.views}; views must be at least 2, and batch a multiple of "
                f"it, at least {2 * max(self.views, 2)}"
            )

    @property
    def narrow(self) -> bool:
        """Whether edges are in the products' dtype alone (see StageContext.narrow)."""
        return self.edge_dtype is self.compute is not self.accumulate

    @property
    def rows(self) -> int:
        """Edges that are computed: all n², or n² / 2 and n K / 2 more for the diagonal.

        Of several processes it is the one with the most.
        """
        parts = bands(self.batch // self.views, self.symmetric)
        return self.views**2 * sum(offsets * -(-anchors // self.ranks) for _, offsets, anchors in parts)


class Tiling(NamedTuple):
    """How a schedule cuts the pairs of a batch into tiles.

    Attributes:
        rows: edges of the largest tile.
        mixes: negatives that a tile has at most.
        reach: the largest offset of classes.
    """

    rows: int
    mixes: int
    reach: int


@lru_cache
def tiling(size: StepSize, memory: str) -> Tiling:
    """Sizes of the engine's schedule (see make_schedule), found without listing its tiles: a large batch has many.

    Args:
        size: of the step.
        memory: store, hidden or recompute.
    """
    classes, block = size.batch // size.views, size.views**2
    most = default_tile_rows(size.dim, size.compute, memory, size.device)
    rows = mixes = 0
    for first_offset, offsets, anchors in bands(classes, size.symmetric):
        parts = _parts(offsets, most // block)
        for width in {offsets // parts, -(-offsets // parts)}:
            shares = {anchors // size.ranks, -(-anchors // size.ranks)} - {0}
            height = max(-(-share // _parts(share, most // (block * width))) for share in shares)
            # Both directions of a pair, but for a class with itself, which is in every tile if offsets are in one part.
            own = first_offset == 0 and parts == 1
            both = 2 * width - own if size.symmetric else width
            rows, mixes = max(rows, height * width * block), max(mixes, height * both * size.views)
    return Tiling(rows, mixes, classes // 2 if size.symmetric else classes - 1)


def _parts(count: int, most: int) -> int:
    """How many parts of at most `most` cover `count`."""
    return -(-count // max(1, most))
