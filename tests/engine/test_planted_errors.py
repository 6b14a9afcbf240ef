"""The bounds on a step's rounding errors refuse what is a few roundings worse than plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import Case
from error_draws import Errors, Variant, assert_errors, draw_errors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
CASE = Case(classes=4, views=2, layers=1, heads=2)


class Fault(TorchDispatchMode):
    """Changes what some operators return."""

    def __init__(self, operators: tuple, change: Callable[[Tensor], Tensor], only: int | None = None) -> None:
        super().__init__()
        self._operators, self._change, self._only, self._calls = operators, change, only, 0

    def __torch_dispatch__(self, function, types, arguments: tuple = (), keywords: dict[str, Any] | None = None):
        found = function(*arguments, **(keywords or {}))
        if function.overloadpacket in self._operators:
            self._calls += 1
            if self._only in (None, self._calls):
                return self._change(found)
        return found


class OtherEpsilon(TorchDispatchMode):
    """LayerNorm with an epsilon of 1e-6 in place of 1e-5."""

    def __torch_dispatch__(self, function, types, arguments: tuple = (), keywords: dict[str, Any] | None = None):
        if function.overloadpacket is aten.native_layer_norm:
            arguments = (*arguments[:-1], 0.1 * arguments[-1])
        return function(*arguments, **(keywords or {}))


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def off_by(ulp: int) -> Callable[[Tensor], Tensor]:
    """Every value is that many units in the last place too large or too small, by turns."""

    def change(x: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(x.numel()) % 2).view(x.shape)
        return (x.double() * (1 + ulp * torch.finfo(x.dtype).eps * signs)).to(x.dtype)

    return change


FAULTS = {
    "products accumulate in bf16": lambda: Fault(PRODUCTS, in_bfloat16),
    "one product accumulates in bf16": lambda: Fault(PRODUCTS, in_bfloat16, only=5),
    "sums are formed in bf16": lambda: Fault((aten.sum,), in_bfloat16),
    "another epsilon": OtherEpsilon,
    "products are off by six roundings": lambda: Fault(PRODUCTS, off_by(6)),
    "GELU is off by six roundings": lambda: Fault((aten.gelu,), off_by(6)),
}


@pytest.fixture(autouse=True)
def unobserved(monkeypatch):
    """Comparisons that are meant to fail say nothing of how near the others come to it."""
    monkeypatch.setattr("gcahng.testing.compare.observers", [])


@pytest.fixture(scope="module")
def errors() -> dict[str, Errors]:
    """Those of plain PyTorch with each fault, and without one."""
    faults = {name: Variant("reference", fault=fault) for name, fault in FAULTS.items()}
    return draw_errors(CASE, faults | {"plain": Variant("reference")})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_step_is_refused(fault, errors):
    with pytest.raises(AssertionError, match="of its size|times plain PyTorch's error"):
        assert_errors(CASE, Variant("reference"), errors[fault], errors["plain"])


def test_a_step_in_other_draws_is_not_refused(errors):
    """Without a fault, the first three draws hold the others and the other way round."""
    for part, rest in ((slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))):
        actual, plain = ({name: draws[s] for name, draws in errors["plain"].items()} for s in (part, rest))
        assert_errors(CASE, Variant("reference"), actual, plain)
