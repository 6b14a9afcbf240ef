"""Products of bf16 operands whose results are in fp32: with stand-ins for the products that torch has on CUDA alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gcahng.engine import products
from gcahng.testing import seeded

LOW, WIDE = torch.bfloat16, torch.float32
A, B = seeded(5, 7, seed=1).to(LOW), seeded(7, 3, seed=2).to(LOW)
BIAS, INTO = seeded(3, seed=3).to(LOW), seeded(5, 3, seed=4)
TRUTH = A.double() @ B.double()


def scratch(_: str, rows: int, width: int, dtype: torch.dtype = LOW) -> Tensor:
    return torch.full((rows, width), torch.nan, dtype=dtype)


class Library:
    """Stand-ins for torch's products, which note how they are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wide: bool, adds: bool) -> None:
        self.calls: list[tuple[str, torch.dtype | None]] = []
        self.mm, self.addmm = torch.mm, torch.addmm
        monkeypatch.setattr(torch, "mm", self._mm)
        monkeypatch.setattr(torch, "addmm", self._addmm)
        monkeypatch.setattr(products, "_has_wide_products", lambda *_: wide)
        monkeypatch.setattr(products, "_adds_to_wide", lambda *_: adds)

    def _mm(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **out: Any) -> Tensor:
        self.calls.append(("mm", out_dtype))
        return self.mm(*((a, b) if out_dtype is None else (a.to(out_dtype), b.to(out_dtype))), **out)

    def _addmm(self, c: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **out: Any) -> Tensor:
        self.calls.append(("addmm", out_dtype))
        return self.addmm(*((c, a, b) if out_dtype is None else (x.to(out_dtype) for x in (c, a, b))), **out)


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("wide", "adds"), [(True, True), (True, False), (False, False)])
def test_products_into_fp32(wide: bool, adds: bool, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library, into = Library(monkeypatch, wide, adds), INTO.clone()
    products.product(into, A, B, add, scratch)
    wanted = TRUTH + add * INTO.double()
    error = (into.double() - wanted).abs().max().item()
    rounded = (TRUTH.to(LOW).double() - TRUTH).abs().max().item()
    assert error < 1e-6 if wide else 1e-6 < error < 1.1 * rounded
    name = "addmm" if add and adds else "mm"
    assert library.calls == [(name, WIDE if wide else None)], "one product, which is not rounded where it need not be"


@pytest.mark.parametrize("wide", [True, False])
def test_new_and_affine_products(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library, into = Library(monkeypatch, wide, wide), torch.full_like(INTO, torch.nan)
    bound = 1e-6 if wide else 2 * torch.finfo(LOW).eps * TRUTH.abs().max().item()
    assert (products.new_product(A, B, WIDE).double() - TRUTH).abs().max() < bound
    products.affine(into, BIAS, A, B)
    assert (into.double() - TRUTH - BIAS.double()).abs().max() < bound
    assert library.calls == [("mm", WIDE if wide else None), ("addmm", WIDE if wide else None)]


def test_products_of_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_works", lambda *_: pytest.fail("nothing is tried where nothing is to be widened"))
    a, b, into = A.double(), B.double(), INTO.double()
    products.product(into, a, b, True, scratch)
    torch.testing.assert_close(into, TRUTH + INTO.double(), rtol=1e-14, atol=1e-14)
    products.product(into, a, b, False, scratch)
    assert torch.equal(into, products.new_product(a, b, torch.float64))


def test_what_a_device_has_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in (products._has_wide_products, products._adds_to_wide):
        probe.cache_clear()
    assert products._has_wide_products(torch.device("meta"), LOW) and products._adds_to_wide(torch.device("meta"), LOW)
    assert not products._has_wide_products(torch.device("cpu"), LOW)
    assert not products._works(lambda a, into: torch.mm(a, a, out_dtype=WIDE), torch.device("cpu"), LOW)
