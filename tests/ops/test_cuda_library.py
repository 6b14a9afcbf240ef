"""The built CUDA library, on a machine without a GPU: it loads, and holds code for every target."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from gcahng import native
from gcahng.engine.schema import OPS


@pytest.fixture
def library() -> Path:
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    found = native.load("_C_cuda")
    if found.path is None and "no nvcc" in (found.reason or ""):
        pytest.skip(found.reason)
    assert found.path is not None, found.reason
    return Path(found.path)


def listing(library: Path, *options: str) -> str:
    """What cuobjdump says of the library."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *options, str(library)], capture_output=True, text=True).stdout


def test_it_registers_every_op(library: Path) -> None:
    missing = [op for op in OPS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gcahng::{op}", "CUDA")]
    assert not missing


def test_it_holds_code_for_every_target(library: Path) -> None:
    listed = listing(library, "--list-elf", "--list-ptx")
    for target in (r"sm_80\.cubin", r"sm_90a?\.cubin", r"sm_100\.cubin", r"sm_100\.ptx"):  # older tools leave out the a
        assert re.search(target, listed), listed


def test_no_kernel_needs_a_stack(library: Path) -> None:
    """A stack holds spilled registers, or arrays that should be registers."""
    pattern = r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    used = re.findall(pattern, listing(library, "-res-usage"))
    assert sum("mlp_out_backward_kernel" in name for name, *_ in used) == 3 * 23  # targets, variants
    assert not [name for name, _, stack, shared, local in used if int(stack) or int(local) or int(shared) > 48 << 10]


def test_shared_arrays_are_aligned_for_wide_accesses(library: Path) -> None:
    """Their types ask for less, and sums in them are read 16 bytes at a time."""
    code = listing(library, "-ptx")
    assert "ld.shared.v4" in code
    assert set(re.findall(r"\.shared \.align (\d+)", code)) == {"16"}


def test_the_probe_says_what_is_wrong(library: Path) -> None:
    """Here that there is no GPU, without a crash."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    function = ctypes.CDLL(str(library)).gcahng_cuda_probe
    said = ctypes.c_char_p()
    assert function(ctypes.byref(said)) != 0
    assert b"driver" in said.value or b"device" in said.value
