"""Lists what the processes that share a batch send in a training step, and how evenly they share its pairs.

The list follows the code: one entry for each tensor that a pass hands to `gcahng.engine.ranks.Ranks`, in the order in
which a step does so. It does not depend on how edges are kept, since no edge is sent. A step is the loss's forward and
backward and `generator_step`, with J_syn as in the paper; cosines need no norms of negatives. What the first batch
sends once (weights, options) is not in it, and neither are the network's gradients, which DistributedDataParallel
sends.
"""

from __future__ import annotations

from math import ceil, log2, prod
from typing import NamedTuple

import torch

from gcahng.engine.plan import generator_parameters, metric_parameters, work
from gcahng.engine.schedule import bands
from gcahng.engine.shared_attention import shares_attention
from gcahng.engine.step_size import StepSize

KINDS = ("all_reduce", "all_gather", "broadcast")


class Sent(NamedTuple):
    """A tensor that a step hands to a collective.

    Attributes:
        kind: all_reduce, all_gather or broadcast.
        name: what the tensor is.
        shape: of the tensor; for all_gather, of one process's part.
        itemsize: bytes of an element.
        times: how often a step sends such a tensor.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    itemsize: int
    times: int = 1

    @property
    def payload(self) -> int:
        """Bytes that one process hands over in a step."""
        return prod(self.shape) * self.itemsize * self.times

    def link_bytes(self, ranks: int) -> float:
        """Bytes that one process puts on its link if the collective is a ring.

        Args:
            ranks: processes R. An all-reduce sends 2 (R − 1) / R of the payload, an all-gather R − 1 parts, and a
                broadcast the payload once, from neighbor to neighbor. One process sends nothing.
        """
        factors = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "broadcast": min(1, ranks - 1)}
        return self.payload * factors[self.kind]


def collectives(size: StepSize) -> list[Sent]:
    """Lists the tensors that a training step sends.

    Args:
        size: of the step.
    """
    n, d, layers = size.batch, size.dim, size.layers
    a, double, whole = size.accumulate.itemsize, torch.float64.itemsize, torch.int64.itemsize
    edge_update = 8 * d * d + 8 * d  # mlp_in's and mlp_out's weights, and their sums over edges
    part = n // size.ranks
    attention = []
    if shares_attention(n, size.device, size.ranks):
        attention = [
            Sent("all_gather", "attended nodes", (part, d), size.compute.itemsize, 2 * layers),
            Sent("all_reduce", "gradients of queries, keys and values", (n, 3 * d), a, 2 * layers),
        ]
    return [
        Sent("all_gather", "checksum of the weights", (1,), whole),
        Sent("all_gather", "number of rows", (1,), whole),
        Sent("all_gather", "embeddings", (part, d), a),
        Sent("all_gather", "labels", (part,), whole),
        # Either phase has a forward, and a backward; phase 1 has none of the last layer's edge update.
        Sent("all_reduce", "sums of edges at nodes", (n, d), a, 2 * layers),
        *attention,
        Sent("all_reduce", "BatchNorm's moments", (2, d), double, 2),
        Sent("all_reduce", "norms of synthetic negatives", (1,), double),
        Sent("all_reduce", "maxima and sums of J_syn's softmax", (n,), a, 2),
        Sent("all_reduce", "their gradients at nodes", (n, d + 1), a),
        Sent("all_reduce", "row sums of J_div", (2, n, d), a),
        Sent("all_reduce", "losses of synthetic negatives", (2,), double),
        Sent("all_reduce", "gradients of the coefficient head", (d + 3, d), a),
        Sent("all_reduce", "gradients of edge updates", (edge_update,), a, 2 * layers - 1),
        Sent("all_reduce", "gradients of tokens at nodes", (n, 2 * d + 1), a, 2 * layers - 1),
        Sent("all_reduce", "gradients of edge to node", (d + 1, d), a, 2 * layers),
        Sent("all_reduce", "gradients of embeddings", (n, d), a),
    ]


def corrections(size: StepSize) -> list[Sent]:
    """Lists what a step sends beside `collectives` once processes have been found to round differently: the gradients
    of the first one, before each optimizer's step (see gcahng.losses.agreement).

    Args:
        size: of the step.
    """
    a, classifier = size.accumulate.itemsize, size.classes * (size.dim + 1)
    return [
        Sent("broadcast", "gradients of the graph network, phase 1", (metric_parameters(size),), a),
        Sent("broadcast", "gradients of the classifier", (classifier,), a),
        Sent("broadcast", "gradients of the graph network, phase 3", (generator_parameters(size),), a),
    ]


def shares(size: StepSize) -> list[int]:
    """Edges that each process computes (see make_schedule), by rank."""
    count, parts = size.ranks, bands(size.batch // size.views, size.symmetric)
    return [
        size.views**2
        * sum(offsets * (anchors * (rank + 1) // count - anchors * rank // count) for _, offsets, anchors in parts)
        for rank in range(count)
    ]


def link_seconds(size: StepSize, bandwidth: float, latency: float) -> float:
    """Derives how long a step's collectives take, one after the other, with nothing computed meanwhile.

    Args:
        size: of the step.
        bandwidth: of each process's link, in bytes a second.
        latency: of a message between two processes, in seconds. A collective has ⌈log₂ R⌉ of them one after the other,
            an all-reduce twice as many, as trees do.
    """
    hops = ceil(log2(size.ranks))
    messages = {"all_reduce": 2 * hops, "all_gather": hops, "broadcast": hops}
    return sum(
        sent.link_bytes(size.ranks) / bandwidth + sent.times * messages[sent.kind] * latency
        for sent in collectives(size)
    )


class Repeated(NamedTuple):
    """A part of a step that every process computes.

    Attributes:
        name: what it is.
        products: its multiply-adds.
        link_bytes: what a process would put on its link for it if the processes shared it.
    """

    name: str
    products: int
    link_bytes: float


def repeated(size: StepSize) -> list[Repeated]:
    """Lists what every process computes, and what sharing it would send beside what is sent now.

    The linear maps of nodes, shared by rows, would have the gradients of their weights added up (two values on the link
    for each), and in each layer and phase send 9 n D values: keys and values, the tokens U and V, the gradients of S,
    and those of keys and values twice. That is 2 n D more than what shared attention sends. The classifiers would have
    theirs added up, and send the gradient of the node features.

    Args:
        size: of the step.
    """
    n, d, layers, m, a = size.batch, size.dim, size.layers, size.classes, size.accumulate.itemsize
    others, attention = (size.ranks - 1) / size.ranks, shares_attention(n, size.device, size.ranks)
    weights = 2 * (2 * (16 * layers + 1) - 4) * d * d  # without the last layer's tokens in phase 1
    found = [
        Repeated(
            "linear maps of nodes",
            n * d * d * (6 * (16 * layers + 1) - 9),
            others * a * (weights + 2 * layers * (2 if attention else 9) * n * d),
        ),
        Repeated("classifiers on the batch", 5 * n * m * d, others * a * (4 * m * d + n * d)),
    ]
    if not attention:
        found.append(Repeated("node attention", 14 * layers * n * n * d, others * a * 2 * layers * 7 * n * d))
    return found


def product_seconds(size: StepSize, memory: str, rate: float) -> float:
    """Derives how long the matrix products of the process with the most pairs take.

    Args:
        size: of the step.
        memory: store, hidden or recompute.
        rate: of matrix products, in FLOP/s.
    """
    return 2 * work(size, memory).total / rate
