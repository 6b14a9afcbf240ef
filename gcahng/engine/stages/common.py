"""What the stages share: a tile's edges, the groups of arguments that several of them take, and memory for results.

Shapes: T edges of a tile, also seen as (A, K, O, K) (see schedule). Products are in the compute dtype; everything else
is in the accumulating dtype (fp32, or fp64), the edges included unless they are narrow (see StageContext.edge_dtype).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gcahng.engine import products
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import NodeSum, Schedule, Tile, Wrapped, wrap, wrapped_shape
from gcahng.engine.schema import Ops, TileNumbers, Written
from gcahng.engine.workspace import Workspace

NORM_EPS = 1e-5
Made = TypeVar("Made", bound=tuple)


class Edges(NamedTuple):
    """A tile's edges (T, D).

    Attributes:
        full: in the accumulating dtype, or where edges are narrow in the compute dtype.
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
        edge_dtype: dtype of stored edges; None is the accumulating one. If it is that of products, edges are *narrow*:
            between stages, too, they and their gradients and coefficients have no other form.
    """

    schedule: Schedule
    dim: int
    compute: torch.dtype
    like: Tensor
    dropout: EdgeDropout | None = None
    layers: int = 1
    workspace: Workspace | None = None
    ops: Ops | None = None
    edge_dtype: torch.dtype | None = None
    _flipped: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def same(self) -> bool:
        """Whether products are in the accumulating dtype."""
        return self.compute is self.like.dtype

    @property
    def _keeps(self) -> bool:
        """Whether memory is used again from tile to tile."""
        return self.workspace is not None and self.ops is not None

    @property
    def narrow(self) -> bool:
        """Whether edges are in the dtype of products alone."""
        return self.edge_dtype is self.compute and not self.same

    @property
    def edges_dtype(self) -> torch.dtype:
        """Dtype of edges, their gradients and coefficients between stages."""
        return self.compute if self.narrow else self.like.dtype

    def full(self, x: Tensor) -> Tensor:
        """x in the accumulating dtype, in which stages compute."""
        return x if x.dtype is self.like.dtype else x.to(self.like.dtype)

    def rounded(self, x: Tensor) -> Tensor:
        """x as it goes from a stage to the next one, if it is a tensor over edges."""
        return x.to(self.compute) if self.narrow else x

    def scratch(self, slot: str, rows: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory (rows, width) whose contents are undefined.

        Args:
            slot: a name. Whoever asks for the same name again gets the same memory, and overwrites what it holds.
            rows: first dimension.
            width: second dimension.
            dtype: by default that of products.
        """
        dtype = dtype or self.compute
        if not self._keeps:
            return self.like.new_empty(rows, width, dtype=dtype)
        return self.workspace.get(slot, rows, width, self.like, dtype)

    def wide(self, slot: str, rows: int, width: int) -> Tensor:
        """`scratch` memory of the accumulating dtype."""
        return self.scratch(slot, rows, width, self.like.dtype)

    def edge_scratch(self, slot: str, rows: int) -> Tensor:
        """`scratch` memory (T, D) for a tensor over edges."""
        return self.scratch(slot, rows, self.dim, self.edges_dtype)

    def edge_room(self, slot: str, rows: int) -> Edges:
        """`scratch` memory for edges (T, D) that leave a stage."""
        full = self.edge_scratch(slot, rows)
        return Edges(full, full if self.same or self.narrow else self.scratch(f"{slot} low", rows, self.dim))

    def node_room(self, slot: str, rows: int) -> Edges:
        """`scratch` memory for node features (n, D) in both dtypes."""
        full = self.wide(slot, rows, self.dim)
        return Edges(full, full if self.same else self.scratch(f"{slot} low", rows, self.dim))

    def out(self, e: Edges) -> EdgesOut:
        """Edges in the form in which the fused ops write them."""
        return EdgesOut(None, e.low) if self.narrow else EdgesOut(e.full, self.low(e))

    def low(self, e: Edges) -> Tensor | None:
        """`e.low` if it is a tensor of its own beside `e.full`, else None."""
        return None if self.same or self.narrow else e.low

    def edges(self, full: Tensor) -> Edges:
        """Edges from their values (T, D) in the accumulating dtype."""
        low = full.to(self.compute)
        return Edges(low if self.narrow else full, low)

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

    def views(
        self,
        slot: str,
        rows: int,
        width: int,
        make: Callable[[Tensor], tuple[Tensor, ...]],
        sizes: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, ...]:
        """Views of `scratch` memory, which are made once.

        Args:
            slot: as in `scratch`.
            rows: as in `scratch`.
            width: as in `scratch`.
            make: makes the views of memory (rows, width).
            sizes: everything else that the views depend on.
            dtype: as in `scratch`.
        """
        whole = self.scratch(slot, rows, width, dtype)
        return self.workspace.views(slot, sizes, whole, make) if self._keeps else make(whole)

    def wrapped(self, slot: str, width: int) -> Wrapped:
        """`scratch` memory for a node tensor (n, W) of the accumulating dtype that wraps around."""
        schedule = self.schedule
        sizes = (schedule.classes, schedule.views)
        shape = wrapped_shape(schedule, width)
        found = self.views(slot, *shape, lambda memory: wrap(schedule, memory), sizes, self.like.dtype)
        return found  # type: ignore[return-value]

    def node_sums(self, widths: dict[str, int]) -> list[NodeSum]:
        """Sums (n, W) at nodes that start at 0, by slot and width. Their totals are `scratch` memory, too."""
        rooms = [self.wrapped(slot, width) for slot, width in widths.items()]
        torch._foreach_zero_([room.whole for room in rooms])
        return [
            NodeSum(self.schedule, width, like=self.like, room=room)
            for room, width in zip(rooms, widths.values(), strict=True)
        ]

    def constant(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Tensors that follow from the sizes of a batch alone (see Workspace.constant)."""
        return self.workspace.constant(key, make) if self._keeps else make()

    def transposed(self, x: Tensor) -> Tensor:
        """The transpose of `scratch` memory, or of a tensor that lives as long as the pass. It is made once."""
        found = None if self.workspace is None else self.workspace.transposed(x)
        if found is None:
            if id(x) not in self._flipped:
                self._flipped[id(x)] = (x, x.T)
            found = self._flipped[id(x)][1]
        return found

    def product(self, into: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """Writes the product a b (R, W) of matrices in the dtype of products to `into`, or adds it."""
        products.product(into, a, b, add, self.scratch)

    def add_product(self, into: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds the product a b (R, W) of matrices in the dtype of products to `into`."""
        self.product(into, a, b, add=True)


class Stage:
    """A stage of one pass: an operation on a tile's edges between two matrix products.

    Args:
        context: what all stages of the pass work with.
    """

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.schedule, self.dim, self.ops = context.schedule, context.dim, context.ops

    def transposed(self, x: Tensor) -> Tensor:
        """The transpose of a tensor of this stage: one of `scratch`, or in plain torch one with memory of its own."""
        return x.T if self.ops is None else self.context.transposed(x)
