"""Rows of embeddings as the search reads them: checked, scaled when used, and taken in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from gcahng.errors import UserError

# Elements of a float64 block gathered at once (64 MiB).
_BLOCK = 1 << 23


class Rows:
    """Rows (n, D) as given, with their norms (n,) float64 and what they are divided by, first their norms.

    Args:
        name: the argument's name, for errors.
        values: (n, D).
        normalize: whether every row needs a direction.
    """

    def __init__(self, name: str, values: Tensor, normalize: bool):
        self.values = values
        self.dim = values.shape[1]
        # By blocks, so that the rows are never held in float64 as a whole.
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for rows in blocks(values, self.dim)]
        self.norms = torch.cat(norms)
        check_norms(name, self.norms, normalize)
        self.divisor = self.norms.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.values)

    def at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled rows (*index.shape, D), divided in float64, then rounded to `dtype`."""
        divisor = self.divisor[index] if self.divisor.ndim else self.divisor
        return self.values[index].double().div_(divisor).to(dtype)

    def all(self, dtype: torch.dtype) -> Tensor:
        """All scaled rows (n, D) in `dtype`."""
        scaled = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        for block in blocks(torch.arange(len(self), device=self.values.device), self.dim):
            scaled[block] = self.at(block, dtype)
        return scaled


def check_embeddings(name: str, embeddings: Tensor, dim: int | None = None) -> None:
    """UserError unless `embeddings` is a finite, floating (n, D) tensor with n, D >= 1 (and D = `dim`)."""
    if not isinstance(embeddings, Tensor):
        raise UserError(f"{name} must be a tensor of shape (n, D), got {type(embeddings).__name__}")
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise UserError(f"{name} must have shape (n, D) with n, D >= 1, got {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise UserError(f"{name} must be floating point, got {embeddings.dtype}")
    if dim is not None and embeddings.shape[1] != dim:
        raise UserError(f"{name} must have {dim} channels like embeddings, got {embeddings.shape[1]}")
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in blocks(embeddings, embeddings.shape[1])])
    if not finite.all():
        raise UserError(f"{name} must be finite, row {int(finite.logical_not().nonzero()[0])} is not")


def check_norms(name: str, norms: Tensor, normalize: bool, option: str = "normalize=True") -> None:
    """UserError at a row whose norm (n,) is infinite, or zero where rows are normalized."""
    wrong = norms.isinf() | (norms == 0 if normalize else False)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        right = f"positive and finite with {option}" if normalize else "finite"
        raise UserError(f"{name} must have rows whose norm is {right}, row {row} has norm {norms[row].item()}")


def split(rows: Tensor, chunk: int) -> Iterator[Tensor]:
    """`rows` in pieces of `chunk`; UserError unless that is a positive integer."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk must be a positive integer, got {chunk!r}")
    return (rows[start : start + chunk] for start in range(0, len(rows), chunk))


def blocks(rows: Tensor, elements: int, at_once: int = _BLOCK) -> tuple[Tensor, ...]:
    """`rows` (n, ...) in pieces whose work, `elements` for a row, stays within `at_once`; none where n = 0."""
    return rows.split(max(1, at_once // elements)) if len(rows) else ()


def power_of_two(largest: float) -> float:
    """The power of two, thus an exact divisor, that brings a norm of `largest` to at most 1 (1 where all is zero)."""
    return 2.0 ** max(math.frexp(largest)[1], -1000)
