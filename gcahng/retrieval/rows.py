"""Rows of embeddings for the search: checking them, scaling them when they are used, and taking them in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gcahng.errors import UserError

# Elements of a float64 block that is gathered at once (64 MiB).
_BLOCK = 1 << 23


class Rows:
    """Embeddings (n, D) that are scaled when they are used.

    Args:
        name: name of the argument, for errors.
        values: (n, D) embeddings.
        normalize: whether every row needs a direction, that is a norm above 0.

    Attributes:
        values: the rows as they were given.
        dim: D.
        norms: (n,) float64 norms of the rows.
        divisor: (n, 1) or () float64 that rows are divided by. These are the norms, unless the caller sets another one.

    Raises:
        UserError: a norm is infinite, or 0 with `normalize`.
    """

    def __init__(self, name: str, values: Tensor, normalize: bool):
        self.values = values
        self.dim = values.shape[1]
        # In blocks, so that the whole set is never in memory in float64.
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in blocks(values, self.dim)]
        self.norms = torch.cat(norms)
        check_norms(name, self.norms, normalize)
        self.divisor = self.norms.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The scaled rows (*index.shape, D), divided in float64 and then rounded to `dtype`."""
        divisor = self.divisor[index] if self.divisor.ndim else self.divisor
        return self.values[index].double().div_(divisor).to(dtype)

    def all(self, dtype: torch.dtype) -> Tensor:
        """All scaled rows (n, D) in `dtype`."""
        scaled = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for block in blocks(torch.arange(len(self), device=self.values.device), self.dim):
            scaled[block] = self.at(block, dtype)
        return scaled


def check_embeddings(name: str, embeddings: Tensor, dim: int | None = None) -> None:
    """Check that `embeddings` is a finite floating-point tensor (n, D) with n, D >= 1.

    Args:
        name: name of the argument, for errors.
        embeddings: the tensor to check.
        dim: D if it must have a certain value; None allows any.

    Raises:
        UserError: it is not.
    """
    if not isinstance(embeddings, Tensor):
        raise UserError(f"{name} is a {type(embeddings).__name__}; it must be a tensor of shape (n, D)")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise UserError(f"{name} has shape {tuple(embeddings.shape)}; it must have shape (n, D) with n, D >= 1")
    if not embeddings.is_floating_point():
        raise UserError(f"{name} is {dtype_name(embeddings)}; it must be floating point")
    if dim is not None and embeddings.shape[1] != dim:
        raise UserError(
            f"{name} has {embeddings.shape[1]} channels; it must have {dim}, like the embeddings it is compared with"
        )
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in blocks(embeddings, embeddings.shape[1])])
    if not finite.all():
        raise UserError(
            f"{name} has non-finite values in row {int(finite.logical_not().nonzero()[0])}; it must be finite"
        )


def check_norms(name: str, norms: Tensor, normalize: bool, option: str = "normalize=True") -> None:
    """Check the norms of rows.

    Args:
        name: name of the argument that the rows are from, for errors.
        norms: (n,) norms.
        normalize: whether rows are scaled to norm 1.
        option: the option that asks for scaling, for errors.

    Raises:
        UserError: a norm is infinite, or 0 with `normalize`.
    """
    wrong = norms.isinf() | (norms == 0 if normalize else False)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        expected = f"positive and finite with {option}" if normalize else "finite"
        raise UserError(f"{name} has norm {norms[row].item()} in row {row}; it must be {expected}")


def dtype_name(tensor: Tensor) -> str:
    """The dtype of a tensor, as errors name it: "float32" rather than "torch.float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def split(rows: Tensor, chunk: int) -> Iterator[Tensor]:
    """Split `rows` into pieces of `chunk`.

    Raises:
        UserError: `chunk` is not a positive integer.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk is {chunk!r}; it must be a positive integer")
    return (rows[start : start + chunk] for start in range(0, len(rows), chunk))


def blocks(rows: Tensor, elements: int, most: int = _BLOCK) -> tuple[Tensor, ...]:
    """Split `rows` (n, ...), each of which takes `elements` elements of work, so that a piece takes at most `most`."""
    return rows.split(max(1, most // elements)) if len(rows) else ()


def power_of_two(largest: float) -> float:
    """The power of two that a norm of `largest` can be divided by, exactly, to be at most 1; 1 if `largest` is 0."""
    return 2.0 ** max(math.frexp(largest)[1], -1000)
