"""Offsets where edges have more values than 32 bits can count: a step at n = 2,049 and D = 512 that keeps hidden
vectors, launched on tensors without data (aot_offsets.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aot_offsets.py")
LIMIT = 2**31


@pytest.mark.simulated
def test_offsets_of_32_bits_reach_far_enough() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[2]), *sys.path])
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    offsets, narrow = found["offsets"], found["narrow"]
    assert len(offsets) > 20 and offsets.keys() == narrow.keys()

    # The case is one: hidden vectors lie behind what 32 bits count. A kernel gets a tile of them.
    assert found["places"]["mlp_in_product_forward_kernel"] > 2 * LIMIT
    assert found["places"]["mlp_in_product_backward_kernel"] > 2 * LIMIT
    reached = {
        f"{kernel} {name}": last
        for kernel, of in offsets.items()
        for name, last in of.items()
        if name in narrow[kernel]
    }
    assert len(reached) > 60 and not {name for name, last in reached.items() if last >= LIMIT}
    # What is read of the kernels tells the widths apart.
    assert {"p_u", "p_v"} & set(narrow["gate_forward_kernel"]) and "p_theta" not in narrow["head_forward_kernel"]

    for kernel, numbers in found["numbers"].items():
        beyond = {name for name, number in numbers.items() if number >= LIMIT}
        assert beyond <= set(found["wide"][kernel]), kernel
    assert found["wide"]["gate_forward_kernel"] == ["seed"]
