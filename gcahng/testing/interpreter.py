"""Triton's interpreter, made right for bf16: `interpret_bfloat16()` before the first interpreted launch.

The interpreter holds a bf16 value as its 16 bits. As it comes it multiplies these bits as whole numbers in a product,
and cuts values off instead of rounding them. Here arithmetic and products widen bf16 to fp32 first, as GPUs do, and
results are rounded to nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

MARK = "rounds_bfloat16"  # gcahng.availability asks the builder for it


def interpret_bfloat16() -> None:
    """Makes bf16 right in this process's interpreter, once."""
    if getattr(InterpreterBuilder, MARK, False):
        return
    setattr(InterpreterBuilder, MARK, True)
    for name, replacement in _REPLACEMENTS.items():
        setattr(InterpreterBuilder, name, replacement(getattr(InterpreterBuilder, name)))
    for scheme in (interpreter.ReduceOps, interpreter.ScanOps):
        scheme.apply_impl = _refusing(scheme.apply_impl)
    for name in ("create_fma", "create_clampf", "create_erf", "create_rsqrt"):
        setattr(InterpreterBuilder, name, _refusing(getattr(InterpreterBuilder, name)))


def _is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    """A handle in fp32 of one in bf16; others as they are."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """A handle in bf16 of fp32 values."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.uint16)
    return TensorHandle(rounded.numpy().reshape(values.shape), tl.bfloat16)


def _casting(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """A cast, (builder, source, type, …), through fp32."""

    def cast(self: Any, source: TensorHandle, target: Any, *rest: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16 and not _is_bfloat16(source):
            wide = source if source.dtype.scalar == tl.float32 else self.cast_impl(source, tl.float32)
            return _narrow(wide.data)
        if not _is_bfloat16(source):
            return stock(self, source, target, *rest)
        wide = _wide(source)
        if target.scalar in (tl.float32, tl.bfloat16):
            return wide if target.scalar == tl.float32 else source
        return self.cast_impl(wide, target)

    return cast


def _computing(operands: int) -> Callable[[Callable[..., TensorHandle]], Callable[..., TensorHandle]]:
    """An operation of so many operands, (builder, operands…, function), in fp32. Comparisons give booleans."""

    def replace(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
        def compute(self: Any, *arguments: Any) -> TensorHandle:
            given = arguments[:operands]
            if not any(map(_is_bfloat16, given)):
                return stock(self, *arguments)
            found = stock(self, *map(_wide, given), *arguments[operands:])
            values = found.data
            return _narrow(values) if values.dtype == np.float32 else TensorHandle(values, tl.int1)

        return compute

    return replace


def _multiplying(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return stock(self, _wide(a), _wide(b), *rest)

    return create_dot


def _refusing(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What no kernel asks of bf16: an error, before it is computed wrongly."""

    def refuse(self: Any, *arguments: Any) -> Any:
        flat = [x for argument in arguments for x in (argument if isinstance(argument, tuple | list) else [argument])]
        if any(getattr(getattr(x, "dtype", None), "scalar", None) == tl.bfloat16 for x in flat):
            raise NotImplementedError(f"{stock.__qualname__} in bfloat16 is not interpreted; it must be in float32")
        return stock(self, *arguments)

    return refuse


_REPLACEMENTS = {
    "cast_impl": _casting,
    "create_fp_to_fp": _casting,
    "binary_op": _computing(2),
    "unary_op": _computing(1),
    "create_dot": _multiplying,
}
