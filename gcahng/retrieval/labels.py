"""Labels: one rule for all metrics.

A label is a whole number that int64 holds. Its size means nothing: labels of 10¹² take no more memory than 0, 1, 2. The
label -1 (`UNLABELED`) means that the class of a row is not known. Such a row matches no row, another one with -1
included. In a gallery it is a wrong item for every query; as a query it has nothing to find and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcahng.data.sampler import UNLABELED
from gcahng.errors import UserError
from gcahng.retrieval.rows import dtype_name

_CURE = "numpy.unique(labels, return_inverse=True)[1] numbers labels of any other kind"


def check_labels(name: str, labels: Any, embeddings: Tensor) -> Tensor:
    """Check labels and move them to the CPU.

    Args:
        name: name of the argument, for errors.
        labels: (n,) integers, as a tensor, an array or a list; -1 for a row without a label.
        embeddings: (n, D) embeddings that they belong to.

    Returns:
        (n,) int64 labels on the CPU.

    Raises:
        UserError: the labels are not integers that int64 holds, or not one for each embedding.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} has no whole numbers ({reason}); it must be integer: {_CURE}") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"{name} is {dtype_name(labels)}; it must be integer: {_CURE}")
    if labels.shape != embeddings.shape[:1]:
        raise UserError(
            f"{name} has shape {tuple(labels.shape)}; it must have shape ({len(embeddings)},), like the embeddings"
        )
    whole = labels.detach().cpu().long().contiguous()
    if labels.dtype == torch.uint64 and (beyond := (whole < 0).nonzero().squeeze(1)).numel():
        row = int(beyond[0])
        raise UserError(
            f"{name} has {int(whole[row]) + 2**64} in row {row}; it must be less than 2**63, and -1 (signed) stands "
            "for no label"
        )
    return whole


class Classes:
    """The items of each class, in memory that depends on the number of items alone.

    Args:
        labels: (n,) int64 on the CPU; items with -1 are in no class.
    """

    def __init__(self, labels: Tensor):
        self._labels, self._sizes = labels.unique(return_counts=True)
        self._order = labels.argsort(stable=True)
        self._starts = self._sizes.cumsum(0) - self._sizes

    def sizes(self, labels: Tensor) -> Tensor:
        """The number (n,) of items with each label of `labels` (n,); 0 for -1."""
        place = self._place(labels)
        return torch.where((self._labels[place] == labels) & (labels != UNLABELED), self._sizes[place], 0)

    def members(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The items of each of `labels` (n,), all of which are classes here.

        Returns:
            (t,) places in `labels` and (t,) items, as pairs.
        """
        place = self._place(labels)
        sizes = self._sizes[place]
        query = torch.arange(len(labels)).repeat_interleave(sizes)
        within = torch.arange(len(query)) - (sizes.cumsum(0) - sizes)[query]
        return query, self._order[self._starts[place][query] + within]

    def _place(self, labels: Tensor) -> Tensor:
        return torch.searchsorted(self._labels, labels).clamp_(max=len(self._labels) - 1)
