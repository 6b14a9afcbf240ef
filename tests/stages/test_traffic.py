"""What CUDA C++ reads and writes in global memory: as benchmarks/results/traffic.json says, and every edge once."""

from __future__ import annotations

import json

import pytest
from emulator import traffic
from emulator.ops import OPS, STEMS

pytestmark = pytest.mark.simulated

# Vectors of edges, and of mixes (1 for every 3 edges here), that are read more than once, and how often. What the same
# threads have read a moment before is in their cache; a mix and the one back share their θ, and their threads do not.
AGAIN = {
    ("mlp_out_bwd_", "s"): 2,  # fewer registers than to keep it
    ("similarity_", "negatives"): 2,
    ("mix_fwd_", "theta"): 2,
    ("mix_bwd_theta_", "dn"): 2,  # of two mixes for each edge
    ("mix_bwd_z_", "theta"): 3,
    ("mix_bwd_z_", "dn"): 4,
    ("cross_entropy_", "logits"): 4,
}
NODES = {"x", "dx", "u", "v", "c", "du", "dv", "dc", "z", "dz", "ds", "sum", "square", "mean", "anchors", "d_plus"}
WEIGHTS = {"gamma", "beta", "bias", "w", "d", "scale", "a", "b", "db", "sums", "dgamma", "dbeta"}


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_move_what_the_table_says(stem):
    table = json.loads(traffic.FILE.read_text(encoding="utf-8"))
    counted = traffic.count(stem)
    assert counted == {op: table[op] for op in OPS if OPS[op].stem == stem}, "run tests/emulator/traffic.py"


@pytest.mark.parametrize("op", OPS)
def test_vectors_of_edges_are_read_and_written_once(op):
    """4 bytes are those of a number in fp32, or of two in bf16; hidden channels have four numbers for each."""
    table = json.loads(traffic.FILE.read_text(encoding="utf-8"))
    for name, (read, written) in table[op].items():
        if name in NODES | WEIGHTS:
            continue
        if name == "scratch":
            # J_div's squares have a plane at the columns, too.
            assert read <= 3 and written <= 3, (op, name)
            continue
        size = 8 if op.startswith("mlp_in") else 4
        assert read <= size * AGAIN.get((op, name), 1) and written <= size, (op, name, read, written)
