"""The CUDA kernels of the stages that know the tile, run in the emulator (tests/emulator): against plain torch, between
fences, in memory full of NaN, with threads in order and warps in random orders."""

from __future__ import annotations

import pytest
import torch
from emulator.tile_ops import EmulatedTiles, compile_all, each_unaligned
from mask_cases import CHANCES, DRAWS, LAYERS, SEEDS, assert_a_draw_at_the_threshold_is_kept, assert_gate_masks
from stage_cases import Setup, Some
from stage_checks import (
    check_a_positive_is_never_farther_than_itself,
    check_attention_far_from_half,
    check_stage,
    run_of,
)

from gcahng import native
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.schedule import make_schedule

ONE_DTYPE = ("edge_start_backward", "mixing", "diversity")  # nothing of theirs is an operand of products
STAGES = ("edge_start", "edge_to_node", "edge_to_node_backward", "gate", "gate_backward", *ONE_DTYPE)
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
WITH_PRODUCTS = [
    (stage, precision) for stage in STAGES for precision in PRECISIONS[: 2 if stage in ONE_DTYPE else len(PRECISIONS)]
]


# Tied and apart; tiles of one class and of several; rows that wide accesses fit, fit in fp32 alone, and do not fit;
# anchors with many edges, beside their columns and apart from them, and columns that begin again at class 0; more views
# than a warp weighs at once.
SETUPS = [
    Setup(6, 3, 19, 60, p=0.3),
    Setup(5, 2, 136, 40, symmetric=False, p=0.5),
    Some(70, 2, 64, 0, p=0.1, tiles=((0, 1, 0, 36, 1), (69, 1, 10, 40, 0), (3, 2, 1, 34, 0))),
    Setup(4, 9, 36, 400),
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    compile_all()


@pytest.fixture
def emulated(monkeypatch):
    """Makes the implementation "cuda" run in the emulator."""

    def use(*arguments) -> None:
        monkeypatch.setattr("gcahng.engine.fused.stage_ops", lambda impl: EmulatedTiles(*arguments))

    return use


@pytest.mark.parametrize(("stage", "precision"), WITH_PRODUCTS)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_stage(setup, stage, precision, emulated):
    emulated()
    check_stage(setup, stage, precision, "cuda")


@pytest.mark.parametrize("stage", ["gate", "gate_backward"])
@pytest.mark.parametrize("setup", [Setup(3, 2, 260, 100, p=0.2), Setup(2, 1, 1024, 9)], ids=str)
def test_many_channels_a_lane(setup, stage, emulated):
    emulated()
    check_stage(setup, stage, "float32", "cuda")


@pytest.mark.parametrize(("stage", "precision"), WITH_PRODUCTS)
def test_unaligned(stage, precision, emulated):
    """Rows that wide accesses would fit, were they where they may be."""
    emulated(-1, 1)
    check_stage(Setup(3, 2, 16, 12, p=0.3), stage, precision, "cuda")


@pytest.mark.parametrize("stage", STAGES)
def test_one_unaligned(stage, monkeypatch):
    """Wide accesses ask of each tensor whether it is where they may be."""
    for precision in ("float32", "bfloat16")[: 1 if stage in (*ONE_DTYPE, "gate_backward") else 2]:
        for ops in each_unaligned(EmulatedTiles):
            monkeypatch.setattr("gcahng.engine.fused.stage_ops", lambda impl, ops=ops: ops)
            if stage == "gate_backward":  # its check asks for the same bits of calls with other tensors
                check_attention_far_from_half("cuda")
            else:
                check_stage(Setup(2, 2, 16, 20, p=0.3), stage, precision, "cuda")


def test_attention_far_from_half(emulated):
    emulated()
    check_attention_far_from_half("cuda")


def test_a_positive_is_never_farther_than_itself(emulated):
    emulated()
    check_a_positive_is_never_farther_than_itself("cuda")


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_one_view(precision, emulated):
    emulated()
    check_stage(Setup(5, 1, 12, 10), "mixing", precision, "cuda")


def test_most_views(emulated):
    emulated()
    check_stage(Some(2, 64, 5, 0, tiles=((0, 1, 1, 1, 0),)), "mixing", "float32", "cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_bits_do_not_depend_on_warp_order(stage, precision, emulated):
    setup = Some(20, 4, 40, 0, p=0.3, tiles=((0, 1, 0, 18, 1), (17, 3, 3, 1, 0)))
    in_order = None
    for seed in (-1, 0, 1, 2):
        emulated(seed)
        found = getattr(run_of(setup, precision, "cuda"), stage)()
        in_order = in_order or found
        assert all(torch.equal(tensor, in_order[name]) for name, tensor in found.items())


def test_a_missing_barrier_is_caught(emulated):
    setup = Setup(4, 2, 40, 100)
    emulated()
    right = run_of(setup, "float32", "cuda").edge_to_node()["sum"]
    for seed in range(3):
        emulated(seed, 0, "CUDA_EMULATOR_DROP_BARRIERS")
        assert bool(run_of(setup, "float32", "cuda").edge_to_node()["sum"].isnan().any())
    assert bool(right.isfinite().all())


@pytest.mark.parametrize(("classes", "views", "symmetric", "rows"), [(3, 2, True, 12), (2, 3, False, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masks(classes, views, symmetric, rows, dtype, monkeypatch):
    monkeypatch.setattr("mask_cases.stage_ops", lambda impl: EmulatedTiles())
    schedule = make_schedule(classes, views, symmetric=symmetric, tile_rows=rows)
    for layer, seed, draw, p in zip(LAYERS, SEEDS, DRAWS, CHANCES, strict=True):
        assert_gate_masks("cuda", schedule, layer, EdgeDropout(p, seed, torch.tensor(draw)), dtype)


def test_a_draw_at_the_threshold_is_kept(monkeypatch):
    monkeypatch.setattr("mask_cases.stage_ops", lambda impl: EmulatedTiles())
    assert_a_draw_at_the_threshold_is_kept("cuda")


def test_too_many_channels_are_an_error(emulated):
    emulated()
    with pytest.raises(RuntimeError, match="cudaError_t 9"):
        run_of(Setup(2, 1, 1028, 9), "float32", "cuda").gate()


def test_cuda_library_has_the_ops():
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    library = native.load("_C_cuda")
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    stage_ops = [name for name in dir(EmulatedTiles) if name.endswith("_") and not name.startswith("_")]
    assert len(stage_ops) == 11
    for name in stage_ops:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gcahng::{name}", "CUDA"), name
