"""Backwards that can themselves not be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError


def once(op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """backward(*tensors), from the backward of an autograd Function; differentiating the result raises UserError.

    torch's once_differentiable is not enough: where the upstream gradient is a constant, as after sum(), it hands out
    constants, and a second derivative through the saved inputs would silently be zero.
    """
    if torch.is_grad_enabled():  # create_graph=True
        return _Once.apply(op, backward, *tensors)
    return backward(*tensors)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, backward: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op = op
        return backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise UserError(
            f"{ctx.op} is differentiable once, not twice; impl='reference' is differentiable any number of times"
        )
