"""Averages of weights over a run: what the loss counts stays a count, and an averaged loss can go on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from loss_cases import make_batch, make_loss, same, snapshot, train_step
from tiers import few
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn, update_bn

import gcahng
from gcahng.losses import misuse


class ModelAndLoss(nn.Module):
    """Returns the loss of a batch (x, labels)."""

    def __init__(self) -> None:
        super().__init__()
        self.gca = make_loss(means=False, edge_dropout=0.2)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).double()

    def forward(self, batch):
        x, labels = batch
        return self.gca(self.model(x), labels)

    def step(self, seed: int) -> dict:
        self.gca.zero_grad()
        self(make_batch(seed)).backward()
        return self.gca.generator_step()


def in_place(average: nn.Module, module: nn.Module, decay: float = 0.9) -> None:
    """As the averages of YOLO do it, over the floating-point entries of the state dict."""
    state = module.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            value.mul_(decay).add_(state[name], alpha=1 - decay)


AVERAGES = {
    "mean": {},
    "mean-by-hand": {"avg_fn": get_swa_avg_fn()},
    "exponential": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "state-dict": None,
}


def averaged_over(module: ModelAndLoss, kind: str, epochs: int = 3, steps: int = 4) -> tuple[ModelAndLoss, list[float]]:
    """Trains, with an average from the start and an update after every step.

    Returns:
        The averaged module, and J̄_gen after each epoch.
    """
    options = AVERAGES[kind]
    average = copy.deepcopy(module) if options is None else AveragedModel(module, use_buffers=True, **options)
    means = []
    for step in range(epochs * steps):
        module.step(step)
        if step % steps == steps - 1:
            module.gca.end_epoch()
            means.append(module.gca.mean_generator.item())
        if options is None:
            in_place(average, module)
        else:
            average.update_parameters(module)
    return (average if options is None else average.module), means


@pytest.mark.parametrize("kind", few([*AVERAGES], 1))
def test_an_average_has_means_of_epochs_that_have_ended(kind):
    """The first epoch has no mean yet. Its stand-in, 1e6, must not be averaged with the others."""
    module = ModelAndLoss()
    average, means = averaged_over(module, kind)
    assert max(means) < 1e3
    assert min(means) * (1 - 1e-9) <= average.gca.mean_generator.item() <= max(means) * (1 + 1e-9)
    assert average.gca.mean_metric < 1e3
    assert average.gca.draw.dtype is torch.int64 and 0 <= average.gca.draw <= module.gca.draw


@pytest.mark.parametrize("kind", few([*AVERAGES], 1))
def test_an_average_within_the_first_epoch_is_of_the_first_epoch(kind):
    average, _ = averaged_over(ModelAndLoss(), kind, epochs=1, steps=4)
    one_epoch, _ = averaged_over(ModelAndLoss(), kind, epochs=0)
    assert one_epoch.gca.mean_generator == 1e6
    assert average.gca.mean_generator < 1e3  # the last update came after the epoch's end


@pytest.mark.parametrize("kind", few([*AVERAGES], 1))
def test_an_average_can_go_on(kind):
    module = ModelAndLoss()
    average, _ = averaged_over(module, kind)
    for step in range(2):  # the average now has parts of the sums of an epoch
        module.step(20 + step)
    moments = average.gca.get_extra_state()
    other = ModelAndLoss()
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    assert torch.equal(other.gca.get_extra_state(), moments)
    for going_on in (average, other):
        logs = [going_on.step(30 + step) for step in range(3)]
        assert all(math.isfinite(value) for log in logs for value in log.values())
        before = [log["J_gen"].item() for log in logs]
        going_on.gca.end_epoch()
        assert 0.1 * min(before) < going_on.gca.mean_generator.item() < 10 * max(before)
    assert same(snapshot(average), snapshot(other))


def test_the_sums_of_an_average_are_of_its_steps():
    """Sum and count are averaged alike, so that their ratio stays a mean."""
    module = ModelAndLoss()
    average = AveragedModel(module, use_buffers=True)
    found = []
    for step in range(5):
        found.append(module.step(step)["J_gen"].item())
        average.update_parameters(module)
    gca = average.module.gca
    gca.end_epoch()
    assert min(found) < gca.mean_generator.item() < max(found)


def test_without_buffers_an_average_counts_as_its_module_does():
    module = ModelAndLoss()
    average = AveragedModel(module, use_buffers=False)
    for step in range(3):
        module.step(step)
        module.gca.end_epoch()
        average.update_parameters(module)
    gca = average.module.gca
    assert gca.mean_generator == module.gca.mean_generator and gca.draw == module.gca.draw == 6
    average.module.step(3)


def test_averaged_weights_put_in_place_leave_the_optimizers():
    """As Lightning's WeightAveraging does at the end of training: it copies parameters and buffers."""
    module = ModelAndLoss()
    average, means = averaged_over(module, "exponential")
    extra = module.gca.get_extra_state()
    with torch.no_grad():
        for own, other in zip(
            [*module.parameters(), *module.buffers()], [*average.parameters(), *average.buffers()], strict=True
        ):
            own.copy_(other)
    assert torch.equal(module.gca.get_extra_state(), extra)
    assert module.gca.mean_generator.item() <= max(means)
    module.step(40)


@pytest.mark.parametrize("with_gradients", [False, True], ids=["update_bn", "lightning"])
def test_a_pass_for_batch_norm_does_not_ask_for_generator_steps(with_gradients, monkeypatch):
    """Lightning's is a training epoch without backward, torch's one without gradients. Both set momentum to None."""
    monkeypatch.setattr(misuse, "FORWARDS_WITHOUT_STEP", 3)
    module = ModelAndLoss()
    for step in range(2):
        module.step(step)
    batches = [[make_batch(seed)] for seed in range(5)]
    weights = copy.deepcopy([*module.parameters()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if with_gradients:
            norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm1d)]
            for norm in norms:
                norm.momentum = None
                norm.reset_running_stats()
            for batch in batches:
                module(*batch)
            for norm in norms:
                norm.momentum = 0.1
        else:
            update_bn(batches, module)
    assert same([*module.parameters()], weights)
    with pytest.warns(UserWarning, match="forwards in training mode without"):  # and after it they count again
        for batch in batches:
            module(*batch)


def test_an_averaged_loss_in_a_new_one(tmp_path):
    """An averaged state in a file is as good as any."""
    average, _ = averaged_over(ModelAndLoss(), "mean")
    torch.save(average.gca.state_dict(), tmp_path / "state.pt")
    gca: gcahng.GCAHNGLoss = make_loss(edge_dropout=0.2)
    gca.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(train_step(gca, *make_batch(50)), train_step(average.gca, *make_batch(50)))
