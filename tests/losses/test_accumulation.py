"""Gradient accumulation, which trains the graph network on no batch but the last: the loss says so, once."""

from __future__ import annotations

import pytest
import torch
from loss_cases import make_batch, model_and_loss, snapshot, train_step
from loss_cases import one_layer as make_loss

pytestmark = pytest.mark.usefixtures("no_other_warning")
ACCUMULATED = r"a second training forward follows a backward without gca\.generator_step\(\)"


def test_a_batch_that_never_trains_the_graph_network_is_told_of_once():
    gca, batches = make_loss(), [make_batch(seed) for seed in range(3)]
    gca(*batches[0])  # without a backward: a measurement
    gca(*batches[0]).backward()
    with pytest.warns(UserWarning, match=ACCUMULATED) as caught:
        gca(*batches[1]).backward()
    assert [warning.filename for warning in caught] == [__file__]
    for _ in range(30):
        gca(*batches[2]).backward()
    gca.generator_step()
    train_step(gca, *batches[0])


def test_though_the_loss_is_moved_to_its_device_before_each_batch():
    gca, batch = make_loss(), make_batch()
    gca(*batch).backward()
    with pytest.warns(UserWarning, match=ACCUMULATED):
        gca.to("cpu")(*batch)


@pytest.mark.parametrize("clear", ["optimizer", "module"])
def test_though_the_gradients_were_cleared(clear):
    model, gca = model_and_loss()
    optimizer = torch.optim.AdamW([*model.parameters(), *gca.parameters()])
    x, labels = make_batch()
    gca(model(x), labels).backward()
    (optimizer if clear == "optimizer" else gca).zero_grad()
    with pytest.warns(UserWarning, match=ACCUMULATED):
        gca(model(x), labels)


def test_accumulation_is_not_told_of_where_nothing_is_lost():
    gca, (z, labels) = make_loss(), make_batch()
    z.requires_grad_()
    for _ in range(2):
        first, second = gca(z, labels), gca(z, labels)  # two forwards before their backward
        (first + second).backward()
        gca.generator_step()
    gca(z, labels).backward()
    gca.eval()(z, labels)
    with torch.no_grad():
        gca.train()(z, labels)
    gca.load_state_dict(snapshot(gca))  # as a loop does that takes a bad batch back
    train_step(gca, z, labels)
    gca.graph_network.requires_grad_(False)
    for _ in range(3):
        gca(z, labels).backward()
