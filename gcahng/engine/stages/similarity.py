"""J_sim: similarity of negatives to their anchors, with its gradient (docs/math/similarity.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schema import Written, declare
from gcahng.engine.stages.common import Stage

SMALLEST_NORM = 1e-8


class SimilarityInputs(NamedTuple):
    """What J_sim is formed of.

    Attributes:
        anchors: embeddings (n, D).
        node: the node that is each negative's anchor, (N,) int64.
        negatives: (N, D).
        counted: which rows count, (N,) bool.
        scale: what the gradient is multiplied with.
    """

    anchors: Tensor
    node: Tensor
    negatives: Tensor
    counted: Tensor
    scale: float


class SimilarityOutputs(NamedTuple):
    """What the op writes.

    Attributes:
        loss: 1 − cos(a, N) of each row that counts, else 0 (N,).
        dn: gradient of the negatives (N, D), to which scale times that of the loss is added; None if it is not wanted.
    """

    loss: Written
    dn: Written | None


declare("similarity_", "similarity.forward", SimilarityInputs, SimilarityOutputs)


class Similarity(Stage):
    """The loss in plain torch."""

    def forward(self, inputs: SimilarityInputs, loss: Tensor, dn: Tensor | None) -> None:
        """Computes the loss.

        Args:
            inputs: what the loss is formed of.
            loss: 1 − cos(a, N) of each row that counts, else 0 (N,), which is written.
            dn: gradient of the negatives (N, D), to which scale times that of the loss is added; None if it is not
                wanted.
        """
        negatives, scale = inputs.negatives, inputs.scale
        a, counted = inputs.anchors[inputs.node], inputs.counted[:, None].to(negatives.dtype)
        norm_a = a.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        norm_n = negatives.norm(dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
        cosine = (a * negatives).sum(dim=1, keepdim=True) / (norm_a * norm_n)
        if dn is not None:
            along = counted * (scale / norm_n)
            dn.addcmul_(along / norm_a, a, value=-1).addcmul_(along * cosine / norm_n, negatives)
        torch.mul((1 - cosine)[:, 0], counted[:, 0], out=loss)


class FusedSimilarity(Similarity):
    """The loss as one fused op."""

    def forward(self, inputs: SimilarityInputs, loss: Tensor, dn: Tensor | None) -> None:
        self.ops.similarity_(inputs, SimilarityOutputs(loss, dn))
