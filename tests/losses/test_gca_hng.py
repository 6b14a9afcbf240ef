"""The training step of the public loss: its order, its logs, its random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from loss_cases import CLASSES, MEAN_GENERATOR, MEAN_METRIC, VIEWS, make_batch, make_loss, same, snapshot, train_step
from torch.nn import functional as F

import gcahng
from gcahng.engine import prepare
from gcahng.engine.workspace import WorkspaceOfThread
from gcahng.reference.diversity import diversity
from gcahng.reference.edge_update import Dropout
from gcahng.reference.graph_network import graph_network
from gcahng.reference.mix import mix
from gcahng.reference.npair import npair, synthetic_npair
from gcahng.reference.philox import mixing_draws
from gcahng.reference.training_step import coefficients_by_view

pytestmark = pytest.mark.usefixtures("implementation")
LOG_NAMES = ("J_m", "J_syn", "J_gce", "J_cls", "J_soft", "J_sim", "J_div", "J_gen")


def close(actual, wanted, name, atol=1e-13):
    torch.testing.assert_close(actual, wanted.detach(), rtol=1e-10, atol=atol, msg=lambda text: f"{name}: {text}")


# -- order of calls


def test_generator_step_needs_a_training_forward():
    gca, (z, labels) = make_loss(), make_batch()
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()
    train_step(gca, z, labels)
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()
    with torch.no_grad():
        gca(z, labels)
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()


def test_generator_step_needs_a_backward():
    gca, (z, labels) = make_loss(), make_batch()
    train_step(gca, z, labels)
    loss = gca(z, labels)
    before = snapshot(gca)
    with pytest.raises(RuntimeError, match=r"loss\.backward\(\)"):
        gca.generator_step()
    assert same(snapshot(gca), before)
    loss.backward()
    assert gca.generator_step().keys() == set(LOG_NAMES)


def test_training_forward_clears_graph_gradients():
    gca, (z, labels) = make_loss(), make_batch()
    for parameter in gca.graph_network.parameters():
        parameter.grad = torch.ones_like(parameter)
    gca(z, labels)
    assert all(parameter.grad is None for parameter in gca.graph_network.parameters())


def test_no_gradient_is_left_behind():
    gca, (z, labels) = make_loss(), make_batch()
    leaf = z.clone().requires_grad_()
    gca(leaf, labels).backward()
    gradient = leaf.grad.clone()
    gca.generator_step()
    assert torch.equal(leaf.grad, gradient)
    assert all(parameter.grad is None for parameter in gca.parameters())


def test_gradients_that_lie_on_the_classifier_do_not_count():
    """A sum of all parameters in the caller's loss, say, leaves some."""
    found = []
    for stray in (False, True):
        gca, (z, labels) = make_loss(), make_batch()
        loss = gca(z.requires_grad_(), labels)
        loss.backward()
        if stray:
            for parameter in gca.classifier.parameters():
                parameter.grad = torch.ones_like(parameter)
        found.append((gca.generator_step(), snapshot(gca)))
    assert same(*found)


def test_generator_step_without_recorded_gradients_around_it():
    found = []
    for enabled in (True, False):
        gca, (z, labels) = make_loss(), make_batch()
        gca(z.requires_grad_(), labels).backward()
        with torch.set_grad_enabled(enabled):
            found.append((gca.generator_step(), snapshot(gca)))
    assert same(*found)


@pytest.mark.filterwarnings("ignore:a second training forward")
def test_a_second_forward_forgets_the_first():
    """No accumulation over batches: only the last forward counts, though the first has moved draws and statistics."""
    assert "Gradient accumulation is not supported" in gcahng.GCAHNGLoss.__doc__
    first, second = make_batch(1), make_batch(2)
    gca = make_loss()
    other = copy.deepcopy(gca)
    gca(*first).backward()
    with torch.no_grad():
        other(*first)
    results = [train_step(one, *second) for one in (gca, other)]
    assert same(*results)
    assert same(snapshot(gca), snapshot(other))


def test_handing_the_parameters_to_another_optimizer_is_documented_as_wrong():
    text = " ".join(gcahng.GCAHNGLoss.__doc__.split())
    assert "Do not hand `gca.parameters()` to another optimizer" in text


