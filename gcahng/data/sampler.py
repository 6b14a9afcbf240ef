"""Balanced batches: the same number of samples of each of several classes."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from gcahng.errors import UserError

# The label of a sample whose class is not known.
UNLABELED = -1


class BalancedBatchSampler(Sampler[list[int]]):
    """Draws batches of `classes_per_batch` classes with `samples_per_class` samples each.

    It is the `batch_sampler` of a `torch.utils.data.DataLoader`. An iteration is an epoch of `len(sampler)` batches,
    and the next one continues with other batches. Row a · samples_per_class + k of a batch is sample k of its class a.

    Classes are taken in shuffled order, and all of them before any comes again. A batch that reaches the end of one
    order continues with the next one, without taking a class twice. The samples of a class are shuffled too. When fewer
    than `samples_per_class` unused ones remain, the class is shuffled again. A class with fewer samples than that is
    drawn from with replacement.

    `state_dict` contains the position and the generator. A sampler that loads it continues with exactly the batches
    that the saved one would have drawn, the rest of its epoch first. A DataLoader with workers draws batches before
    they are asked for, and the state is ahead by as many.

    In several processes, each gives `num_replicas` and its `rank`. All of them draw the same batch, and an iteration
    yields the part that belongs to the rank: the parts by rank are the batch.

    Args:
        labels: (N,) integer labels of the samples, as a tensor or a sequence. Those with -1 have no label and are never
            drawn.
        classes_per_batch: C, at least 1 and at most the number of classes.
        samples_per_class: K, at least 1.
        seed: seed of the order of classes and samples.
        num_replicas: the number of processes that share a batch, C·K must be a multiple of it; None: 1.
        rank: which of them this process is, from 0; None: 0.

    Raises:
        UserError: `labels` is not a non-empty (N,) integer tensor, or another argument is out of range.
    """

    drop_last = True  # as of torch's BatchSampler, for those who ask: all batches are whole

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        classes_per_batch: int,
        samples_per_class: int,
        seed: int = 0,
        *,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        labels = _checked(labels)
        # Not a class of their own: samples without a label need not have anything in common.
        labeled = (labels != UNLABELED).nonzero().squeeze(1)
        labels = labels[labeled]
        classes, counts = labels.unique(return_counts=True)
        if not 1 <= classes_per_batch <= len(classes):
            raise UserError(
                f"classes_per_batch is {classes_per_batch}; it must be from 1 to {len(classes)}, the number of classes"
            )
        if samples_per_class < 1:
            raise UserError(f"samples_per_class is {samples_per_class}; it must be at least 1")
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self._part = self._part_of(num_replicas, rank)
        self._says_which_part = num_replicas is not None
        self._num_samples = len(labels)
        self._seed = seed
        self._counts: list[int] = counts.tolist()
        self._starts: list[int] = (counts.cumsum(0) - counts).tolist()
        self._generator = torch.Generator()
        # Sample indices grouped by class, each group in the order in which its samples are used.
        self._samples = labeled[labels.argsort(stable=True)]
        self._used = torch.zeros(len(classes), dtype=torch.int64)
        self._start_epoch(0)

    @property
    def batch_size(self) -> int:
        """C·K, the size of a whole batch."""
        return self.classes_per_batch * self.samples_per_class

    @property
    def batches_per_epoch(self) -> int:
        """⌊samples / batch size⌋, at least 1."""
        return max(1, self._num_samples // self.batch_size)

    def __len__(self) -> int:
        """The batches of an epoch. The first epoch after `load_state_dict` may have fewer left."""
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yields the sample indices of this process's part of each batch, to the end of the epoch."""
        if not self._says_which_part and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"torch.distributed has {dist.get_world_size()} processes, and all of them draw the same batches; give "
                "num_replicas and rank to BalancedBatchSampler, so that each gets its part",
                stacklevel=2,
            )
        if not self._continues:
            self._drawn = 0
        self._continues = False
        while True:
            part = self.draw()[self._part].tolist()
            last = self._drawn == 0
            yield part
            if last:
                return

    def set_epoch(self, epoch: int) -> None:
        """Make the batches of the next epoch depend on the seed and its number alone, as of torch's DistributedSampler.

        Epoch 0 is what a new sampler draws. After `load_state_dict` in the middle of this epoch nothing changes, so
        that the rest of it is drawn.

        Args:
            epoch: the number of the epoch, at least 0.

        Raises:
            UserError: it is negative.
        """
        if epoch < 0:
            raise UserError(f"epoch is {epoch}; it must be at least 0")
        if not (self._continues and epoch == self._epoch):
            self._start_epoch(epoch)

    def draw(self) -> Tensor:
        """The sample indices of the next batch, (classes_per_batch · samples_per_class,) int64, all parts of it."""
        self._drawn = (self._drawn + 1) % len(self)
        return torch.cat([self._draw_samples(label) for label in self._draw_classes()])

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "generator": self._generator.get_state(),
            "samples": self._samples.clone(),
            "used": self._used.clone(),
            "order": self._order.clone(),
            "position": torch.tensor(self._position),
            "epoch": torch.tensor(self._epoch),
            "drawn": torch.tensor(self._drawn),
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
        # States of older versions do not say how far the epoch is.
        self._epoch, self._drawn = int(state.get("epoch", 0)), int(state.get("drawn", 0))
        self._continues = self._drawn > 0

    def _part_of(self, num_replicas: int | None, rank: int | None) -> slice:
        """The rows of a batch that belong to a process."""
        replicas, own = 1 if num_replicas is None else num_replicas, 0 if rank is None else rank
        if replicas < 1 or self.batch_size % replicas:
            raise UserError(
                f"num_replicas is {replicas}; classes_per_batch x samples_per_class, which is {self.batch_size}, must "
                "be a multiple of it"
            )
        if not 0 <= own < replicas:
            raise UserError(f"rank is {own} and num_replicas is {replicas}; rank must be from 0 to {replicas - 1}")
        rows = self.batch_size // replicas
        return slice(own * rows, (own + 1) * rows)

    def _start_epoch(self, epoch: int) -> None:
        """Shuffle everything as if nothing had been drawn before."""
        self._epoch, self._drawn, self._continues = epoch, 0, False
        self._generator.manual_seed(_seed_of(self._seed, epoch))
        for label in range(len(self._counts)):
            group = self._group(label)
            self._samples[group] = self._samples[group].sort().values
            self._shuffle_samples(label)
        self._order = self._shuffled_classes()
        self._position = 0

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
        group = self._group(label)
        self._samples[group] = self._samples[group][torch.randperm(self._counts[label], generator=self._generator)]
        self._used[label] = 0

    def _shuffled_classes(self) -> Tensor:
        return torch.randperm(len(self._counts), generator=self._generator)

    def _group(self, label: int) -> slice:
        return slice(self._starts[label], self._starts[label] + self._counts[label])


def _checked(labels: Tensor | Sequence[int]) -> Tensor:
    """The labels as a tensor on the CPU.

    Raises:
        UserError: they are not a non-empty (N,) integer tensor.
    """
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"labels is a {type(labels).__name__} that makes no tensor ({error}); it must be an integer tensor of "
            "shape (N,) with N at least 1"
        ) from None
    if found.ndim != 1 or len(found) == 0 or found.is_floating_point() or found.is_complex():
        dtype = str(found.dtype).removeprefix("torch.")
        raise UserError(
            f"labels is a {dtype} tensor of shape {tuple(found.shape)}; it must be an integer tensor of shape "
            "(N,) with N at least 1"
        )
    return found


def _seed_of(seed: int, epoch: int) -> int:
    """The generator's seed in an epoch. Those of two seeds have no epoch in common, as sums of both would have."""
    if epoch == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest(), "little")
