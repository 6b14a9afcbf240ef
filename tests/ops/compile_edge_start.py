"""Compiles the Triton kernels of edge_start for three GPUs, without one, and prints sizes of code and shared memory.

A script of its own: in a process with TRITON_INTERPRET=1 kernels are not compiled.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gcahng.kernels import edge_start as kernels
from gcahng.kernels._configs import EDGE_START as CONFIG
from gcahng.kernels._launch import compute_type

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
ROWS = {kernels.edge_start_forward_kernel: "BLOCK_J", kernels.edge_start_node_sum_kernel: "BLOCK_S"}

report = {}
for name, dtype in DTYPES.items():
    for kernel, rows in ROWS.items():
        constants = {"COMPUTE": compute_type(dtype), rows: CONFIG.block_rows, "BLOCK_D": CONFIG.block_channels}
        kinds = {"constexpr": constants, f"*{name}": [a for a in kernel.arg_names if a.startswith("p_")]}
        signature = {a: next((kind for kind, names in kinds.items() if a in names), "i32") for a in kernel.arg_names}
        aligned = [k for k, a in enumerate(kernel.arg_names) if a.startswith("p_") or a == "D"]
        attributes = {(k,): [["tt.divisibility", 16]] for k in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        for arch in (80, 90, 100):
            built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": CONFIG.num_warps})
            report[f"{kernel.__name__} {name} {arch}"] = [len(built.asm["cubin"]), built.metadata.shared]
json.dump(report, sys.stdout)
