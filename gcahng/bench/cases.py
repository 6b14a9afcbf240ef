"""What is measured: a batch, a loss for it, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import gcahng
from gcahng.engine.engine import Engine, _prepare
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.errors import UserError
from gcahng.ops._implementations import resolve
from gcahng.reference.graph_network import Dropout, graph_network
from gcahng.reference.passes import Batch
from gcahng.reference.philox import mixing_draws

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
EDGE_MEMORY = ("store", "hidden", "recompute")
# Running means for which negatives are pulled and J_syn counts, as after some epochs.
MEAN_METRIC, MEAN_GENERATOR = 2.0, 20.0


@dataclass(frozen=True)
class Case:
    """batch n; views K; dim D; layers L; classes: training classes M; impl, precision (of products; fp64: of
    everything), memory, symmetric and edge_dtype of the loss."""

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

    def __post_init__(self) -> None:
        if self.views < 2 or self.batch < 2 * self.views or self.batch % self.views:
            raise UserError(
                f"batch is {self.batch} and views is {self.views}; views must be at least 2, and batch a multiple of "
                f"it, at least {2 * max(self.views, 2)}"
            )
        if self.batch // self.views > self.classes:
            raise UserError(
                f"classes is {self.classes}; a batch of {self.batch} with {self.views} views has "
                f"{self.batch // self.views} classes, and the training set at least as many"
            )
        for name, allowed in (("precision", PRECISIONS), ("memory", EDGE_MEMORY)):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

    @property
    def implementation(self) -> str:
        """The implementation that impl means here."""
        return resolve(self.impl, "cpu", "loss")

    @property
    def name(self) -> str:
        """implementation, precision, and how edges are kept."""
        chosen = self.implementation
        return f"{chosen} {self.precision}" + ("" if chosen == "reference" else f" {self.memory}")


class Problem:
    """A loss and a batch for a case: the same weights and embeddings for the same sizes."""

    def __init__(self, case: Case, **options: float) -> None:
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
                **options,
            ).to(self.dtype)
        self.gca.mean_metric, self.gca.mean_generator = MEAN_METRIC, MEAN_GENERATOR
        self.embeddings, self.labels = self.batch(case.batch)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Embeddings (size, D), which require gradients, and labels (size,), classes side by side."""
        generator = torch.Generator().manual_seed(size)
        z = torch.randn(size, self.case.dim, generator=generator, dtype=torch.float64)
        labels = torch.arange(size // self.case.views).repeat_interleave(self.case.views)
        return z.to(self.dtype).requires_grad_(), labels

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.case.precision == "bf16"):
            yield

    def loss(self) -> Tensor:
        """The loss of a training forward."""
        with self.autocast():
            return self.gca(self.embeddings, self.labels)

    def step(self) -> dict[str, Tensor]:
        """A whole step: the loss, its backward, and the generator's step. → the loss and the logs."""
        self.embeddings.grad = None
        loss = self.loss()
        loss.backward()
        return {"loss": loss.detach(), **self.gca.generator_step()}

    @torch.no_grad()
    def forward(self) -> None:
        """The graph network up to θ, in training mode, without a gradient; θ is formed tile by tile and dropped,
        where the implementation can, and no state is touched."""
        gca, network = self.gca, self.gca.graph_network
        u = mixing_draws(self.case.views, draw=gca.draw, seed=gca.seed, dtype=self.dtype)
        pull = torch.exp(-gca.alpha / gca.mean_metric).to(self.dtype)
        dropout = Dropout(gca.edge_dropout, gca.seed, gca.draw, gca.symmetric)
        classes = self.labels[:: self.case.views]
        batch = Batch(self.embeddings.detach(), classes, self.case.views, pull, u, dropout, True)
        with self.autocast():
            if self.case.implementation == "reference":
                graph_network(network, batch.z, batch.labels, training=True, dropout=dropout, update=False)
                return
            engine = Engine(self.case.implementation, self.case.memory, self.case.edge_dtype)
            settings = engine._settings(network, batch)
        tensors = (batch.z, classes, pull, u, gca.draw, parameter_list(network), buffer_list(network))
        graph = _prepare(*tensors, settings, record=False, update=False).graph
        graph.forward()
        for number, tile in enumerate(graph.schedule.tiles):
            graph.coefficients(graph.edge(graph.layers, number, tile))
