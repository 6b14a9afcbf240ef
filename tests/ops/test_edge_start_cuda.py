"""CUDA code without a GPU: kernels run in the emulator, the built library loads. (Triton: tests/engine/test_aot.py.)"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from emulator.build import Guarded, call, compiled

from gcahng import _native
from gcahng.reference.edge_start import edge_start as reference
from gcahng.testing import assert_close_to_truth, edge_start_inputs

# Rows past one tile, channels past one block, widths that 16-byte accesses divide and that they do not.
SIZES = [(1, 1, 1), (3, 5, 7), (2, 33, 16), (33, 2, 72), (3, 11, 1040), (9, 18, 130)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def emulated(library, seed: int, inputs, offset: int | tuple[int, ...] = 0):
    """Output and gradients of the emulated kernels, written between fences. offset: of all tensors' addresses, or of
    x_i, x_j, grad_e, e, dx_i and dx_j."""
    offsets = (offset,) * 6 if isinstance(offset, int) else offset
    x_i, x_j, grad_e = (Guarded.of(x, by) for x, by in zip(inputs, offsets[:3], strict=True))
    size = (*grad_e.shape,)
    shapes = size, x_i.shape, x_j.shape
    outputs = [Guarded(*shape, dtype=x_i.dtype, offset=by) for shape, by in zip(shapes, offsets[3:], strict=True)]
    e, dx_i, dx_j = (output.tensor for output in outputs)
    call(library, "emulate_edge_start_forward", seed, x_i, x_j, e, *size)
    call(library, "emulate_edge_start_backward", seed, grad_e, x_i, x_j, dx_i, dx_j, *size)
    return tuple(output.check().clone() for output in outputs)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_kernels_match_reference(dtype: torch.dtype, size: tuple[int, int, int], offset: int) -> None:
    inputs = edge_start_inputs(*size, dtype=dtype)

    def with_gradients(x_i, x_j, grad_e):
        e = reference(x_i, x_j)
        return (e.detach(), *torch.autograd.grad(e, (x_i, x_j), grad_e))

    plain = with_gradients(*inputs)
    wide = [x.detach().double() for x in inputs]
    truth = with_gradients(wide[0].requires_grad_(), wide[1].requires_grad_(), wide[2])
    actual = emulated(compiled("edge_start"), -1, inputs, offset)
    for what, *three in zip(("e", "dx_i", "dx_j"), actual, plain, truth, strict=True):
        assert_close_to_truth(*three, name=f"emulated {what}")


def test_one_unaligned() -> None:
    """Wide accesses ask of each tensor whether it is where they may be."""
    inputs = edge_start_inputs(3, 5, 16)
    right = emulated(compiled("edge_start"), -1, inputs)
    for only in range(6):
        found = emulated(compiled("edge_start"), -1, inputs, tuple(int(k == only) for k in range(6)))
        torch.testing.assert_close(found, right)


def test_bits_do_not_depend_on_warp_order() -> None:
    inputs = edge_start_inputs(5, 35, 70)
    in_order = emulated(compiled("edge_start"), -1, inputs)
    for seed in range(5):
        shuffled = emulated(compiled("edge_start"), seed, inputs)
        assert all(torch.equal(a, b) for a, b in zip(shuffled, in_order, strict=True))


def test_a_missing_barrier_is_caught() -> None:
    inputs = edge_start_inputs(3, 20, 40)
    right = emulated(compiled("edge_start"), -1, inputs)
    for seed in range(3):
        broken = emulated(compiled("edge_start", "CUDA_EMULATOR_DROP_BARRIERS"), seed, inputs)
        assert torch.equal(broken[0], right[0])  # the forward has no barrier
        assert not torch.equal(broken[1], right[1]) and bool(broken[1].isnan().any())


def test_too_large_a_grid_is_an_error() -> None:
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="cudaError_t 9"):
        call(compiled("edge_start"), "emulate_edge_start_forward", -1, x, x, x, 2**31, 1, 1)


def test_cuda_library_loads_and_registers_its_ops() -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    library = _native.load("_C_cuda")
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    for op in ("edge_start_fwd", "edge_start_bwd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gcahng::{op}", "CUDA")


def test_cuda_library_holds_code_for_every_target() -> None:
    library = _native.load("_C_cuda")
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [str(tool), "--list-elf", "--list-ptx", str(library.path)], capture_output=True, text=True
    ).stdout
    for target in (r"sm_80\.cubin", r"sm_90a?\.cubin", r"sm_100\.cubin", r"sm_100\.ptx"):  # older tools leave out the a
        assert re.search(target, listed), listed
