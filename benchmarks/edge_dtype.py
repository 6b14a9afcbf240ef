"""Writes benchmarks/results/edge_dtype.md: what edges in bf16 cost in accuracy, in each layer and in a training step.

    python benchmarks/edge_dtype.py

One loss of random weights takes steps on random batches in fp64, and again with bf16 products and fp32 or bf16 edges,
on the CPU by C++. An error is the norm of the difference from fp64, divided by the norm in fp64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gcahng import GCAHNGLoss
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.graph import GraphPass
from gcahng.engine.operands import PassInputs
from gcahng.engine.prepare import graph_pass
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.testing import seeded

RESULTS = Path(__file__).parent / "results" / "edge_dtype.md"
CLASSES, VIEWS, DIM, LAYERS, TRAINING_CLASSES, DRAWS = 16, 3, 128, 2, 50, 5
EDGES = {"fp32": None, "bf16": torch.bfloat16}
HEADING = f"""# What edges in bf16 cost in accuracy

Errors against fp64 with products in bf16 (autocast), for edges stored and passed on in fp32 and in bf16:
‖x − x₆₄‖ / ‖x₆₄‖, medians of {DRAWS} batches of n = {CLASSES * VIEWS}, D = {DIM}, L = {LAYERS}.
`python benchmarks/edge_dtype.py` writes this file. The CPU's C++ stages computed it.

| what | fp32 edges | bf16 edges | ratio |
| --- | ---: | ---: | ---: |
"""


def make(dtype: torch.dtype, edges: torch.dtype | None) -> GCAHNGLoss:
    """The same weights every time."""
    torch.manual_seed(0)
    gca = GCAHNGLoss(TRAINING_CLASSES, DIM, layers=LAYERS, seed=1, impl="cpp", edge_memory="store", edge_dtype=edges)
    gca.mean_metric, gca.mean_generator = 1.25, 40.0
    return gca.to(dtype)


def batch(draw: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings in clusters, and labels; fp32 values in any dtype."""
    labels = torch.arange(CLASSES).repeat_interleave(VIEWS)
    z = seeded(len(labels), DIM, seed=2 * draw) + 0.7 * seeded(CLASSES, DIM, seed=2 * draw + 1)[labels]
    return z.to(dtype), labels


def step(gca: GCAHNGLoss, z: Tensor, labels: Tensor, low: bool) -> dict[str, Tensor]:
    """Losses of a training step, the gradient of the embeddings, and those of the graph network by layer."""
    z = z.clone().requires_grad_()
    gradients: dict[str, list[Tensor]] = {}
    names = {p: name for name, p in gca.graph_network.named_parameters()}

    def take(module: str, _: list[Tensor]) -> None:
        if module == "graph_network":
            for parameter, name in names.items():
                if parameter.grad is not None and not name.endswith("key.bias"):  # zero but for rounding
                    part = ".".join(name.split(".")[:3]) if name.startswith("layers.") else "input and heads"
                    gradients.setdefault(f"gradient of {part}", []).append(parameter.grad.flatten().clone())
                    parameter.grad.zero_()  # no weight may move between the phases

    gca.gradient_hook = take
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = gca(z, labels)
    loss.backward()
    logs = gca.generator_step()
    found = {name: value for name, value in logs.items() if name != "J_cls"} | {"gradient of the embeddings": z.grad}
    return found | {name: torch.cat(parts) for name, parts in gradients.items()}


def edges_of_layers(gca: GCAHNGLoss, z: Tensor, labels: Tensor, low: bool) -> dict[str, Tensor]:
    """The pre-norm sums of each layer's edges, and the coefficients."""
    layout, z = gca._enter(z, labels)
    problem = gca._batch(z, layout, None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        settings = Engine("cpp", PassOptions("store", gca.edge_dtype))._settings(gca.graph_network, problem)
    network = gca.graph_network
    inputs = PassInputs(
        z,
        problem.classes,
        problem.pull,
        problem.u,
        problem.dropout.draw,
        parameter_list(network),
        buffer_list(network),
    )
    graph: GraphPass = graph_pass(inputs, settings)
    with torch.no_grad():
        graph.forward()
        found = {f"edges of layer {layer}": s.x.clone() for layer, s in enumerate(graph.s)}
        tiles = graph.schedule.tiles
        theta = [graph.coefficients(graph.edge(graph.layers, tile)).clone() for tile in tiles]
    return found | {"coefficients": torch.cat(theta)}


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def everything(draw: int, dtype: torch.dtype, edges: torch.dtype | None) -> dict[str, Tensor]:
    """All that is compared, of one batch; products are in bf16 unless the dtype is fp64."""
    z, labels = batch(draw, dtype)
    low = dtype is not torch.float64
    of_step = step(make(dtype, edges), z, labels, low)
    return edges_of_layers(make(dtype, edges), z, labels, low) | of_step


def table() -> str:
    """The file's text."""
    errors: dict[str, dict[str, list[float]]] = {}
    for draw in range(DRAWS):
        truth = everything(draw, torch.float64, None)
        for name, edges in EDGES.items():
            for what, value in everything(draw, torch.float32, edges).items():
                errors.setdefault(what, {}).setdefault(name, []).append(error(value, truth[what]))
    lines = []
    for what, by_dtype in errors.items():
        fp32, bf16 = (statistics.median(by_dtype[name]) for name in EDGES)
        lines.append(f"| {what} | {fp32:.2e} | {bf16:.2e} | {bf16 / fp32:.2f} |")
    return HEADING + "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    RESULTS.write_text(table(), encoding="utf-8")
    print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
