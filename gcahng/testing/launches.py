"""Training steps on meta tensors of full size: the engine's own code, which calls and launches what it would on a GPU.

Nothing is computed and nothing is allocated; who wants to see the launches has to catch them (see gcahng.testing.aot).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import nn

from gcahng.engine import engine
from gcahng.engine.fused import FusedStages
from gcahng.engine.plan import MODES
from gcahng.nn import GraphNetwork
from gcahng.ops._schemas import NATIVE, TRITON
from gcahng.reference.training_step import Batch, Dropout, GeneratorWeights

SEED, DROPOUT = 2**40 + 5, 0.1


class Sizes(NamedTuple):
    """Classes and views in the batch, layers, training classes."""

    classes: int = 170  # n = 510: tiles of full size and smaller ones
    views: int = 3
    layers: int = 2
    training_classes: int = 1000


USUAL = Sizes()


def launch_all(dim: int, compute: torch.dtype) -> None:
    """Every Triton kernel, as steps with D channels and products in the compute dtype launch it: in every memory mode,
    and with every product left to the library, as in fp64."""
    with _launching():
        for memory in MODES:
            meta_step("triton", dim, compute, memory)
        meta_step("triton", dim, compute, "store", edge_dtype=torch.bfloat16)
        with patch("gcahng.engine.triton.TritonStages", FusedStages):
            meta_step("triton", dim, compute, "store")
            meta_step("triton", dim, compute, "recompute")


def meta_step(
    stages: str,
    dim: int,
    compute: torch.dtype,
    memory: str,
    sizes: Sizes = USUAL,
    edge_dtype: torch.dtype | None = None,
) -> None:
    """Both passes of a training step as on a CUDA device under autocast; all but products in fp32, or in fp64 with
    them."""
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
    run = engine.Engine(stages, memory, edge_dtype)
    with _on_meta(compute):
        run.metric_pass(network, batch)
        run.generator_pass(network, classifier, batch, None, GeneratorWeights(1.0, 1.0, 1.0))


@contextmanager
def _on_meta(compute: torch.dtype) -> Iterator[None]:
    """The engine takes meta tensors for a GPU's."""
    tile_rows = engine.default_tile_rows

    def on_cuda(dim: int, products: torch.dtype, memory: str, _: str) -> int:
        return tile_rows(dim, products, memory, "cuda")

    library = torch.library.Library(NATIVE, "IMPL")
    library.impl("metric_pass", engine._metric_op, "Meta", allow_override=True)  # else its fake
    try:
        with (
            patch.object(engine, "default_tile_rows", on_cuda),
            patch.object(engine, "compute_dtype", lambda *_: compute),
            patch.dict(engine.DTYPES, {"float16": torch.float16}),  # the kernels know it, the loss does not offer it
            patch.object(torch, "autocast", lambda *_, **__: nullcontext()),  # does not know meta tensors
        ):
            yield
    finally:
        library._destroy()


@contextmanager
def _launching() -> Iterator[None]:
    """The Triton ops run their launchers on meta tensors too."""
    library = torch.library.Library(TRITON, "IMPL")
    for name, (launcher, _) in STAGES.items():
        library.impl(name, partial(_launch, *launcher.split(".")), "Meta", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def _launch(stem: str, function: str, *arguments: object) -> None:
    getattr(importlib.import_module(f"gcahng.kernels.{stem}"), function)(*arguments)
