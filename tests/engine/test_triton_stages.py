"""Each Triton stage against plain torch, in Triton's interpreter where there is no GPU: fp32, fp64 and fp16 products
(it computes bf16 wrongly), poisoned memory, and the same bits twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gcahng.engine.fused import FusedStages, stage_ops
from gcahng.engine.triton import TritonStages, _shared_memory
from stage_cases import Setup, Some
from stage_checks import (
    STAGES,
    TILED,
    check_a_positive_is_never_farther_than_itself,
    check_attention_far_from_half,
    check_coefficients_near_zero,
    check_entropy_far_from_zero,
    check_gradient_of_sure_rows,
    check_hidden_values_as_they_are_stored,
    check_moments,
    check_outputs_on_their_own,
    check_similarity_of_short_vectors,
    check_stage,
    check_store_in_bfloat16,
    check_variance_of_edges_far_from_zero,
    run_of,
    wanted,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from gcahng.engine.schedule import make_schedule
from gcahng.engine.stages import Keep
from gcahng.engine.workspace import Workspace
from gcahng.kernels import edge_update, head, mlp_in, mlp_out, tiles
from gcahng.kernels.sums import add_partials
from gcahng.testing import seeded

PRECISIONS = ("float64", "float32", "float16")

# Tied and apart, tiles of one class and of several, odd channels, more of them than one column block of a product has;
# small, for the interpreter takes milliseconds a program.
SETUPS = [
    Setup(6, 3, 19, 60, p=0.3),
    Setup(5, 2, 150, 40, symmetric=False, p=0.5),
    Setup(3, 8, 33, 200, p=0.1),
    Setup(4, 2, 64, 100),
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_stage(setup, stage, precision):
    check_stage(setup, stage, precision, "triton")


@pytest.mark.parametrize("stage", sorted({*TILED} - {"edge_start", "norm_backward"}))
def test_more_views_than_a_program_takes(stage):
    check_stage(Some(3, 9, 5, 0, p=0.3, tiles=((1, 1, 1, 2, 1),)), stage, "float64", "triton")


@pytest.fixture
def few_programs(monkeypatch):
    """So that each goes through several blocks of rows, as where there are thousands."""
    for module, name in ((head, "HEAD"), (mlp_out, "ROWS_BACKWARD"), (mlp_in, "ROWS_BACKWARD")):
        monkeypatch.setattr(module, name, getattr(module, name)._replace(programs=1))


@pytest.mark.parametrize("stage", ["mlp_backward", "head_backward"])
def test_several_blocks_of_rows_a_program(stage, few_programs):
    check_stage(Setup(6, 3, 19, 300), stage, "float64", "triton")


def test_moments_of_several_blocks_of_rows_a_program(few_programs):
    check_moments(Setup(6, 3, 19, 60), "float32", "triton")


def test_more_parts_of_nodes_than_are_added_at_once(monkeypatch):
    monkeypatch.setattr(tiles, "NODE_PARTS", tiles.NODE_PARTS._replace(block_parts=1))
    check_stage(Setup(5, 8, 5, 2000), "edge_to_node", "float64", "triton")


def test_more_partial_sums_than_are_added_at_once():
    part, into = seeded(150, 40, seed=1), seeded(40, seed=2)
    wanted = into + part.sum(dim=0)
    add_partials(part, into)
    torch.testing.assert_close(into, wanted)


@pytest.mark.parametrize("precision", ["float32", "float16"])  # in fp64 they are so anyway
@pytest.mark.parametrize("stage", ["mlp", "mlp_backward"])
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_mlp_between_products_of_the_library(setup, stage, precision, monkeypatch):
    monkeypatch.setattr("gcahng.engine.triton.TritonStages", FusedStages)
    check_stage(setup, stage, precision, "triton")


UPDATES = [
    Setup(5, 3, 19, 100, p=0.3),
    Setup(4, 2, 64, 100, symmetric=False, p=0.5),
    Setup(3, 3, 128, 100, p=0.1),
    Setup(3, 2, 128, 100),
]


@pytest.mark.parametrize("precision", PRECISIONS)  # in fp64 it is gate, mlp_in and mlp_out
@pytest.mark.parametrize("setup", UPDATES, ids=str)
def test_update(setup, precision):
    """In one kernel, where it is taken, and beside what is to be kept."""
    check_stage(setup, "update", precision, "triton")


@pytest.mark.parametrize(
    ("dim", "written"), [(128, {"out", "gate rows"}), (129, {"out", "e1", "g"})], ids=["in one kernel", "in several"]
)
def test_an_update_in_one_kernel_writes_no_e1(dim, written):
    setup = Setup(3, 2, dim, 100, p=0.1)
    run = run_of(setup, "float32", "triton")
    number, tile, rows = next(run.tiles())
    w = (run.inputs.weights, run.inputs.closing, run.tokens)
    run.stages.update(1, number, tile, *w, run.edges(rows), Keep(None, None, None, None), "out")
    names = run.workspace.names
    assert written <= names and ("e1" in names) == ("e1" in written)


def test_update_takes_what_fits():
    assert edge_update.takes(128, 2, False) and edge_update.takes(128, 4, True) and edge_update.takes(64, 2, True)
    assert not (edge_update.takes(129, 4, False) or edge_update.takes(128, 2, True))


@pytest.mark.parametrize(("kilobytes", "small"), [(99, True), (163, False), (227, False)])
def test_a_gpu_of_little_shared_memory_is_crowded(kilobytes, small, monkeypatch):
    properties = SimpleNamespace(shared_memory_per_block_optin=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    _shared_memory.cache_clear()
    schedule = make_schedule(3, 2, symmetric=True, tile_rows=64)
    with FakeTensorMode():
        like = torch.zeros((), device="cuda:0")
        stages = TritonStages(schedule, 128, torch.bfloat16, like, None, 1, Workspace(), None)
    _shared_memory.cache_clear()
    assert stages._small is small


def test_more_blocks_than_share_a_cache():
    """Every block of a product is formed, in whichever order."""
    e1, w1, b = (seeded(*shape, seed=k, dtype=torch.float32) for k, shape in enumerate(((1300, 5), (300, 5), (300,))))
    h, g = (torch.full((1300, 300), torch.nan) for _ in range(2))
    mean, rstd = (torch.full((1300, 1), torch.nan) for _ in range(2))
    mlp_in.product_forward(e1, w1, b, h, g, mean, rstd)
    torch.testing.assert_close(h, e1 @ w1.T)
    torch.testing.assert_close(g, F.gelu(h + b))
    variance, wanted_mean = torch.var_mean(g, dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(mean, wanted_mean)
    torch.testing.assert_close(rstd, torch.rsqrt(variance + 1e-5))


def test_hidden_values_are_made_of_the_product_as_it_is_stored():
    """The backward makes them of it again."""
    e1, w1, b = (seeded(*shape, seed=k, dtype=torch.float32) for k, shape in enumerate(((50, 33), (70, 33), (70,))))
    h, g = (torch.full((50, 70), torch.nan, dtype=torch.float16) for _ in range(2))
    mean, rstd = (torch.full((50, 1), torch.nan) for _ in range(2))
    mlp_in.product_forward(e1.half(), w1.half(), b, h, g, mean, rstd)
    again = F.gelu(h.float() + b)
    large = again.abs() > 1e-2  # of the others, what is near 0 in the tail of GELU is formed less exactly
    assert (g != again.half())[large].float().mean() < 0.01  # two roundings of fp32 on both sides of a tie
    torch.testing.assert_close(mean, g.float().mean(dim=1, keepdim=True), rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_store_in_bfloat16(setup, precision):
    check_store_in_bfloat16(setup, precision, "triton")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("setup", SETUPS[:2], ids=str)
def test_moments(setup, precision):
    check_moments(setup, precision, "triton")


def test_entropy_far_from_zero():
    check_entropy_far_from_zero("triton")


def test_a_positive_is_never_farther_than_itself():
    check_a_positive_is_never_farther_than_itself("triton")


def test_hidden_values_as_they_are_stored():
    check_hidden_values_as_they_are_stored(stage_ops("triton"), torch.float16)


def test_outputs_on_their_own():
    check_outputs_on_their_own(stage_ops("triton"), torch.float16)


def test_coefficients_near_zero():
    check_coefficients_near_zero("triton")


def test_similarity_of_short_vectors():
    check_similarity_of_short_vectors("triton")


def test_gradient_of_sure_rows():
    check_gradient_of_sure_rows("triton", torch.float16)


def test_attention_far_from_half():
    check_attention_far_from_half("triton")


def test_variance_of_edges_far_from_zero():
    check_variance_of_edges_far_from_zero("triton")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stage", (*STAGES, "update"))
def test_same_bits_twice(stage, precision):
    setup = Setup(3, 2, 19, 20, p=0.3)
    arguments = wanted(setup, stage, precision).arguments
    first, second = (getattr(run_of(setup, precision, "triton"), stage)(*arguments) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
