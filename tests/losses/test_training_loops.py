"""What training loops do to a loss that they hold: wrap it, average it, freeze it, hand it more than it takes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from loss_cases import make_batch, make_loss, same, snapshot, train_step
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import gcahng
from gcahng.losses import misuse

FORWARDS = 4

pytestmark = pytest.mark.usefixtures("implementation")


class ModelAndLoss(nn.Module):
    """As a LightningModule holds them."""

    def __init__(self):
        super().__init__()
        self.gca = make_loss()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x, labels):
        return self.gca(self.model(x), labels)


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def steps(whole, module, count):
    """Steps of the user's model and the loss, forward through `whole`."""
    optimizer = torch.optim.SGD(module.model.parameters(), lr=0.1)
    for seed in range(count):
        loss = whole(*make_batch(seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        module.gca.generator_step()


def test_data_parallel_around_model_and_loss(process_group):
    """The generator's own gradients must not count as the rest of the caller's backward: the model's gradients would be
    reduced after its step, and the copies of the model drift apart without a word."""
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        module = ModelAndLoss()
        steps(DistributedDataParallel(module), module, 2)
    wrapped, plain = ModelAndLoss(), ModelAndLoss()
    steps(DistributedDataParallel(wrapped, find_unused_parameters=True), wrapped, 3)
    steps(plain, plain, 3)
    assert same(snapshot(wrapped), snapshot(plain))


def test_a_loss_that_never_steps_says_so_once(monkeypatch):
    assert misuse.FORWARDS_WITHOUT_STEP == 20
    monkeypatch.setattr(misuse, "FORWARDS_WITHOUT_STEP", FORWARDS)
    gca, batch = make_loss(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(FORWARDS):  # the generator step begins the count anew
            gca(*batch)
            train_step(gca, *batch)
        for _ in range(FORWARDS - 1):
            gca(*batch)
        gca.eval()(*batch)
        with torch.no_grad():
            gca.train()(*batch)
    with pytest.warns(UserWarning, match=r"4 forwards in training mode without generator_step\(\)") as caught:
        for _ in range(FORWARDS):
            gca(*batch)
    assert [warning.filename for warning in caught] == [__file__]


def test_generator_step_may_come_before_the_models_step():
    """As in Lightning's on_after_backward."""
    early, late = ModelAndLoss(), ModelAndLoss()
    steps(late, late, 2)
    optimizer = torch.optim.SGD(early.model.parameters(), lr=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        early(*make_batch(seed)).backward()
        early.gca.generator_step()
        optimizer.step()
    assert same(snapshot(early), snapshot(late))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model(use_buffers):
    module = ModelAndLoss()
    averaged = AveragedModel(module, use_buffers=use_buffers)
    for _ in range(2):
        steps(module, module, 1)
        averaged.update_parameters(module)
    steps(averaged.module, averaged.module, 1)


def test_batch_norms_without_momentum_weigh_all_batches_alike():
    """Stochastic weight averaging sets momentum to None."""

    def statistics(momentum):
        gca = make_loss()
        norms = (gca.graph_network.edge_batch_norm, gca.graph_network.node_batch_norm)
        for norm in norms:
            norm.momentum = momentum
        found = []
        for seed in range(2):
            z, labels = make_batch(seed)
            gca(z, labels).backward()
            found.append([t.clone() for norm in norms for t in (norm.running_mean, norm.running_var)])
            gca.generator_step()
            found.append([t.clone() for norm in norms for t in (norm.running_mean, norm.running_var)])
        return found

    of_batches = statistics(1.0)
    wanted = [torch.stack(values).mean(dim=0) for values in zip(*of_batches, strict=True)]
    torch.testing.assert_close(statistics(None)[-1], wanted)


def test_other_classes_do_not_take_over_the_optimizers():
    """Fused AdamW reads moments as long as its weights, whatever their shape."""
    gca, other = make_loss(), gcahng.GCAHNGLoss(9, 8, heads=2, seed=1).double()
    train_step(gca, *make_batch())
    state = {name: value for name, value in snapshot(gca).items() if "class" not in name}
    before = snapshot(other)["_extra_state"]
    with pytest.raises(ValueError, match=r"weight of shape \(7, 8\), and this loss's has shape \(9, 8\); num_"):
        other.load_state_dict(state, strict=False)
    assert same(snapshot(other)["_extra_state"], before)
    del state["_extra_state"]
    other.load_state_dict(state, strict=False)
    train_step(other, *make_batch())


def test_a_frozen_classifier_stays_as_it_is():
    gca = make_loss()
    gca.classifier.requires_grad_(False)
    before = copy.deepcopy(gca.classifier.state_dict())
    train_step(gca, *make_batch())
    assert same(gca.classifier.state_dict(), before)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_phase_whose_weights_are_all_frozen_leaves_them_as_they_are(scaled):
    """J_gen has no gradient of class_head, the only one that trains here."""
    gca = make_loss()
    gca.graph_network.requires_grad_(False).class_head.requires_grad_(True)
    before = snapshot(gca.graph_network)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0) if scaled else None
    train_step(gca, *make_batch(), scaler=scaler)
    moved = {
        name
        for name, _ in gca.graph_network.named_parameters()
        if not same(gca.graph_network.state_dict()[name], before[name])
    }
    assert moved == {"class_head.weight", "class_head.bias"}


@pytest.mark.parametrize("cause", ["zero_grad", "frozen"])
def test_gradients_that_are_missing_after_a_backward(cause):
    gca = make_loss()
    z, labels = make_batch()
    gca.graph_network.requires_grad_(cause != "frozen")
    gca(z.requires_grad_(), labels).backward()
    gca.zero_grad()
    with pytest.raises(RuntimeError, match="or they were cleared .* or its parameters are frozen"):
        gca.generator_step()


def test_a_miners_pairs_are_not_mixing_draws():
    """pytorch-metric-learning's trainers and MultipleLosses hand them on as the third argument."""
    z, labels = make_batch()
    pairs = tuple(torch.zeros(3, dtype=torch.int64) for _ in range(4))
    with pytest.raises(ValueError, match="u is a tuple; it must be None or a tensor of mixing draws"):
        make_loss()(z, labels, pairs)


def test_made_without_a_seed_where_tensors_have_no_data():
    with torch.device("meta"):
        assert gcahng.GCAHNGLoss(7, 8).classifier.weight.device.type == "meta"
