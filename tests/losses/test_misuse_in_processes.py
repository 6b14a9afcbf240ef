"""Training loops in several processes that would train wrongly without a word, and those that must be left alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from loss_cases import make_batch, make_loss, same, train_step
from pytorch_metric_learning.losses import ContrastiveLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper, DistributedMinerWrapper
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import gcahng
from gcahng.engine.ranks import Ranks


@pytest.fixture(autouse=True)
def no_other_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def two_processes() -> Iterator[None]:
    """torch.distributed as in the first of two processes, whose collectives do nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


def test_processes_that_share_nothing_are_told_of_once(two_processes):
    gca, batch = make_loss(), make_batch()
    gca.eval()(*batch)
    gca.train()
    with pytest.warns(UserWarning, match=r"process_group is None among 2 processes .* pass process_group='world'"):
        train_step(gca, *batch)
    train_step(gca, *batch)


def test_alone_says_that_they_shall_share_nothing(two_processes):
    batch = make_batch()
    alone, usual = make_loss(process_group="alone"), make_loss()
    result = train_step(alone, *batch)
    distributed.destroy_process_group()
    assert same(result, train_step(usual, *batch))
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


def test_no_word_of_processes_where_there_is_one(tmp_path):
    assert train_step(make_loss(process_group="alone"), *make_batch())
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        train_step(make_loss(), *make_batch())
    finally:
        distributed.destroy_process_group()


def wrapped() -> nn.Module:
    return DistributedLossWrapper(ContrastiveLoss())


class Gathers(nn.Module):
    """A base loss of the user's own, which gathers by itself."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        parts = [torch.zeros_like(embeddings) for _ in range(2)]
        distributed.all_gather(parts, embeddings.detach())
        return torch.cat(parts).square().mean() + embeddings.square().mean()


class Averages(nn.Module):
    """One that takes the mean over processes, which is no second gathering."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        distributed.all_reduce(torch.ones(3))
        return embeddings.square().mean()


@pytest.fixture
def gathered(two_processes, monkeypatch) -> None:
    """Batches enter as if they were gathered."""
    monkeypatch.setattr(Ranks, "whole_batch", lambda ranks, embeddings, labels: (embeddings, labels))


def test_a_base_that_gathers_by_itself_is_refused(gathered):
    for base in (wrapped(), nn.Sequential(wrapped())):
        with pytest.raises(gcahng.UserError, match=r"base gathers .* \(it holds a DistributedLossWrapper\)"):
            make_loss(base=base, process_group="world")
    hidden = wrapped()
    with pytest.raises(gcahng.UserError, match=r"base gathers .* \(it holds a DistributedLossWrapper\)"):
        make_loss(base=lambda embeddings, labels: hidden(embeddings, labels), process_group="world")
    with pytest.raises(gcahng.UserError, match=r"miner gathers .* \(it holds a DistributedMinerWrapper\)"):
        make_loss(base=ContrastiveLoss(), miner=DistributedMinerWrapper(MultiSimilarityMiner()), process_group="world")
    gca = make_loss(base=Gathers(), process_group="world")
    for _ in range(2):
        with pytest.raises(gcahng.UserError, match=r"base gathers .* \(it calls c10d\.allgather"):
            gca(*make_batch())


def test_a_base_that_does_not_gather_is_called_as_ever(gathered):
    gca = make_loss(base=Averages(), process_group="world")
    for _ in range(2):
        gca(*make_batch())
    make_loss(base=wrapped(), process_group="alone")
    make_loss(base=wrapped())
