"""What benchmarks/roofline.py derives, for what was measured: whole steps, and stages on one tile."""

from __future__ import annotations

from typing import Any

import roofline

# The stages of _stage_tile.py, as stages of the roofline; of those with a slash, the products with epilogues.
STAGES = {
    "edge_start": ["edge_start"],
    "edge_start_backward": ["edge_start: backward"],
    "norm_gelu": ["N of stored sums"],
    "edge_to_node": ["edge_to_node: product", "edge_to_node: GELU, sums"],
    "edge_to_node_backward": [
        "edge_to_node: product again",
        "edge_to_node: backward, row-wise",
        "edge_to_node: weights' gradient",
        "edge_to_node: edges' gradient",
    ],
    "gate": ["gate"],
    "gate_backward": ["gate: backward"],
    "mlp_in": ["mlp_in: product", "mlp_in: GELU, moments", "mlp_in: product, GELU, moments"],
    "mlp_out": [
        "mlp_out: product",
        "mlp_out: fold, residual, N",
        "mlp_out: product, fold, residual",
        "mlp_out: N",
    ],
    "mlp_backward": [
        "mlp_out: backward",
        "mlp_in: backward product",
        "mlp_in: backward, row-wise",
        "mlp_in: backward product, GELU'",
        "edge MLP: weights' gradients",
        "edge MLP: edges' gradient",
    ],
    "head_moments": ["head: BatchNorm's moments"],
    "head": ["head: product", "head: sigmoid"],
    "head_backward": ["head: backward, row-wise", "head: backward, products"],
    "norm_backward": ["head: BatchNorm backward"],
    "mix": ["mix: negatives"],
    "mix_logits": ["mix: J_syn's logits"],
    "mix_backward_theta": ["mix: backward to θ"],
    "mix_backward_z": ["mix: backward to z"],
    "diversity": ["J_div: sums"],
    "diversity_backward": ["J_div: gradient"],
}
# By implementation: whether products have epilogues, and what is row-wise.
KINDS = {"cuda": (False, "cuda"), "cuda+triton": (True, "cuda"), "auto": (True, "cuda"), "triton": (True, "triton")}


def step_seconds(row: dict[str, Any]) -> float | None:
    """The derived time of a row of whole steps, without launches in a graph; None for what is not derived."""
    size = (roofline.DIM, roofline.VIEWS)
    if row["impl"] not in KINDS or row["precision"] not in roofline.RATE or (row["D"], row["K"]) != size:
        return None
    epilogues, rows = KINDS[row["impl"]]
    sizes = (row["n"], row["L"], row["precision"])
    narrow = row["narrow"] and row["precision"] == "bf16"
    step = roofline.Step(*sizes, epilogues, row["memory"], narrow=narrow, rows=rows)
    found = roofline.total(step)
    return found.seconds if row["graph"] else found.step


def stage_seconds(row: dict[str, Any]) -> float | None:
    """The derived time of a row of stages on one tile, without launches; None for what is not derived."""
    known = row["kind"] == "stage" and row["impl"] in KINDS and row["stage"] in STAGES
    if not known or row["precision"] not in roofline.RATE or row["D"] != roofline.DIM:
        return None
    epilogues, rows = KINDS[row["impl"]]
    step = roofline.Step(1023, 2, row["precision"], epilogues, rows=rows)
    of_one = [k._replace(times=1) for k in roofline.kernels(step) if k.stage in STAGES[row["stage"]]]
    return sum(roofline.cost(step, kernel).seconds for kernel in of_one) * row["rows"] / step.size.rows
