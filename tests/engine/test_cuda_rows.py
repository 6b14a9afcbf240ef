"""The CUDA kernels of the row-wise stages, run in the emulator (tests/emulator): against plain torch, between fences,
in memory full of NaN, with threads in order and warps in random orders."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from emulator.row_ops import EmulatedRows, compile_all
from emulator.tile_ops import each_unaligned
from stage_cases import Setup
from stage_checks import (
    check_hidden_values_as_they_are_stored,
    check_moments,
    check_stage,
    check_store_in_bfloat16,
    check_variance_of_edges_far_from_zero,
    run_of,
    wanted,
)

from gcahng import native
from gcahng.testing import assert_close_to_truth, seeded

STAGES = ("norm_gelu", "mlp", "mlp_backward", "head_forward", "head_backward", "norm_backward")
PRECISIONS = ("float64", "float32", "bfloat16", "float16")
OPS = (
    "norm_gelu_",
    "mlp_in_fwd_",
    "mlp_in_bwd_",
    "mlp_out_fwd_",
    "mlp_out_bwd_",
    "head_moments_",
    "head_fwd_",
    "head_bwd_",
    "head_sums_",
    "head_norm_",
)

# Rows that wide accesses fit, of every number of channels that a lane keeps, and rows that they do not fit; edges that
# stand for one pair and for two.
SETUPS = [
    Setup(6, 3, 19, 60),
    Setup(5, 2, 12, 40),
    Setup(5, 2, 72, 30, symmetric=False),
    Setup(4, 2, 136, 20),
    Setup(3, 2, 260, 20),
    Setup(2, 2, 520, 9),
]
NARROW, ROUND = SETUPS[0], SETUPS[3]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    compile_all()


@pytest.fixture
def emulated(monkeypatch):
    """Makes the implementation "cuda" run in the emulator."""

    def use(*arguments) -> None:
        monkeypatch.setattr("gcahng.engine.fused.stage_ops", lambda impl: EmulatedRows(*arguments))

    return use


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_stage(setup, stage, precision, emulated):
    emulated()
    check_stage(setup, stage, precision, "cuda")


@pytest.mark.parametrize("stage", STAGES)
def test_addresses_that_wide_accesses_do_not_fit(stage, emulated):
    emulated(-1, 1)
    for precision in ("float32", "bfloat16"):
        check_stage(ROUND, stage, precision, "cuda")


@pytest.mark.parametrize("stage", STAGES)
def test_one_unaligned(stage, monkeypatch):
    """Wide accesses ask of each tensor whether it is where they may be."""
    for precision in ("float32", "bfloat16"):
        for ops in each_unaligned(EmulatedRows):
            monkeypatch.setattr("gcahng.engine.fused.stage_ops", lambda impl, ops=ops: ops)
            check_stage(Setup(2, 2, 16, 20), stage, precision, "cuda")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_moments(precision, emulated):
    emulated()
    for setup in (NARROW, ROUND):
        check_moments(setup, precision, "cuda")


def test_variance_of_edges_far_from_zero(emulated):
    emulated()
    check_variance_of_edges_far_from_zero("cuda")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_hidden_values_as_they_are_stored(low):
    check_hidden_values_as_they_are_stored(EmulatedRows(), low)


def test_store_in_bfloat16(emulated):
    emulated()
    for precision in PRECISIONS:
        check_store_in_bfloat16(NARROW, precision, "cuda")


@pytest.mark.parametrize("setup", [NARROW, ROUND], ids=str)
@pytest.mark.parametrize("stage", [*STAGES, "add_moments"])
def test_bits_do_not_depend_on_warp_order(stage, setup, emulated):
    arguments = wanted(setup, stage, "float32").arguments if stage == "mlp_backward" else ()

    def results(seed: int):
        emulated(seed)
        return getattr(run_of(setup, "float32", "cuda"), stage)(*arguments)

    in_order = results(-1)
    for seed in range(3):
        shuffled = results(seed)
        assert all(torch.equal(shuffled[name], tensor) for name, tensor in in_order.items())


# -- more rows than blocks: each takes several


def check_sum(found: torch.Tensor, terms: torch.Tensor) -> None:
    """Of few thousand terms: a sum in any order is off by a few roundings of its terms' sizes."""
    size = terms.double().abs().sum(dim=0)
    assert bool(((found.double() - terms.double().sum(dim=0)).abs() <= 4 * torch.finfo(found.dtype).eps * size).all())


def test_blocks_that_take_several_rows_of_the_hidden_layer():
    """Warps meet at barriers that several rows share: none may run ahead into places that others still read."""
    rows, width = 4110, 264
    h, b = seeded(rows, width, seed=1), torch.zeros(width)
    g, mean, rstd = torch.full_like(h, torch.nan), *(torch.full((rows, 1), torch.nan) for _ in range(2))
    EmulatedRows(0).mlp_in_fwd_(h, b, g, mean, rstd)
    variance, center = torch.var_mean(torch.nn.functional.gelu(h.double()), dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), center, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_blocks_that_take_several_rows_of_the_close():
    rows = 4200
    s, dy, ops = seeded(rows, 1, seed=1), seeded(rows, 1, seed=2), EmulatedRows()
    one, zero, column = torch.ones(1), torch.zeros(1), torch.ones(rows, 1)
    ds, scaled, m1, m2 = (torch.full((rows, 1), torch.nan) for _ in range(4))
    sums = torch.zeros(4, 1)
    ops.mlp_out_bwd_(s, s, dy, column, column, zero, zero, one, ds, ds, scaled, m1, m2, sums)
    assert not ds.any() and not scaled.any() and not m1.any() and not m2.any()  # one channel: its norm is constant
    assert sums[0] == 0 and sums[2] == 0 and sums[3] == 0
    check_sum(sums[1], dy)


