"""Similarity of negatives to their anchors, J_sim, with its gradient (docs/math/similarity.md)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import Stage

SMALLEST_NORM = 1e-8


class SimilarityInputs(NamedTuple):
    """What J_sim is formed of.

    Attributes:
        anchors: (n, D), the embeddings.
        node: (N,) int64, whose a negative's anchor is.
        negatives: (N, D).
        counted: (N,) bool, the rows that count.
        scale: of the gradient.
    """

    anchors: Tensor
    node: Tensor
    negatives: Tensor
    counted: Tensor
    scale: float


class SimilarityOutputs(NamedTuple):
    """loss (N,); to dn (N, D) scale times its gradient is added."""

    loss: Written
    dn: Written | None


FORWARD = declare("similarity_", "similarity.forward", SimilarityInputs, SimilarityOutputs)


class Similarity(Stage):
    """In plain torch."""

    def forward(self, inputs: SimilarityInputs, dn: Tensor | None) -> Tensor:
        """→ 1 − cos(a, N) of the rows that count, else 0: (N,). scale times the gradient is added to dn (N, D), if
        given."""
        negatives, scale = inputs.negatives, inputs.scale
        a, counted = inputs.anchors[inputs.node], inputs.counted[:, None].to(negatives.dtype)
        norm_a = a.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        norm_n = negatives.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        cosine = (a * negatives).sum(dim=1, keepdim=True) / (norm_a * norm_n)
        if dn is not None:
            along = counted * (scale / norm_n)
            dn.addcmul_(along / norm_a, a, value=-1).addcmul_(along * cosine / norm_n, negatives)
        return ((1 - cosine) * counted)[:, 0]


class FusedSimilarity(Similarity):
    """As one op."""

    def forward(self, inputs: SimilarityInputs, dn: Tensor | None) -> Tensor:
        loss = inputs.negatives.new_empty(len(inputs.negatives))
        self.ops(FORWARD, inputs, SimilarityOutputs(loss, dn))
        return loss
