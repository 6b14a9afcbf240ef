"""The balanced sampler: balance, coverage, exhaustion of small classes, and exact continuation."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gcahng.data import BalancedBatchSampler
from gcahng.errors import UserError


def shuffled_labels(counts: list[int], seed: int = 0) -> Tensor:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


def test_batches_are_class_major_and_balanced() -> None:
    labels = shuffled_labels([5, 6, 7, 8, 9])
    sampler = BalancedBatchSampler(labels, 3, 4)
    for _ in range(50):
        index = sampler.draw()
        assert index.dtype == torch.int64 and len(index.unique()) == 12
        classes = labels[index].view(3, 4)
        assert (classes == classes[:, :1]).all()
        assert len(classes[:, 0].unique()) == 3


def test_labels_need_not_be_consecutive() -> None:
    labels = torch.tensor([7, -3, 7, 100, -3, 100])
    index = BalancedBatchSampler(labels, 3, 2).draw()
    assert sorted(labels[index].tolist()) == sorted(labels.tolist())


@pytest.mark.parametrize("classes_per_batch", [2, 3, 5, 7])
def test_every_class_comes_once_before_any_comes_again(classes_per_batch: int) -> None:
    labels = shuffled_labels([4] * 7)
    sampler = BalancedBatchSampler(labels, classes_per_batch, 2)
    drawn = torch.cat([labels[sampler.draw()[::2]] for _ in range(7 * 6)]).tolist()
    for cycle in range(len(drawn) // 7):
        assert sorted(drawn[7 * cycle : 7 * cycle + 7]) == list(range(7))
    assert drawn[:7] != drawn[7:14]


def test_samples_are_used_up_before_they_come_again() -> None:
    # Seven samples, three at a time: two draws without repetition, then one is left over and the class starts again.
    sampler = BalancedBatchSampler(torch.zeros(7, dtype=torch.int64), 1, 3)
    rounds = [torch.cat([sampler.draw(), sampler.draw()]) for _ in range(30)]
    assert all(len(samples.unique()) == 6 for samples in rounds)
    assert len(torch.cat(rounds).unique()) == 7
    assert len({tuple(samples.tolist()) for samples in rounds}) > 20


def test_small_classes_are_drawn_with_replacement() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    sampler = BalancedBatchSampler(labels, 2, 4)
    small = []
    for _ in range(40):
        index = sampler.draw()
        assert torch.equal(labels[index].sort().values, torch.tensor([0] * 4 + [1] * 4))
        assert len(index[labels[index] == 1].unique()) == 4
        small.append(tuple(index[labels[index] == 0].tolist()))
    assert set(sum(small, ())) == {0, 1}
    assert (0, 0, 0, 0) in small or (1, 1, 1, 1) in small  # with replacement, not by shuffling


def test_the_seed_decides() -> None:
    labels = shuffled_labels([6] * 10)
    batches = [[BalancedBatchSampler(labels, 4, 3, seed).draw().tolist() for _ in range(1)] for seed in (0, 0, 1)]
    assert batches[0] == batches[1] != batches[2]


@pytest.mark.parametrize("steps", [0, 1, 5, 23])
def test_a_loaded_state_continues_exactly(steps: int) -> None:
    labels = shuffled_labels([2, 3, 5, 6, 7, 8, 9])
    sampler = BalancedBatchSampler(labels, 3, 3, seed=5)
    for _ in range(steps):
        sampler.draw()
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    expected = [sampler.draw().tolist() for _ in range(20)]
    file.seek(0)
    other = BalancedBatchSampler(labels, 3, 3, seed=99)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [other.draw().tolist() for _ in range(20)] == expected


def test_a_state_is_a_copy() -> None:
    sampler = BalancedBatchSampler(shuffled_labels([4] * 4), 2, 2)
    state = sampler.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    for _ in range(5):
        sampler.draw()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_loaded_state_is_left_as_it_was() -> None:
    sampler = BalancedBatchSampler(shuffled_labels([4] * 4), 2, 2)
    state = sampler.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    sampler.load_state_dict(state)
    for _ in range(5):
        sampler.draw()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_sizes() -> None:
    sampler = BalancedBatchSampler(shuffled_labels([10] * 5), 4, 3)
    assert sampler.batch_size == 12 and sampler.batches_per_epoch == 4
    assert len(sampler) == 4 and [len(batch) for batch in sampler] == [12] * 4


def test_the_stream_of_a_seed_is_fixed() -> None:
    """Runs of earlier versions continue with the batches that they would have had."""
    sampler = BalancedBatchSampler(shuffled_labels([2, 3, 5, 6, 7]), 3, 3, seed=5)
    drawn = [sampler.draw().tolist() for _ in range(40)]
    assert drawn[0] == [1, 12, 9, 21, 14, 21, 3, 19, 8]
    assert drawn[1] == [17, 6, 20, 18, 15, 11, 12, 1, 16]
    assert drawn[39] == [2, 6, 20, 21, 14, 21, 16, 1, 10]


def test_a_data_loader_has_epochs() -> None:
    """Batches are lists of numbers, which any data set understands: this one is a dict."""
    labels = shuffled_labels([8] * 6)
    samples = {i: int(label) for i, label in enumerate(labels)}
    loader = DataLoader(samples, batch_sampler=BalancedBatchSampler(labels, 2, 2))  # type: ignore[arg-type]
    epochs = [[batch.tolist() for batch in loader] for _ in range(2)]
    assert len(loader) == len(epochs[0]) == len(epochs[1]) == 12 and epochs[0] != epochs[1]
    assert all(batch[0] == batch[1] != batch[2] == batch[3] for epoch in epochs for batch in epoch)


def test_epochs_are_the_stream_cut_in_pieces() -> None:
    labels = shuffled_labels([5, 6, 7, 8])
    sampler, other = BalancedBatchSampler(labels, 2, 2), BalancedBatchSampler(labels, 2, 2)
    assert [batch for _ in range(3) for batch in sampler] == [other.draw().tolist() for _ in range(3 * len(other))]


def test_set_epoch_forgets_what_was_drawn() -> None:
    labels = shuffled_labels([5, 6, 7, 8])
    sampler, other = BalancedBatchSampler(labels, 2, 2, seed=1), BalancedBatchSampler(labels, 2, 2, seed=1)
    epochs = [list(other)]
    for epoch in (1, 2):
        other.set_epoch(epoch)
        epochs.append(list(other))
    for epoch in (2, 0, 1, 1):
        next(iter(sampler))  # an epoch that is broken off
        sampler.set_epoch(epoch)
        assert list(sampler) == epochs[epoch]
    assert epochs[0] != epochs[1] != epochs[2]
    later = BalancedBatchSampler(labels, 2, 2, seed=2)
    later.set_epoch(0)
    assert list(later) not in epochs
    with pytest.raises(UserError, match="epoch is -1; it must be at least 0"):
        sampler.set_epoch(-1)


@pytest.mark.parametrize("drawn", [1, 4, 6])
def test_a_loop_continues_in_the_middle_of_an_epoch(drawn: int) -> None:
    """As `for epoch in …: sampler.set_epoch(epoch); for batch in sampler: …`, stopped after `drawn` of 6 batches."""
    labels = shuffled_labels([5, 6, 7, 8])
    sampler, other = BalancedBatchSampler(labels, 2, 2), BalancedBatchSampler(labels, 2, 2, seed=9)
    sampler.set_epoch(3)
    epoch = list(sampler)
    sampler.set_epoch(3)
    batches = iter(sampler)
    for _ in range(drawn):
        next(batches)
    other.load_state_dict(sampler.state_dict())
    if drawn < 6:
        other.set_epoch(3)
        assert list(other) == epoch[drawn:]
    assert len(list(other)) == len(other) == 6
    other.set_epoch(3)
    assert list(other) != epoch, "the seed is the sampler's own"


def test_a_state_of_an_older_version() -> None:
    labels = shuffled_labels([4] * 4)
    sampler, other = BalancedBatchSampler(labels, 2, 2), BalancedBatchSampler(labels, 2, 2, seed=9)
    sampler.draw()
    state = sampler.state_dict()
    del state["epoch"], state["drawn"]
    other.load_state_dict(state)
    assert [other.draw().tolist() for _ in range(9)] == [sampler.draw().tolist() for _ in range(9)]


@pytest.mark.parametrize("replicas", [2, 3, 4])
def test_processes_share_a_batch(replicas: int) -> None:
    labels = shuffled_labels([7] * 9)
    alone = BalancedBatchSampler(labels, 4, 3, seed=2)
    shares = [
        list(BalancedBatchSampler(labels, 4, 3, seed=2, num_replicas=replicas, rank=rank)) for rank in range(replicas)
    ]
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == list(alone)


def test_processes_that_do_not_share_are_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    labels = shuffled_labels([7] * 9)
    with pytest.warns(UserWarning, match="has 2 processes, .* give num_replicas and rank to BalancedBatchSampler"):
        next(iter(BalancedBatchSampler(labels, 4, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(iter(BalancedBatchSampler(labels, 4, 3, num_replicas=1)))
        BalancedBatchSampler(labels, 4, 3).draw()


@pytest.mark.parametrize(
    ("replicas", "rank", "message"),
    [
        (5, 0, "num_replicas is 5; .* which is 12, must be a multiple"),
        (0, 0, "num_replicas is 0"),
        (2, 2, "rank is 2 and num_replicas is 2; rank must be from 0 to 1"),
        (2, -1, "rank is -1"),
        (None, 1, "rank is 1 and num_replicas is 1"),
    ],
)
def test_processes_that_do_not_fit(replicas: int | None, rank: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BalancedBatchSampler(shuffled_labels([7] * 9), 4, 3, num_replicas=replicas, rank=rank)


def test_labels_in_a_list() -> None:
    labels = shuffled_labels([5, 6, 7])
    assert list(BalancedBatchSampler(labels.tolist(), 2, 2)) == list(BalancedBatchSampler(labels, 2, 2))
    assert list(BalancedBatchSampler(labels.numpy(), 2, 2)) == list(BalancedBatchSampler(labels, 2, 2))
    with pytest.raises(UserError, match="labels is a list that makes no tensor"):
        BalancedBatchSampler(["a", "b"], 1, 1)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("labels", "classes", "samples", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, 2, "classes_per_batch is 2"),
        (torch.arange(4), 0, 2, "classes_per_batch is 0"),
        (torch.arange(4), 2, 0, "samples_per_class is 0"),
        (torch.zeros(0, dtype=torch.int64), 1, 1, "labels"),
        (torch.zeros(4), 1, 1, "labels"),
        (torch.zeros(2, 2, dtype=torch.int64), 1, 1, "labels"),
    ],
)
def test_mistakes(labels: Tensor, classes: int, samples: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        BalancedBatchSampler(labels, classes, samples)


def test_a_state_of_other_labels_is_refused() -> None:
    state = BalancedBatchSampler(shuffled_labels([4] * 4), 2, 2).state_dict()
    with pytest.raises(UserError, match="other labels"):
        BalancedBatchSampler(shuffled_labels([4] * 5), 2, 2).load_state_dict(state)
