"""A stand-in for CUDA graphs on the CPU, and training steps to capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gcahng import GCAHNGLoss
from gcahng.engine import cuda_graph
from gcahng.engine.engine import Engine, PassOptions
from gcahng.reference.training_step import Batch

LABELS = torch.tensor([4, 1, 1, 7, 4, 7, 0, 0])


def recorded(run, device, pool=None):
    """A stand-in for cuda_graph.record: what it returns reads the gradients that lay there, whatever lies there now."""
    (parameters,) = (cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, list))
    mine = [p.grad for p in parameters]

    def replay() -> None:
        given = [p.grad for p in parameters]
        cuda_graph._set_gradients(parameters, mine)
        run()
        cuda_graph._set_gradients(parameters, given)

    return replay


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts a stand-in for CUDA graphs in place: a replay runs the pass again, on the memory of its capture.

    Returns:
        A list that grows by an item with each capture.
    """
    counted = []

    def capture(run, device, pool=None):
        outputs = run()
        counted.append(len(outputs))
        for output in outputs:
            output.detach().fill_(torch.nan if output.is_floating_point() else -1)

        def replay() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return replay, outputs

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "record", recorded)
    monkeypatch.setattr("gcahng.dispatch.passes", engine_of)
    return counted


def engine_of(impl: str, batch: Batch, options: PassOptions) -> Engine:
    """The loss's engine, on devices too that have no CUDA graphs."""
    return Engine(impl, options)


def train(gca: GCAHNGLoss, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    found = []
    for z, labels in batches:
        z = z.clone().requires_grad_()
        loss = gca(z, labels)
        loss.backward()
        found += [loss.detach(), z.grad, *gca.generator_step().values()]
    return found + [value for value in gca.state_dict().values() if isinstance(value, Tensor)]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