@pytest.mark.parametrize("symmetric", [True, False])
def test_step_by_hand(symmetric):
    """Phase 1 on draw 0, the classifier, phase 3 on draw 1 with the new weights; three AdamW steps in that order."""
    gca, (z, labels) = make_loss(symmetric=symmetric, edge_dropout=0.3, compat="fixed"), make_batch()
    network, classifier = copy.deepcopy(gca.graph_network), copy.deepcopy(gca.classifier)
    loss, gradient, logs = train_step(gca, z, labels)

    canonical = torch.sort(labels, stable=True)
    rows, classes = canonical.indices, canonical.values[::VIEWS]
    graph_optimizer = torch.optim.AdamW(network.trainable(), lr=1.5e-4, weight_decay=1e-4)
    classifier_optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    pull = torch.exp(torch.tensor(-gca.alpha / MEAN_METRIC, dtype=z.dtype))

    def graph(z, draw):
        dropout = Dropout(0.3, 11, torch.tensor(draw), symmetric)
        return graph_network(network, z, canonical.values, training=True, dropout=dropout)

    def negatives(z, coefficients, draw):
        views = z.view(CLASSES, VIEWS, -1).transpose(0, 1)
        u = mixing_draws(VIEWS, draw=torch.tensor(draw), seed=11, dtype=z.dtype)
        return views, mix(views, coefficients_by_view(coefficients, VIEWS), u, pull)

    def step_graph():
        torch.nn.utils.clip_grad_value_(network.parameters(), 10.0)
        graph_optimizer.step()
        network.zero_grad()

    leaf = z.clone().requires_grad_()
    found = graph(leaf[rows], 0)
    views, made = negatives(leaf[rows], found.coefficients.detach(), 0)
    metric, entropy = npair(views), F.cross_entropy(found.node_logits, canonical.values)
    weight = 1 - torch.exp(torch.tensor(-gca.beta / MEAN_GENERATOR, dtype=z.dtype))
    synthetic = weight * synthetic_npair(views, made)
    (metric + synthetic + entropy).backward()
    step_graph()

    classifier_loss = 10 * F.cross_entropy(classifier(z[rows]), canonical.values)
    classifier_loss.backward()
    classifier_optimizer.step()

    found = graph(z[rows], 1)
    views, made = negatives(z[rows], found.coefficients, 1)
    soft = 20 * F.cross_entropy(classifier(made).flatten(0, -2), classes.expand(VIEWS, CLASSES, CLASSES).flatten())
    cosine = F.cosine_similarity(views[:, :, None], made, dim=-1)
    similarity = ((1 - cosine) * (1 - torch.eye(CLASSES))).mean()
    spread = diversity(found.coefficients)
    generator = 0.5 * (soft + 10 * similarity + 10 * spread)
    generator.backward()
    step_graph()

    close(loss, metric + synthetic + entropy, "loss")
    close(gradient, leaf.grad, "gradient")
    parts = (metric, synthetic, entropy, classifier_loss, soft, similarity, spread, generator)
    for name, wanted in zip(LOG_NAMES, parts, strict=True):
        close(logs[name], wanted, name)
    for ours, theirs in ((gca.graph_network, network), (gca.classifier, classifier)):
        for (name, tensor), wanted in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            # AdamW turns the rounding noise of a gradient that cancels into a step of its own; a real step is 1e-4.
            close(tensor, wanted, name, atol=1e-9)


# -- evaluation mode


