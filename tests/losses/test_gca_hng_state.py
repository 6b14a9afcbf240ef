"""What the loss remembers: saving, moving, copying."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from loss_cases import DIM, NUM_CLASSES, learning_rate, make_batch, make_loss, same, snapshot, train_step
from pytorch_metric_learning.losses import ProxyAnchorLoss
from tiers import few

pytestmark = pytest.mark.usefixtures("implementation")

OPTIONS = {"edge_dropout": 0.3, "epochs": 4, "steps_per_epoch": 3}


def train(gca, first, last, dtype=torch.float64):
    return [train_step(gca, *make_batch(step, dtype)) for step in range(first, last)]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", few([pytest.param(5, id="mid-epoch"), pytest.param(3, id="at-epoch-end")]))
def test_going_on_after_a_reload_is_bit_identical(stop):
    whole = make_loss(**OPTIONS)
    wanted = train(whole, 0, 8)
    stopped = make_loss(**OPTIONS)
    train(stopped, 0, stop)
    saved = through_a_file(stopped.state_dict())

    # Other weights, other seed: everything must come from the file.
    resumed = make_loss(**(OPTIONS | {"seed": 999}))
    for parameter in resumed.parameters():
        torch.nn.init.normal_(parameter)
    train(resumed, 0, 2)
    resumed.load_state_dict(saved)
    assert same(train(resumed, stop, 8), wanted[stop:])
    assert same(resumed.state_dict(), whole.state_dict())
    assert learning_rate(resumed.graph_optimizer) == learning_rate(whole.graph_optimizer) < 1.5e-4


def test_base_loss_is_saved_with_it():
    gca, other = (make_loss(base=ProxyAnchorLoss(num_classes=NUM_CLASSES, embedding_size=DIM)) for _ in range(2))
    assert not torch.equal(gca.base.proxies, other.base.proxies)
    other.load_state_dict(through_a_file(gca.state_dict()))
    assert torch.equal(gca.base.proxies, other.base.proxies)


def test_state_inside_a_larger_module():
    def module():
        return torch.nn.ModuleDict({"loss": make_loss(**OPTIONS), "model": torch.nn.Linear(2, 2)})

    outer, other = module(), module()
    train(outer["loss"], 0, 2)
    other.load_state_dict(through_a_file(outer.state_dict()))
    assert same(train(other["loss"], 2, 4), train(outer["loss"], 2, 4))


def test_two_losses_never_share_state_after_loading():
    gca, other = make_loss(), make_loss()
    train(gca, 0, 1)
    other.load_state_dict(gca.state_dict())
    before = snapshot(gca)
    train(other, 1, 3)
    assert same(snapshot(gca), before)


def test_loading_forgets_a_pending_forward():
    gca, batch = make_loss(), make_batch()
    saved = snapshot(gca)
    gca(*batch).backward()
    gca.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()


def test_loading_by_assignment_is_refused():
    gca = make_loss()
    before = snapshot(gca)
    with pytest.raises(ValueError, match="assign is True; it must be False"):
        gca.load_state_dict(snapshot(make_loss(seed=12)), assign=True)
    assert same(snapshot(gca), before)


def test_a_state_of_other_layers_is_refused():
    gca, other = make_loss(), make_loss(layers=3)
    before = snapshot(gca)["_extra_state"]
    with pytest.raises(ValueError, match=r"a graph network of 104 weights, this one has 72 \(layers=2\)"):
        gca.load_state_dict(snapshot(other))
    assert same(snapshot(gca)["_extra_state"], before)


def optimized(gca):
    """The parameters that the loss itself steps."""
    return [*gca.graph_optimizer.param_groups[0]["params"], *gca.classifier_optimizer.param_groups[0]["params"]]


def moments(gca):
    for optimizer in (gca.graph_optimizer, gca.classifier_optimizer):
        for state in optimizer.state.values():
            yield state["exp_avg"]
            yield state["exp_avg_sq"]


def test_moving_dtype_after_the_first_step_moves_optimizer_state():
    moved = make_loss(dtype=torch.float32)
    train(moved, 0, 2, torch.float32)
    loaded = make_loss(dtype=torch.float64)
    loaded.load_state_dict(snapshot(moved))
    steps = [state["step"].clone() for state in moved.graph_optimizer.state.values()]
    moved.double()
    assert all(moment.dtype is torch.float64 for moment in moments(moved))
    assert same([state["step"] for state in moved.graph_optimizer.state.values()], steps)
    assert moved.draw.dtype is torch.int64
    assert same(train(moved, 2, 4), train(loaded, 2, 4))
    assert same(moved.state_dict(), loaded.state_dict())

    moved.float()
    assert all(moment.dtype is torch.float32 for moment in moments(moved))
    train(moved, 4, 5, torch.float32)


def test_moving_device_after_the_first_step_moves_optimizer_state():
    gca = make_loss()
    train(gca, 0, 1)
    saved = snapshot(gca)
    gca.to("meta")
    assert {moment.device.type for moment in moments(gca)} == {"meta"}
    held = optimized(gca)
    own = [*gca.graph_network.trainable(), *gca.classifier.parameters()]
    assert [id(p) for p in held] == [id(p) for p in own]

    wanted = make_loss()
    train(wanted, 0, 2)
    gca.to_empty(device="cpu").load_state_dict(saved)
    train(gca, 1, 2)
    assert same(snapshot(gca), snapshot(wanted))


def test_frozen_weights_move_too():
    gca = make_loss(dtype=torch.float32)
    train(gca, 0, 1, torch.float32)
    gca.graph_network.node_input.requires_grad_(False)
    weight = gca.graph_network.node_input.weight.detach().clone()
    gca.double()
    train(gca, 1, 2)
    assert torch.equal(gca.graph_network.node_input.weight, weight.double())


def test_moving_forgets_a_pending_forward():
    gca = make_loss(dtype=torch.float32)
    gca(*make_batch(dtype=torch.float32)).backward()
    gca.double()
    with pytest.raises(RuntimeError, match="no training forward is pending"):
        gca.generator_step()


def test_deepcopy():
    gca = make_loss(**OPTIONS)
    train(gca, 0, 2)
    twin = copy.deepcopy(gca)
    before = snapshot(gca)
    results = train(twin, 2, 5)
    assert same(snapshot(gca), before)
    assert same(train(gca, 2, 5), results)
    assert same(snapshot(gca), snapshot(twin))


def test_engine_options_may_be_set_between_steps():
    gca, other = make_loss(), make_loss()
    gca.impl, gca.edge_memory, gca.edge_dtype = "torch", "recompute", torch.float64
    assert (gca.engine.impl, gca.engine.edge_memory, gca.engine.edge_dtype) == ("torch", "recompute", torch.float64)
    assert other.engine.edge_memory != "recompute" and other.edge_dtype is None
