"""The stage ops that judge negatives (gcahng/ops/_stages.py), by their CUDA kernels in the emulator."""

from __future__ import annotations

from emulator.tile_ops import EmulatedTiles
from torch import Tensor

STEMS = ("cross_entropy", "similarity")


class EmulatedLosses(EmulatedTiles):
    """As EmulatedTiles, for these."""

    def cross_entropy_(self, logits: Tensor, bias: Tensor, *arguments: Tensor | float | None) -> None:
        types = bias.dtype, logits.dtype
        inputs = len(logits), logits, bias, *arguments[:-2]
        self._run("cross_entropy", "forward", types, inputs, arguments[-2:], logits.shape[-1])

    def similarity_(self, anchors: Tensor, node: Tensor, negatives: Tensor, *arguments: Tensor | float | None) -> None:
        inputs = len(negatives), anchors, node, negatives, *arguments[:-2]
        self._run("similarity", "forward", (negatives.dtype,), inputs, arguments[-2:], negatives.shape[-1])
