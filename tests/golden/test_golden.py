"""Against the authors' code: the reference's outputs and gradients, and every implementation's whole training steps."""

from __future__ import annotations

import golden
import pytest
import torch
from torch.nn import functional as F

import gcahng
from gcahng.reference.diversity import diversity
from gcahng.reference.edge_start import edge_start
from gcahng.reference.graph_network import graph_network, normalized_rows
from gcahng.reference.mix import mix
from gcahng.reference.npair import npair, synthetic_npair

OUTPUT, GRADIENT, STEPS = 1e-11, 1e-9, 1e-8


@pytest.fixture(params=golden.CASES, scope="module")
def case(request):
    return golden.load(request.param)


def by_view(case, name):
    """Golden rows are view-major: (n, D) → (K, C, D)."""
    config = case.config
    return case[name].view(config["num_per_class"], config["num_classes_in_batch"], config["dim"])


def coefficients_by_view(case, theta):
    config = case.config
    shape = (config["num_per_class"], config["num_classes_in_batch"])
    return theta.view(*shape, *shape, config["dim"])


def test_edge_start(case):
    x = normalized_rows(case["z"])
    golden.close(edge_start(x, x), case["edge_attr0"], OUTPUT)


def test_graph_network_in_training(case):
    gca = case.loss()
    z = case["z"].clone().requires_grad_()
    graph = graph_network(gca.graph_network, z, case["labels"], training=True)
    golden.close(graph.node_logits, case["node_pred"], OUTPUT, "node_pred")
    golden.close(graph.coefficients, case["edge_para"], OUTPUT, "edge_para")
    official = gcahng.official_state_dict(gca)
    for name, buffer in case.under("after_fwd.").items():
        if name.startswith("gnn."):
            golden.close(official[name], buffer, OUTPUT, name)

    outputs = (graph.node_logits, graph.coefficients)
    torch.autograd.backward(outputs, (case["probe.node_pred"], case["probe.edge_para"]))
    golden.close(z.grad, case["grad.z"], GRADIENT, "z")
    named = {name: tensor for name, tensor in gcahng.losses.official._names(gca)}
    wanted = case.under("grad.gnn.")
    assert wanted
    for name, gradient in wanted.items():
        if golden.CANCELS in name:
            assert gradient.abs().max() < 1e-12
            assert named[f"gnn.{name}"].grad.abs().max() < 1e-12
        else:
            golden.close(named[f"gnn.{name}"].grad, gradient, GRADIENT, name)


def test_graph_network_in_eval(case):
    gca = case.loss()
    graph_network(gca.graph_network, case["z"], case["labels"], training=True)
    graph = graph_network(gca.graph_network, case["z"], case["labels"], training=False)
    golden.close(graph.node_logits, case["eval.node_pred"], OUTPUT, "node_pred")
    golden.close(graph.coefficients, case["eval.edge_para"], OUTPUT, "edge_para")


def test_mix(case):
    pull = torch.exp(torch.tensor(-case.config["alpha"] / case.config["j_avg"], dtype=torch.float64))
    z = case["z"].clone().requires_grad_()
    theta = case["edge_para"].clone().requires_grad_()
    views = z.view_as(by_view(case, "z"))
    negatives = mix(views, coefficients_by_view(case, theta), case["mix.u"], pull)
    golden.close(negatives, case["mix.negatives"], OUTPUT)
    negatives.backward(case["probe.mix"])
    golden.close(z.grad, case["mix.grad.z"], GRADIENT)
    golden.close(theta.grad, case["mix.grad.edge_para"], GRADIENT)


def test_npair(case):
    z = case["z"].clone().requires_grad_()
    loss = npair(z.view_as(by_view(case, "z")))
    golden.close(loss, case["loss.npair"], OUTPUT)
    loss.backward()
    golden.close(z.grad, case["loss.npair.grad.z"], GRADIENT)


