"""The N-pair loss as GCA-HNG uses it (paper section 3.4, J_m)."""

from __future__ import annotations

from torch import Tensor

from gcahng.bounds import check_number
from gcahng.errors import UserError
from gcahng.losses.layout import check_shapes, class_layout, raise_for_problems, value_problems
from gcahng.losses.misuse import refuse_vmap
from gcahng.reference.npair import npair


def npair_loss(embeddings: Tensor, labels: Tensor, *, num_per_class: int | None = None, check: bool = True) -> Tensor:
    """Computes J_m, the N-pair loss.

    The first sample of each class in the batch is its anchor z₀. For every other sample k the loss has the cross
    entropy of z₀ z_kᵀ against the classes. It is their mean over k, plus 3e-3 · 0.25 · Σ‖z‖² / C.

    Args:
        embeddings: (n, D), in any order.
        labels: whole numbers (n,) other than -1, which means no label; each of the C classes has K samples.
        num_per_class: samples of a class, K. None reads it from the labels on the host.
        check: whether values are checked, which costs a synchronization.

    Returns:
        The loss, 0-dim.

    Raises:
        UserError: wrong shapes or dtypes; classes of unequal size; a label of -1; values that are not finite.
    """
    if check or num_per_class is None:
        refuse_vmap("npair_loss", (embeddings, labels), "it can be mapped with num_per_class and check=False")
    check_shapes(embeddings, labels)
    if embeddings.is_meta:
        raise UserError("embeddings is on meta, where tensors have no values; it must be on another device")
    check_number("num_per_class", num_per_class, none="None")
    layout = class_layout(labels, num_per_class)
    z = embeddings[layout.order]
    if check:
        raise_for_problems(value_problems(z, layout, None).tolist(), None, layout.views)
    return npair(z.view(-1, layout.views, z.shape[1]).transpose(0, 1))
