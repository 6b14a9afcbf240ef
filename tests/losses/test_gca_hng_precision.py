"""The training step under a GradScaler, under autocast, and on low-precision embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_cases import make_batch, make_loss, same, snapshot, train_step

pytestmark = pytest.mark.usefixtures("implementation")


def test_grad_scaler_equals_the_unscaled_step():
    z, labels = make_batch()
    plain, scaled = make_loss(), make_loss()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        loss, gradient, logs = train_step(plain, z, labels)
        scaled_loss, scaled_gradient, scaled_logs = train_step(scaled, z, labels, scaler=scaler)
        # A scale is a power of two: nothing is rounded.
        assert same((scaled_loss, scaled_gradient / 2.0**10, scaled_logs), (loss, gradient, logs))
    assert same(snapshot(scaled), snapshot(plain))


def test_disabled_grad_scaler():
    z, labels = make_batch()
    plain, scaled = make_loss(), make_loss()
    train_step(plain, z, labels)
    train_step(scaled, z, labels, scaler=torch.amp.GradScaler("cpu", enabled=False))
    assert same(snapshot(scaled), snapshot(plain))


def test_grad_scaler_leaves_out_a_graph_step_with_infinite_gradients():
    gca, (z, labels) = make_loss(dtype=torch.float32), make_batch(dtype=torch.float32)
    graph = copy.deepcopy(list(gca.graph_network.parameters()))
    classifier = gca.classifier.weight.detach().clone()
    overflow = gca.graph_network.node_input.weight.register_hook(lambda gradient: gradient * float("inf"))
    train_step(gca, z, labels, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    overflow.remove()
    assert same(list(gca.graph_network.parameters()), graph)
    assert {state["step"].item() for state in gca.graph_optimizer.state.values()} == {0.0}
    assert not torch.equal(gca.classifier.weight, classifier)
    assert all(parameter.grad is None for parameter in gca.parameters())

    leaf = z.clone().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(gca(leaf, labels)).backward()
    gca.graph_network.node_input.weight.grad[0, 0] = float("nan")
    gca.generator_step(scaler=scaler)
    # J_gen has no gradient of the nodes' own classification.
    only_in_phase_1 = {gca.graph_network.node_batch_norm.weight, *gca.graph_network.class_head.parameters()}
    steps = {state["step"].item() for p, state in gca.graph_optimizer.state.items() if p not in only_in_phase_1}
    assert steps == {1.0}, "only the generator's own step happens"


def test_bfloat16_autocast_is_close():
    z, labels = make_batch(dtype=torch.float32)
    exact, lower = make_loss(dtype=torch.float32), make_loss(dtype=torch.float32)
    loss, gradient, logs = train_step(exact, z, labels)
    leaf = z.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower_loss = lower(leaf, labels)
    lower_loss.backward()
    lower_logs = lower.generator_step()
    # bf16 keeps 8 bits; some ten roundings in a row stay under 5 %.
    assert lower_loss != loss
    torch.testing.assert_close(lower_loss, loss, rtol=0.05, atol=0)
    assert (leaf.grad - gradient).norm() < 0.05 * gradient.norm()
    assert torch.equal(lower_logs["J_m"], logs["J_m"]), "the metric loss stays in float32"
    for name in ("J_cls", "J_soft", "J_gen"):
        assert lower_logs[name] != logs[name], "the generator step runs under the forward's autocast"
        torch.testing.assert_close(lower_logs[name], logs[name], rtol=0.05, atol=0)


def test_generate_computes_in_what_the_next_forward_would():
    z, labels = make_batch(dtype=torch.float32)
    gca = make_loss(dtype=torch.float32)
    exact = gca.generate(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = gca.generate(z, labels)
    assert lower.negatives.dtype is torch.float32
    assert not torch.equal(lower.coefficients, exact.coefficients)
    torch.testing.assert_close(lower.coefficients.float(), exact.coefficients, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_embeddings_are_cast_up(dtype):
    z, labels = make_batch(dtype=dtype)
    leaf = z.clone().requires_grad_()
    gca, exact = make_loss(dtype=torch.float32), make_loss(dtype=torch.float32)
    loss = gca(leaf, labels)
    loss.backward()
    wanted, gradient, _ = train_step(exact, z.float(), labels)
    assert loss.dtype is torch.float32 and torch.equal(loss.detach(), wanted)
    assert torch.equal(leaf.grad, gradient.to(dtype))
