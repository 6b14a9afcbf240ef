"""A stage of an implementation against plain torch: what is wanted, and how near it must come."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from engine_cases import error, moved
from stage_cases import PRECISIONS, Inputs, Results, Run, Setup, make_inputs, mapped
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine import fused
from gcahng.engine.judge import FusedJudge
from gcahng.engine.stages import Edges
from gcahng.engine.workspace import Workspace
from gcahng.testing import assert_close_to_truth, nan_poisoned, seeded

STAGES = (
    "edge_start",
    "edge_start_backward",
    "norm_gelu",
    "edge_to_node",
    "edge_to_node_backward",
    "gate",
    "gate_backward",
    "mlp",
    "mlp_backward",
    "head_forward",
    "head_backward",
    "norm_backward",
    "diversity",
    "mixing",
    "judging",
)


def run_of(setup: Setup, precision: str, impl: str, inputs: Inputs | None = None) -> Run:
    p = PRECISIONS[precision]
    return Run(setup, p, make_inputs(setup, p) if inputs is None else inputs, impl)


def truth_of(run: Run, setup: Setup) -> Run:
    """Plain torch in fp64 on the same (rounded) inputs."""
    return run_of(setup, "float64", "torch", mapped(Tensor.double, run.inputs))


class Wanted(NamedTuple):
    """arguments of the stage; the truth; what plain torch finds at the precision: on the inputs, and on inputs moved by
    a rounding, since one run may be right by luck."""

    arguments: tuple[Tensor, ...]
    truth: Results
    plain: list[Results]


@functools.cache  # for every instruction set and implementation
def wanted(setup: Setup, stage: str, precision: str) -> Wanted:
    plain = run_of(setup, precision, "torch")
    truth, arguments = truth_of(plain, setup), ()
    if stage == "mlp_backward":  # the sums that belong to the edges
        arguments = (truth.mlp()["s"].to(plain.like.dtype),)
    exact = getattr(truth, stage)(*(x.double() for x in arguments))
    if precision == "float64":
        return Wanted(arguments, exact, [])
    # A generator each, so that what an input is moved by does not depend on those after it.
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    near = [mapped(lambda x, g=generator: moved(x, x.dtype, g), plain.inputs) for generator in generators]
    every = [plain, *(run_of(setup, precision, "torch", inputs) for inputs in near)]
    return Wanted(arguments, exact, [getattr(run, stage)(*arguments) for run in every])


def check_stage(setup: Setup, stage: str, precision: str, impl: str) -> None:
    """fp64: 1e-13 of the largest value, so every formula is right. Below: at most twice plain torch's error, and half a
    unit in the last place. In memory full of NaN."""
    arguments, truth, plain = wanted(setup, stage, precision)
    run = run_of(setup, precision, impl)
    with nan_poisoned():
        actual = getattr(run, stage)(*arguments)
    run.workspace.check()
    assert actual.keys() == truth.keys() and actual
    for name, tensor in truth.items():
        if plain:
            worst = max((found[name] for found in plain), key=lambda x, t=tensor: error(x, t))
            assert_close_to_truth(actual[name], worst, tensor, name=f"{stage} {name}")
        else:
            assert actual[name].dtype is torch.float64 and actual[name].shape == tensor.shape
            assert error(actual[name], tensor) <= 1e-13 * tensor.abs().max().item(), name


def check_moments(setup: Setup, precision: str, impl: str) -> None:
    """Gathered in fp64 whatever the edges' type: a variance is a difference of them."""
    run = run_of(setup, precision, impl)
    truth = truth_of(run, setup).add_moments()["moments"]
    for found in (run, run_of(setup, precision, "torch")):
        found = found.add_moments()["moments"]
        torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-13 * truth.abs().max().item())


def check_variance_of_edges_far_from_zero(impl: str) -> None:
    """A spread of 1e-3 around 100: its square has seven digits left in fp64, and none in fp32."""
    run = run_of(Setup(6, 3, 19, 40), "float32", impl)
    full = (100 + 1e-3 * run.inputs.edges.full.double()).float()
    run.inputs = run.inputs._replace(edges=Edges(full, full))
    mean, square = run.add_moments()["moments"] / run.schedule.nodes**2
    counts = [
        torch.where(torch.arange(tile.offsets) < tile.mirrored, 1.0, 2.0)[:, None].expand(run.schedule.shape(tile))
        for tile in run.schedule.tiles
    ]
    weight = torch.cat([count.flatten() for count in counts]).double()[:, None] / run.schedule.nodes**2
    centred = full.double() - (weight * full.double()).sum(dim=0)
    wanted = (weight * centred.square()).sum(dim=0)
    torch.testing.assert_close(square - mean**2, wanted, rtol=1e-4, atol=0)


def check_entropy_far_from_zero(impl: str) -> None:
    """The largest logit is taken off before anything is raised to a power, wherever a row lies."""
    labels = torch.arange(9) % 37
    bias = seeded(37, seed=1, dtype=torch.float32)
    for at in (-1000.0, 1000.0):
        logits = at + seeded(9, 37, seed=2, dtype=torch.float32)
        exact = (logits.double() + bias.double()).requires_grad_()
        wanted = F.cross_entropy(exact, labels, reduction="none")
        wanted.sum().backward()
        judge = FusedJudge(Workspace(), fused.stage_ops(impl))
        loss, d = judge.cross_entropy(logits.clone(), bias, labels, 0.5, True)
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=0, atol=3e-4)  # an fp32 near 1000: 6e-5
        torch.testing.assert_close(d.double(), 0.5 * exact.grad, rtol=0, atol=3e-4)


def check_store_in_bfloat16(setup: Setup, precision: str, impl: str) -> None:
    """The pre-norm sums are rounded to the nearest bf16, and what goes on is what was stored."""
    run = run_of(setup, precision, impl)
    with nan_poisoned():
        kept, whole = run.close_to_bfloat16()["kept"], run.mlp()["s"]
    assert torch.equal(kept, whole.bfloat16())