def test_partial_sums_of_more_rows_than_a_block_takes_at_least():
    rows = 33_000
    theta, dtheta, ops = torch.sigmoid(seeded(rows, 1, seed=1)), seeded(rows, 1, seed=2), EmulatedRows()
    dpre, total = torch.full((rows, 1), torch.nan), torch.zeros(1)
    ops.head_bwd_(theta, dtheta, dpre, total)
    torch.testing.assert_close(dpre, dtheta * theta * (1 - theta))
    check_sum(total, dpre)


# -- what would go wrong


def test_a_missing_barrier_is_caught():
    h, b = seeded(4, 2048, seed=1), torch.zeros(2048)

    def results(seed: int, *defines: str) -> tuple[torch.Tensor, ...]:
        outputs = torch.full_like(h, torch.nan), *(torch.full((4, 1), torch.nan) for _ in range(2))
        EmulatedRows(seed, 0, *defines).mlp_in_fwd_(h, b, *outputs)
        return outputs

    right = results(-1)
    for seed in range(3):
        g, mean, rstd = results(seed, "CUDA_EMULATOR_DROP_BARRIERS")
        assert torch.equal(g, right[0])  # no thread waits for another
        assert not torch.equal(mean, right[1]) and bool(mean.isnan().any() and rstd.isnan().any())


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_the_widest_rows(low):
    t, gamma, beta = seeded(3, 1024, seed=1), seeded(1024, seed=2), seeded(1024, seed=3)
    y, y_low = torch.full_like(t, torch.nan), torch.full_like(t, torch.nan, dtype=low)
    EmulatedRows().norm_gelu_(t, gamma, beta, y, y_low)

    def norm_gelu(dtype: torch.dtype) -> torch.Tensor:
        g, *affine = (x.to(dtype) for x in (torch.nn.functional.gelu(t.to(dtype)), gamma, beta))
        return torch.nn.functional.layer_norm(g, (1024,), *affine, 1e-5)

    assert_close_to_truth(y, norm_gelu(torch.float32), norm_gelu(torch.float64))
    assert torch.equal(y_low, y.to(low))
    h, b = seeded(2, 4096, seed=4, dtype=low), seeded(4096, seed=5)
    g, mean, rstd = torch.full_like(h, torch.nan), torch.full((2, 1), torch.nan), torch.full((2, 1), torch.nan)
    EmulatedRows().mlp_in_fwd_(h, b, g, mean, rstd)
    assert_close_to_truth(g, torch.nn.functional.gelu(h.float() + b).to(low), torch.nn.functional.gelu(h.double() + b))
    variance, center = torch.var_mean(g.double(), dim=1, correction=0, keepdim=True)
    torch.testing.assert_close(mean.double(), center, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(rstd.double(), (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_what_the_kernels_do_not_take_is_an_error():
    ops = EmulatedRows()

    def norm_gelu(dim: int, low: torch.dtype, dtype: torch.dtype = torch.float32) -> None:
        t = torch.zeros(1, dim, dtype=dtype)
        ops.norm_gelu_(t, t[0].clone(), t[0].clone(), t.clone(), torch.zeros(1, dim, dtype=low))

    norm_gelu(8, torch.float16)
    for wrong in ((1025, torch.float32), (8, torch.float64), (8, torch.bfloat16, torch.float64)):
        with pytest.raises(RuntimeError, match="cudaError_t 1"):
            norm_gelu(*wrong)
    h, moments = torch.zeros(1, 4097), torch.zeros(2, 1)
    with pytest.raises(RuntimeError, match="cudaError_t 1"):
        ops.mlp_in_fwd_(h, h[0].clone(), h.clone(), moments[0].clone(), moments[1].clone())


# -- the built library


@pytest.fixture
def library() -> Path:
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    found = native.load("_C_cuda")
    if found.path is None and "no nvcc" in (found.reason or ""):
        pytest.skip(found.reason)
    assert found.path is not None, found.reason
    return Path(found.path)


@pytest.mark.parametrize("op", OPS)
def test_registered_for_cuda(op, library):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gcahng::{op}", "CUDA")


def test_no_kernel_needs_a_stack(library):
    """A stack holds spilled registers, or arrays that should be registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), "-res-usage", str(library)], capture_output=True, text=True, check=True)
    used = re.findall(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert sum("mlp_out_backward_kernel" in name for name, *_ in used) == 3 * 17  # targets, variants
    assert not [name for name, _, stack, shared, local in used if int(stack) or int(local) or int(shared) > 48 << 10]


def test_shared_arrays_are_aligned_for_wide_accesses(library):
    """Their types ask for less, and sums in them are read 16 bytes at a time."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), "-ptx", str(library)], capture_output=True, text=True, check=True)
    assert "ld.shared.v4" in done.stdout
    assert set(re.findall(r"\.shared \.align (\d+)", done.stdout)) == {"16"}
