"""How kernels cut up a tile of edges (A, K, O, K, D), and its sums at both ends of edges, in a fixed order.

An anchor's columns are its O · K edges in the order of the rows; their nodes follow each other in a wrapped tensor. A
program takes one place: a block of columns and a chunk of an anchor class's views. It leaves what it adds to each node
in a place of its own (NodeParts); a second kernel adds these up node by node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import ENDS, NODE_PARTS, Ends, RowWise
from gcahng.kernels.launch import compute_type, on_device_of, row_block

if TYPE_CHECKING:
    from gcahng.engine.schema import TileNumbers

# The numbers of a tile, in the order of TileNumbers. Each kernel that knows tiles takes all of them. They take many
# values, so that a kernel is compiled for all of them at once.
TILE = ("A", "K", "O", "first", "offset", "mirrored", "classes")


class Places(NamedTuple):
    """How a kernel's programs share a tile: the columns, views and channels (of D) that one of them takes at most."""

    tile: TileNumbers
    channels: int
    block_columns: int
    block_views: int
    block_channels: int
    num_warps: int

    @property
    def blocks(self) -> int:
        """How many blocks of columns an anchor class has."""
        return triton.cdiv(self.tile.O * self.tile.K, self.block_columns)

    @property
    def chunks(self) -> int:
        """How many chunks of views an anchor class has."""
        return triton.cdiv(self.tile.K, self.block_views)

    @property
    def grid(self) -> tuple[int, int]:
        """Places, and blocks of channels."""
        return self.tile.A * self.chunks * self.blocks, triton.cdiv(self.channels, self.block_channels)


def _block_columns(tile: TileNumbers, most: int) -> int:
    return min(most, triton.next_power_of_2(tile.O * tile.K))


def channel_places(tile: TileNumbers, channels: int, config: Ends = ENDS) -> Places:
    """For kernels whose channels have nothing to do with each other: a program takes a block of them."""
    columns = _block_columns(tile, config.block_columns)
    return Places(tile, channels, columns, config.block_views, config.block_channels, config.num_warps)


def row_places(tile: TileNumbers, channels: int, config: RowWise, views: int = 1, least: int = 1) -> Places:
    """For kernels that need whole rows: a program takes all channels, and at least so many columns (a power of two)."""
    most, block_channels = row_block(channels, config)
    columns = max(least, _block_columns(tile, most))
    return Places(tile, channels, columns, views, block_channels, config.warps(block_channels))


def launch_places(
    kernel: Any, places: Places, pointers: Sequence[Tensor | None], numbers: Sequence[int] = (), **constants: Any
) -> None:
    """Launches a kernel whose programs take one place each (see place_of).

    Args:
        kernel: its arguments are the pointers, the tile's numbers (TILE), the channels' number, the numbers, and the
            constants, BLOCK_C, BLOCK_V and BLOCK_D among them.
        places: how programs share the tile.
        pointers: the tensors, of which the first is not None.
        numbers: further numbers that the kernel takes.
        constants: further constants that the kernel takes.
    """
    with on_device_of(pointers[0]):
        kernel[places.grid](
            *pointers,
            *places.tile,
            places.channels,
            *numbers,
            BLOCK_C=places.block_columns,
            BLOCK_V=places.block_views,
            BLOCK_D=places.block_channels,
            num_warps=places.num_warps,
            **constants,
        )


