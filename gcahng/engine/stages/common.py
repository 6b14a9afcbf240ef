"""What the stages share: a tile's edges, the groups of arguments that several of them take, and memory for results.

Shapes: T edges of a tile, also seen as (A, K, O, K) (see schedule). Products are in the compute dtype; everything else,
the edges included, is in the accumulating dtype (fp32, or fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import Schedule, Tile
from gcahng.engine.schema import Ops, TileNumbers, Written
from gcahng.engine.workspace import Workspace

NORM_EPS = 1e-5


class Edges(NamedTuple):
    """A tile's edges (T, D).

    Attributes:
        full: in the accumulating dtype.
        low: as an operand of products, in the compute dtype; the same tensor where the two dtypes agree.
    """

    full: Tensor
    low: Tensor


class EdgesOut(NamedTuple):
    """Where a stage writes edges; None where they are not wanted in that dtype.

    Attributes:
        full: (T, D) in the accumulating dtype.
        low: (T, D) in the dtype of products.
    """

    full: Written | None
    low: Written | None


class RowMoments(NamedTuple):
    """Moments of each edge's 4D hidden channels.

    Attributes:
        mean: mean (T, 1).
        rstd: 1/σ (T, 1).
    """

    mean: Tensor
    rstd: Tensor


@dataclass(frozen=True)
class StageContext:
    """What all stages of a pass work with.

    Attributes:
        schedule: the tiles.
        dim: channels D.
        compute: dtype of products.
        like: any tensor of the accumulating dtype on the device.
        dropout: dropout of the edges, or None.
        layers: layers L, each of which has dropout masks of its own.
        workspace: memory that fused stages use again from tile to tile. Without it, and in plain torch, every result
            gets memory of its own.
        ops: the fused ops by name, torch.ops.gcahng's or torch.ops.gcahng_triton's; None if stages are plain torch.
    """

    schedule: Schedule
    dim: int
    compute: torch.dtype
    like: Tensor
    dropout: EdgeDropout | None = None
    layers: int = 1
    workspace: Workspace | None = None
    ops: Ops | None = None

    @property
    def same(self) -> bool:
        """Whether products are in the accumulating dtype."""
        return self.compute is self.like.dtype

    def scratch(self, slot: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory (rows, width) whose contents are undefined.

        Args:
            slot: a name. Whoever asks for the same name again gets the same memory, and overwrites what it holds.
            rows: first dimension.
            width: second dimension.
            dtype: by default that of products.
        """
        dtype = dtype or self.compute
        if self.workspace is None or self.ops is None:
            return self.like.new_empty(rows, width, dtype=dtype)
        return self.workspace.get(slot, rows, width, self.like, dtype)

    def wide(self, slot: str, rows: int, width: int) -> Tensor:
        """`scratch` memory of the accumulating dtype."""
        return self.scratch(slot, rows, width, self.like.dtype)

    def edge_room(self, slot: str, rows: int) -> Edges:
        """`scratch` memory for edges (T, D) that leave a stage."""
        full = self.wide(slot, rows, self.dim)
        return Edges(full, full if self.same else self.scratch(f"{slot} low", rows, self.dim))

    def out(self, e: Edges) -> EdgesOut:
        """Edges in the form in which the fused ops write them."""
        return EdgesOut(e.full, self.low(e))

    def low(self, e: Edges) -> Tensor | None:
        """`e.low` if it is a tensor of its own beside `e.full`, else None."""
        return None if self.same else e.low

    def edges(self, full: Tensor) -> Edges:
        """Edges from their values (T, D) in the accumulating dtype."""
        return Edges(full, full.to(self.compute))

    def grid(self, tile: Tile, x: Tensor) -> Tensor:
        """A view of x (T, W) as (A, K, O, K, W)."""
        return x.view(*self.schedule.shape(tile), x.shape[-1])

    def numbers(self, tile: Tile) -> TileNumbers:
        """A tile in the form in which the fused ops take it."""
        schedule = self.schedule
        return TileNumbers(
            tile.classes,
            schedule.views,
            tile.offsets,
            tile.first_class,
            tile.first_offset,
            tile.mirrored,
            schedule.classes,
        )

    def add_product(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds the product a b (R, W) of matrices in the dtype of products to `into`."""
        if into.dtype is a.dtype:
            into.addmm_(a, b)
        else:
            into += torch.mm(a, b, out=self.scratch("product", a.shape[0], b.shape[1]))


class Stage:
    """A stage of one pass: an operation on a tile's edges between two matrix products.

    Args:
        context: what all stages of the pass work with.
    """

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.schedule, self.dim, self.ops = context.schedule, context.dim, context.ops
