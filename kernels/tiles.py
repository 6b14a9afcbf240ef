"""How kernels cut up a tile of edges (A, K, O, K, D), and its sums at both ends of edges, in a fixed order.

An anchor's columns are its O · K edges in the order of the rows; their nodes follow each other in a wrapped tensor. A
program takes a block of columns for a chunk of an anchor class's views, and leaves what it adds to each of them in a
place of its own; a second kernel adds these up node by node.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcahng.kernels.configs import NODE_PARTS
from gcahng.kernels.launch import compute_type, on_device_of

# Sizes of tiles are many: a kernel is compiled for all of them.
TILE = ("A", "K", "O", "first", "offset", "mirrored", "classes")


class Tile(NamedTuple):
    """See gcahng/ops/_stages.py."""

    A: int
    K: int
    O: int
    first: int
    offset: int
    mirrored: int
    classes: int

    @property
    def rows(self) -> int:
        return self.A * self.K * self.O * self.K

    @property
    def mixes(self) -> int:
        return self.A * self.K * (2 * self.O - self.mirrored)


class Cut(NamedTuple):
    """Columns and views that a program takes; how many such blocks and chunks an anchor class has."""

    columns: int
    views: int
    blocks: int
    chunks: int


def cut(tile: Tile, columns: int, views: int, least: int = 1) -> Cut:
    """At most so many columns and views a program, and at least so many columns (all powers of two)."""
    columns = max(least, min(columns, triton.next_power_of_2(tile.O * tile.K)))
    return Cut(columns, views, triton.cdiv(tile.O * tile.K, columns), triton.cdiv(tile.K, views))


def places(tile: Tile, by: Cut, channels: int, block: int) -> tuple[int, int]:
    """The grid of programs that each take one place (see place_of) and a block of channels."""
    return tile.A * by.chunks * by.blocks, triton.cdiv(channels, block)


@triton.jit
def place_of(K, O, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr):
    """A program's anchor class, chunk of views and block of columns, and the columns o_c (a block) with their mask."""
    blocks, chunks = tl.cdiv(O * K, BLOCK_C), tl.cdiv(K, BLOCK_V)
    block = tl.program_id(0) % blocks
    chunk = tl.program_id(0) // blocks % chunks
    a = tl.program_id(0) // (blocks * chunks)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return a.to(tl.int64), chunk, block, o_c, o_c < O * K


class NodeParts(NamedTuple):
    """What programs add to nodes: rows (A, K, R, W), to an anchor in R parts; columns (A, S, O - skip, K, W), to a
    column in S parts, the tile's first `skip` offsets left out."""

    rows: Tensor
    columns: Tensor
    skip: int


def node_parts(tile: Tile, by: Cut, width: int, like: Tensor, skip: int = 0) -> NodeParts:
    """Room for them, contents undefined."""
    rows = torch.empty(tile.A, tile.K, by.blocks, width, dtype=like.dtype, device=like.device)
    columns = (tile.A, by.chunks, tile.O - skip, tile.K, width)
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
    W,
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


def add_nodes(tile: Tile, parts: NodeParts, into: Tensor) -> None:
    """Adds a tile's sums at the ends of its edges to `into`, a wrapped node tensor."""
    width = into.shape[-1]
    classes = tile.A + (tile.O - 1 + min(tile.offset, tile.A) if parts.skip < tile.O else 0)
    with on_device_of(into):
        add_nodes_kernel[(classes * tile.K, triton.cdiv(width, NODE_PARTS.block_channels))](
            parts.rows,
            parts.columns,
            into,
            tile.A,
            tile.K,
            tile.O,
            tile.first,
            tile.offset,
            parts.skip,
            parts.rows.shape[2],
            parts.columns.shape[1],
            width,
            COMPUTE=compute_type(into.dtype),
            BLOCK_N=NODE_PARTS.block_parts,
            BLOCK_W=NODE_PARTS.block_channels,
            num_warps=NODE_PARTS.num_warps,
        )
