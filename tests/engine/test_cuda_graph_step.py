"""A whole step for a CUDA graph of the caller's: the optimizers' rates, means and checks that stay on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from capture_cases import LABELS, same, train
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from gcahng import GCAHNGLoss, UserError
from gcahng.engine import prepare
from gcahng.engine.engine import Engine
from gcahng.engine.workspace import Workspace
from gcahng.testing import seeded


def make_whole(captured: bool, **options) -> GCAHNGLoss:
    """Rates that fp32 holds, in every epoch."""
    torch.manual_seed(0)
    rates = {"graph_lr": 2**-12, "classifier_lr": 2**-10, "epochs": 2}
    return GCAHNGLoss(8, 16, heads=2, seed=3, impl="torch", cuda_graph=captured, **rates, **options)


def batches(first: int, last: int) -> list[tuple[Tensor, Tensor]]:
    return [(seeded(len(LABELS), 16, seed=seed), LABELS.roll(seed)) for seed in range(first, last)]


def test_rates_on_the_device_are_written_in_place(captures: list[int]) -> None:
    gca, plain = make_whole(True), make_whole(False)
    (group,) = gca.graph_optimizer.param_groups
    rate = group["lr"]
    assert group["capturable"] and rate.dtype is torch.float32
    for epoch in range(3):
        assert group["lr"] is rate and rate.item() == plain.graph_optimizer.param_groups[0]["lr"]
        assert rate.item() == (2**-12, 2**-13, 0.0)[epoch]
        assert same(train(gca, batches(2 * epoch, 2 * epoch + 2)), train(plain, batches(2 * epoch, 2 * epoch + 2)))
        gca.end_epoch()
        plain.end_epoch()
    assert len(gca._graphs._steps) == 3, "of the graph network's two steps and the classifier's, one graph each"
    twin = copy.deepcopy(gca)
    assert twin.graph_optimizer.param_groups[0]["lr"] is not rate
    assert same(train(twin, batches(6, 7)), train(plain, batches(6, 7)))


@pytest.mark.parametrize("captured", [True, False])
def test_a_state_goes_on_with_capturable_optimizers_and_without(captures: list[int], captured: bool) -> None:
    first, other = make_whole(captured), make_whole(not captured)
    train(first, batches(0, 2))
    first.end_epoch()
    train(first, batches(2, 3))
    state = first.state_dict()
    train(other, batches(5, 6))
    other.load_state_dict(state)
    (group,) = other.graph_optimizer.param_groups
    assert isinstance(group["lr"], Tensor) is group["capturable"] is not captured
    assert same(train(other, batches(3, 5)), train(first, batches(3, 5)))
    first.end_epoch()
    other.end_epoch()
    assert torch.equal(first.mean_metric, other.mean_metric)
    assert [gca.graph_optimizer.param_groups[0]["lr"] for gca in (first, other)] == [0.0, 0.0]


def test_a_rate_moves_with_its_parameters(captures: list[int]) -> None:
    gca = make_whole(True).double()
    (group,) = gca.graph_optimizer.param_groups
    assert group["lr"].dtype is torch.float32
    gca.to("meta")
    assert group["lr"].item() == 2**-12


def test_the_means_count_steps_that_the_host_has_not_seen(captures: list[int]) -> None:
    gca = make_whole(True)
    train(gca, batches(0, 3))
    gca._steps_in_epoch = 1  # captured once, replayed twice
    total = gca._metric_sum.clone()
    assert gca.state_dict()["_counted_steps"] == 3
    gca.end_epoch()
    assert torch.equal(gca.mean_metric, total / 3)
    gca.end_epoch()
    assert torch.equal(gca.mean_metric, total / 3), "an epoch without steps keeps the old means"


def test_a_step_that_is_not_finite_is_left_out_on_the_device(captures: list[int]) -> None:
    gca, scaler = make_whole(True), torch.amp.GradScaler("cpu", init_scale=2.0)
    train(gca, batches(0, 1))
    optimizer = gca.graph_optimizer
    before = copy.deepcopy((gca.graph_network.state_dict(), optimizer.state_dict()))
    for parameter in gca.graph_network.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    gca._step_graph_network(scaler.scale(torch.ones(())))
    after = (gca.graph_network.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for parameter in gca.graph_network.parameters():
        parameter.grad = torch.ones_like(parameter)
    gca._step_graph_network(scaler.scale(torch.ones(())))
    assert not torch.equal(gca.graph_network.node_input.weight, before[0]["node_input.weight"])


def test_inside_a_capture_passes_are_part_of_it(captures: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is captured within a capture, nothing is shared with other passes, and no value is asked for."""
    gca, plain = make_whole(True, check="auto"), make_whole(False)
    wanted = train(plain, batches(0, 3))
    for place in ("gcahng.engine.cuda_graph", "gcahng.losses.gca_hng", "gcahng.losses.optimizers"):
        monkeypatch.setattr(f"{place}.capturing", lambda: True)

    def prepared(inputs, settings, workspace: Workspace, **named):
        assert isinstance(workspace, Workspace)
        return prepare.prepare(inputs, settings, workspace, **named)

    for phase in ("metric_pass", "generator_pass"):
        monkeypatch.setattr(f"gcahng.engine.{phase}.prepare", prepared)
    monkeypatch.setattr(prepare, "_workspace", None)
    monkeypatch.setattr(gca, "_raise_deferred", None)
    assert same(train(gca, batches(0, 3)), wanted)
    gca.generate(*batches(3, 4)[0])
    assert captures == [] and not gca._graphs._captured and not gca._graphs._steps


def test_a_whole_step_neither_waits_nor_depends_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: loss, backward, the generator's step and the caller's own; checks wait for end_epoch."""
    monkeypatch.setattr("gcahng.dispatch.passes", lambda impl, _, options: Engine(impl, options._replace(graphs=None)))
    monkeypatch.setattr("gcahng.losses.optimizers.capturing", lambda: True)
    with FakeTensorMode():
        gca = make_whole(True, num_per_class=2, check="deferred", edge_memory="store")
        model = torch.nn.Linear(4, 16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3), fused=True, capturable=True)
        for _ in range(2):
            loss = gca(model(torch.randn(8, 4)), torch.randint(0, 8, (8,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gca.generator_step()
        with pytest.raises(DataDependentOutputException):
            gca.end_epoch()


def test_a_classifier_that_is_frozen_later_has_no_captured_step(captures: list[int]) -> None:
    gca, plain = make_whole(True), make_whole(False)
    found = []
    for one in (gca, plain):
        train(one, batches(0, 2))
        one.classifier.requires_grad_(False)
        found.append(train(one, batches(2, 4)))
    assert same(*found)


@pytest.mark.parametrize("misuse", ["weights changed between", "gradient was multiplied by 65536"])
def test_misuse_that_a_step_may_not_read_is_told_at_the_epochs_end(captures: list[int], misuse: str) -> None:
    gca, (z, labels) = make_whole(True, check="deferred", num_per_class=2), batches(0, 1)[0]
    loss = gca(z, labels)
    (65536 * loss if "gradient" in misuse else loss).backward()
    if "weights" in misuse:
        torch.optim.SGD(gca.parameters(), lr=0.1).step()
    gca.generator_step()
    with pytest.raises(UserError, match=misuse):
        gca.end_epoch()
