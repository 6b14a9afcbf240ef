"""gate: attention of an edge to its two nodes, residual and norm; its backward. Masks: test_gate_masks.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import (
    case,
    check_same_bits,
    check_stage,
    check_unaligned,
    inputs_of,
    run_of,
    stage,
    truth_of,
)

from gcahng.engine.stages.gate import LayerSums, TokenSums
from gcahng.engine.weights import EdgeGradients


def layer_sums(run: Run) -> LayerSums:
    return LayerSums(EdgeGradients(run.dim, run.like), TokenSums(run.stages.context))


@stage("tiles")
def forward(run: Run) -> Results:
    found = Collected()
    for _, tile, rows in run.tiles():
        e1, saved = run.stages.edge_update.gate.forward(run.layer, tile, run.edges(rows), "e1")
        found.add(e1=e1.full, low=e1.low)
        found.add(weight_i=saved.weight_i.reshape(-1), weight_j=saved.weight_j.reshape(-1))
    return found.results()


@stage("tiles")
def backward(run: Run) -> Results:
    """Sums and the edges' gradient apart, as some sweeps need but one of them, and together."""
    found, sums, gate = Collected(), layer_sums(run), run.stages.edge_update.gate
    for _, tile, rows in run.tiles():
        e, upstream = run.edges(rows), run.inputs.upstream
        _, saved = gate.forward(run.layer, tile, e, "e1")
        assert gate.backward(run.layer, tile, e, saved, rows(upstream), sums, False) is None
        found.add(de=gate.backward(run.layer, tile, e, saved, rows(upstream), None, True))
        found.add(de_again=gate.backward(run.layer, tile, e, saved, rows(upstream), sums, True))
    du, dc, dv = sums.tokens.totals()
    dgamma, dbeta = sums.gradients.norm
    return found.results() | {"du": du, "dc": dc, "dv": dv, "dgamma": dgamma, "dbeta": dbeta}


directions = pytest.mark.parametrize("direction", [forward, backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_most_views(backend, direction):
    check_stage(backend, direction, [backend.most_views])


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


def test_the_edges_gradient_does_not_depend_on_the_sums(backend):
    setups = backend.setups_twice(backward)
    for setup, precision in itertools.product(setups, backend.precisions(backward)):
        with case(setup, precision):
            found = backward.results(run_of(backend, setup, precision))
            assert torch.equal(found["de_again"], found["de"])


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


@pytest.mark.simulated
@directions
def test_many_channels_a_lane(emulator, direction):
    setups = (Setup(3, 2, 260, 100, p=0.2), Setup(2, 1, 1024, 9))
    check_stage(emulator, direction, [(setup, "float32") for setup in setups])


@pytest.mark.simulated
def test_too_many_channels_are_an_error(emulator):
    with pytest.raises(RuntimeError, match="cudaError_t 9"):
        forward.results(run_of(emulator, Setup(2, 1, 1028, 9), "float32"))


@pytest.mark.simulated
def test_a_missing_barrier_is_caught(emulator):
    """The backward's threads add up over edges what other warps left in shared memory."""
    setup = Setup(4, 2, 40, 100)
    right = backward.results(run_of(emulator, setup, "float32"))
    assert all(bool(x.isfinite().all()) for x in right.values())
    for seed in range(3):
        found = backward.results(run_of(emulator.without_barriers(seed), setup, "float32"))
        assert all(bool(found[name].isnan().any()) for name in ("du", "dc", "dv"))
        assert torch.equal(found["de"], right["de"])  # no thread waits for another


def attention_between_classes(run: Run) -> Results:
    """The attention weights, and what tokens get of the backward, without the edges of a class with itself."""
    found, sums, gate = Collected(), layer_sums(run), run.stages.edge_update.gate
    for _, tile, rows in run.tiles():
        if tile.first_offset > 0:
            e = run.edges(rows)
            _, saved = gate.forward(run.layer, tile, e, "e1")
            found.add(weight_i=saved.weight_i.reshape(-1), weight_j=saved.weight_j.reshape(-1))
            gate.backward(run.layer, tile, e, saved, rows(run.inputs.upstream), sums, False)
    du, dc, _ = sums.tokens.totals()
    return found.results() | {"du": du, "dc": dc}


def test_attention_far_from_half(backend):
    """The weights, 1 minus them and what comes of them keep their digits where an edge all but overlooks one of its
    ends, and do not overflow beyond."""
    setup = Setup(4, 2, 16, 4, symmetric=False)
    inputs = inputs_of(setup, "float32", backend.device)
    u, c, v = inputs.tokens
    apart = torch.linspace(-700, 700, len(c), device=c.device).view_as(c)  # neighbors' logits differ by 50
    inputs = inputs._replace(tokens=(u, apart, v))
    truth = attention_between_classes(truth_of(setup, inputs))
    found = attention_between_classes(run_of(backend, setup, "float32", inputs))
    for name in ("weight_i", "weight_j"):
        normal = truth[name] > 1e-37
        assert bool((truth[name][normal] < 1e-20).any()) and bool(found[name].isfinite().all())
        torch.testing.assert_close(found[name].double()[normal], truth[name][normal], rtol=1e-3, atol=0)
    for name in ("du", "dc"):
        wanted = truth[name][1:-1]  # the first and the last node have no other that near
        size = wanted.abs().amax(dim=1, keepdim=True)
        assert bool(((size > 1e-30) & (size < 1e-18)).all())
        torch.testing.assert_close(found[name][1:-1].double() / size, wanted / size, rtol=0, atol=1e-3)


@pytest.mark.simulated
def test_attention_far_from_half_with_unaligned_tensors(emulator):
    for one, _, precision in emulator.unaligned(backward):
        if precision == "float32":
            with case(one):
                test_attention_far_from_half(one)
