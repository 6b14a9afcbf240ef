"""edge_to_node: S_i = Σ_j GELU(W_e e_ij + b_e), and its backward."""

from __future__ import annotations

import importlib

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import check_same_bits, check_stage, check_unaligned, run_of, stage

from gcahng.engine.weights import ToNodeSums


@stage("tiles", edges=False)
def forward(run: Run) -> Results:
    into = run.node_sum()
    for _, tile, rows in run.tiles():
        run.stages.edge_to_node.forward(tile, run.inputs.to_node, run.edges(rows), into)
    return {"sum": into.total()}


@stage("tiles", edges=False)
def backward(run: Run) -> Results:
    found, ds = Collected(), run.band(run.inputs.node_upstream)
    sums = ToNodeSums(run.like.new_zeros(run.dim, run.dim), run.like.new_zeros(run.dim))
    for number, tile, rows in run.tiles():
        de = rows(run.inputs.upstream)
        into = sums if number != 1 else None  # as where a replay needs de alone
        run.stages.edge_to_node.backward(tile, run.inputs.to_node, run.edges(rows), ds, into, de)
        found.add(de=de)
    return found.results() | sums._asdict()


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


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


@pytest.mark.simulated
def test_more_parts_of_nodes_than_are_added_at_once(triton, monkeypatch):
    tiles = importlib.import_module("gcahng.kernels.tiles")
    monkeypatch.setattr(tiles, "NODE_PARTS", tiles.NODE_PARTS._replace(block_parts=1))
    check_stage(triton, forward, [(Setup(5, 8, 5, 2000), "float64")])


@pytest.mark.simulated
def test_a_missing_barrier_is_caught(emulator):
    setup = Setup(4, 2, 40, 100)
    assert bool(forward.results(run_of(emulator, setup, "float32"))["sum"].isfinite().all())
    for seed in range(3):
        found = forward.results(run_of(emulator.without_barriers(seed), setup, "float32"))["sum"]
        assert bool(found.isnan().any())


@pytest.mark.simulated
def test_more_partial_sums_than_are_added_at_once():
    from gcahng.kernels.sums import add_partials
    from gcahng.testing import seeded

    part, into = seeded(150, 40, seed=1), seeded(40, seed=2)
    wanted = into + part.sum(dim=0)
    add_partials(part, into)
    torch.testing.assert_close(into, wanted)
