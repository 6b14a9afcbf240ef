"""What is measured: a batch, a loss for it, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import gcahng
from gcahng import dispatch
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.operands import PassInputs
from gcahng.engine.prepare import graph_pass
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.errors import UserError
from gcahng.reference import training_step as reference
from gcahng.reference.edge_update import Dropout
from gcahng.reference.graph_network import graph_network
from gcahng.reference.philox import mixing_draws
from gcahng.reference.training_step import Batch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
TF32 = "tf32"  # fp32 with products whose operands an NVIDIA GPU rounds to ten bits of mantissa
EDGE_MEMORY = ("store", "hidden", "recompute")
# Running means as after some epochs, for which negatives are pulled and J_syn counts.
MEAN_METRIC, MEAN_GENERATOR = 2.0, 20.0


@dataclass(frozen=True)
class Case:
    """The sizes and options of a training step that is measured.

    Attributes:
        batch: n, number of samples.
        views: K, samples per class.
        dim: D, channels of the embeddings.
        layers: L, layers of the graph network.
        classes: M, training classes.
        impl: implementation of the loss.
        precision: precision of matrix products, or of everything for "fp64"; "tf32" is for CUDA only.
        memory: the loss's `edge_memory`.
        symmetric: the loss's `symmetric`.
        edge_dtype: the loss's `edge_dtype`.
        device: "cpu" or "cuda".
        compiled: whether the two passes of the reference run under torch.compile.
        cuda_graph: the loss's `cuda_graph`.

    Raises:
        UserError: a value is out of range.
    """

    batch: int
    views: int = 3
    dim: int = 512
    layers: int = 2
    classes: int = 100
    impl: str = "auto"
    precision: str = "fp32"
    memory: str = "store"
    symmetric: bool = True
    edge_dtype: torch.dtype | None = None
    device: str = "cpu"
    compiled: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.views < 2 or self.batch < 2 * self.views or self.batch % self.views:
            raise UserError(
                f"batch is {self.batch} and views is {self.views}; views must be at least 2, and batch a multiple of "
                f"it, at least {2 * max(self.views, 2)}"
            )
        if self.batch // self.views > self.classes:
            raise UserError(
                f"classes is {self.classes}; it must be at least {self.batch // self.views}, the classes in a batch of "
                f"{self.batch} with {self.views} views"
            )
        precisions = (*PRECISIONS, TF32) if self.device == "cuda" else tuple(PRECISIONS)
        for name, allowed in (("precision", precisions), ("memory", EDGE_MEMORY), ("device", ("cpu", "cuda"))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.compiled and self.impl != "reference":
            raise UserError(f"compiled is True and impl is {self.impl!r}; it must be 'reference' to be compiled")

    @property
    def implementation(self) -> str:
        """The implementation that `impl` stands for on this device, with these views and channels."""
        return dispatch.choose(self.impl, self.device, dispatch.Sizes(self.views, self.dim)).implementation

    @property
    def name(self) -> str:
        """Implementation, precision, edge memory and the dtype of edges if it is given, separated by spaces."""
        # On CUDA "auto" takes the stages from two implementations.
        chosen = self.impl if self.device == "cuda" else self.implementation
        words = [chosen, self.precision] + ([] if chosen == "reference" else [self.memory])
        words += ["" if self.edge_dtype is None else f"{str(self.edge_dtype).removeprefix('torch.')} edges"]
        return " ".join(filter(None, words + ["compiled"] * self.compiled + ["graph"] * self.cuda_graph))

    @property
    def compute(self) -> torch.dtype:
        """The dtype of matrix products."""
        return PRECISIONS["fp32" if self.precision == TF32 else self.precision]

    @property
    def rounding(self) -> float:
        """The relative error of rounding an operand of a matrix product."""
        return 2.0**-11 if self.precision == TF32 else torch.finfo(self.compute).eps / 2


class Problem:
    """A loss and a batch for a case. Equal sizes have equal weights and embeddings.

    Args:
        case: what is measured.
        options: further options of the loss. With a `process_group`, the batch is the part of this process.

    Attributes:
        case: as given.
        dtype: dtype of the weights and the embeddings.
        gca: the loss.
        embeddings: (n, D), which require gradients.
        labels: (n,).
    """

    def __init__(self, case: Case, **options: Any) -> None:
        self.case = case
        self.dtype = torch.float64 if case.precision == "fp64" else torch.float32
        heads = 4 if case.dim % 4 == 0 else 1
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.gca = gcahng.GCAHNGLoss(
                case.classes,
                case.dim,
                layers=case.layers,
                heads=heads,
                impl=case.impl,
                num_per_class=case.views,
                edge_memory=case.memory,
                edge_dtype=case.edge_dtype,
                symmetric=case.symmetric,
                seed=1,
                **({"cuda_graph": True} if case.cuda_graph else {}),
                **options,
            ).to(device=case.device, dtype=self.dtype)
        self.gca.mean_metric, self.gca.mean_generator = MEAN_METRIC, MEAN_GENERATOR
        self.embeddings, self.labels = self.batch(case.batch)
        self._compiled = None
        if case.compiled:
            compiled = {name: torch.compile(getattr(reference, name)) for name in ("metric_pass", "generator_pass")}
            self._compiled = SimpleNamespace(**compiled)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Embeddings (size, D), which require gradients, and labels (size,), with each class in consecutive rows."""
        generator = torch.Generator().manual_seed(size)
        z = torch.randn(size, self.case.dim, generator=generator, dtype=torch.float64)
        labels = torch.arange(size // self.case.views).repeat_interleave(self.case.views)
        if (ranks := self.gca._ranks) is not None:
            z, labels = (whole.tensor_split(ranks.count)[ranks.rank] for whole in (z, labels))
        return z.to(device=self.case.device, dtype=self.dtype).requires_grad_(), labels.to(self.case.device)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.case.device, dtype=torch.bfloat16, enabled=self.case.precision == "bf16"):
            yield

    @contextmanager
    def products(self) -> Iterator[None]:
        """Within the block, fp32 products on CUDA have the precision of the case."""
        before = torch.get_float32_matmul_precision()
        if self.case.device == "cuda":
            torch.set_float32_matmul_precision("high" if self.case.precision == TF32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def loss(self) -> Tensor:
        """The forward pass of a training step."""
        with self.autocast():
            return self.gca(self.embeddings, self.labels)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Within the block, the loss runs the reference's compiled passes if the case asks for them."""
        if self._compiled is None:
            yield
            return
        with patch.object(dispatch, "passes", lambda *_: self._compiled):
            yield

    def step(self) -> dict[str, Tensor]:
        """Run a whole training step: the loss, its backward pass and the generator's step.

        Returns:
            The loss and the logs.
        """
        self.embeddings.grad = None
        with self.products(), self.passes():
            loss = self.loss()
            loss.backward()
            return {"loss": loss.detach(), **self.gca.generator_step()}

    @torch.no_grad()
    def forward(self) -> None:
        """Run the graph network up to θ, in training mode and without a gradient.

        The engine computes θ tile by tile and drops each tile. No state changes.
        """
        gca, network = self.gca, self.gca.graph_network
        u = mixing_draws(self.case.views, draw=gca.draw, seed=gca.seed, dtype=self.dtype).to(self.case.device)
        pull = torch.exp(-gca.alpha / gca.mean_metric).to(self.dtype)
        dropout = Dropout(gca.edge_dropout, gca.seed, gca.draw, gca.symmetric)
        classes = self.labels[:: self.case.views]
        batch = Batch(self.embeddings.detach(), classes, self.case.views, pull, u, dropout, True)
        with self.products(), self.autocast():
            if self.case.implementation == "reference":
                graph_network(network, batch.z, batch.labels(), training=True, dropout=dropout, update=False)
                return
            engine = Engine(self.case.implementation, PassOptions(self.case.memory, self.case.edge_dtype))
            settings = engine._settings(network, batch)
        inputs = PassInputs(batch.z, classes, pull, u, gca.draw, parameter_list(network), buffer_list(network))
        with self.products():
            graph = graph_pass(inputs, settings)
            graph.forward()
            for tile in graph.schedule.tiles:
                graph.coefficients(graph.edge(graph.layers, tile))
