"""Pieces of the reference: gradients, symmetry, attention with a sink, the dropout law."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gcahng.errors import UserError
from gcahng.nn import GraphNetwork
from gcahng.reference.edge_start import edge_start
from gcahng.reference.edge_to_node import edge_to_node
from gcahng.reference.edge_update import Dropout
from gcahng.reference.gate import gate
from gcahng.reference.graph_network import graph_network, node_update, normalized_rows
from gcahng.reference.head import batch_norm, head
from gcahng.reference.mix import mix
from gcahng.reference.mlp_in import mlp_in
from gcahng.reference.mlp_out import mlp_out
from gcahng.reference.node_attention import node_attention
from gcahng.reference.philox import edge_dropout_masks

N, DIM, HEADS = 4, 4, 2
CLASSES = torch.tensor([0, 0, 1, 1])


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def network():
    """Every parameter and buffer away from its start, zero biases and unit weights included."""
    torch.manual_seed(5)
    network = GraphNetwork(DIM, 3, layers=2, heads=HEADS).double()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    network.edge_batch_norm.running_mean.normal_()
    network.edge_batch_norm.running_var.uniform_(0.5, 2.0)
    return network


def edge_mlp(layer, e):
    w = layer.weights()
    return mlp_out(w, mlp_in(w, e), e)


def check_gradients(function, inputs, module=None):
    """gradcheck of every input and of every parameter of the module that the function reaches."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    parameters = []
    if module is not None:
        out = function(*inputs)
        wanted = list(module.parameters())
        found = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
        parameters = [p for p, gradient in zip(wanted, found, strict=True) if gradient is not None]
        assert parameters
    assert torch.autograd.gradcheck(lambda *args: function(*args[: len(inputs)]), (*inputs, *parameters))


# -- weights


def test_attention_starts_as_the_authors_and_the_rest_as_torch():
    """Xavier-uniform matrices up to sqrt(6 / 2D) and no bias; else up to 1 / sqrt(inputs), biases too."""
    torch.manual_seed(0)
    dim = 48
    for name, module in GraphNetwork(dim, 7, layers=2, heads=4).named_modules():
        if not isinstance(module, nn.Linear):
            continue
        attention = name.rpartition(".")[2] in ("query", "key", "value", "output")
        bound = math.sqrt(3 / dim) if attention else 1 / math.sqrt(module.in_features)
        assert 0.97 * bound < module.weight.abs().max() <= bound, name
        assert module.bias.any() == (not attention), name


# -- gradients


def test_mix_gradients():
    views, theta = random(2, 3, 2), torch.sigmoid(random(2, 3, 2, 3, 2, seed=1))
    u, pull = torch.sigmoid(random(2, 1, seed=2)), torch.tensor(0.4, dtype=torch.float64)
    check_gradients(lambda views, theta: mix(views, theta, u, pull), (views, theta))


@pytest.mark.parametrize("training", [True, False])
def test_head_gradients(network, training):
    parts = nn.ModuleList((network.edge_batch_norm, network.coefficient_head))
    network.edge_batch_norm.bias.requires_grad_()
    check_gradients(lambda e: head(network, e, training=training, update=False), (random(N, N, DIM),), parts)


@pytest.mark.parametrize("masked", [True, False])
def test_gate_gradients(network, masked):
    layer = network.layers[0].edge
    keep, p = None, 0.0
    if masked:
        p = 0.4
        keep = edge_dropout_masks(N, layer=0, draw=torch.tensor(0), seed=3, p=p, symmetric=True)
        assert len(keep.flatten(0, 1).unique(dim=0)) == 4, "both kept, either, neither"
    inputs = random(N, N, DIM), random(N, DIM, seed=1)
    check_gradients(lambda e, tokens: gate(layer.weights(), e, tokens, keep, p), inputs, layer)


def test_node_attention_gradients(network):
    layer = network.layers[0].node
    other_class = CLASSES[:, None] != CLASSES
    check_gradients(lambda f: node_attention(layer, f, other_class, HEADS), (random(N, DIM),), layer)


