"""gcahng.ops.edge_update: forward, backward and both, for every implementation that is available here.

    python -m pytest benchmarks/bench_edge_update.py

Each is checked against the reference in float64 before it is timed; one that fails is not timed. With a symmetric
schedule n (n + 1) / 2 edges are computed, each with 8 D² multiply-adds forward and 20 D² backward (16 D² of gradients,
and 4 D² to form the first product again). "of product rate" is what these would take at the rate of one repeated
product of that shape, over the time measured; peak_MB is what the call held beyond its inputs.
"""

from __future__ import annotations

import pytest
import torch
from op_timing import Case, cases, near, time_call
from torch import Tensor

from gcahng.bench.system import ProductRate
from gcahng.ops import EdgeUpdateWeights, edge_update
from gcahng.testing import seeded

SIZES = [(96, 128), (129, 512)]  # nodes, channels
PRODUCTS = {"forward": 8, "backward": 20, "both": 28}  # multiply-adds an edge, over D²


def inputs_of(case: Case) -> list[Tensor]:
    """edges, nodes and the weights."""
    n, dim = case.size
    wide = 4 * dim
    shapes = [(dim, dim), (dim,)] * 3 + [(dim,), (dim,), (wide, dim), (wide,), (wide,), (wide,), (dim, wide), (dim,)]
    weights = [
        seeded(*s, seed=k, device=case.device) * (s[1] ** -0.5 if len(s) == 2 else 0.5) for k, s in enumerate(shapes)
    ]
    edges = seeded(n, n, dim, seed=90, device=case.device)
    nodes = seeded(n, dim, seed=91, device=case.device)
    return [x.requires_grad_() for x in ((edges + edges.transpose(0, 1)) / 2, nodes, *weights)]


def run(inputs: list[Tensor], impl: str, precision: str) -> Tensor:
    """The updated edges."""
    device = inputs[0].device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return edge_update(inputs[0], inputs[1], EdgeUpdateWeights(*inputs[2:]), impl=impl, edge_memory="store")


def check(case: Case, inputs: list[Tensor], upstream: Tensor) -> None:
    """On a small part: the first nodes."""
    few = [inputs[0][:9, :9].detach(), inputs[1][:9].detach(), *(w.detach() for w in inputs[2:])]

    def outputs(x: list[Tensor], impl: str, precision: str) -> list[Tensor]:
        x = [t.requires_grad_() for t in x]
        new = run(x, impl, precision)
        return [new.detach(), *torch.autograd.grad(new, x, upstream[:9, :9].to(new.dtype))]

    truth = outputs([x.double() for x in few], "reference", "fp64")
    plain = outputs([x.clone() for x in few], "reference", case.precision)
    found = outputs([x.clone() for x in few], case.impl, case.precision)
    skip = 5  # the key's bias cancels: its gradient is rounding
    assert near(*([t for k, t in enumerate(x) if k != skip + 1] for x in (found, plain, truth))), "not as near as plain"


@pytest.mark.parametrize("case", cases(SIZES, ("fp32", "bf16")), ids=str)
def test_edge_update(case: Case, benchmark) -> None:
    n, dim = case.size
    benchmark.group = f"edge_update {case.direction} n={n} D={dim} {case.precision} on {case.device}"
    inputs = inputs_of(case)
    upstream = seeded(n, n, dim, seed=92, device=case.device)
    check(case, inputs, upstream)
    seconds = time_call(benchmark, case, lambda: run(inputs, case.impl, case.precision), inputs, upstream)
    if seconds is not None:
        flops = 2 * PRODUCTS[case.direction] * dim**2 * n * (n + 1) / 2
        rate = ProductRate(dim, case.precision).rate(5)
        benchmark.extra_info["of product rate"] = f"{100 * flops / rate / seconds:.0f} %"
