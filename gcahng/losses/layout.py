"""The canonical order of a batch, and the checks that a batch must pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.errors import UserError

_CURE = (
    "draw batches with gcahng.data.BalancedBatchSampler, or give batch_size to pytorch-metric-learning's "
    "MPerClassSampler"
)


class ClassLayout(NamedTuple):
    """The canonical order of a batch: classes ascending, the views of a class side by side in their old order.

    Attributes:
        order: the batch's row at each canonical place (n,).
        labels: labels (n,) in canonical order.
        classes: labels of the classes in ascending order (C,).
        views: samples of a class, K.
    """

    order: Tensor
    labels: Tensor
    classes: Tensor
    views: int

    @property
    def index(self) -> Tensor:
        """The batch's row that is view k of class a, (K, C)."""
        return self.order.view(-1, self.views).T

    @property
    def appearance(self) -> Tensor:
        """Each class's place among the classes by first appearance in the batch, (C,)."""
        first = self.order.view(-1, self.views)[:, 0]
        return torch.argsort(torch.argsort(first))


def check_shapes(embeddings: Tensor, labels: Tensor, embedding_dim: int | None = None) -> None:
    """Checks what shapes and dtypes alone show.

    Args:
        embeddings: must be floating-point (n, D).
        labels: must be integers (n,).
        embedding_dim: what D must be, or None.

    Raises:
        UserError: one of them is not what it must be.
    """
    if not isinstance(embeddings, Tensor) or embeddings.dim() != 2 or not embeddings.is_floating_point():
        raise UserError(f"embeddings is {describe(embeddings)}; it must be a floating-point tensor of shape (n, D)")
    if embedding_dim is not None and embeddings.shape[1] != embedding_dim:
        raise UserError(f"embeddings has {embeddings.shape[1]} channels; it must have embedding_dim, {embedding_dim}")
    integral = isinstance(labels, Tensor) and not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool
    )
    if not integral or labels.dim() != 1:
        raise UserError(f"labels is {describe(labels)}; it must be an integer tensor of shape (n,)")
    if labels.shape[0] != embeddings.shape[0]:
        raise UserError(
            f"labels has {labels.shape[0]} entries; embeddings has {embeddings.shape[0]} rows, one label each"
        )
    for name, x in (("embeddings", embeddings), ("labels", labels)):
        if x.layout is not torch.strided:
            raise UserError(f"{name} is a {str(x.layout).removeprefix('torch.')} tensor; it must be dense")
    if labels.is_meta:
        raise UserError("labels is on meta, where tensors have no values; it must be on the device of the embeddings")


def class_layout(labels: Tensor, num_per_class: int | None) -> ClassLayout:
    """Finds the canonical order of a batch.

    Args:
        labels: (n,).
        num_per_class: samples of a class, K. With None it is read from the labels on the host. Otherwise nothing checks
            here that the labels agree with it: that is left to value_problems.

    Raises:
        UserError: the number of labels does not fit, or, if K is read from them, classes are of unequal size or fewer
            than two.
    """
    if num_per_class is None:
        classes, counts = labels.unique(return_counts=True)
        sizes = dict(zip(classes.tolist(), counts.tolist(), strict=True))
        smallest, largest = (min(sizes, key=sizes.get), max(sizes, key=sizes.get)) if sizes else (None, None)
        if len(sizes) < 2:
            raise UserError(f"labels has {len(sizes)} class(es); it must have at least 2")
        if sizes[smallest] != sizes[largest] or sizes[smallest] < 2:
            raise UserError(
                f"labels has {sizes[smallest]} sample(s) of class {smallest} and {sizes[largest]} of class {largest}; "
                f"every class in a batch needs the same number, at least 2: {_CURE}"
            )
        num_per_class = sizes[smallest]
    n = labels.shape[0]
    if n % num_per_class or n < 2 * num_per_class:
        raise UserError(
            f"labels has {n} entries; with num_per_class={num_per_class} it must have a multiple of {num_per_class}, "
            f"at least {2 * num_per_class}"
        )
    ordered, order = torch.sort(labels, stable=True)
    return ClassLayout(order, ordered, ordered[::num_per_class].contiguous(), num_per_class)


_OUT_OF_RANGE = "labels is out of range; with num_classes={num_classes} labels must lie in 0 … {last}"
PROBLEMS = (
    "embeddings holds non-finite values; they must be finite (did the model diverge?)",
    "embeddings has a constant row (all channels equal, or too close to normalize); its direction is undefined, "
    "every row needs two different channels",
    _OUT_OF_RANGE,
    "labels does not hold num_per_class={views} samples of every class in it; "
    f"every class in a batch needs the same number: {_CURE}",
)


def value_problems(z: Tensor, layout: ClassLayout, num_classes: int | None) -> Tensor:
    """Finds which of PROBLEMS a batch has, on its device and without a synchronization.

    Args:
        z: embeddings (n, D) in canonical order.
        layout: the canonical order.
        num_classes: training classes M; None for the N-pair loss alone, which takes constant rows and any labels
            but -1.

    Returns:
        (4,) bool.
    """
    z = z.detach()
    rows = layout.labels.view(-1, layout.views)
    unequal = (rows != rows[:, :1]).any() | (rows[1:, 0] == rows[:-1, 0]).any()
    if num_classes is None:
        constant = torch.zeros_like(unequal)
        out_of_range = (rows == -1).any()  # rows without a label are no class
    else:
        # The rounded mean of equal channels may differ from them, and the norm of tiny ones underflow: look at both.
        norms = (z - z.mean(dim=1, keepdim=True)).norm(dim=1)
        constant = ((z.amax(dim=1) == z.amin(dim=1)) | (norms == 0)).any()
        out_of_range = ((rows < 0) | (rows >= num_classes)).any()
    return torch.stack(((~z.isfinite()).any(), constant, out_of_range, unequal))


def raise_for_problems(problems: list[bool], num_classes: int | None, views: int | None = None) -> None:
    """Reports the first problem of a batch, if there is one.

    Args:
        problems: what value_problems found.
        num_classes: training classes M.
        views: samples of a class, K.

    Raises:
        UserError: there is a problem.
    """
    for text, present in zip(PROBLEMS, problems, strict=True):
        if present:
            if text is _OUT_OF_RANGE and num_classes is None:
                raise UserError("labels has -1, which means no label; every sample of a batch must have a class")
            last = None if num_classes is None else num_classes - 1
            raise UserError(text.format(num_classes=num_classes, last=last, views=views))


def describe(value: object) -> str:
    """A value's type, or a tensor's dtype and shape, for error messages."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
