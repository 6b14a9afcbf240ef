"""The built CUDA library, on a machine without a GPU: it loads, and holds code for every target."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from gcahng import native


def test_cuda_library_loads_and_registers_its_ops() -> None:
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    library = native.load("_C_cuda")
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    for op in ("edge_start_fwd_", "edge_start_bwd_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gcahng::{op}", "CUDA")


def test_cuda_library_holds_code_for_every_target() -> None:
    library = native.load("_C_cuda")
    if library.path is None and "no nvcc" in (library.reason or ""):
        pytest.skip(library.reason)
    assert library.path is not None, library.reason
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run(
        [str(tool), "--list-elf", "--list-ptx", str(library.path)], capture_output=True, text=True
    ).stdout
    for target in (r"sm_80\.cubin", r"sm_90a?\.cubin", r"sm_100\.cubin", r"sm_100\.ptx"):  # older tools leave out the a
        assert re.search(target, listed), listed
