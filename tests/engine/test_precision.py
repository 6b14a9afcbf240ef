"""The type of products, and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from gcahng import GCAHNGLoss
from gcahng.engine import precision
from gcahng.testing import seeded


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    said = (precision._warn_of_slow_bf16, precision._warn_of_fp16)
    for once in said:
        once.cache_clear()
    yield
    for once in said:
        once.cache_clear()


def what_is_said(low: torch.dtype | None, **options: object) -> list[str]:
    gca = GCAHNGLoss(4, 8, layers=1, heads=2, impl="torch", **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torch.autocast("cpu", low, enabled=low is not None):
                gca(seeded(8, 8, seed=0), torch.arange(4).repeat(2))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(("low", "options"), [(torch.bfloat16, {}), (None, {"edge_dtype": torch.bfloat16})])
def test_a_cpu_without_bf16_is_named_once(
    low: torch.dtype | None, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_lacks_bf16", lambda: False)
    assert what_is_said(low, **options) == []
    precision._warn_of_slow_bf16.cache_clear()
    monkeypatch.setattr(precision, "_cpu_lacks_bf16", lambda: True)
    (said,) = what_is_said(low, **options)
    assert said.startswith("this CPU has no bf16 instructions")
    assert what_is_said(None) == []


def test_products_under_fp16_stay_in_float32_and_it_is_said_once() -> None:
    (said,) = what_is_said(torch.float16)
    assert said.startswith("fp16 autocast: the engine's products stay in float32")


@pytest.mark.parametrize(
    ("flags", "lacks"), [("fpu avx2", True), ("fpu avx512_bf16", False), ("amx_bf16 fpu", False), (None, False)]
)
def test_what_a_processor_says_of_itself(flags: str | None, lacks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_text(path: object) -> str:
        if flags is None:
            raise OSError
        return f"model name : x\nflags : {flags}\n"

    monkeypatch.setattr(precision.Path, "read_text", read_text)
    assert precision._cpu_lacks_bf16() is lacks