@triton.jit
def place_of(K, O, D, first_d, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program's place, and its channels from first_d on.

    Returns:
        a, chunk, block: the anchor class (int64), the chunk of its views and the block of its columns.
        o_c, o_d: the columns (BLOCK_C,) and the channels (BLOCK_D,).
        m_c, m_d, m_cd: which of them there are (BLOCK_C,), (BLOCK_D,), (BLOCK_C, BLOCK_D).
    """
    blocks, chunks = tl.cdiv(O * K, BLOCK_C), tl.cdiv(K, BLOCK_V)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    a = (tl.program_id(0) // (blocks * chunks)).to(tl.int64)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < O * K
    o_d = first_d + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    return a, chunk, block, o_c, o_d, m_c, m_d, m_c[:, None] & m_d[None, :]


@triton.jit
def wrapped(o, nodes):
    """Nodes at places o of a wrapped tensor, which has fewer than twice as many places as there are nodes."""
    return tl.where(o >= nodes, o - nodes, o)


@triton.jit
def row_part(a, i, block, K, O, BLOCK_C: tl.constexpr):
    """The place in NodeParts.rows of what a program adds to view i of its anchor class."""
    return (a * K + i) * tl.cdiv(O * K, BLOCK_C) + block


@triton.jit
def column_part(a, chunk, o_c, skip, K, O, BLOCK_V: tl.constexpr):
    """The places in NodeParts.columns of what a program adds to its columns, from column `skip` on."""
    return (a * tl.cdiv(K, BLOCK_V) + chunk) * (O * K - skip) + o_c - skip


class NodeParts(NamedTuple):
    """What programs add to nodes: rows (A, K, R, W), to an anchor in R parts; columns (A, S, O - skip, K, W), to a
    column in S parts, the tile's first `skip` offsets left out."""

    rows: Tensor
    columns: Tensor
    skip: int


def node_parts(places: Places, width: int, like: Tensor, skip: int = 0) -> NodeParts:
    """Room for what the programs add to nodes, `width` values each; contents undefined."""
    tile = places.tile
    rows = torch.empty(tile.A, tile.K, places.blocks, width, dtype=like.dtype, device=like.device)
    columns = (tile.A, places.chunks, tile.O - skip, tile.K, width)
    return NodeParts(rows, torch.empty(columns, dtype=like.dtype, device=like.device), skip)


@triton.jit(do_not_specialize=(*TILE, "skip", "R", "S"))
def add_nodes_kernel(
    p_rows,  # (A, K, R, W)
    p_columns,  # (A, S, O - skip, K, W)
    p_into,  # (classes + reach, K, W)
    A,
    K,
    O,
    first,
    offset,
    skip,
    R,
    S,
    W: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Adds every part in order, once. One program: a node that the tile touches, BLOCK_W channels."""
    o_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_w = o_w < W
    v = tl.program_id(0) % K
    c = tl.program_id(0) // K  # class, counted from the tile's first
    c += tl.where(c >= A, tl.maximum(offset - A, 0), 0)  # none between anchors and columns
    c = c.to(tl.int64)
    b_sum = tl.zeros((BLOCK_W,), dtype=COMPUTE)
    for start in range(0, tl.where(c < A, R, 0), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_part = (c * K + v) * R + o_n
        m_nw = (o_n < R)[:, None] & m_w[None, :]
        b_sum += tl.sum(tl.load(p_rows + o_part[:, None] * W + o_w[None, :], mask=m_nw, other=0.0), axis=0)
    lowest = tl.maximum(c - offset - O + 1, 0)  # anchors a with skip <= c - a - offset < O
    count = (tl.minimum(c - offset - skip + 1, A) - lowest) * S
    for start in range(0, count, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        o_a = lowest + o_n // S
        o_part = ((o_a * S + o_n % S) * (O - skip) + c - o_a - offset - skip) * K + v
        m_nw = (o_n < count)[:, None] & m_w[None, :]
        b_sum += tl.sum(tl.load(p_columns + o_part[:, None] * W + o_w[None, :], mask=m_nw, other=0.0), axis=0)
    p_at = p_into + ((first + c) * K + v) * W + o_w
    tl.store(p_at, tl.load(p_at, mask=m_w, other=0.0) + b_sum, mask=m_w)


def add_nodes(tile: TileNumbers, parts: NodeParts, into: Tensor) -> None:
    """Adds a tile's sums at the ends of its edges to `into`, a wrapped node tensor (classes + reach, K, W)."""
    width = into.shape[-1]
    classes = tile.A + (tile.O - 1 + min(tile.offset, tile.A) if parts.skip < tile.O else 0)
    with on_device_of(into):
        add_nodes_kernel[(classes * tile.K, triton.cdiv(width, NODE_PARTS.block_channels))](
            parts.rows,
            parts.columns,
            into,
            *tile[:5],
            parts.skip,
            parts.rows.shape[2],
            parts.columns.shape[1],
            width,
            COMPUTE=compute_type(into.dtype),
            BLOCK_N=NODE_PARTS.block_parts,
            BLOCK_W=NODE_PARTS.block_channels,
            num_warps=NODE_PARTS.num_warps,
        )
