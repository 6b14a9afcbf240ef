"""The one configuration of each kernel: block sizes and warps."""

from __future__ import annotations

from typing import NamedTuple


class EdgeStart(NamedTuple):
    """Rows and channels that one program takes at a time; both powers of two."""

    block_rows: int = 16
    block_channels: int = 128
    num_warps: int = 4


EDGE_START = EdgeStart()
