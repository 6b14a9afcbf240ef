"""torch.compile: the engine enters a user's graph as one operator, and the eager parts of a step go on from it."""

from __future__ import annotations

import copy

import pytest
import torch
from tiers import few
from torch import nn

import gcahng
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.reference.edge_update import Dropout
from gcahng.reference.training_step import Batch

K, C, D, M = 3, 5, 16, 10


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


# torch.compile starts compilers. The default tier compiles public ops in C++ (tests/ops).
COMPILED = [
    pytest.param("cpp", marks=pytest.mark.processes),
    pytest.param("torch", marks=pytest.mark.slow),
    pytest.param("reference", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("impl", COMPILED)
def test_fullgraph_step_equals_eager(impl):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, D))
    gca = gcahng.GCAHNGLoss(M, D, num_per_class=K, impl=impl, seed=1, edge_memory="store")
    model_eager, gca_eager = copy.deepcopy((model, gca))
    compiled = torch.compile(lambda x, labels: gca(model(x), labels), fullgraph=True)
    labels = torch.arange(C).repeat(K)
    for _ in range(2):
        x = torch.randn(K * C, 20)
        loss, eager = compiled(x, labels), gca_eager(model_eager(x), labels)
        torch.testing.assert_close(loss, eager)
        loss.backward()
        eager.backward()
        for p, q in zip(model.parameters(), model_eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        logs, logs_eager = gca.generator_step(), gca_eager.generator_step()
        torch.testing.assert_close(logs, logs_eager)
    compiled(x, labels).backward()
    torch.optim.SGD(gca.parameters(), lr=0.1).step()
    with pytest.raises(gcahng.UserError, match="weights changed between the loss's forward and generator_step"):
        gca.generator_step()


def test_engine_is_one_node_of_the_graph():
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    gca = gcahng.GCAHNGLoss(M, D, num_per_class=K, impl="torch", seed=1)
    z = torch.randn(K * C, D, requires_grad=True)
    torch.compile(gca, fullgraph=True, backend=backend)(z, torch.arange(C).repeat(K))
    assert sum("metric_pass" in name for name in nodes) == 1


@pytest.mark.parametrize("transposed", few([False, True]))
def test_opcheck(transposed):
    gca = gcahng.GCAHNGLoss(M, D, layers=2, impl="torch")
    network = gca.graph_network
    if transposed:
        for parameter in network.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.T.contiguous().T
    z = torch.randn(K * C, D, requires_grad=True)
    dropout = Dropout(0.1, 3, torch.tensor(0), True)
    batch = Batch(z, torch.arange(C), K, torch.tensor(0.2), torch.rand(K, K - 1), dropout, True)
    settings = Engine("torch", PassOptions("store"))._settings(network, batch)
    parameters, buffers = parameter_list(network), buffer_list(network)
    arguments = (z, batch.classes, batch.pull, batch.u, dropout.draw, parameters, buffers, *settings, True, True)
    torch.library.opcheck(torch.ops.gcahng.metric_pass.default, arguments)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_double_backward_is_refused(impl):
    gca = gcahng.GCAHNGLoss(M, D, impl=impl)
    z = torch.randn(K * C, D, requires_grad=True)
    loss = gca(z, torch.arange(C).repeat(K))
    (dz,) = torch.autograd.grad(loss, z, create_graph=True)
    # J_m itself is plain torch and twice differentiable; the engine's share of dz is not.
    with pytest.raises(gcahng.UserError, match="once, not twice"):
        dz.square().sum().backward()


def test_torch_func_is_refused():
    gca = gcahng.GCAHNGLoss(M, D, impl="torch", num_per_class=K, check="off").eval()
    labels = torch.arange(C).repeat(K)
    with pytest.raises(gcahng.UserError, match="outside torch.func; impl='reference' supports all"):
        torch.func.vmap(lambda z: gca(z, labels))(torch.randn(2, K * C, D))
