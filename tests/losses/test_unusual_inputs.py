"""Equal rows, another default device, torch.vmap: right values, or one clear error."""

from __future__ import annotations

import copy

import loss_cases
import pytest
import torch
from loss_cases import make_batch, same, snapshot, train_step
from tiers import few
from torch import Tensor

import gcahng


def make_loss(**options) -> gcahng.GCAHNGLoss:
    return loss_cases.make_loss(**({"layers": 1} | options))


# -- batches with equal rows


def one_class(z: Tensor, labels: Tensor) -> Tensor:
    return torch.where((labels == labels.min())[:, None], z[:1], z)


def every_class(z: Tensor, labels: Tensor) -> Tensor:
    firsts = {int(label): (labels == label).nonzero()[0, 0] for label in labels.unique()}
    return z[torch.stack([firsts[int(label)] for label in labels])]


def across_classes(z: Tensor, labels: Tensor) -> Tensor:
    first, second = labels.unique()[:2]
    z = z.clone()
    z[labels == first] = z[labels == second]
    return z


def one_image(z: Tensor, labels: Tensor) -> Tensor:
    return z[:1].expand_as(z).clone()


def opposite(z: Tensor, labels: Tensor) -> Tensor:
    first, second = labels.unique()[:2]
    z = z.clone()
    z[labels == first] = -z[labels == second]
    return z


@pytest.mark.parametrize("mean", few([2.0, 1e-2, 1e6]))
@pytest.mark.parametrize("edit", [one_class, every_class, across_classes, one_image, opposite])
@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("dtype", few([torch.float32, torch.float64]))
def test_equal_rows_give_finite_gradients(edit, impl, dtype, mean):
    gca = make_loss(impl=impl, dtype=dtype)
    gca.mean_metric = mean
    z, labels = make_batch(dtype=dtype)
    for _ in range(2):
        loss, gradient, logs = train_step(gca, edit(z, labels), labels)
        assert loss.isfinite() and gradient.isfinite().all()
        assert all(value.isfinite() for value in logs.values())
        assert all(parameter.isfinite().all() for parameter in gca.parameters())


# -- tensors that are not where, or what, they seem


@pytest.mark.parametrize("num_per_class", few([None, 3]))
@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_a_default_device_does_not_move_what_belongs_beside_the_loss(impl, num_per_class):
    """Meta tensors stand for those of a GPU: whoever makes one where a CPU tensor belongs fails."""
    gca, (z, labels) = make_loss(impl=impl, num_per_class=num_per_class, epochs=2), make_batch()
    usual = copy.deepcopy(gca)
    for one, device in ((usual, None), (gca, "meta")):
        torch.set_default_device(device)
        try:
            train_step(one, z, labels)
            train_step(one, z, labels, scaler=torch.amp.GradScaler("cpu"))
            one.end_epoch()
            one.mean_metric, one.mean_generator = 3.0, 5
            one.generate(z, labels, anchors=[int(labels[0])])
            one.load_state_dict(snapshot(one))
            one.float().double()
            train_step(one, z, labels)
            gcahng.load_official_state_dict(one, gcahng.official_state_dict(one))
            gcahng.npair_loss(z, labels)
        finally:
            torch.set_default_device(None)
    assert same(snapshot(gca), snapshot(usual))


@pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])
def test_vmap_is_refused_in_one_line(impl):
    z, labels = make_batch()
    several = z.expand(2, -1, -1)
    gca = make_loss(impl=impl)
    message = r"the engine supports .*, and a loop does what torch\.vmap would"
    if impl == "reference":
        message = r"the loss is called within torch\.vmap; it must be called in a loop"
    stacked = {name: torch.stack([p, p]) for name, p in gca.named_parameters()}
    calls = [
        lambda: torch.vmap(lambda z: gca(z, labels))(several),
        lambda: torch.vmap(gca)(several, labels.expand(2, -1)),
        lambda: torch.vmap(torch.func.grad(gca), in_dims=(0, None))(several, labels),
        lambda: torch.vmap(lambda z: gca.generate(z, labels))(several),
        lambda: torch.vmap(lambda p: torch.func.functional_call(gca, p, (z, labels)))(stacked),
    ]
    for training in (True, False):
        gca.train(training)
        for call in calls:
            with pytest.raises(gcahng.UserError, match=message):
                call()
    with pytest.raises(gcahng.UserError, match=r"npair_loss is called within torch\.vmap; .* check=False"):
        torch.vmap(lambda z: gcahng.npair_loss(z, labels))(several)


def test_what_vmap_can_do_it_still_does():
    z, labels = make_batch()
    several = torch.stack([z, z.flip(0)])
    gca = make_loss(impl="reference", check="off", num_per_class=3).eval()
    mapped = torch.vmap(lambda z: gca(z, labels))(several)
    torch.testing.assert_close(mapped, torch.stack([gca(z, labels) for z in several]))
    mapped = torch.vmap(lambda z: gcahng.npair_loss(z, labels, num_per_class=3, check=False))(several)
    torch.testing.assert_close(mapped, torch.stack([gcahng.npair_loss(z, labels) for z in several]))
