"""Which implementation computes the passes of the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from gcahng.errors import UserError
from gcahng.nn import GraphNetwork
from gcahng.ops._implementations import Op, available, register, resolve
from gcahng.reference import passes as reference
from gcahng.reference.passes import Batch, GeneratorLosses, GeneratorWeights, MetricLosses

if TYPE_CHECKING:
    from gcahng.engine.cuda_graph import GraphCache
    from gcahng.engine.ranks import Ranks

register(
    "loss",
    Op(
        cpu=("cpp", "torch", "reference", "triton"),  # Triton's interpreter, for tests, after all else
        cuda=("cuda", "triton", "torch", "reference"),
    ),
)


class Passes(Protocol):
    """What an implementation of the loss provides (see gcahng.reference.passes)."""

    def metric_pass(self, network: GraphNetwork, batch: Batch) -> MetricLosses: ...

    def generator_pass(
        self,
        network: GraphNetwork,
        classifier: nn.Linear,
        batch: Batch,
        official_order: Tensor | None,
        weights: GeneratorWeights,
    ) -> GeneratorLosses: ...

    def generate(self, network: GraphNetwork, batch: Batch, anchors: Tensor | None) -> tuple[Tensor, Tensor]: ...


def joined(chosen: str, device_type: str) -> str:
    """What "auto" makes of the best implementation: on CUDA what GCAHNG_AUTO asks for, else cuda and triton together,
    where both are there."""
    if device_type == "cuda":
        from gcahng.engine.auto import wished

        if (wish := wished()) is not None:
            return wish
    both = chosen == "cuda" and available("triton", device_type, "loss") is None
    return "cuda+triton" if both else chosen


joined._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as resolve's


def passes_for(
    impl: str,
    device: torch.device,
    edge_memory: str,
    edge_dtype: torch.dtype | None,
    graphs: GraphCache | None = None,
    ranks: Ranks | None = None,
) -> Passes:
    """The implementation of this name on this device. UserError for one that is not available. graphs, ranks: see
    Engine; the reference has every process compute all."""
    chosen = resolve(impl, device.type, "loss")
    if graphs is not None and device.type != "cuda":
        raise UserError(f"cuda_graph is True and the embeddings are on {device}; CUDA graphs need a CUDA device")
    if chosen == "reference":
        if graphs is not None:
            raise UserError("cuda_graph is True and impl is 'reference'; the engine alone captures its passes")
        return reference
    from gcahng.engine.engine import Engine

    if impl == "auto":
        chosen = joined(chosen, device.type)
    return Engine(chosen, edge_memory, edge_dtype, graphs, ranks=ranks, asked=impl != "auto")
