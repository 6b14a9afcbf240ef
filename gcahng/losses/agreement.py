"""Keeps the weights of a loss the same, to the bit, in all processes that share its batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.engine.ranks import Ranks


class Agreement:
    """Sees that the processes' weights do not drift apart.

    Each process computes the same gradients: those of edges from sums that an all-reduce gives all of them the same,
    and the others from the same node tensors. So nothing need be sent if all of them round alike, which depends on
    their processors, on how many threads they have, and on whether torch's kernels are deterministic. A checksum of the
    weights after each step shows whether they do. The processes compare it before the weights are used again. If it
    differs, all of them take over the first one's weights and moments, and from then on its gradients in every step.

    Attributes:
        alike: whether all weights have been the same so far.
    """

    def __init__(self) -> None:
        self.alike = True
        self._checksum: Tensor | None = None
        self._ready: torch.cuda.Event | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Agreement:
        twin = Agreement()
        twin.alike = self.alike
        return twin

    def on_gradients(self, ranks: Ranks, parameters: Iterable[nn.Parameter]) -> None:
        """Gives all processes the first one's gradients, if they have been found to round differently."""
        if not self.alike:
            ranks.copy_from_first([p.grad for p in parameters if p.grad is not None])

    def note(self, weights: Iterable[Tensor]) -> None:
        """Takes the checksum of the weights that a step has left."""
        if self.alike:
            self._checksum = checksum(weights)
            if self._checksum.is_cuda:
                self._ready = torch.cuda.Event()
                self._ready.record()

    def on_weights(self, ranks: Ranks, state: Iterable[Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Compares the processes' checksums, if a step has been since, and cures what differs.

        Args:
            ranks: the processes.
            state: weights and buffers, which are copied from the first process if the checksums differ.
            optimizers: whose moments are copied then, too.
        """
        if self._checksum is None:
            return
        found, self._checksum = ranks.numbers(self._checksum, self._ready), None
        if len(set(found)) == 1:
            return
        self.alike = False
        moments = [x for optimizer in optimizers for held in optimizer.state.values() for x in held.values()]
        ranks.copy_from_first([x.detach() for x in (*state, *moments) if isinstance(x, Tensor)])


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """A number that shows whether floating-point tensors have the same bits as others: the sum of the squares of these
    bits, read as whole numbers, modulo 2⁶⁴. Squares, since differences by rounding would cancel in a plain sum.

    Returns:
        (1,) int64, on the tensors' device.
    """
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = []
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(kinds[tensor.element_size()]).to(torch.int64)
        sums.append((bits * bits).sum())
    return torch.stack(sums).sum().view(1)