def test_eval_remembers_nothing_and_uses_running_statistics_without_dropout():
    gca, (z, labels) = make_loss(edge_dropout=0.5), make_batch()
    train_step(gca, z, labels)
    before = snapshot(gca)
    gca.eval()
    first, second = gca(z, labels), gca(z, labels)
    assert torch.equal(first, second)
    assert same(snapshot(gca), before)
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()

    order = torch.sort(labels, stable=True)
    graph = graph_network(gca.graph_network, z[order.indices], order.values, training=False)
    views = z[order.indices].view(CLASSES, VIEWS, -1).transpose(0, 1)
    u = mixing_draws(VIEWS, draw=gca.draw, seed=gca.seed, dtype=z.dtype)
    made = mix(views, coefficients_by_view(graph.coefficients, VIEWS), u, torch.exp(-gca.alpha / gca.mean_metric))
    weight = 1 - torch.exp(-gca.beta / gca.mean_generator)
    wanted = npair(views) + weight * synthetic_npair(views, made)
    wanted = wanted + F.cross_entropy(graph.node_logits, order.values)
    torch.testing.assert_close(first, wanted, rtol=1e-12, atol=0)
    gca.train()
    assert not torch.equal(gca(z, labels), first)


def test_eval_forward_between_forward_and_step_changes_nothing():
    (z, labels), other = make_batch(1), make_batch(2)
    gca = make_loss()
    twin = copy.deepcopy(gca)
    for one in (gca, twin):
        loss = one(z, labels)
        if one is gca:
            gca.eval()
            gca(*other)
            gca.train()
        loss.backward()
        one.generator_step()
    assert same(snapshot(gca), snapshot(twin))


def test_inference_mode_leaves_nothing_behind(monkeypatch):
    """Memory that is kept from batch to batch must not be made as inference tensors, which training cannot write."""
    monkeypatch.setattr(prepare, "_workspace", WorkspaceOfThread())
    batch = make_batch()
    gca = make_loss()
    twin = copy.deepcopy(gca)
    gca.eval()
    with torch.inference_mode():
        gca(*batch)
        gca.generate(*batch)
    gca.train()
    for one in (gca, twin):
        train_step(one, *batch)
    assert same(snapshot(gca), snapshot(twin))


# -- what a step reports and does


def test_logs():
    gca, (z, labels) = make_loss(softmax_factor=3.0, dot_weight=5.0, div_weight=7.0), make_batch()
    loss, _, logs = train_step(gca, z, labels)
    assert logs.keys() == set(LOG_NAMES)
    for name, value in logs.items():
        assert value.dim() == 0 and not value.requires_grad and value.is_leaf and value.dtype == z.dtype, name
    torch.testing.assert_close(logs["J_m"] + logs["J_syn"] + logs["J_gce"], loss, rtol=1e-12, atol=0)
    generator = 0.5 * (logs["J_soft"] + 5.0 * logs["J_sim"] + 7.0 * logs["J_div"])
    torch.testing.assert_close(logs["J_gen"], generator, rtol=1e-12, atol=0)
    _, _, other = train_step(make_loss(softmax_factor=6.0), z, labels)
    torch.testing.assert_close(other["J_soft"], 2 * logs["J_soft"], rtol=1e-12, atol=0)


def test_synthetic_loss_is_logged_with_its_weight():
    z, labels = make_batch()
    logged = {}
    for mean in (20.0, 60.0):
        gca = make_loss(beta=30.0)
        gca.mean_generator = mean
        logged[mean] = train_step(gca, z, labels)[2]["J_syn"]
    weight = {mean: 1 - torch.exp(torch.tensor(-30.0 / mean, dtype=z.dtype)) for mean in logged}
    torch.testing.assert_close(logged[20.0] / weight[20.0], logged[60.0] / weight[60.0], rtol=1e-12, atol=0)


def test_graph_gradients_are_clipped_by_value_and_the_classifiers_are_not():
    clip = 1e-3
    gca, (z, labels) = make_loss(clip_value=clip), make_batch()
    seen = {"graph": [], "classifier": []}
    for name, optimizer in (("graph", gca.graph_optimizer), ("classifier", gca.classifier_optimizer)):

        def record(optimizer, *_, name=name):
            parameters = optimizer.param_groups[0]["params"]
            seen[name].append([(p.shape, p.grad.clone()) for p in parameters if p.grad is not None])

        optimizer.register_step_pre_hook(record)
    leaf = z.clone().requires_grad_()
    gca(leaf, labels).backward()
    raw = [p.grad.clone() for p in gca.graph_network.trainable() if p.grad is not None]
    gca.generator_step()
    assert [len(steps) for steps in seen.values()] == [2, 1]
    for (_, clipped), gradient in zip(seen["graph"][0], raw, strict=True):
        assert torch.equal(clipped, gradient.clamp(-clip, clip))
    assert max(gradient.abs().max() for gradient in raw) > clip
    assert max(gradient.abs().max() for _, gradient in seen["graph"][1]) == clip
    assert max(gradient.abs().max() for _, gradient in seen["classifier"][0]) > clip


