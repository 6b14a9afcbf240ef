"""edge_update: gate, mlp_in and mlp_out as one stage, which saves what it is asked to; the MLP's backward."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from stages.cases import Collected, Results, Run, Setup
from stages.checks import check_same_bits, check_stage, check_unaligned, run_of, stage
from torch._subclasses.fake_tensor import FakeTensorMode

from gcahng.engine.schedule import make_schedule
from gcahng.engine.schema import Ops
from gcahng.engine.stages import edge_update, make_stages
from gcahng.engine.stages.common import RowMoments, StageContext
from gcahng.engine.stages.edge_update import EdgeRecord, Saving
from gcahng.engine.weights import EdgeGradients


@stage("updates")
def forward(run: Run) -> Results:
    """BatchNorm's moments of its edges, too."""
    found, update, head = Collected(), run.stages.edge_update, run.stages.head
    moments, of_edges = head.moments(), head.moments()
    for number, tile, rows in run.tiles():
        h = run.nan(tile.rows, 4 * run.dim, dtype=run.low)
        stored, s = RowMoments(run.nan(tile.rows, 1), run.nan(tile.rows, 1)), run.edge_room(tile)
        given = (run.layer, tile, run.edges(rows))
        e, e1, saved = update.forward(*given, Saving("e1", h, stored, s), "out")
        assert h.isfinite().all()
        found.add(e1=e1.full, e1_low=e1.low, weight_i=saved.weight_i.reshape(-1), weight_j=saved.weight_j.reshape(-1))
        found.add(mean=stored.mean, rstd=stored.rstd, s=s, e=e.full, low=e.low)
        e = update.forward(*given, Saving(s=s), "again").edges  # where h is saved it may be another kernel
        found.add(s_again=s, e_again=e.full, low_again=e.low)
        head.add_moments(tile, e, of_edges)
        e = update.forward(*given, Saving(moments=stored if number else None), "last", moments).edges
        if e is not None:
            head.add_moments(tile, e, moments)
        if run.edge_dtype is run.like.dtype:
            check_narrow_storage(run, given)
    torch.testing.assert_close(moments, of_edges, rtol=1e-13, atol=1e-13 * of_edges.abs().max().item())
    return found.results()


def check_narrow_storage(run: Run, given: tuple) -> None:
    """What goes on is what was stored."""
    stored, s = run.nan(given[1].rows, run.dim, dtype=torch.bfloat16), run.edge_room(given[1])
    run.stages.edge_update.forward(*given, Saving(s=s), "whole")
    e = run.stages.edge_update.forward(*given, Saving(s=stored), "stored").edges
    assert torch.equal(stored, s.bfloat16())
    wanted = run.stages.norm_gelu.forward(run.layer.closing.norm, stored.to(s.dtype), "wanted").full
    torch.testing.assert_close(e.full, wanted, rtol=0, atol=8 * torch.finfo(s.dtype).eps * wanted.abs().max().item())


@stage("rows")
def mlp_backward(run: Run) -> Results:
    """Through both halves of the MLP and the residual: with and without sums, from the stored product and again."""
    found, into, update = Collected(), EdgeGradients(run.dim, run.like), run.stages.edge_update
    for number, tile, rows in run.tiles():
        e1, s = run.edges(rows), rows(run.inputs.sums)
        h = run.nan(tile.rows, 4 * run.dim, dtype=run.low)
        _, moments = update.mlp_in.forward(run.layer.closing, e1, h, None)
        record = EdgeRecord(None, e1, None, h, RowMoments(moments.mean.clone(), moments.rstd.clone()), s)
        found.add(de1=update.mlp_backward(run.layer, record, rows(run.inputs.upstream), None))
        record = record._replace(h=None if number else h)
        found.add(de1_again=update.mlp_backward(run.layer, record, rows(run.inputs.upstream), into))
    gamma, beta = into.norm
    sums = {name: getattr(into, name) for name in ("w1", "b1", "out_g", "out", "out_mean")}
    return found.results() | sums | {"gamma": gamma, "beta": beta}


directions = pytest.mark.parametrize("direction", [forward, mlp_backward], ids=str)


@directions
def test_stage(backend, direction):
    check_stage(backend, direction)


@directions
def test_same_bits_twice(backend, direction):
    check_same_bits(backend, direction)


@pytest.mark.simulated
@directions
def test_unaligned(emulator, direction):
    check_unaligned(emulator, direction)


@pytest.mark.simulated
def test_between_products_of_the_library(between_products):
    check_stage(between_products, mlp_backward)


@pytest.mark.simulated
def test_several_blocks_of_rows_a_program(triton, monkeypatch):
    """As where there are thousands of blocks."""
    for stem in ("mlp_in", "mlp_out"):
        kernels = importlib.import_module(f"gcahng.kernels.{stem}")
        monkeypatch.setattr(kernels, "ROWS_BACKWARD", kernels.ROWS_BACKWARD._replace(programs=1))
    check_stage(triton, mlp_backward, [(Setup(6, 3, 19, 300), "float64")])


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("dim", "written"), [(128, {"out", "gate rows"}), (129, {"out", "e1", "g"})], ids=["in one kernel", "in several"]
)
def test_an_update_in_one_kernel_writes_no_e1(triton, dim, written):
    run = run_of(triton, Setup(3, 2, dim, 100, p=0.1), "float32")
    _, tile, rows = next(run.tiles())
    run.stages.edge_update.forward(run.layer, tile, run.edges(rows), Saving(), "out")
    names = run.workspace.names
    assert written <= names and ("e1" in names) == ("e1" in written)


@pytest.mark.simulated
def test_update_takes_what_fits():
    takes = importlib.import_module("gcahng.kernels.edge_update").takes
    assert takes(128, 2, False) and takes(128, 4, True) and takes(64, 2, True)
    assert not (takes(129, 4, False) or takes(128, 2, True))


@pytest.mark.simulated
@pytest.mark.parametrize(("kilobytes", "small"), [(99, True), (163, False), (227, False)])
def test_a_gpu_of_little_shared_memory_is_crowded(kilobytes, small, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    edge_update.shared_memory.cache_clear()
    schedule = make_schedule(3, 2, symmetric=True, tile_rows=64)
    with FakeTensorMode():
        like = torch.zeros((), device="cuda:0")
        context = StageContext(schedule, 128, torch.bfloat16, like, ops=Ops("triton", triton_products=True))
        stages = make_stages(context)
    edge_update.shared_memory.cache_clear()
    assert stages.edge_update.small is small
