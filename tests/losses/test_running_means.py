"""Running means, the schedule, and the base loss that they are taken of."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from loss_cases import DIM, NUM_CLASSES, VIEWS, learning_rate, make_batch, make_loss, same, train_step
from pytorch_metric_learning.losses import ProxyAnchorLoss, SupConLoss
from tiers import few
from torch import nn

import gcahng
from gcahng.losses import misuse as module

pytestmark = pytest.mark.usefixtures("implementation")


def batches():
    return [make_batch(seed) for seed in range(3)]


# -- running means


def test_end_epoch_puts_the_epochs_means_in_force():
    gca = make_loss(means=False)
    assert gca.mean_metric == gca.mean_generator == 1e6
    for epoch in range(2):
        logs = [train_step(gca, *make_batch(3 * epoch + step))[2] for step in range(3)]
        before = gca.mean_metric.clone(), gca.mean_generator.clone()
        gca.end_epoch()
        for mean, name, old in ((gca.mean_metric, "J_m", before[0]), (gca.mean_generator, "J_gen", before[1])):
            wanted = torch.stack([log[name] for log in logs]).mean()
            assert wanted != old
            torch.testing.assert_close(mean, wanted, rtol=1e-12, atol=0)


def test_means_stay_in_force_through_an_epoch():
    gca = make_loss(means=False)
    for batch in batches():
        train_step(gca, *batch)
        assert gca.mean_metric == gca.mean_generator == 1e6


def test_an_epoch_without_steps_keeps_the_means():
    gca = make_loss()
    gca.end_epoch()
    assert (gca.mean_metric, gca.mean_generator) == (2.0, 20.0)
    train_step(gca, *make_batch())
    gca.end_epoch()
    means = gca.mean_metric.clone(), gca.mean_generator.clone()
    gca.end_epoch()
    assert same((gca.mean_metric, gca.mean_generator), means)


def test_losses_below_1e_6_count_as_1e_6():
    losses = iter((-3.0, 5.0, 0.0))
    gca = make_loss(base=lambda embeddings, labels: embeddings.sum() * 0 + next(losses))
    for batch in batches():
        train_step(gca, *batch)
    gca.end_epoch()
    torch.testing.assert_close(gca.mean_metric, torch.tensor((5.0 + 2e-6) / 3, dtype=torch.float64), rtol=1e-12, atol=0)

    gca = make_loss(softmax_factor=0.0, dot_weight=0.0, div_weight=0.0)
    assert train_step(gca, *make_batch())[2]["J_gen"] == 0
    gca.end_epoch()
    torch.testing.assert_close(gca.mean_generator, torch.tensor(1e-6, dtype=torch.float64), rtol=1e-12, atol=0)


def test_steps_per_epoch_rolls_by_itself():
    by_itself, by_hand = make_loss(steps_per_epoch=2, epochs=3), make_loss(epochs=3)
    for step in range(4):
        for gca in (by_itself, by_hand):
            train_step(gca, *make_batch(step))
        if step % 2:
            by_hand.end_epoch()
        assert same(by_itself.state_dict(), by_hand.state_dict())
    assert by_itself.mean_metric != 2.0
    assert learning_rate(by_itself.graph_optimizer) < 1.5e-4


@pytest.mark.parametrize("value", [3, 3.0, torch.tensor(3.0), torch.tensor(3.0, dtype=torch.float64)])
def test_means_are_settable(value):
    gca = make_loss()
    gca.mean_metric, gca.mean_generator = value, value
    assert gca.mean_metric == gca.mean_generator == 3.0
    assert gca.mean_metric.dtype is torch.float64 and gca.mean_metric.dim() == 0


def test_mean_metric_decides_how_far_negatives_are_pulled():
    z, labels = make_batch()
    gca = make_loss(alpha=4.0).eval()
    distances = []
    for mean in (0.5, 5.0, 1e6):
        gca.mean_metric = mean
        made = gca.generate(z, labels)
        gap = (z[made.index][:, :, None] - made.negatives).norm(dim=-1)
        distances.append(gap.mean())
    # Of the gap between the positive's and the negative's distance, the share θ · exp(-α / J̄_m) is kept.
    assert distances[0] < distances[1] < distances[2]


def test_warns_once_without_end_epoch(monkeypatch):
    assert module.STEPS_WITHOUT_EPOCH == 2000
    monkeypatch.setattr(module, "STEPS_WITHOUT_EPOCH", 2)
    gca, batch = make_loss(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            train_step(gca, *batch)
    with pytest.warns(UserWarning, match=r"without end_epoch\(\).* steps_per_epoch") as caught:
        for _ in range(3):
            train_step(gca, *batch)
    assert len(caught) == 1


@pytest.mark.parametrize("steps_per_epoch", few([None, 2]))
def test_does_not_warn_when_epochs_end(monkeypatch, steps_per_epoch):
    monkeypatch.setattr(module, "STEPS_WITHOUT_EPOCH", 2)
    gca, batch = make_loss(steps_per_epoch=steps_per_epoch), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 6):
            train_step(gca, *batch)
            if steps_per_epoch is None and step % 2 == 0:
                gca.end_epoch()


# -- schedule


def test_cosine_schedule_of_the_graph_network():
    gca = make_loss(epochs=4, graph_lr=2e-4, classifier_lr=3e-3)
    rates = [learning_rate(gca.graph_optimizer)]
    for _ in range(6):
        gca.end_epoch()
        rates.append(learning_rate(gca.graph_optimizer))
        assert learning_rate(gca.classifier_optimizer) == 3e-3
    wanted = [1e-4 * (1 + math.cos(math.pi * min(epoch, 4) / 4)) for epoch in range(7)]
    assert rates == pytest.approx(wanted, abs=1e-18)
    assert rates[4:] == [0.0] * 3


def test_constant_rate_without_epochs():
    gca = make_loss(graph_lr=2e-4)
    for _ in range(3):
        gca.end_epoch()
        assert learning_rate(gca.graph_optimizer) == 2e-4


def test_optimizers_have_the_arguments_rates_and_decays():
    gca = make_loss(graph_lr=1e-5, graph_weight_decay=2e-5, classifier_lr=3e-5, classifier_weight_decay=4e-5)
    for optimizer, lr, decay in ((gca.graph_optimizer, 1e-5, 2e-5), (gca.classifier_optimizer, 3e-5, 4e-5)):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW and (group["lr"], group["weight_decay"]) == (lr, decay)


# -- the base loss


def proxy_anchor():
    torch.manual_seed(3)
    return ProxyAnchorLoss(num_classes=NUM_CLASSES, embedding_size=DIM)


def test_base_from_pytorch_metric_learning():
    base = proxy_anchor()
    gca, (z, labels) = make_loss(base=base), make_batch()
    assert gca.base_parameters() == [base.proxies]
    assert "base.proxies" in gca.state_dict()
    proxies = base.proxies.detach().clone()
    optimizer = torch.optim.SGD(gca.base_parameters(), lr=0.1)

    loss, gradient, logs = train_step(gca, z, labels)
    leaf = z.clone().requires_grad_()
    wanted = proxy_anchor().double()(leaf, labels)
    torch.testing.assert_close(logs["J_m"], wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, logs["J_m"] + logs["J_syn"] + logs["J_gce"], rtol=1e-12, atol=0)

    # Beside the base's own gradient, the embeddings get the same one as beside N-pair.
    wanted.backward()
    _, npair_gradient, _ = train_step(make_loss(), z, labels)
    npair_leaf = z.clone().requires_grad_()
    gcahng.npair_loss(npair_leaf, labels).backward()
    torch.testing.assert_close(gradient - leaf.grad, npair_gradient - npair_leaf.grad, rtol=1e-10, atol=1e-13)

    # The loss never steps the proxies; the user's optimizer can, on the gradient of the loss alone.
    assert torch.equal(base.proxies, proxies) and base.proxies.grad.abs().max() > 0
    groups = gca.graph_optimizer.param_groups + gca.classifier_optimizer.param_groups
    assert all(parameter is not base.proxies for group in groups for parameter in group["params"])
    optimizer.step()
    assert not torch.equal(base.proxies, proxies)


@pytest.mark.parametrize("base", ["npair", SupConLoss(), lambda embeddings, labels: embeddings.square().mean()])
def test_bases_without_parameters(base):
    gca = make_loss(base=base)
    assert gca.base_parameters() == []
    train_step(gca, *make_batch())


def test_base_gets_the_callers_rows_in_the_losss_precision():
    seen = []

    def base(embeddings, labels):
        seen.append((embeddings.detach(), labels, torch.is_autocast_enabled("cpu")))
        return embeddings.square().mean()

    gca = make_loss(base=base, dtype=torch.float32)
    z, labels = make_batch(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gca(z.requires_grad_(), labels.int())
    loss.backward()
    ((embeddings, given, autocast),) = seen
    assert torch.equal(embeddings, z.float()) and embeddings.dtype is torch.float32
    assert torch.equal(given, labels) and given.dtype is torch.int64
    assert not autocast and z.grad.dtype is torch.bfloat16


def test_base_with_weights_takes_low_precision_embeddings():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(DIM, 1)

        def forward(self, embeddings, labels):
            return self.map(embeddings).square().mean()

    gca = make_loss(base=Linear(), dtype=torch.float32)
    logs = train_step(gca, *make_batch(dtype=torch.bfloat16))[2]
    assert logs["J_m"].dtype is torch.float32
    assert len(gca.base_parameters()) == 2


# -- N-pair by itself


def npair_by_hand(z, labels):
    """Per class, the first sample in the batch is the anchor; every later view gives one cross entropy."""
    classes = labels.unique()
    views = torch.stack([z[labels == label] for label in classes])  # (C, K, D)
    total = 0.0
    for k in range(1, VIEWS):
        for a in range(len(classes)):
            logits = torch.stack([views[a, 0] @ views[c, k] for c in range(len(classes))])
            total = total + (logits.exp().sum().log() - logits[a]) / len(classes) / (VIEWS - 1)
    return total + 0.00075 * (z**2).sum() / len(classes)


def test_npair_loss():
    z, labels = make_batch()
    loss = gcahng.npair_loss(z, labels)
    torch.testing.assert_close(loss, npair_by_hand(z, labels), rtol=1e-12, atol=0)
    assert torch.equal(gcahng.npair_loss(z, labels.int(), num_per_class=VIEWS), loss)
    assert torch.equal(train_step(make_loss(), z, labels)[2]["J_m"], loss)


def test_npair_loss_errors():
    z, labels = make_batch()
    constant = z.clone()
    constant[0] = 1.0
    torch.testing.assert_close(gcahng.npair_loss(constant, labels), npair_by_hand(constant, labels), rtol=1e-12, atol=0)
    z[0, 0] = float("nan")
    with pytest.raises(gcahng.UserError, match="embeddings holds non-finite values"):
        gcahng.npair_loss(z, labels)
    with pytest.raises(gcahng.UserError, match="labels has 12 entries; with num_per_class=5"):
        gcahng.npair_loss(z, labels, num_per_class=5)
    with pytest.raises(gcahng.UserError, match="embeddings is on meta, where tensors have no values"):
        gcahng.npair_loss(z.to("meta"), labels)
    with pytest.raises(gcahng.UserError, match="labels does not hold num_per_class=2 samples"):
        gcahng.npair_loss(make_batch()[0], labels, num_per_class=2)
    for wrong in (0, -3, 1, 3.0):
        with pytest.raises(gcahng.UserError, match=rf"num_per_class is {wrong}; it must be None or a whole number"):
            gcahng.npair_loss(make_batch()[0], labels, num_per_class=wrong)
    with pytest.raises(gcahng.UserError, match="labels has 1 class"):
        gcahng.npair_loss(z, torch.zeros_like(labels))
