"""Training loops that would train wrongly without a word: what the loss notices, and what it must leave alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from loss_cases import make_batch, model_and_loss, same, snapshot, train_step
from loss_cases import one_layer as make_loss
from tiers import few
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import gcahng

pytestmark = pytest.mark.usefixtures("no_other_warning")
FOREIGN = r"weights changed between the loss's forward and generator_step; .* give it model\.parameters\(\)"


def weights(gca: gcahng.GCAHNGLoss) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in gca.parameters()]


# -- another optimizer that holds the loss's parameters


class WritesData(torch.optim.Optimizer):
    """As older optimizers do it, where autograd's version counters do not see it."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.data.add_(parameter.grad, alpha=-0.01)


def matrices_alone(parameters) -> torch.optim.Optimizer:
    """As Muon is used."""
    return torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], lr=0.01)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW": lambda p: torch.optim.AdamW(p, foreach=False, fused=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "writes .data": WritesData,
    "Muon": matrices_alone,
}


@pytest.mark.parametrize("check", few(["auto", "deferred", "raise"]))
@pytest.mark.parametrize("clears", [False, True], ids=["", "zero_grad"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_holds_the_losss_parameters_is_refused(name, clears, check):
    """Trainer and sentence-transformers collect them, clear all gradients, and then call what follows a step."""
    model, gca = model_and_loss(check=check)
    optimizer = OPTIMIZERS[name]([*model.parameters(), *gca.parameters()])
    x, labels = make_batch()
    gca(model(x), labels).backward()
    optimizer.step()
    if clears:
        optimizer.zero_grad()
    before = snapshot(gca)
    with pytest.raises(gcahng.UserError, match=FOREIGN) as caught:
        gca.generator_step()
    assert "\n" not in str(caught.value)
    assert same(snapshot(gca), before)


@pytest.mark.parametrize("frozen", ["class_head", "node_input"])
def test_an_optimizer_of_a_loss_that_is_frozen_in_part_is_refused(frozen):
    model, gca = model_and_loss()
    getattr(gca.graph_network, frozen).requires_grad_(False)
    optimizer = torch.optim.AdamW([*model.parameters(), *gca.graph_network.trainable()], lr=0.01)
    x, labels = make_batch()
    gca(model(x), labels).backward()
    optimizer.step()
    with pytest.raises(gcahng.UserError, match=FOREIGN):
        gca.generator_step()


def test_weights_may_be_frozen_and_thawed_within_a_step():
    """As Lightning toggles optimizers."""
    gca, batch = make_loss(), make_batch()
    gca.graph_network.class_head.requires_grad_(False)
    loss = gca(*batch)
    gca.graph_network.class_head.requires_grad_(True)
    loss.backward()
    gca.graph_network.class_head.requires_grad_(False)
    gca.generator_step()


def test_under_a_grad_scaler_too():
    model, gca = model_and_loss()
    optimizer = torch.optim.AdamW([*model.parameters(), *gca.parameters()], fused=True)
    scaler = torch.amp.GradScaler("cpu")
    x, labels = make_batch()
    scaler.scale(gca(model(x), labels)).backward()
    scaler.step(optimizer)
    with pytest.raises(gcahng.UserError, match=FOREIGN):
        gca.generator_step(scaler)


def test_after_generator_step_such_an_optimizer_finds_no_gradient():
    """So that nothing is stepped twice: the same training as with model.parameters() alone."""
    found = []
    for everything in (False, True):
        model, gca = model_and_loss()
        held = [*model.parameters(), *(gca.parameters() if everything else ())]
        optimizer = torch.optim.AdamW(held, lr=0.01, weight_decay=0.1)
        for seed in range(3):
            x, labels = make_batch(seed)
            optimizer.zero_grad()
            gca(model(x), labels).backward()
            gca.generator_step()
            optimizer.step()
        found.append((snapshot(gca), snapshot(model)))
    assert same(*found)


def test_the_base_losss_parameters_are_the_users():
    base = nn.Module()
    base.proxies = nn.Parameter(torch.randn(8, dtype=torch.float64))
    base.forward = lambda embeddings, labels: (embeddings * base.proxies).square().mean()
    model, gca = model_and_loss(base=base)
    optimizer = torch.optim.AdamW([*model.parameters(), *gca.base_parameters()], fused=True)
    before = base.proxies.detach().clone()
    for seed in range(2):
        x, labels = make_batch(seed)
        optimizer.zero_grad()
        gca(model(x), labels).backward()
        optimizer.step()
        gca.generator_step()
    assert not torch.equal(base.proxies, before)


def test_weights_that_others_have_replaced_are_not_trained_in_silence():
    """As transformers' from_pretrained replaces them, and some tools for adapters. The optimizers hold the old ones."""
    for name in ("graph_network.class_head", "classifier"):
        gca, batch = make_loss(), make_batch()
        module = gca.get_submodule(name)
        module.bias = nn.Parameter(module.bias.detach().clone())
        gca(*batch).backward()
        before = snapshot(gca)
        with pytest.raises(gcahng.UserError, match="parameters have been replaced .* its optimizers hold the old ones"):
            gca.generator_step()
        assert same(snapshot(gca), before)


# -- what a loop may do with the weights


def swap_copy(gca: gcahng.GCAHNGLoss, averaged: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, mean in zip(gca.parameters(), averaged, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(mean)
            mean.copy_(kept)


def swap_data(gca: gcahng.GCAHNGLoss, averaged: list[Tensor]) -> None:
    for number, parameter in enumerate(gca.parameters()):
        parameter.data, averaged[number] = averaged[number], parameter.data


@pytest.mark.parametrize("when", ["between steps", "after the backward", "before the backward"])
@pytest.mark.parametrize("swap", [swap_copy, swap_data])
def test_weights_may_be_swapped_for_an_average_and_back(swap, when):
    gca, batch = make_loss(check="deferred"), make_batch()
    plain = copy.deepcopy(gca)
    averaged = [torch.randn_like(parameter) for parameter in gca.parameters()]

    def measure(moment: str) -> None:
        if moment == when:
            swap(gca, averaged)
            gca.eval()(*make_batch(5))
            gca.train()
            swap(gca, averaged)

    for _ in range(2):
        train_step(plain, *batch)
        loss = gca(*batch)
        measure("before the backward")
        loss.backward()
        measure("after the backward")
        gca.generator_step()
        measure("between steps")
    if swap is swap_copy or when == "between steps":
        assert same(snapshot(gca), snapshot(plain))


def test_weights_may_be_replaced_between_steps():
    gca, batch = make_loss(), make_batch()
    other = make_loss(seed=3)
    averaged = AveragedModel(gca)
    for change in (
        lambda: gca.load_state_dict(snapshot(other)),
        lambda: gcahng.load_official_state_dict(gca, gcahng.official_state_dict(other)),
        lambda: swap_copy(gca, weights(other)),
        lambda: gca.float().double(),
        lambda: averaged.update_parameters(gca),
        lambda: gca.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None),
    ):
        train_step(gca, *batch)
        change()
        train_step(gca, *batch)
        train_step(averaged.module, *batch)
    train_step(copy.deepcopy(gca), *batch)


def test_a_state_that_is_loaded_after_the_backward_drops_the_batch():
    gca, batch = make_loss(), make_batch()
    for change in (lambda: gca.load_state_dict(snapshot(make_loss(seed=3))), lambda: gca.float().double()):
        gca(*batch).backward()
        change()
        with pytest.raises(RuntimeError, match="no training forward is pending"):
            gca.generator_step()
        train_step(gca, *batch)


def test_a_copy_made_after_the_backward_has_no_gradients():
    gca, batch = make_loss(), make_batch()
    gca(*batch).backward()
    copies = copy.deepcopy(gca), pickle.loads(pickle.dumps(gca))
    gca.generator_step()
    train_step(gca, *batch)
    for twin in copies:
        with pytest.raises(RuntimeError, match="no gradients yet"):
            twin.generator_step()
        train_step(twin, *batch)


def test_weights_that_are_not_a_number_have_not_changed():
    gca, batch = make_loss(), make_batch()
    with torch.no_grad():
        gca.graph_network.class_head.bias.fill_(torch.nan)
    train_step(gca, *batch)


def test_check_off_looks_at_nothing():
    model, gca = model_and_loss(check="off")
    optimizer = torch.optim.AdamW([*model.parameters(), *gca.parameters()])
    x, labels = make_batch()
    (1e5 * gca(model(x), labels)).backward()
    optimizer.step()
    gca.generator_step()


def test_a_move_to_where_everything_is_changes_nothing():
    gca, batch = make_loss(), make_batch()
    assert not gca.awaits_step
    loss = gca(*batch)
    assert not gca.to("cpu").awaits_step
    loss.backward()
    assert gca.to("cpu").double().awaits_step
    gca.generator_step()
    assert not gca.awaits_step


# -- a GradScaler


@pytest.mark.parametrize("check", ["auto", "deferred"])
def test_scaled_gradients_without_their_scaler_are_refused(check):
    gca, (z, labels) = make_loss(check=check), make_batch()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(gca(z, labels)).backward()
    before = snapshot(gca)
    with pytest.raises(gcahng.UserError, match=r"gradient was multiplied by 65536, .* gca\.generator_step\(scaler\)"):
        gca.generator_step()
    assert same(snapshot(gca), before)
    train_step(gca, z, labels, scaler=scaler)


def test_a_scaler_that_did_not_scale_is_refused():
    gca, (z, labels) = make_loss(), make_batch()
    gca(z, labels).backward()
    with pytest.raises(gcahng.UserError, match=r"was not scaled by it; call scaler\.scale\(loss\)\.backward\(\)"):
        gca.generator_step(torch.amp.GradScaler("cpu"))
    gca(z, labels).backward()
    gca.generator_step(torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.25, 1.0, 100.0])
@pytest.mark.parametrize("scale", few([65536.0, None, 4.0], 2))
def test_the_loss_may_have_a_weight(weight, scale):
    gca, (z, labels) = make_loss(), make_batch()
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    for _ in range(2):
        total = weight * gca(z.requires_grad_(), labels) + z.square().sum()
        (total if scaler is None else scaler.scale(total)).backward()
        gca.generator_step(scaler)


FROZEN = {
    "classifier": lambda gca: gca.classifier.requires_grad_(False),
    "what the loss trains": lambda gca: gca.graph_network.requires_grad_(False).coefficient_head.requires_grad_(True),
    "what J_gen trains": lambda gca: gca.graph_network.requires_grad_(False).class_head.requires_grad_(True),
    "both": lambda gca: (
        gca.classifier.requires_grad_(False),
        gca.graph_network.requires_grad_(False).coefficient_head.requires_grad_(True),
    ),
}


@pytest.mark.parametrize("late", few([True, False]))
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_stay_and_the_others_train(frozen, scaled, late):
    gca, (z, labels) = make_loss(), make_batch()
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    if late:
        train_step(gca, z, labels, scaler=scaler)
    FROZEN[frozen](gca)
    before = weights(gca)
    for _ in range(2):
        logs = train_step(gca, z, labels, scaler=scaler)[2]
        assert all(value.isfinite() for value in logs.values())
    for (name, parameter), old in zip(gca.named_parameters(), before, strict=True):
        if not parameter.requires_grad:
            assert torch.equal(parameter, old), name
    named = dict(gca.named_parameters())
    moved = {
        name for (name, parameter), old in zip(named.items(), before, strict=True) if not torch.equal(parameter, old)
    }
    assert moved and (("classifier.weight" in moved) == named["classifier.weight"].requires_grad)


def test_a_graph_network_that_is_frozen_whole_has_no_step():
    gca, (z, labels) = make_loss(), make_batch()
    gca.graph_network.requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(gca(z.requires_grad_(), labels)).backward()
    with pytest.raises(RuntimeError, match="or its parameters are frozen"):
        gca.generator_step(scaler)
