"""Matrix products of bf16 operands whose results are in fp32, wherever torch's library has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_WIDE = torch.float32


def product(into: Tensor, a: Tensor, b: Tensor, add: bool, scratch: Callable[..., Tensor]) -> None:
    """Writes the product a b to `into`, or adds it there.

    Where `into` is wider than the operands, CUDA's library forms the sum in fp32 and rounds nothing to the operands'
    dtype on the way. The CPU's library has no such product: there it is rounded once.

    Args:
        into: (R, W), in the operands' dtype or in fp32.
        a: (R, D).
        b: (D, W).
        add: whether the product is added to what `into` holds.
        scratch: scratch(slot, R, W[, dtype]) is memory for a result on its way, by default in the operands' dtype.
    """
    if into.dtype is a.dtype:
        if add:
            into.addmm_(a, b)
        else:
            torch.mm(a, b, out=into)
    elif into.dtype is _WIDE and _has_wide_products(a.device, a.dtype):
        if not add:
            torch.mm(a, b, out_dtype=_WIDE, out=into)
        elif _adds_to_wide(a.device, a.dtype):
            torch.addmm(into, a, b, out_dtype=_WIDE, out=into)
        else:
            into += torch.mm(a, b, out_dtype=_WIDE, out=scratch("wide product", *into.shape, _WIDE))
    else:
        narrow = torch.mm(a, b, out=scratch("product", *into.shape))
        if add:
            into += narrow
        else:
            into.copy_(narrow)


def affine(into: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes a b + bias to `into` (R, W), which may be wider than the operands; see `product`."""
    if into.dtype is a.dtype:
        torch.addmm(bias, a, b, out=into)
    elif into.dtype is _WIDE and _has_wide_products(a.device, a.dtype):
        torch.addmm(bias, a, b, out_dtype=_WIDE, out=into)
    else:
        into.copy_(torch.addmm(bias, a, b))


def new_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """The product a b (R, W) in a dtype that may be wider than the operands'; see `product`."""
    if a.dtype is dtype:
        return torch.mm(a, b)
    if dtype is _WIDE and _has_wide_products(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


@cache
def _has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether mm takes operands of this dtype and returns fp32. torch has it on CUDA devices, and not on the CPU."""
    return device.type in ("cuda", "meta") and _works(lambda a, into: torch.mm(a, a, out_dtype=_WIDE), device, dtype)


@cache
def _adds_to_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm adds such a product to an fp32 tensor. Early versions of it want the operands' dtype there."""

    def add(a: Tensor, into: Tensor) -> Tensor:
        return torch.addmm(into, a, a, out_dtype=_WIDE, out=into)

    return _works(add, device, dtype)


def _works(call: Callable[[Tensor, Tensor], Tensor], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch takes this call, tried on a small matrix. It refuses before it launches anything.

    Raises:
        RuntimeError: the device failed, which says nothing about the call.
    """
    a, into = (torch.zeros(8, 8, dtype=x, device=device) for x in (dtype, _WIDE))
    try:
        return call(a, into).dtype is _WIDE
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        if "CUDA error" in str(error) or "CUBLAS" in str(error):
            raise
        return False
