"""The balanced sampler: balance, coverage, exhaustion of small classes, and exact continuation."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

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
    iterator = iter(sampler)
    assert len(next(iterator)) == len(next(iterator)) == 12


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
