"""Edge start, e_ij = x_i ∘ x_j for a tile of node pairs, and its backward: two node sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.ops._implementations import Op, register, resolve
from gcahng.ops._once import once
from gcahng.ops._schemas import registered
from gcahng.reference.edge_start import edge_start as reference

register(
    "edge_start",
    Op(
        cpu=("cpp", "torch", "reference"),
        cuda=("cuda", "triton", "torch", "reference"),
        dtypes={
            "cpp": (torch.float32, torch.float64, torch.bfloat16),
            "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "triton": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        },
    ),
)


def edge_start(x_i: Tensor, x_j: Tensor, impl: str = "auto") -> Tensor:
    """x_i (I, D), x_j (J, D) → e (I, J, D), the product per channel (paper section 3.2, e⁰ where x = x̂).

    The gradients are dx_i = Σ_j g_ij ∘ x_j and dx_j = Σ_i g_ij ∘ x_i, summed in fp32 (fp64 for fp64), each in an order
    that depends on the shapes alone, so that two runs give the same bits with any number of threads. They are not
    differentiable again; impl="reference" is differentiable any number of times.

    Autocast changes nothing here: the op runs in its inputs' own type, as torch.mul does.

    Arguments
        x_i, x_j: of one floating dtype, on one device, with the same number of channels D.
        impl: auto, reference, torch, cpp, cuda or triton (gcahng/ops/_implementations.py).

    Errors: UserError for other shapes, dtypes or devices, and for an implementation that is not available.
    """
    _check(x_i, x_j)
    chosen = resolve(impl, x_i.device.type, "edge_start", x_i.dtype)
    if chosen == "reference":
        return reference(x_i, x_j)
    return _EdgeStart.apply(x_i.contiguous(), x_j.contiguous(), chosen)


def _check(x_i: Tensor, x_j: Tensor) -> None:
    for name, x in (("x_i", x_i), ("x_j", x_j)):
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is a {type(x).__name__}: a tensor is needed")
        if x.dim() != 2:
            raise UserError(f"{name} has shape {tuple(x.shape)}: (rows, channels) is needed")
        if not x.is_floating_point():
            raise UserError(f"{name} has dtype {x.dtype}: a floating one is needed")
    if x_i.shape[1] != x_j.shape[1]:
        raise UserError(f"x_j has {x_j.shape[1]} channels: x_i has {x_i.shape[1]}, and both need the same number")
    if x_i.dtype != x_j.dtype:
        raise UserError(f"x_j has dtype {x_j.dtype}: x_i has {x_i.dtype}, and both need the same")
    if x_i.device != x_j.device:
        raise UserError(f"x_j is on {x_j.device}: x_i is on {x_i.device}, and both need the same device")


def _torch_forward(x_i: Tensor, x_j: Tensor) -> Tensor:
    return x_i[:, None, :] * x_j[None, :, :]


def _torch_backward(grad_e: Tensor, x_i: Tensor, x_j: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x_i.dtype == torch.float64 else torch.float32
    g = grad_e.to(wide)
    dx_i, dx_j = (g * x_j).sum(1), (g * x_i[:, None]).sum(0)
    return dx_i.to(x_i.dtype), dx_j.to(x_j.dtype)


FORWARD = {"torch": _torch_forward, **registered("edge_start_fwd")}
BACKWARD = {"torch": _torch_backward, **registered("edge_start_bwd")}


class _EdgeStart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_i: Tensor, x_j: Tensor, impl: str) -> Tensor:
        ctx.save_for_backward(x_i, x_j)
        ctx.impl = impl
        return FORWARD[impl](x_i, x_j)

    @staticmethod
    def backward(ctx: Any, grad_e: Tensor) -> tuple[Tensor, Tensor, None]:
        x_i, x_j = ctx.saved_tensors
        return *once("edge_start", BACKWARD[ctx.impl], grad_e.contiguous(), x_i, x_j), None
