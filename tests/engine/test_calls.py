"""How many calls of torch a training step makes from Python: for a small batch they take longer than a GPU's work.

Counted is every operator that torch dispatches within the two passes, views and allocations included, and every launch
of a Triton product, in a second step of the same kind, on meta tensors that the engine takes for a GPU's. Attention
counts as one call each way, as CUDA's fused attention is. What follows from the number of tiles is told from the rest
by two tilings of one batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gcahng.engine import generator_pass, prepare
from gcahng.engine.schedule import make_schedule
from gcahng.testing import launches
from gcahng.testing.launches import Sizes

MOST_A_TILE, MOST_FIXED = 120, 600
SIZES, DIM = Sizes(27, 3, 2, 100), 64
FEW, MANY = 1000, 600  # edges of a tile; 27 classes have no half band, so that no tile is of another kind
PRODUCTS = ("mlp_in.product_forward", "mlp_in.product_backward", "mlp_out.product_forward", "edge_update.forward")


class Calls(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class FusedAttention(torch.autograd.Function):
    """One operator forward and one backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul(ctx.saved_tensors, 1))


def calls_of_a_step(implementation: str, compute: torch.dtype, memory: str, tile_rows: int) -> Counter[str]:
    calls = Calls()

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with calls:
                return run(*arguments)

        return call

    def launch(*_: Any) -> None:
        calls.seen["launch"] += 1

    metric = patch.object(launches, "METRIC_PASS", counted(launches.METRIC_PASS))
    generator = patch.object(generator_pass, "generator_pass", counted(generator_pass.generator_pass))
    tilings = patch.object(prepare, "default_tile_rows", lambda *_: tile_rows)
    attention = patch("torch.nn.functional.scaled_dot_product_attention", lambda *qkv, **_: FusedAttention.apply(*qkv))
    products = [patch(f"gcahng.kernels.{product}", launch) for product in PRODUCTS]
    with ExitStack() as patches:
        for one in (metric, generator, tilings, attention, *products):
            patches.enter_context(one)
        for _ in range(2):
            calls.seen.clear()
            launches.meta_step(implementation, DIM, compute, memory, SIZES)
    return calls.seen


def tiles(tile_rows: int) -> int:
    return len(make_schedule(SIZES.classes, SIZES.views, symmetric=True, tile_rows=tile_rows).tiles)


@pytest.mark.parametrize("memory", ["store", "hidden"])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("implementation", ["cuda", "cuda+triton"])
def test_calls_of_a_step(implementation: str, compute: torch.dtype, memory: str) -> None:
    few, many = (calls_of_a_step(implementation, compute, memory, rows) for rows in (FEW, MANY))
    a_tile = (many.total() - few.total()) / (tiles(MANY) - tiles(FEW))
    fixed = few.total() - tiles(FEW) * a_tile
    print(f"{a_tile:.0f} a tile, {fixed:.0f} fixed")
    assert many["gate_fwd_"] + many["launch"] > few["gate_fwd_"] + few["launch"] > 0
    assert a_tile <= MOST_A_TILE
    assert fixed <= MOST_FIXED
