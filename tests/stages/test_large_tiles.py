"""Offsets past 2^31 in CUDA C++: n = 2,049 samples of 512 channels as one tile, which has 4.2 million edges.

The emulator runs the last block of each kernel alone, on memory that is never touched elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator.ops import OPS, EmulatedOps, Mode, Traffic
from torch import Tensor

pytestmark = pytest.mark.simulated

CLASSES, VIEWS, DIM = 683, 3, 512
T, MIXES, NODES = (CLASSES * VIEWS) ** 2, CLASSES * VIEWS * CLASSES, (2 * CLASSES - 1) * VIEWS
assert T * DIM > 2**31 and MIXES * DIM * 4 > 2**31

# Arguments by kind, in order. T: the tile; E, L: edges in fp32 and in bf16; H: hidden channels; X: mixes; r, m: a
# number of each edge and mix; N, n: channels and a number of each node; w, W: a weight, and one of hidden channels or
# four; d: sums in fp64; i, b: whole numbers and flags of each edge; 1: a number; others: the gate's and the mix's.
KINDS = {
    "norm_gelu_": "E w w E L",
    "edge_start_fwd_": "T N E L",
    "edge_start_bwd_": "T N E N",
    "edge_to_node_fwd_": "T L w N",
    "edge_to_node_bwd_": "T L w N L w",
    "gate_fwd_": "T dropout 1 draw N n N w w E E L r r",
    "gate_bwd_": "T dropout 1 draw N n N w w E E r r E N n N w w",
    "mlp_in_fwd_": "H W H r r",
    "mlp_in_bwd_": "H W H r r r r H H W",
    "mlp_out_fwd_": "L E r r w w w w E E L",
    "mlp_out_bwd_": "E E E r r w w w E L L r r W",
    "head_moments_": "T E d",
    "head_fwd_": "L w E",
    "head_bwd_": "E E L w",
    "head_sums_": "L E E W",
    "head_norm_": "T E E w w w E",
    "mix_fwd_": "T N n kappa pull E X m m",
    "mix_bwd_theta_": "T N n kappa pull X E",
    "mix_bwd_z_": "T N n kappa pull E m 1 X N n",
    "cross_entropy_": "L w i 1 r L",
    "similarity_": "N i E b 1 r E",
    "diversity_fwd_": "T E N N",
    "diversity_bwd_": "T E N pull E",
}


def argument(kind: str) -> Any:
    if kind in ("E", "L", "H", "X"):
        dtype = torch.bfloat16 if kind in ("L", "H") else torch.float32
        return torch.empty(MIXES if kind == "X" else T, 4 * DIM if kind == "H" else DIM, dtype=dtype)
    return {
        "T": lambda: (CLASSES, VIEWS, CLASSES, 0, 0, CLASSES, CLASSES),  # all ordered pairs
        "r": lambda: torch.empty(T, 1),
        "m": lambda: torch.empty(MIXES),
        "N": lambda: torch.zeros(NODES, DIM),
        "n": lambda: torch.zeros(NODES),
        "w": lambda: torch.zeros(DIM),
        "W": lambda: torch.zeros(4 * DIM),
        "d": lambda: torch.zeros(2, DIM, dtype=torch.float64),
        "i": lambda: torch.zeros(T, dtype=torch.long),
        "b": lambda: torch.ones(T, dtype=torch.bool),
        "1": lambda: 1.0,
        "dropout": lambda: (7, 1, 429_496_730, 1),
        "draw": lambda: torch.tensor(3),
        "kappa": lambda: torch.ones(VIEWS, VIEWS),
        "pull": lambda: torch.ones(()),
    }[kind]()


def of_many_rows(op: str, values: list[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, kind, value in zip((*OPS[op].inputs, *OPS[op].outputs), KINDS[op].split(), values, strict=True):
        if kind in ("E", "L", "H", "X"):
            yield name, value


@pytest.mark.parametrize("op", OPS)
def test_the_last_block_reaches_the_last_channels(op):
    """An offset that overflowed would lie elsewhere, most likely outside of what the process may access."""
    values = [argument(kind) for kind in KINDS[op].split()]
    traffic: Traffic = {}
    EmulatedOps(mode=Mode(last_block=True), bare=True, traffic=traffic).run(op, *values)
    for name, tensor in of_many_rows(op, values):
        # Blocks of mlp_out's backward take turns at the rows; there are no more than 4,096 warps.
        least = tensor.nbytes - (4096 * tensor.stride(0) * tensor.itemsize if op == "mlp_out_bwd_" else 0)
        assert least <= traffic[op][name].highest <= tensor.nbytes, (name, traffic[op][name])
