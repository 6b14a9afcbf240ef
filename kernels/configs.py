"""The one configuration of each kernel: block sizes and warps."""

from __future__ import annotations

from typing import NamedTuple

MOST_WARPS = 32  # that a block can have


class EdgeStart(NamedTuple):
    """Rows and channels that one program takes at a time; both powers of two."""

    block_rows: int = 16
    block_channels: int = 128
    num_warps: int = 4


EDGE_START = EdgeStart()


class RowWise(NamedTuple):
    """Whole rows: values that one program holds at a time (a power of two, no fewer than its threads, so that no value
    lies in two of them: results may overwrite inputs), and how many programs share the rows where they form sums. Few
    warps, so that a thread has many values of a row: what it does once a row then counts for little. A row of more than
    `widest` channels takes more warps: what a thread holds for each channel, parameters and their sums, is then no more
    than for a row of that width, and needs no more registers."""

    values: int = 1024
    num_warps: int = 2
    programs: int = 1024
    widest: int = 512

    def warps(self, columns: int) -> int:
        """Of a program whose block has so many columns, a power of two."""
        return min(MOST_WARPS, self.num_warps * max(1, columns // self.widest))


ROWS = RowWise()
ROWS_BACKWARD = RowWise()
MLP_IN = RowWise(widest=2048)  # rows of 4D channels


class Product(NamedTuple):
    """A matrix product with an epilogue: block sizes; parts of columns that the epilogue takes one after the other,
    which spares registers; how many of them have joint row moments; blocks of rows that share a column block in
    cache."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    parts: int = 1
    joined: int = 1
    group: int = 8


# By the operands' bytes a value: 2 for bf16 and fp16, 4 for fp32.
MLP_IN_PRODUCT = {2: Product(128, 128, 64, 4, 3, parts=4, joined=4), 4: Product(128, 128, 32, 8, 3, parts=8, joined=2)}
# Where h is stored, the compiler forms GELU in two layouts: half as many values a thread leave registers for that.
MLP_IN_PRODUCT_STORED = MLP_IN_PRODUCT | {2: Product(128, 128, 64, 8, 3, parts=4, joined=4)}
MLP_IN_PRODUCT_BACKWARD = {2: Product(128, 128, 64, 4, 3, parts=4), 4: Product(128, 128, 32, 8, 3, parts=8)}
# block_n hidden channels at a time, block_k of edges at most; parts of its epilogue, and (joined) of the last one.
EDGE_UPDATE = {
    2: Product(128, 128, 128, 8, 2, parts=2, joined=4),
    4: Product(64, 32, 128, 8, 2, parts=1, joined=8),
}
MLP_OUT_PRODUCT = {2: Product(128, 128, 64, 4, 3, parts=4), 4: Product(128, 128, 16, 8, 3)}


class Ends(NamedTuple):
    """Sums at both ends of edges: columns, views of the anchor class and channels that one program takes."""

    block_columns: int = 16
    block_views: int = 8
    block_channels: int = 128
    num_warps: int = 8


ENDS = Ends()
EDGE_TO_NODE = Ends(num_warps=4)  # more values of a thread for what it does once a place


class NodeParts(NamedTuple):
    """Adding up what these programs leave: parts at a time, channels; no fewer of these than threads."""

    block_parts: int = 16
    block_channels: int = 128
    num_warps: int = 4


NODE_PARTS = NodeParts()
GATE = RowWise(num_warps=1)
GATE_BACKWARD = RowWise()
MIX = RowWise(values=2048, num_warps=8, widest=2048)


class Head(NamedTuple):
    """Rows and channels that one program takes at a time; about how many programs share the rows of a sum."""

    block_rows: int = 16
    block_channels: int = 128
    programs: int = 256
    num_warps: int = 4


HEAD = Head()
CROSS_ENTROPY = RowWise(num_warps=4)
SIMILARITY = RowWise()