# -- random numbers


def test_u_overrides_the_mixing_draws():
    z, labels = make_batch()
    drawn = [mixing_draws(VIEWS, draw=torch.tensor(draw), seed=11, dtype=z.dtype) for draw in (0, 1)]
    gca, given, other = make_loss(), make_loss(), make_loss()
    result = train_step(gca, z, labels)
    assert same(train_step(given, z, labels, u=drawn), result)
    assert same(snapshot(given), snapshot(gca))
    loss, _, logs = train_step(other, z, labels, u=(drawn[1], drawn[0]))
    assert loss != result[0] and logs["J_gen"] != result[2]["J_gen"]


def test_a_wrong_u_leaves_the_step_pending():
    gca, (z, labels) = make_loss(), make_batch()
    with pytest.raises(ValueError, match=r"u has shape \(2, 2\).* must be \(3, 2\)"):
        gca(z, labels, u=torch.zeros(2, 2))
    gca(z, labels).backward()
    before = snapshot(gca)
    with pytest.raises(ValueError, match=r"u has shape \(3, 3\).* must be \(3, 2\)"):
        gca.generator_step(u=torch.zeros(3, 3))
    assert same(snapshot(gca), before)
    gca.generator_step()


def test_draw_advances_by_two_a_step_and_not_in_eval():
    gca, (z, labels) = make_loss(), make_batch()
    for step in range(3):
        assert gca.draw == 2 * step
        train_step(gca, z, labels)
    gca.eval()
    gca(z, labels)
    assert gca.draw == 6


@pytest.mark.parametrize(("p", "same_loss"), [(0.3, False), (0.0, True)])
def test_dropout_changes_with_the_draw(p, same_loss):
    z, labels = make_batch()
    u = torch.full((VIEWS, VIEWS - 1), 0.5, dtype=z.dtype)
    gca = make_loss(edge_dropout=p)
    with torch.no_grad():
        assert torch.equal(gca(z, labels, u=u), gca(z, labels, u=u)) == same_loss


def test_the_seed_decides_everything_random():
    batches = [make_batch(seed) for seed in range(2)]

    def run(seed):
        torch.rand(3)
        gca = make_loss(seed=seed)
        return [train_step(gca, *batch) for batch in batches]

    assert same(run(5), run(5))
    assert not same(run(5), run(6))


def test_auto_is_one_of_the_implementations(implementation):
    z, labels = make_batch()
    results = [train_step(make_loss(impl=impl), z, labels) for impl in (implementation, "auto")]
    for one, other in zip(results[0][2].values(), results[1][2].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_without_a_seed_torchs_generator_gives_one():
    seeds = []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        seeds.append(gcahng.GCAHNGLoss(7, 8, layers=1, heads=2).seed)
    assert seeds[0] == seeds[1] != seeds[2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("num_per_class", [None, VIEWS])
def test_labels_in_any_order(num_per_class, dtype):
    """Samples of other classes may come between. Masks follow the canonical order: dropout sees no difference."""
    z, labels = make_batch()
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))
    # Views keep their order within a class: the first is N-pair's anchor.
    order = torch.empty_like(shuffled)
    for label in labels.unique():
        mine = labels == label
        order[labels[shuffled] == label] = mine.nonzero().flatten()
    assert not torch.equal(labels[order], labels) and torch.equal(order.sort().values, torch.arange(len(labels)))
    gca, permuted = (make_loss(edge_dropout=0.3, num_per_class=num_per_class) for _ in range(2))
    for _ in range(2):
        loss, gradient, logs = train_step(gca, z, labels)
        assert same(train_step(permuted, z[order], labels[order].to(dtype)), (loss, gradient[order], logs))
    assert same(snapshot(permuted), snapshot(gca))
