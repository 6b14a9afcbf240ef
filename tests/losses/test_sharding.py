"""A loss that FSDP shards is refused, whenever it does so."""

from __future__ import annotations

import gc
import weakref

import pytest
from loss_cases import make_batch, make_loss, train_step
from torch import nn
from torch.distributed import fsdp

import gcahng


def shard(module: nn.Module) -> None:
    """Gives a module's class another base, as fully_shard does; that needs processes."""
    module.__class__ = type("Sharded", (fsdp.FSDPModule, type(module)), {})


@pytest.mark.parametrize("which", ["", "classifier", "graph_network.layers.0"])
@pytest.mark.parametrize("steps", [0, 2])
def test_sharding_is_refused_after_a_step_too(which: str, steps: int) -> None:
    gca = make_loss()
    for _ in range(steps):
        train_step(gca, *make_batch())
    shard(gca.get_submodule(which))
    with pytest.raises(gcahng.UserError, match="FSDP shards the loss's parameters"):
        gca(*make_batch())


def test_views_in_the_place_of_parameters_are_refused() -> None:
    """As FullyShardedDataParallel puts them."""
    gca = make_loss()
    train_step(gca, *make_batch())
    weight = gca.classifier.weight
    del gca.classifier.weight
    gca.classifier.weight = weight.detach().clone()
    with pytest.raises(gcahng.UserError, match="FSDP shards the loss's parameters"):
        gca(*make_batch())


def test_a_loss_that_was_looked_at_is_freed() -> None:
    gca = make_loss()
    train_step(gca, *make_batch())
    gone = weakref.ref(gca)
    del gca
    gc.collect()
    assert gone() is None


def test_a_loss_that_its_base_knows_is_freed() -> None:
    class Base(nn.Module):
        def forward(self, embeddings, labels):
            return embeddings.square().mean()

    gca = make_loss(base=(base := Base()))
    base.loss_of = [gca]
    train_step(gca, *make_batch())
    gone = weakref.ref(gca)
    del gca, base
    gc.collect()
    assert gone() is None


def test_another_weight_of_the_network_is_looked_at() -> None:
    gca = make_loss()
    train_step(gca, *make_batch())
    head = gca.graph_network.class_head
    head.weight = type("DTensor", (nn.Parameter,), {})(head.weight.detach())
    with pytest.raises(gcahng.UserError, match="FSDP shards the loss's parameters"):
        gca(*make_batch())