def test_public_npair_in_any_order(case):
    order = torch.randperm(len(case["labels"]), generator=torch.Generator().manual_seed(1))
    # The first sample of a class is its anchor, so a class's views must keep their order.
    order = order[torch.sort(order // case.config["num_classes_in_batch"], stable=True).indices]
    loss = gcahng.npair_loss(case["z"][order], case["labels"][order])
    golden.close(loss, case["loss.npair"], OUTPUT)


def test_synthetic_npair(case):
    z = case["z"].clone().requires_grad_()
    negatives = case["mix.negatives"].clone().requires_grad_()
    loss = synthetic_npair(z.view_as(by_view(case, "z")), negatives)
    golden.close(loss, case["loss.syn_npair"], OUTPUT)
    loss.backward()
    golden.close(z.grad, case["loss.syn_npair.grad.z"], GRADIENT)
    golden.close(negatives.grad, case["loss.syn_npair.grad.negatives"], GRADIENT)


def test_diversity(case):
    theta = case["edge_para"].clone().requires_grad_()
    loss = diversity(theta)
    golden.close(loss, 0.01 * case["loss.diversity"], OUTPUT)
    loss.backward()
    golden.close(theta.grad, 0.01 * case["loss.diversity.grad.edge_para"], GRADIENT)


# -- every implementation, through the public loss

# Triton's interpreter takes seconds a pass; tests/engine/test_simulated_devices.py compares a step with the reference.
IMPLEMENTATIONS = ("reference", "torch", "cpp", pytest.param("triton", marks=pytest.mark.slow))
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
orders = pytest.mark.parametrize("shuffled", [False, True], ids=["view-major", "shuffled"])


def row_order(case, shuffled, generator):
    """Rows of a batch: as they are, or with classes interleaved anew.

    Classes keep their order of appearance (the authors' zeroed similarities depend on it), and a class's views theirs.
    """
    views, classes = case.config["num_per_class"], case.config["num_classes_in_batch"]
    if not shuffled:
        return torch.arange(views * classes)
    keys = torch.rand(views, classes, generator=generator).sort(dim=0).values
    keys[0] = torch.arange(classes) * 1e-6
    return keys.flatten().argsort()


@implementations
@orders
def test_generate(case, impl, shuffled):
    gca = case.loss(impl=impl)
    order = row_order(case, shuffled, torch.Generator().manual_seed(1))
    z, labels = case["z"][order], case["labels"][order]
    made = gca.generate(z, labels, u=case["mix.u"])
    golden.close(made.coefficients, case["edge_para"][order][:, order], OUTPUT, "coefficients")
    # Ours are by ascending label, the authors' by order of appearance.
    place = torch.searchsorted(made.classes, case["labels"][: case.config["num_classes_in_batch"]])
    golden.close(made.negatives[:, place][:, :, place], case["mix.negatives"], OUTPUT, "negatives")


@implementations
@orders
def test_losses_and_statistics_of_a_forward(case, impl, shuffled):
    gca = case.loss(impl=impl)
    order = row_order(case, shuffled, torch.Generator().manual_seed(2))
    loss = gca(case["z"][order], case["labels"][order], u=case["mix.u"])
    synthetic = (1 - case.config["e_bj"]) * case["loss.syn_npair"]
    wanted = case["loss.npair"] + synthetic + F.cross_entropy(case["node_pred"], case["labels"])
    golden.close(loss.detach(), wanted, OUTPUT, "loss")
    official = gcahng.official_state_dict(gca)
    for name, buffer in case.under("after_fwd.").items():
        if name.startswith("gnn."):
            golden.close(official[name], buffer, OUTPUT, name)


@implementations
@orders
def test_eval(case, impl, shuffled):
    gca = case.loss(impl=impl)
    gca(case["z"], case["labels"], u=case["mix.u"])
    gca.eval()
    order = row_order(case, shuffled, torch.Generator().manual_seed(3))
    z, labels = case["z"][order], case["labels"][order]
    made = gca.generate(z, labels)
    golden.close(made.coefficients, case["eval.edge_para"][order][:, order], OUTPUT, "coefficients")
    gca.beta = 0.0  # J_syn weighs nothing
    wanted = case["loss.npair"] + F.cross_entropy(case["eval.node_pred"], case["labels"])
    golden.close(gca(z, labels).detach(), wanted, OUTPUT, "J_m + J_gce")


@implementations
@orders
def test_training_steps(case, impl, shuffled):
    train(case, impl, shuffled)


def train(case, impl, shuffled):
    """The authors' training steps: every loss, and all weights and statistics after them."""
    gca, model = case.loss(impl=impl), case.feature_extractor()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4, weight_decay=1e-4)
    names = {
        "J_m": "J_m",
        "J_gce": "J_gnnce",
        "J_syn": "J_syn",
        "J_cls": "J_softce",
        "J_div": "J_div",
        "J_soft": "J_gence",
        "J_gen": "J_gen",
    }
    generator = torch.Generator().manual_seed(0)
    for step, wanted in enumerate(case.config["train_metrics"]):
        x, labels, u = case["train.x"][step], case["train.labels"][step], case["train.u"][step]
        order = row_order(case, shuffled, generator)
        x, labels = x[order], labels[order]
        optimizer.zero_grad()
        loss = gca(model(x), labels, u=u[0])
        golden.close(loss, torch.tensor(wanted["J_metric"], dtype=torch.float64), STEPS, "loss")
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 10.0)
        optimizer.step()
        logs = gca.generator_step(u=u[1])
        for ours, theirs in names.items():
            golden.close(logs[ours], torch.tensor(wanted[theirs], dtype=torch.float64), STEPS, f"step {step} {ours}")
    official = gcahng.official_state_dict(gca)
    official |= {f"feature_extractor.{name}": tensor for name, tensor in model.state_dict().items()}
    wanted = case.under("final.")
    assert official.keys() == wanted.keys()
    for name, tensor in wanted.items():
        golden.close(official[name], tensor, STEPS, name)
