"""Training steps and public ops on meta tensors of full size, by the engine's own code, which launches as on a GPU.

Nothing is computed and nothing is allocated. To see the launches, catch them (see gcahng.testing.aot).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from gcahng.engine import channel_mix, engine, prepare
from gcahng.engine.channel_mix import MIX_BACKWARD, MixSettings, MixTensors
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.metric_pass import METRIC_PASS
from gcahng.engine.plan import MODES
from gcahng.engine.schema import NATIVE, OPS, TRITON, Ops
from gcahng.nn import GraphNetwork
from gcahng.reference.edge_update import Dropout
from gcahng.reference.training_step import Batch, GeneratorWeights

SEED, DROPOUT = 2**40 + 5, 0.1


class Sizes(NamedTuple):
    """Classes and views in the batch, layers, training classes."""

    classes: int = 170  # n = 510: tiles of full size and smaller ones
    views: int = 3
    layers: int = 2
    training_classes: int = 1000


USUAL = Sizes()


def launch_all(dim: int, compute: torch.dtype) -> None:
    """Launches every Triton kernel as steps with D channels and products in the compute dtype do; see `launch_narrow`.

    The steps run in every memory mode, and with every product left to the library, as in fp64. The backward of
    gcahng.ops.channel_mix is launched too, since no step differentiates the mix by embeddings from dN itself.
    """
    with launching():
        for memory in MODES:
            meta_step("triton", dim, compute, memory)
        if compute is not torch.bfloat16:
            meta_step("triton", dim, compute, "store", edge_dtype=torch.bfloat16)
        with patch.object(prepare, "ops_of", lambda implementation: Ops(implementation)):
            meta_step("triton", dim, compute, "store")
            meta_step("triton", dim, compute, "recompute")
        meta_mix_backward("triton", dim, torch.float64 if compute == torch.float64 else torch.float32)


def launch_narrow(dim: int) -> None:
    """Launches what steps in bf16 do whose edges are in bf16 alone."""
    compute = torch.bfloat16
    with launching():
        for memory in MODES:
            meta_step("triton", dim, compute, memory, edge_dtype=compute)
        with patch.object(prepare, "ops_of", lambda implementation: Ops(implementation)):
            meta_step("triton", dim, compute, "store", edge_dtype=compute)


def meta_step(
    implementation: str,
    dim: int,
    compute: torch.dtype,
    memory: str,
    sizes: Sizes = USUAL,
    edge_dtype: torch.dtype | None = None,
) -> None:
    """Runs both passes of a training step as on a CUDA device under autocast.

    Everything but products is in fp32, or in fp64 if products are.
    """
    classes, views, layers, training_classes = sizes
    with torch.device("meta"):
        network = GraphNetwork(dim, training_classes, layers=layers)
        classifier = nn.Linear(dim, training_classes)
        draw, pull, u = torch.empty((), dtype=torch.int64), torch.empty(()), torch.empty(views, views - 1)
        z, labels = torch.empty(classes * views, dim), torch.empty(classes, dtype=torch.int64)
    if compute == torch.float64:
        network, classifier, z, pull, u = (x.double() for x in (network, classifier, z, pull, u))
    dropout = Dropout(p=DROPOUT, seed=SEED, draw=draw, symmetric=True)
    batch = Batch(z.requires_grad_(), labels, views, pull, u, dropout, training=True)
    run = Engine(implementation, PassOptions(memory, edge_dtype))
    with _on_meta(compute):
        run.metric_pass(network, batch)
        run.generator_pass(network, classifier, batch, None, GeneratorWeights(1.0, 1.0, 1.0))


def meta_mix_backward(implementation: str, dim: int, dtype: torch.dtype, sizes: Sizes = USUAL) -> None:
    """Runs the backward of gcahng.ops.channel_mix as on a CUDA device."""
    classes, views = sizes.classes, sizes.views
    n = classes * views
    with torch.device("meta"):
        shapes = ((views, classes, classes, dim), (n, dim), (n, n, dim), (views, views - 1), ())
        upstream, *tensors = (torch.empty(shape, dtype=dtype) for shape in shapes)
    with _on_meta(dtype):
        MIX_BACKWARD(upstream, *MixTensors(*tensors), *MixSettings(views, implementation))


@contextmanager
def _on_meta(compute: torch.dtype) -> Iterator[None]:
    """Inside it the engine takes meta tensors for a GPU's."""
    tile_rows = prepare.default_tile_rows

    def on_cuda(dim: int, products: torch.dtype, memory: str, _: str) -> int:
        return tile_rows(dim, products, memory, "cuda")

    library = torch.library.Library(NATIVE, "IMPL")
    library.impl("metric_pass", METRIC_PASS, "Meta", allow_override=True)  # else its fake
    try:
        with (
            patch.object(prepare, "default_tile_rows", on_cuda),
            patch.object(channel_mix, "default_tile_rows", on_cuda),
            patch.object(engine, "compute_dtype", lambda *_: compute),
            # The kernels know fp16, which the loss does not offer.
            patch.dict(prepare.DTYPES, {"float16": torch.float16}),
            patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # it does not know meta tensors
        ):
            yield
    finally:
        library._destroy()


@contextmanager
def launching() -> Iterator[None]:
    """Inside it the Triton ops run their launchers on meta tensors too."""
    library = torch.library.Library(TRITON, "IMPL")
    for name, op in OPS.items():
        library.impl(name, op.launch, "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()