def test_edge_gradients(network):
    layer = network.layers[0]
    check_gradients(lambda x, y: edge_start(normalized_rows(x), y), (random(3, DIM), random(2, DIM, seed=1)))
    check_gradients(lambda e: edge_to_node(layer.node, e), (random(N, N, DIM),), layer.node)
    check_gradients(lambda e: edge_mlp(layer.edge, e), (random(2, 2, DIM),), layer.edge)


# -- what the pieces mean


def test_node_attention_is_scaled_dot_product_attention_with_a_zero_row(network):
    layer, f = network.layers[0].node, 3 * random(N, DIM)
    other_class = CLASSES[:, None] != CLASSES
    q, k, v = (m(f).view(N, HEADS, DIM // HEADS).transpose(0, 1) for m in (layer.query, layer.key, layer.value))
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    allowed = F.pad(other_class, (0, 1), value=True)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(0, 1).reshape(N, DIM)
    ours = node_attention(layer, f, other_class, HEADS)
    torch.testing.assert_close(ours, layer.output(attended), rtol=1e-12, atol=1e-14)


def test_node_attention_neither_overflows_nor_sees_its_own_class(network):
    layer = network.layers[0].node
    other_class = CLASSES[:, None] != CLASSES
    assert node_attention(layer, 1e4 * random(N, DIM), other_class, HEADS).isfinite().all()
    f = random(N, DIM)
    changed = f.clone()
    changed[1] += 1.0
    before, after = (node_attention(layer, x, other_class, HEADS) for x in (f, changed))
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[2], after[2])
    alone = node_attention(layer, f, torch.zeros_like(other_class), HEADS)
    torch.testing.assert_close(alone, layer.output.bias.expand(N, DIM))


def test_mix_leaves_nearer_negatives_and_pulls_the_others():
    """θ = 0 moves a negative to the positive's distance, θ · pull = 1 leaves it where it is."""
    views = random(2, 3, DIM)
    u = torch.zeros(2, 1, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    zero_theta, one_theta = (torch.full((2, 3, 2, 3, DIM), value, dtype=torch.float64) for value in (0.0, 1.0))
    pulled, kept = mix(views, zero_theta, u, one), mix(views, one_theta, u, one)
    near = (views - views.roll(-1, 0) + 1e-6).norm(dim=-1)[:, :, None].expand(2, 3, 3)
    far = (views[:, :, None] - views[1] + 1e-6).norm(dim=-1)
    easy = near < far
    assert easy.any() and not easy.all()
    distance = (views[:, :, None] - pulled).norm(dim=-1)
    torch.testing.assert_close(distance[easy], near[easy], rtol=1e-5, atol=0)
    torch.testing.assert_close(pulled[~easy], views[1].expand_as(pulled)[~easy], rtol=0, atol=0)
    torch.testing.assert_close(kept, views[1].expand_as(kept), rtol=1e-12, atol=1e-12)


def test_batch_norm_follows_the_running_statistics(network):
    norm, x = network.edge_batch_norm, random(10, DIM)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    still = batch_norm(norm, x, training=True, update=False)
    assert torch.equal(norm.running_mean, mean) and norm.num_batches_tracked == 0
    moved = batch_norm(norm, x, training=True, update=True)
    assert torch.equal(still, moved) and norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * x.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * x.var(0, correction=1))
    wanted = (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(batch_norm(norm, x, training=False, update=False), wanted)


# -- the whole network


def run(network, *, symmetric=True, p=0.3, training=True, draw=0):
    z = random(6, DIM)
    classes = torch.arange(3).repeat_interleave(2)
    dropout = Dropout(p, 3, torch.tensor(draw), symmetric)
    return graph_network(network, z, classes, training=training, dropout=dropout, update=False)


def test_tied_dropout_gives_symmetric_coefficients(network):
    tied, apart, without = run(network), run(network, symmetric=False), run(network, p=0.0)
    torch.testing.assert_close(tied.coefficients, tied.coefficients.transpose(0, 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(without.coefficients, without.coefficients.transpose(0, 1), rtol=1e-12, atol=0)
    assert not torch.allclose(apart.coefficients, apart.coefficients.transpose(0, 1), rtol=1e-3)
    assert not torch.allclose(tied.coefficients, without.coefficients, rtol=1e-3)


def test_tied_edges_are_symmetric_after_every_layer(network):
    x = normalized_rows(random(6, DIM))
    e, f = edge_start(x, x), random(6, DIM, seed=1)
    classes = torch.arange(3).repeat_interleave(2)
    other_class = classes[:, None] != classes
    for number, layer in enumerate(network.layers):
        f = node_update(layer.node, f, e, other_class, HEADS)
        keep = edge_dropout_masks(6, layer=number, draw=torch.tensor(0), seed=3, p=0.3, symmetric=True)
        e = edge_mlp(layer.edge, gate(layer.edge.weights(), e, F.gelu(layer.edge.node_to_edge(f)), keep, 0.3))
        torch.testing.assert_close(e, e.transpose(0, 1), rtol=1e-12, atol=1e-13)
    wanted = head(network, e, training=True, update=False)
    assert wanted.shape == (6, 6, DIM) and 0 < wanted.min() < wanted.max() < 1


def test_each_layer_has_masks_of_its_own(network, monkeypatch):
    from gcahng.reference import edge_update as module

    seen = []

    def record(n, **options):
        seen.append((n, options["layer"], options["draw"].item(), options["seed"], options["p"], options["symmetric"]))
        return edge_dropout_masks(n, **options)

    monkeypatch.setattr(module, "edge_dropout_masks", record)
    run(network, draw=7, symmetric=False)
    assert seen == [(6, 0, 7, 3, 0.3, False), (6, 1, 7, 3, 0.3, False)]


def test_evaluation_has_no_dropout(network):
    with_dropout, without = run(network, training=False), run(network, training=False, p=0.0)
    assert torch.equal(with_dropout.coefficients, without.coefficients)


def test_dropped_tokens_add_nothing_and_kept_ones_are_scaled(network):
    layer, e, tokens, p = network.layers[0].edge, random(N, N, DIM), random(N, DIM, seed=1), 0.25
    neither = torch.zeros(N, N, 2, dtype=torch.bool)
    torch.testing.assert_close(
        gate(layer.weights(), e, tokens, neither, p), layer.norm(F.gelu(e)), rtol=1e-12, atol=1e-14
    )

    first = neither.clone()
    first[..., 0] = True
    difference = layer.key(tokens)[:, None] - layer.key(tokens)[None]
    weight = torch.sigmoid((layer.query(e) * difference).sum(-1, keepdim=True) / math.sqrt(DIM))
    wanted = layer.norm(F.gelu(weight * layer.value(tokens)[:, None] / (1 - p) + e))
    torch.testing.assert_close(gate(layer.weights(), e, tokens, first, p), wanted, rtol=1e-12, atol=1e-14)


def test_dropout_keeps_the_expectation():
    """Over many draws the factor of every token, keep / (1 - p), averages 1: within five standard deviations."""
    p, draws = 0.3, 2000
    for symmetric in (True, False):
        total = torch.zeros(3, 3, 2)
        for draw in range(draws):
            total += edge_dropout_masks(3, layer=0, draw=torch.tensor(draw), seed=3, p=p, symmetric=symmetric) / (1 - p)
        assert ((total / draws - 1).abs() < 5 * math.sqrt(p / (1 - p) / draws)).all()


def test_permuting_nodes_permutes_everything(network):
    z, classes, order = random(6, DIM), torch.arange(3).repeat_interleave(2), torch.tensor([3, 0, 5, 1, 4, 2])
    one = graph_network(network, z, classes, training=True, update=False)
    other = graph_network(network, z[order], classes[order], training=True, update=False)
    torch.testing.assert_close(other.coefficients, one.coefficients[order][:, order], rtol=1e-11, atol=0)
    torch.testing.assert_close(other.node_logits, one.node_logits[order], rtol=1e-11, atol=1e-13)


def test_dim_must_be_divisible_by_heads():
    with pytest.raises(UserError, match="embedding_dim is 10 and heads is 4; embedding_dim must be divisible by heads"):
        GraphNetwork(10, 3, heads=4)
