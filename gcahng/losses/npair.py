"""The N-pair loss as GCA-HNG uses it (paper section 3.4, J_m)."""

from __future__ import annotations

from torch import Tensor

from gcahng.errors import UserError
from gcahng.losses.layout import check_shapes, class_layout, raise_for_problems, value_problems
from gcahng.losses.options import is_whole
from gcahng.reference.npair import npair


def npair_loss(embeddings: Tensor, labels: Tensor, *, num_per_class: int | None = None, check: bool = True) -> Tensor:
    """J_m of embeddings (n, D) with labels (n,), K samples of each of C classes in any order → 0-dim.

    The first sample of each class in the batch is its anchor; with every other sample k, cross entropy of z₀ z_kᵀ
    against the classes; the mean over k; plus 3e-3 · 0.25 · Σ‖z‖² / C. num_per_class: K (None: read from the labels,
    on the host). check: look at the values (one synchronization); UserError for classes of unequal size or non-finite
    values.
    """
    check_shapes(embeddings, labels)
    if num_per_class is not None and (not is_whole(num_per_class) or num_per_class < 2):
        raise UserError(f"num_per_class is {num_per_class!r}; it must be None or a whole number of at least 2")
    layout = class_layout(labels, num_per_class)
    z = embeddings[layout.order]
    if check:
        raise_for_problems(value_problems(z, layout, None).tolist(), None, layout.views)
    return npair(z.view(-1, layout.views, z.shape[1]).transpose(0, 1))
