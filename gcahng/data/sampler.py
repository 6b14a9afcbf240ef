"""Balanced batches: the same number of samples of each of several classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gcahng.errors import UserError

# As in gcahng.retrieval.labels, which is above this package.
_UNLABELED = -1


class BalancedBatchSampler:
    """Draws endless batches of `classes_per_batch` classes with `samples_per_class` samples each.

    Row a · samples_per_class + k of a batch is sample k of its class a.

    Classes are taken in shuffled order, and all of them before any comes again. A batch that reaches the end of one
    order continues with the next one, without taking a class twice. The samples of a class are shuffled too. When fewer
    than `samples_per_class` unused ones remain, the class is shuffled again. A class with fewer samples than that is
    drawn from with replacement.

    `state_dict` contains the position and the generator. A sampler that loads it continues with exactly the batches
    that the saved one would have drawn.

    Args:
        labels: (N,) integer labels of the samples. Those with -1 have no label and are never drawn.
        classes_per_batch: C, at least 1 and at most the number of classes.
        samples_per_class: K, at least 1.
        seed: seed of the order of classes and samples.

    Raises:
        UserError: `labels` is not a non-empty (N,) integer tensor, or C or K is out of range.
    """

    def __init__(self, labels: Tensor, classes_per_batch: int, samples_per_class: int, seed: int = 0) -> None:
        if labels.ndim != 1 or len(labels) == 0 or labels.is_floating_point():
            dtype = str(labels.dtype).removeprefix("torch.")
            raise UserError(
                f"labels is a {dtype} tensor of shape {tuple(labels.shape)}; it must be an integer tensor of shape "
                "(N,) with N at least 1"
            )
        # Not a class of their own: samples without a label need not have anything in common.
        labeled = (labels.cpu() != _UNLABELED).nonzero().squeeze(1)
        labels = labels.cpu()[labeled]
        classes, counts = labels.unique(return_counts=True)
        if not 1 <= classes_per_batch <= len(classes):
            raise UserError(
                f"classes_per_batch is {classes_per_batch}; it must be from 1 to {len(classes)}, the number of classes"
            )
        if samples_per_class < 1:
            raise UserError(f"samples_per_class is {samples_per_class}; it must be at least 1")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self._num_samples = len(labels)
        self._counts: list[int] = counts.tolist()
        self._starts: list[int] = (counts.cumsum(0) - counts).tolist()
        self._generator = torch.Generator().manual_seed(seed)
        # Sample indices grouped by class, each group in the order in which its samples are used.
        self._samples = labeled[labels.argsort(stable=True)]
        self._used = torch.zeros(len(classes), dtype=torch.int64)
        for label in range(len(classes)):
            self._shuffle_samples(label)
        self._order = self._shuffled_classes()
        self._position = 0

    @property
    def batch_size(self) -> int:
        return self.classes_per_batch * self.samples_per_class

    @property
    def batches_per_epoch(self) -> int:
        """⌊samples / batch size⌋, at least 1."""
        return max(1, self._num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self.draw()

    def draw(self) -> Tensor:
        """The sample indices of the next batch, (classes_per_batch · samples_per_class,) int64."""
        return torch.cat([self._draw_samples(label) for label in self._draw_classes()])

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "generator": self._generator.get_state(),
            "samples": self._samples.clone(),
            "used": self._used.clone(),
            "order": self._order.clone(),
            "position": torch.tensor(self._position),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue at the position that `state` was taken from.

        Raises:
            UserError: `state` belongs to a sampler of other labels.
        """
        for name, own in (("samples", self._samples), ("used", self._used), ("order", self._order)):
            if state[name].shape != own.shape:
                raise UserError(
                    f"state[{name!r}] has shape {tuple(state[name].shape)}, as for other labels; "
                    f"it must have shape {tuple(own.shape)}"
                )
        self._generator.set_state(state["generator"].cpu())
        self._samples = state["samples"].cpu().clone()
        self._used = state["used"].cpu().clone()
        self._order = state["order"].cpu().clone()
        self._position = int(state["position"])

    def _draw_classes(self) -> list[int]:
        wanted = self.classes_per_batch
        chosen = self._order[self._position : self._position + wanted]
        self._position += len(chosen)
        if len(chosen) < wanted:
            fresh = self._shuffled_classes()
            free = ~torch.isin(fresh, chosen)
            free &= free.cumsum(0) <= wanted - len(chosen)
            chosen = torch.cat([chosen, fresh[free]])
            # The classes that this batch took from the new order move to its front, so that each comes once per order.
            self._order = torch.cat([fresh[free], fresh[~free]])
            self._position = int(free.sum())
        return chosen.tolist()

    def _draw_samples(self, label: int) -> Tensor:
        start, count, wanted = self._starts[label], self._counts[label], self.samples_per_class
        if count < wanted:
            return self._samples[start + torch.randint(count, (wanted,), generator=self._generator)]
        if int(self._used[label]) + wanted > count:
            self._shuffle_samples(label)
        first = start + int(self._used[label])
        self._used[label] += wanted
        return self._samples[first : first + wanted].clone()

    def _shuffle_samples(self, label: int) -> None:
        group = slice(self._starts[label], self._starts[label] + self._counts[label])
        self._samples[group] = self._samples[group][torch.randperm(self._counts[label], generator=self._generator)]
        self._used[label] = 0

    def _shuffled_classes(self) -> Tensor:
        return torch.randperm(len(self._counts), generator=self._generator)
