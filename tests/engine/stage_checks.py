"""A stage of an implementation against plain torch: what is wanted, and how near it must come."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from engine_cases import error, moved
from gcahng.engine.judge import FusedJudge, TorchJudge
from stage_cases import PRECISIONS, Inputs, Results, Run, Setup, Some, make_inputs, mapped
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine import fused
from gcahng.engine.stages import Edges
from gcahng.engine.workspace import Workspace
from gcahng.testing import assert_close_to_truth, nan_poisoned, seeded
from gcahng.testing.compare import assert_within

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
# Those that know which nodes a row's edge joins.
TILED = ("edge_start", "edge_start_backward", "edge_to_node", "edge_to_node_backward", "gate", "gate_backward")
TILED += ("norm_backward", "diversity", "mixing")


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
    """fp64: 1e-13 of the largest value, so every formula is right. Below: as exact as plain torch, and half a unit in
    the last place (assert_close_to_truth). In memory full of NaN."""
    arguments, truth, plain = wanted(setup, stage, precision)
    run = run_of(setup, precision, impl)
    with nan_poisoned():
        actual = getattr(run, stage)(*arguments)
    run.workspace.check()
    assert actual.keys() == truth.keys() and actual
    for name, tensor in truth.items():
        if plain:
            assert_close_to_truth(actual[name], [found[name] for found in plain], tensor, name=f"{stage} {name}")
        else:
            assert actual[name].dtype is torch.float64 and actual[name].shape == tensor.shape
            assert_within(error(actual[name], tensor), 1e-13 * tensor.abs().max().item(), f"{stage} {name} in fp64")


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
    """The largest logit, bias and all, is taken off before anything is raised to a power, wherever a row or one of its
    columns lies."""
    labels = torch.arange(9) % 37
    logits, bias = seeded(9, 37, seed=2, dtype=torch.float32), seeded(37, seed=1, dtype=torch.float32)
    first, last = (200 * F.one_hot(torch.tensor(column), 37) for column in (0, 36))
    rows = [(logits + at, bias) for at in (-1000.0, 1000.0)]
    for x, shift in (*rows, *((logits, bias + at) for at in (-1000.0, 1000.0, first, last))):
        exact = (x.double() + shift.double()).requires_grad_()
        wanted = F.cross_entropy(exact, labels, reduction="none")
        wanted.sum().backward()
        judge = FusedJudge(Workspace(), fused.stage_ops(impl))
        loss, d = judge.cross_entropy(x.clone(), shift, labels, 0.5, True)
        torch.testing.assert_close(loss.double(), wanted.detach(), rtol=0, atol=3e-4)  # an fp32 near 1000: 6e-5
        torch.testing.assert_close(d.double(), 0.5 * exact.grad, rtol=0, atol=3e-4)


def check_gradient_of_sure_rows(impl: str, low: torch.dtype) -> None:
    """Where a row is all but sure of its label, p - 1 has as many digits as any: p itself is not rounded to low."""
    labels, bias = torch.arange(9), torch.zeros(37)
    logits = (seeded(9, 37, seed=2, dtype=torch.float32) + 9 * F.one_hot(labels, 37)).to(low)
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, labels, reduction="sum").backward()
    _, d = FusedJudge(Workspace(), fused.stage_ops(impl)).cross_entropy(logits.clone(), bias, labels, 0.5, True)
    own = d.double().diagonal(), 0.5 * exact.grad.diagonal()
    torch.testing.assert_close(*own, rtol=0.6 * torch.finfo(low).eps, atol=0)


def check_attention_far_from_half(impl: str) -> None:
    """p, 1 - p and what comes of them keep their digits where an edge all but overlooks one of its ends, and do not
    overflow beyond."""
    setup = Setup(4, 2, 16, 4, symmetric=False)
    inputs = make_inputs(setup, PRECISIONS["float32"])
    u, c, v = inputs.tokens
    apart = torch.linspace(-700, 700, len(c)).view_as(c)  # neighbours' logits differ by 50
    run = run_of(setup, "float32", impl, inputs._replace(tokens=(u, apart, v)))
    truth, found = (r.attention_between_classes() for r in (truth_of(run, setup), run))
    for name in ("p", "q"):
        normal = truth[name] > 1e-37
        assert bool((truth[name][normal] < 1e-20).any()) and bool(found[name].isfinite().all())
        torch.testing.assert_close(found[name].double()[normal], truth[name][normal], rtol=1e-3, atol=0)
    for name in ("du", "dc"):
        wanted = truth[name][1:-1]  # the first and the last node have no other that near
        size = wanted.abs().amax(dim=1, keepdim=True)
        assert bool(((size > 1e-30) & (size < 1e-18)).all())
        torch.testing.assert_close(found[name][1:-1].double() / size, wanted / size, rtol=0, atol=1e-3)


def check_a_positive_is_never_farther_than_itself(impl: str) -> None:
    """Its share is 1 and θ does not matter, whatever d⁺ and d⁻ are rounded to: no other sum of the same distance may
    decide."""
    run = run_of(Some(40, 3, 45, 0, tiles=((0, 40, 0, 1, 1),)), "float32", impl)
    ((_, tile, rows),) = run.tiles()
    theta = rows(run.inputs.theta)
    place = theta.view(*run.schedule.shape(tile), -1)
    negatives = run.mixer.negatives(tile, theta).clone()
    dtheta = run.mixer.backward_theta(tile, torch.ones_like(negatives)).view(place.shape)
    assert bool((dtheta != 0).any())
    for i in range(3):
        assert bool((dtheta[:, i, 0, (i + 1) % 3] == 0).all())
        place[:, i, 0, (i + 1) % 3] += 1
    assert torch.equal(run.mixer.negatives(tile, theta), negatives)


def check_coefficients_near_zero(impl: str) -> None:
    """θ keeps its digits where it is all but 0."""
    setup = Setup(3, 2, 16, 100)
    inputs = make_inputs(setup, PRECISIONS["float32"])
    head = inputs.head._replace(bias=torch.linspace(-80, 80, setup.dim))
    run = run_of(setup, "float32", impl, inputs._replace(head=head))
    truth, found = truth_of(run, setup).head_forward()["theta"], run.head_forward()["theta"]
    assert bool((truth < 1e-20).any())
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=0)


def check_similarity_of_short_vectors(impl: str) -> None:
    """Norms are at least 1e-8, so that a vector of zeros has a finite likeness and gradient."""
    sizes = torch.tensor([0.0, 1e-9, 3e-8, 1e-6, 1.0]).view(-1, 1)
    anchors, negatives = (sizes * seeded(5, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    node, counted = torch.arange(5).repeat_interleave(5), torch.ones(25, dtype=torch.bool)
    dn, wanted = torch.zeros(25, 16), torch.zeros(25, 16, dtype=torch.float64)
    loss = FusedJudge(Workspace(), fused.stage_ops(impl)).similarity(
        anchors, node, negatives.repeat(5, 1), counted, 0.5, dn
    )
    exact = TorchJudge().similarity(anchors.double(), node, negatives.repeat(5, 1).double(), counted, 0.5, wanted)
    torch.testing.assert_close(loss.double(), exact, rtol=0, atol=1e-5)
    size = wanted.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    torch.testing.assert_close(dn.double() / size, wanted / size, rtol=0, atol=1e-5)


def check_outputs_on_their_own(ops: Any, low: torch.dtype) -> None:
    """The accumulating type's output, or the low one, alone is what it is beside the other."""
    count, dim = 24, 9
    t, out, residual = (seeded(count, dim, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    gamma, beta, w, d = (seeded(dim, seed=seed, dtype=torch.float32) for seed in (4, 5, 6, 7))
    mean, rstd = seeded(count, 1, seed=8, dtype=torch.float32), torch.ones(count, 1)
    x = seeded(5 * 2, dim, seed=9, dtype=torch.float32)
    calls = (
        (ops.norm_gelu_, (t, gamma, beta)),
        (ops.mlp_out_fwd_, (out.to(low), residual, mean, rstd, w, d, gamma, beta, torch.empty_like(t))),
        (ops.edge_start_fwd_, ([2, 2, 3, 1, 0, 1, 3], x)),
    )
    for op, inputs in calls:
        full, again = (torch.full_like(t, torch.nan) for _ in range(2))
        narrow, narrow_again = (torch.full_like(t, torch.nan, dtype=low) for _ in range(2))
        op(*inputs, full, narrow)
        op(*inputs, again, None)
        op(*inputs, None, narrow_again)
        assert bool(full.isfinite().all()) and torch.equal(full.to(low), narrow)
        assert torch.equal(again, full) and torch.equal(narrow_again, narrow)


def check_hidden_values_as_they_are_stored(ops: Any, low: torch.dtype) -> None:
    """Row moments, and what the backward makes of them, are of g as the next product reads it; db is summed before dh
    is rounded."""
    rows, width = 40, 300
    h, b = seeded(rows, width, seed=1, dtype=torch.float32).to(low), seeded(width, seed=2, dtype=torch.float32)
    g, again, dh = (torch.full_like(h, torch.nan) for _ in range(3))
    mean, rstd = (torch.full((rows, 1), torch.nan) for _ in range(2))
    ops.mlp_in_fwd_(h, b, g, mean, rstd)
    variance, center = torch.var_mean(g.double(), dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), center, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=2e-6, atol=0)

    zero, one, db = torch.zeros(rows, 1), torch.ones(rows, 1), torch.zeros(width)
    ops.mlp_in_bwd_(h, b, torch.zeros_like(h), zero, one, zero, one, again, dh, db)  # dn = -g
    assert torch.equal(g, again)
    x = (h.double() + b.double()).requires_grad_()
    F.gelu(x).backward(-g.double())
    torch.testing.assert_close(db.double(), x.grad.sum(dim=0), rtol=1e-5, atol=1e-5)


def check_store_in_bfloat16(setup: Setup, precision: str, impl: str) -> None:
    """The pre-norm sums are rounded to the nearest bf16, and what goes on is what was stored."""
    run = run_of(setup, precision, impl)
    with nan_poisoned():
        kept, whole = run.stored_in_bfloat16()["kept"], run.mlp()["s"]
    assert torch.equal(kept, whole.bfloat16())
