"""The stages of the engine: what happens to a tile's edges between two matrix products.

Each stem has one module. It holds the stem's schema (NamedTuples that become torch ops, see gcahng.engine.schema), the
stage in plain torch, which says what it computes, and the stage that calls the fused ops. `make_stages` puts the stages
of one implementation together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gcahng.engine.schema import Ops
from gcahng.engine.stages.common import StageContext
from gcahng.engine.stages.cross_entropy import CrossEntropy, FusedCrossEntropy
from gcahng.engine.stages.diversity import Diversity, FusedDiversity
from gcahng.engine.stages.edge_start import EdgeStart, FusedEdgeStart
from gcahng.engine.stages.edge_to_node import EdgeToNode, FusedEdgeToNode
from gcahng.engine.stages.edge_update import EdgeUpdate, TritonEdgeUpdate
from gcahng.engine.stages.gate import FusedGate, Gate
from gcahng.engine.stages.head import FusedHead, Head
from gcahng.engine.stages.mix import FusedMix, Mix
from gcahng.engine.stages.mlp_in import FusedMlpIn, MlpIn, TritonMlpIn
from gcahng.engine.stages.mlp_out import FusedMlpOut, MlpOut, TritonMlpOut
from gcahng.engine.stages.norm_gelu import FusedNormGelu, NormGelu
from gcahng.engine.stages.similarity import FusedSimilarity, Similarity


class Stages(NamedTuple):
    """The stages of one pass in one implementation. gate, mlp_in and mlp_out are parts of edge_update."""

    context: StageContext
    edge_start: EdgeStart
    norm_gelu: NormGelu
    edge_to_node: EdgeToNode
    edge_update: EdgeUpdate
    head: Head
    mix: Mix
    cross_entropy: CrossEntropy
    similarity: Similarity
    diversity: Diversity


_TORCH = (EdgeStart, NormGelu, EdgeToNode, Head, Mix, CrossEntropy, Similarity, Diversity)
_FUSED = (
    FusedEdgeStart,
    FusedNormGelu,
    FusedEdgeToNode,
    FusedHead,
    FusedMix,
    FusedCrossEntropy,
    FusedSimilarity,
    FusedDiversity,
)


def make_stages(context: StageContext) -> Stages:
    """Makes the stages that run in a context: plain torch if it has no ops, else fused.

    If its ops have products in Triton kernels, the edge MLP runs in them too. Products in fp64 are an exception, since
    the kernels are not written for them.
    """
    ops = context.ops
    if ops is None:
        kinds, update, gate, mlp_in, mlp_out = _TORCH, EdgeUpdate, Gate, MlpIn, MlpOut
    elif ops.triton_products and context.compute is not torch.float64:
        kinds, update, gate, mlp_in, mlp_out = _FUSED, TritonEdgeUpdate, FusedGate, TritonMlpIn, TritonMlpOut
    else:
        kinds, update, gate, mlp_in, mlp_out = _FUSED, EdgeUpdate, FusedGate, FusedMlpIn, FusedMlpOut
    start, norm, to_node, *others = (kind(context) for kind in kinds)
    edge_update = update(context, gate(context, norm), mlp_in(context), mlp_out(context, norm))
    return Stages(context, start, norm, to_node, edge_update, *others)


def ops_of(implementation: str) -> Ops | None:
    """The ops of an implementation, or None if it is plain torch.

    Args:
        implementation: its name as gcahng.dispatch has it: BASE, or BASE,OP=IMPL…
    """
    base, routes = split(implementation)
    if base == "torch":
        return None
    return Ops("cuda" if base == "cuda+triton" else base, routes, triton_products=base in ("triton", "cuda+triton"))


def split(implementation: str) -> tuple[str, dict[str, str]]:
    """Splits BASE[,OP=IMPL…] into the base and the implementations of single ops, by the op's name."""
    base, *others = implementation.split(",")
    return base, dict(other.partition("=")[::2] for other in others)
