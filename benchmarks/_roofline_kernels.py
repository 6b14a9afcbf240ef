"""Which kernels make up the stages of benchmarks/roofline.py, and what they issue by benchmarks/budget.txt."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from gcahng.testing import budget
from gcahng.testing.budget import Limit

VIEWS, DIM, CLASSES = 3, 512, 100
ARCH = 90

# Names of kernels, or what names begin with, and the values that a thread works on for each edge and channel: those of
# CUDA C++, and those of Triton. {edges} stands for the edges' type, as each of the two writes it. Stages that are left
# out run in the library or in torch.
Names = tuple[tuple[str, float], ...]
EDGES = {"cuda": ("float,", "bf16,"), "triton": ("", "<bf16>")}  # in fp32, and in bf16 alone


_MIX, _CE = 1 / VIEWS, CLASSES / DIM / VIEWS  # negatives an edge, on average over ordered pairs; and their logits
ROW_WISE: dict[str, tuple[Names, Names]] = {
    "edge_start": ((("edge_start_forward_kernel<", 1),), (("edge_start_forward_kernel{edges}", 1),)),
    "N of stored sums": ((("norm_gelu_forward_kernel<float,{edges}", 1),), (("norm_gelu_kernel{edges}", 1),)),
    "edge_to_node: GELU, sums": ((("end_sums_kernel<Activated", 1),), (("edge_to_node_forward_kernel", 1),)),
    "gate": ((("gate_forward_kernel<float,{edges}", 1),), (("gate_forward_kernel{edges}", 1),)),
    "mlp_out: N": ((("norm_gelu_forward_kernel<float,{edges}", 1),), (("norm_gelu_kernel{edges}", 1),)),
    "mlp_in: GELU, moments": ((("mlp_in_forward_kernel<", 4),), (("mlp_in_forward_kernel", 4),)),
    "mlp_out: fold, residual, N": (
        (("mlp_out_forward_kernel<float,{edges}", 1),),
        (("mlp_out_forward_kernel{edges}", 1),),
    ),
    "head: BatchNorm's moments": ((("head_moments_kernel<{edges}", 1),), (("head_moments_kernel{edges}", 1),)),
    "head: sigmoid": ((("head_forward_kernel<float,{edges}", 1),), (("head_forward_kernel{edges}", 1),)),
    "mix: J_syn's logits": ((("mix_forward_kernel<float,{edges}", _MIX),), (("mix_forward_kernel{edges}", _MIX),)),
    "mix: backward to z": (
        (("mix_backward_kernel<float,{edges}", _MIX), ("end_sums_kernel<MixGradient<float,{edges}", 1)),
        (("mix_backward_shares_kernel{edges}", _MIX), ("mix_backward_z_kernel{edges}", 1)),
    ),
    "mix: negatives": ((("mix_forward_kernel<float,{edges}", _MIX),), (("mix_forward_kernel{edges}", _MIX),)),
    "mix: backward to θ": (
        (("mix_backward_theta_kernel<float,{edges}", 1),),
        (("mix_backward_theta_kernel{edges}", 1),),
    ),
    "J_soft, J_sim": (
        (("similarity_kernel<", _MIX), ("cross_entropy_kernel<", _CE)),
        (("similarity_kernel", _MIX), ("cross_entropy_kernel", _CE)),
    ),
    "J_div: sums": ((("end_sums_kernel<Spread<float,{edges}", 1),), (("diversity_forward_kernel{edges}", 1),)),
    "J_div: gradient": (
        (("diversity_backward_kernel<float,{edges}", 1),),
        (("diversity_backward_kernel{edges}", 1),),
    ),
    "head: backward, row-wise": (
        (("head_backward_kernel<float,{edges}", 1), ("head_sums_kernel<float,{edges}", 1)),
        (("head_backward_kernel{edges}", 1), ("head_sums_kernel{edges}", 1)),
    ),
    "head: BatchNorm backward": ((("head_norm_kernel<float,{edges}", 1),), (("head_norm_kernel{edges}", 1),)),
    "mlp_out: backward": ((("mlp_out_backward_kernel<float,{edges}", 1),), (("mlp_out_backward_kernel{edges}", 1),)),
    "mlp_in: backward, row-wise": ((("mlp_in_backward_kernel<", 4),), (("mlp_in_backward_kernel", 4),)),
    "gate: backward": ((("gate_backward_kernel<float,{edges}", 1),), (("gate_backward_kernel{edges}", 1),)),
    "edge_to_node: backward, row-wise": (
        (("edge_to_node_backward_kernel<", 1),),
        (("edge_to_node_backward_kernel", 1),),
    ),
    "edge_start: backward": (
        (("end_sums_kernel<NodeGradient<float,{edges}", 1),),
        (("edge_start_backward_kernel{edges}", 1),),
    ),
}
# Products with epilogues, which are Triton's alone.
EPILOGUES: dict[str, Names] = {
    "mlp_in: product, GELU, moments": (("mlp_in_product_forward_kernel", 4),),
    "mlp_out: product, fold, residual": (("mlp_out_product_forward_kernel{edges}", 1),),
    "mlp_in: backward product, GELU'": (("mlp_in_product_backward_kernel", 4),),
}


class Issued(NamedTuple):
    """What a stage issues: instructions of a thread for each edge and channel, and whether its blocks overlap."""

    instructions: float
    overlaps: bool


@cache
def issued(stage: str, by: str, narrow: bool = False, file: Path = budget.FILE) -> Issued:
    """What a stage issues by a budget, on sm_90.

    For edges in bf16, nvcc unrolls the mix's loop over views less, so that the same work counts fewer instructions. A
    kernel of CUDA C++ never counts as less than the one for edges in fp32.

    Args:
        stage: of benchmarks/roofline.py.
        by: cuda or triton, for what is row-wise.
        narrow: whether edges are in bf16 alone.
        file: the budget.

    Raises:
        LookupError: the budget has no such kernel.
    """
    if stage in EPILOGUES:
        by, names = "triton", EPILOGUES[stage]
    else:
        names = ROW_WISE[stage][by == "triton"] if stage in ROW_WISE else ()
    lines = [limit for limit in budget.load(file) if limit[1:4] == (by, DIM, ARCH)]

    def limits_of(pattern: str, narrow: bool) -> list[Limit]:
        name = pattern.format(edges=EDGES[by][narrow])
        found = [limit for limit in lines if limit.kernel == name or (by == "cuda" and limit.kernel.startswith(name))]
        if not found:
            raise LookupError(f"{file} has no kernel {name}, which the stage {stage} needs")
        return found

    instructions, overlaps = 0.0, True
    for pattern, values in names:
        found = limits_of(pattern, narrow)
        at_least = limits_of(pattern, False) if narrow and by == "cuda" else []
        instructions += values * max(limit.each for limit in (*found, *at_least))
        overlaps = overlaps and all(limit.ctas > 1 for limit in found)
    return Issued(instructions, overlaps)
