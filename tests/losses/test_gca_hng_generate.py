"""The public way to look at synthetic negatives and coefficients."""

from __future__ import annotations

import warnings

import pytest
import torch
from loss_cases import CLASSES, DIM, VIEWS, make_batch, make_loss, same, snapshot, train_step

import gcahng
from gcahng.reference.graph_network import Dropout, graph_network
from gcahng.reference.mix import mix
from gcahng.reference.philox import mixing_draws

pytestmark = pytest.mark.usefixtures("implementation")

N = CLASSES * VIEWS


def test_shapes_and_order():
    gca, (z, labels) = make_loss(), make_batch()
    made = gca.generate(z, labels)
    assert type(made) is gcahng.Generated
    assert made.negatives.shape == (VIEWS, CLASSES, CLASSES, DIM)
    assert made.coefficients.shape == (N, N, DIM)
    assert torch.equal(made.classes, labels.unique())
    for a, label in enumerate(made.classes):
        assert torch.equal(made.index[:, a], (labels == label).nonzero().flatten())
    assert not any(tensor.requires_grad for tensor in made)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_reference(training, symmetric):
    gca, (z, labels) = make_loss(edge_dropout=0.3, symmetric=symmetric), make_batch()
    train_step(gca, *make_batch(1))
    made = gca.train(training).generate(z, labels)

    order = torch.sort(labels, stable=True)
    dropout = Dropout(0.3, 11, torch.tensor(2), symmetric)
    options = {"training": training, "dropout": dropout, "update": False}
    graph = graph_network(gca.graph_network, z[order.indices], order.values, **options)
    # Canonical rows back to the caller's, then by view through the index that was handed out.
    place = order.indices.argsort()
    coefficients = graph.coefficients[place][:, place]
    torch.testing.assert_close(made.coefficients, coefficients, rtol=1e-12, atol=0)
    theta = coefficients[made.index[:, :, None, None], made.index]
    u = mixing_draws(VIEWS, draw=torch.tensor(2), seed=11, dtype=z.dtype)
    negatives = mix(z[made.index], theta, u, torch.exp(-gca.alpha / gca.mean_metric))
    torch.testing.assert_close(made.negatives, negatives, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_touches_no_state(training):
    gca, (z, labels) = make_loss(), make_batch()
    train_step(gca, *make_batch(1))
    gca.train(training)
    before, random = snapshot(gca), torch.get_rng_state()
    leaf = z.clone().requires_grad_()
    first = gca.generate(leaf, labels)
    assert same(snapshot(gca), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert leaf.grad is None and all(parameter.grad is None for parameter in gca.parameters())
    assert same(gca.generate(leaf, labels), first)


def test_between_forward_and_step_changes_nothing():
    results = []
    for looks in (False, True):
        gca = make_loss()
        leaf, labels = make_batch()
        leaf.requires_grad_()
        loss = gca(leaf, labels)
        if looks:
            gca.generate(*make_batch(1))
        loss.backward()
        if looks:
            gca.generate(*make_batch(1))
        results.append((leaf.grad, gca.generator_step(), snapshot(gca)))
    assert same(*results)


def test_u():
    gca, (z, labels) = make_loss(), make_batch()
    nothing, everything = torch.zeros(VIEWS, VIEWS - 1), torch.ones(VIEWS, VIEWS - 1)
    last, first = gca.generate(z, labels, u=nothing), gca.generate(z, labels, u=everything)
    # u = 0 leaves the last view's own negative, u = 1 the first one's.
    for made, view in ((last, VIEWS - 1), (first, 0)):
        anchor, negative = z[made.index][:, :, None], z[made.index[view]]
        positive = z[made.index.roll(-1, dims=0)][:, :, None]
        near, far = (anchor - positive + 1e-6).norm(dim=-1), (anchor - negative + 1e-6).norm(dim=-1)
        theta = made.coefficients[made.index[:, :, None], made.index[view]]
        pull = torch.exp(-gca.alpha / gca.mean_metric)
        share = (near[..., None] + (far - near)[..., None] * theta * pull) / far[..., None]
        wanted = torch.where((near < far)[..., None], anchor + (negative - anchor) * share, negative.expand_as(theta))
        torch.testing.assert_close(made.negatives, wanted, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"u has shape \(2, 2\).* must be \(3, 2\)"):
        gca.generate(z, labels, u=torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_anchors_limit_negatives_and_coefficients(dtype):
    gca, (z, labels) = make_loss(), make_batch()
    whole = gca.generate(z, labels)
    asked = whole.classes[[2, 0]]
    for anchors in (asked, asked.int(), asked.tolist()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made = gca.generate(z, labels.to(dtype), anchors=anchors)
        assert torch.equal(made.negatives, whole.negatives[:, [2, 0]])
        rows = torch.isin(labels, asked)
        assert torch.equal(made.coefficients, whole.coefficients[rows])
        assert made.coefficients.shape == (2 * VIEWS, N, DIM)
        assert same((made.classes, made.index), (whole.classes, whole.index))


def test_one_anchor():
    gca, (z, labels) = make_loss(), make_batch()
    whole, made = gca.generate(z, labels), gca.generate(z, labels, anchors=labels[0])
    place = whole.classes.tolist().index(labels[0].item())
    assert torch.equal(made.negatives, whole.negatives[:, [place]])


@pytest.mark.parametrize("absent", [-1, 100, None])
def test_anchors_must_be_in_the_batch(absent):
    gca, (z, labels) = make_loss(), make_batch()
    if absent is None:
        absent = next(label for label in range(CLASSES + 1) if label not in labels)
    with pytest.raises(gcahng.UserError, match=f"anchors holds class {absent}, which is not in labels"):
        gca.generate(z, labels, anchors=[labels[0].item(), absent])


def test_a_permuted_batch_permutes_the_coefficients():
    gca, (z, labels) = make_loss(edge_dropout=0.3), make_batch()
    # Whole classes swap places; views keep their order.
    order = torch.cat([(labels == label).nonzero().flatten() for label in labels.unique().flip(0)])
    made, permuted = gca.generate(z, labels), gca.generate(z[order], labels[order])
    assert torch.equal(permuted.negatives, made.negatives)
    assert torch.equal(permuted.coefficients, made.coefficients[order][:, order])
    assert torch.equal(order[permuted.index], made.index)


def test_eval_uses_running_statistics_and_no_dropout():
    gca, (z, labels) = make_loss(edge_dropout=0.5), make_batch()
    training = gca.generate(z, labels)
    gca.eval()
    first = gca.generate(z, labels)
    assert not torch.equal(first.coefficients, training.coefficients)
    gca.seed += 1
    second = gca.generate(z, labels)
    assert torch.equal(second.coefficients, first.coefficients)
    assert not torch.equal(second.negatives, first.negatives), "the mixing draws follow the seed"
