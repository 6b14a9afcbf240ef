"""Training batches: what a run wants of them, those of an image set in memory, and the choice of the right ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gcahng.data.augment import random_shifts
from gcahng.data.file_batches import WHOLE, FileBatches
from gcahng.data.image_set import ImageFiles, ImageSet, LabeledImages
from gcahng.data.reading import usual_workers
from gcahng.data.sampler import BalancedBatchSampler

if TYPE_CHECKING:
    from gcahng.data.config import DataConfig


class Batches(Protocol):
    """Balanced, augmented batches on a device, or one process's part of them; step s always gets the same ones, also
    after `load_state_dict`."""

    @property
    def batches_per_epoch(self) -> int:
        """⌊images / batch size⌋, at least 1."""

    @property
    def skipped(self) -> int:
        """How many files that cannot be read have been replaced so far, a file counted each time it is drawn here."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (n, …) uint8 and labels (n,) of a step, of the part; call it once a step, in the order of steps."""

    def names(self) -> list[str]:
        """What a person calls the images of the last batch, those outside the part included."""

    def state_dict(self) -> dict[str, Tensor]:
        """Where the batches stand after the last one that was handed out."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where the batches that gave `state` stood."""

    def close(self) -> None:
        """End the processes that read files."""


def build_batches(
    config: DataConfig, train: LabeledImages, *, seed: int, device: torch.device, part: slice = WHOLE
) -> Batches:
    """The batches of `train` that `config` asks for, or of each of them the rows `part`, with the bits that they have
    in the whole batch.

    Raises:
        UserError: more classes a batch than there are; a missing extra.
    """
    sampler = BalancedBatchSampler(train.labels, config.classes_per_batch, config.samples_per_class, seed)
    if not isinstance(train, ImageFiles):
        return InMemoryBatches(train, sampler, max_shift=config.max_shift, seed=seed, device=device, part=part)
    return FileBatches(
        train,
        sampler,
        image_size=config.image_size,
        crop_scale_min=config.crop_scale_min,
        seed=seed,
        device=device,
        workers=usual_workers(config.workers),
        skip_unreadable=config.skip_unreadable,
        part=part,
    )


class InMemoryBatches:
    """Batches of images in memory, shifted by whole pixels; see `Batches`.

    Args:
        images: the training set; copied to `device` once.
        sampler: draws the batches.
        max_shift: see `random_shifts`.
        seed: of the shifts.
        device: where batches are made.
        part: rows of each batch that are made.
    """

    skipped = 0

    def __init__(
        self,
        images: ImageSet,
        sampler: BalancedBatchSampler,
        *,
        max_shift: int,
        seed: int,
        device: torch.device,
        part: slice = WHOLE,
    ) -> None:
        self._set = images
        self._images, self._labels = images.images.to(device), images.labels.to(device)
        self._sampler, self._max_shift, self._seed, self._part = sampler, max_shift, seed, part
        self._last = torch.empty(0, dtype=torch.int64)

    @property
    def batches_per_epoch(self) -> int:
        return self._sampler.batches_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self._last = self._sampler.draw()
        index = self._last.to(self._labels.device)
        shifted = random_shifts(self._images[index], self._max_shift, seed=self._seed, step=step)
        return shifted[self._part], self._labels[index[self._part]]

    def names(self) -> list[str]:
        return [self._set.name(index) for index in self._last.tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """Nothing to end."""
