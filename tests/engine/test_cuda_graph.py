"""Captured passes: the memory that they read and write, with a stand-in for the CUDA graph; and that nothing in a pass
waits for the device or depends on data, which a capture would not survive."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gcahng import GCAHNGLoss, UserError
from gcahng.engine import cuda_graph
from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.engine import Engine, _run_generator, _run_metric
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.engine.workspace import Workspace
from gcahng.nn import GraphNetwork
from gcahng.reference.graph_network import Dropout
from gcahng.reference.passes import Batch, GeneratorWeights
from gcahng.testing import seeded

LABELS = torch.tensor([4, 1, 1, 7, 4, 7, 0, 0])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in on the CPU: a replay runs the pass again, on the memory of its capture. Counts the captures."""
    counted = []

    def capture(run):
        outputs = run()
        counted.append(len(outputs))
        for output in outputs:
            output.detach().fill_(torch.nan if output.is_floating_point() else -1)

        def replay() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return replay, outputs

    def passes_for(impl, device, edge_memory, edge_dtype, graphs):
        return Engine(impl, edge_memory, edge_dtype, graphs)

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr("gcahng.losses.gca_hng.passes_for", passes_for)
    return counted


def train(gca: GCAHNGLoss, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    found = []
    for z, labels in batches:
        z = z.clone().requires_grad_()
        loss = gca(z, labels)
        loss.backward()
        found += [loss.detach(), z.grad, *gca.generator_step().values()]
    return found + [value for value in gca.state_dict().values() if isinstance(value, Tensor)]


def make(captured: bool, **options) -> GCAHNGLoss:
    torch.manual_seed(0)
    gca = GCAHNGLoss(8, 16, layers=2, heads=2, seed=3, impl="torch", **options)
    gca._graphs = GraphCache() if captured else None
    return gca


@pytest.mark.parametrize("compat", ["fixed", "official"])
def test_replayed_steps_are_the_same_bits(captures: list[int], compat: str) -> None:
    batches = [(seeded(len(LABELS), 16, seed=seed), LABELS.roll(seed)) for seed in range(4)]
    wanted = train(make(False, compat=compat), batches)
    assert captures == []
    found = train(make(True, compat=compat), batches)
    assert len(captures) == 2, "one of each phase, for all steps"
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_batches_are_captured_anew_and_few_are_kept(captures: list[int]) -> None:
    gca = make(True)
    batches = [(seeded(2 * classes, 16, seed=1), torch.arange(classes).repeat(2)) for classes in (2, 3, 4, 5, 6, 2)]
    wanted = train(make(False), batches)
    assert all(torch.equal(a, b) for a, b in zip(train(gca, batches), wanted, strict=True))
    assert len(captures) == 2 * len(batches)  # the first kind was dropped when it came again
    assert len(gca._graphs._captured) == cuda_graph.MOST


def test_moved_weights_are_captured_anew(captures: list[int]) -> None:
    batch = [(seeded(len(LABELS), 16, seed=1), LABELS)]
    gca, other = make(True), make(False)
    train(gca, batch)
    train(other, batch)
    for parameter in gca.graph_network.parameters():
        parameter.data = parameter.data.clone()
    found, wanted = train(gca, batch), train(other, batch)
    assert len(captures) == 4 and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_cache_is_not_copied_and_goes_with_its_loss(captures: list[int]) -> None:
    gca = make(True)
    train(gca, [(seeded(len(LABELS), 16, seed=1), LABELS)])
    twin, again = copy.deepcopy(gca), pickle.loads(pickle.dumps(gca._graphs))
    assert twin._graphs.number != gca._graphs.number != again.number
    assert not twin._graphs._captured and not again._captured
    number = gca._graphs.number
    assert cuda_graph.cache(number) is gca._graphs
    del gca
    gc.collect()
    with pytest.raises(KeyError):
        cuda_graph.cache(number)


def test_refusals() -> None:
    z = seeded(len(LABELS), 16, seed=0)
    with pytest.raises(UserError, match="cuda_graph is 1; it must be True or False"):
        GCAHNGLoss(8, 16, cuda_graph=1)
    with pytest.raises(UserError, match="cuda_graph is True and the embeddings are on cpu; CUDA graphs need a CUDA"):
        GCAHNGLoss(8, 16, heads=2, cuda_graph=True)(z, LABELS)


@pytest.mark.parametrize("memory", ["store", "hidden", "recompute"])
@pytest.mark.parametrize("stages", ["torch", "cuda", "triton", "cuda+triton"])
def test_a_pass_neither_waits_nor_depends_on_data(stages: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: what would need a value raises. Kernels are left out."""
    for launcher in ("hidden.product_forward", "hidden.product_backward", "close.product_forward"):
        monkeypatch.setattr(f"gcahng.kernels.{launcher}", lambda *_: None)
    with FakeTensorMode():
        network, classifier = GraphNetwork(16, 8, layers=2, heads=2), torch.nn.Linear(16, 8)
        draw = torch.zeros((), dtype=torch.int64)
        batch = Batch(
            torch.randn(12, 16), torch.arange(6), 2, torch.rand(()), torch.rand(2, 1), Dropout(0.1, 3, draw, True), True
        )
        s = Engine(stages, memory, None)._settings(network, batch)
        tensors = (batch.z, batch.classes, batch.pull, batch.u, draw, parameter_list(network), buffer_list(network))
        _run_metric(tensors, s, True, True, Workspace())
        weights = GeneratorWeights(1.0, 1.0, 1.0)
        head = (classifier.weight.detach(), classifier.bias.detach())
        found = _run_generator(tensors, s, head, None, weights, True, Workspace())
        with pytest.raises(DataDependentOutputException):
            bool(found[0] > 0)
