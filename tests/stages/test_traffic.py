"""What CUDA C++ reads and writes in global memory: as benchmarks/results/traffic*.json say, every edge once, and edges
in bf16 at half the cost."""

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
# What is in bf16 where edges are, and the copies of edges that there are no more.
EDGES = {"t", "e", "e1", "s", "de", "de1", "dy", "wide", "theta", "dtheta"}
PRODUCTS = ("head_sums_", "dy")  # has the name of a gradient of edges
COPIES = {(op, "full") for op in ("norm_gelu_", "edge_start_fwd_", "mlp_out_fwd_")}
COPIES |= {("gate_fwd_", "low"), ("mlp_out_bwd_", "low")}
NARROW = [op for op, emulated in OPS.items() if emulated.edges] + ["edge_start_fwd_"]


def table_of(precision: str) -> traffic.Count:
    return json.loads(traffic.FILES[precision].read_text(encoding="utf-8"))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("precision", traffic.FILES)
def test_kernels_move_what_the_table_says(precision, stem):
    table = table_of(precision)
    counted = traffic.count(precision, stem)
    assert counted == {op: table[op] for op in table if OPS[op].stem == stem}, "run tests/emulator/traffic.py"


def test_edges_in_bfloat16_move_half_and_have_no_copy():
    wide, narrow = table_of("bfloat16"), table_of("narrow")
    assert narrow.keys() == set(NARROW)
    for op in NARROW:
        kept = {name: numbers for name, numbers in wide[op].items() if (op, name) not in COPIES}
        parts = {name: 2 if name in EDGES and (op, name) != PRODUCTS else 1 for name in kept}
        assert narrow[op] == {name: [x / parts[name] for x in kept[name]] for name in kept}, op


@pytest.mark.parametrize("op", OPS)
def test_vectors_of_edges_are_read_and_written_once(op):
    """4 bytes are those of a number in fp32, or of two in bf16; hidden channels have four numbers for each."""
    for name, (read, written) in table_of("bfloat16")[op].items():
        if name in NODES | WEIGHTS:
            continue
        if name == "scratch":
            # J_div's squares have a plane at the columns, too.
            assert read <= 3 and written <= 3, (op, name)
            continue
        size = 8 if op.startswith("mlp_in") else 4
        assert read <= size * AGAIN.get((op, name), 1) and written <= size, (op, name, read, written)
