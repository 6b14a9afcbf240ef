"""Shares the node attention of a large batch between processes: each has its part of the queries.

Attention is the only part of the nodes' work that grows with n². It takes 14 n² D FLOP in each layer and phase, of
which a process is spared 1 − 1/R. What it sends for that is 7 n D values of 4 bytes: the attended rows once, and the
gradients of queries, keys and values twice, as rings do. So sharing pays from n = 2 F / B on, for F FLOP/s and B bytes
a second, however many processes there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.ranks import Ranks
from gcahng.engine.stages.common import StageContext

LEAST_NODES = {"cpu": 256, "cuda": 16384}
"""The smallest batch whose attention is shared, by type of device. It is 2 F / B, rounded up to a power of two, for
100 GFLOP/s and 1.25 GB/s on a CPU, and for 200 TFLOP/s and 25 GB/s on a GPU. Neither was measured."""


def shares_attention(nodes: int, device: str, ranks: int) -> bool:
    """Whether processes share the node attention.

    Args:
        nodes: samples n of the batch.
        device: type of the device.
        ranks: processes R.
    """
    return ranks > 1 and nodes >= LEAST_NODES.get(device, LEAST_NODES["cuda"])


class Queries(NamedTuple):
    """The queries of a process.

    Attributes:
        first: the first one's row.
        end: the row behind the last one.
        ranks: the processes that have the others; None if there are no others.
    """

    first: int
    end: int
    ranks: Ranks | None = None

    def whole(self, attended: Tensor) -> Tensor:
        """All processes' rows (n, D), from those of this process."""
        return attended if self.ranks is None else self.ranks.gather(attended)

    def complete(self, gradients: Tensor, dtype: torch.dtype) -> None:
        """Adds up gradients (n, 3D) of queries, keys and values over all processes, in place and in this dtype."""
        if self.ranks is None:
            return
        of_queries = gradients[:, : gradients.shape[1] // 3]
        of_queries[: self.first].zero_()
        of_queries[self.end :].zero_()
        wide = gradients.to(dtype)
        self.ranks.add_up(wide)
        if wide is not gradients:
            gradients.copy_(wide)


def queries_of(context: StageContext) -> Queries:
    """This process's queries of a batch, whose samples are as many as a multiple of the processes."""
    ranks, n = context.schedule.ranks, context.schedule.nodes
    if ranks is None or not shares_attention(n, context.like.device.type, ranks.count):
        return Queries(0, n)
    return Queries(n * ranks.rank // ranks.count, n * (ranks.rank + 1) // ranks.count, ranks)
