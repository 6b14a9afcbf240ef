"""The built CUDA library, on a machine without a GPU: it loads, and holds code for every target."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from stages.cases import PRECISIONS

from gcahng import native
from gcahng.engine.schema import OPS

TARGETS = ("sm_80", "sm_90a?", "sm_100")  # older tools leave out the a


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
    for target in (*(rf"{target}\.cubin" for target in TARGETS), r"sm_100\.ptx"):
        assert re.search(target, listed), listed


def test_no_kernel_needs_a_stack(library: Path) -> None:
    """A stack holds spilled registers, or arrays that should be registers."""
    pattern = r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    listed = listing(library, "-res-usage")
    used = re.findall(pattern, listed)
    assert len(used) == listed.count("Function ")  # the pattern fits every kernel
    targets = Counter(name for name, *_ in used)
    assert set(targets.values()) == {len(TARGETS)}
    # Shapes of rows by precision: in fp64 no channels are in registers, however many there are.
    shapes = {precision: 2 if precision == "float64" else 7 for precision in PRECISIONS}
    assert sum("mlp_out_backward_kernel" in name for name in targets) == sum(shapes.values())
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
