"""Marks the backward of an operator as one that cannot itself be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError


def differentiable_once(op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Runs the backward of an autograd Function so that differentiating its results raises UserError.

    torch's once_differentiable is not enough. Where the upstream gradient is a constant, as after sum(), it returns
    constants, and a second derivative through the saved inputs would silently be zero.

    Args:
        op: the operator's name, for the error.
        backward: computes the gradients from `tensors`.
        tensors: everything that the gradients depend on, the upstream gradient included.

    Returns:
        What `backward` returns.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return _DifferentiableOnce.apply(op, backward, *tensors)
    return backward(*tensors)


class _DifferentiableOnce(torch.autograd.Function):
    """Puts a node into the graph of the first derivative whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UserError(
            f"{ctx.op} is differentiable once, not twice; impl='reference' is differentiable any number of times"
        )
