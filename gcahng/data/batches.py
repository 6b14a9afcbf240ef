"""Training batches: the interface that a run uses, batches of images in memory, and the choice between the kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gcahng.data.augment import random_shifts
from gcahng.data.file_batches import WHOLE, FileBatches
from gcahng.data.image_set import ImageFiles, ImageSet, LabeledImages
from gcahng.data.sampler import BalancedBatchSampler
from gcahng.data.workers import usual_workers
from gcahng.engine.fits import check_fits

if TYPE_CHECKING:
    from gcahng.data.config import DataConfig


class Batches(Protocol):
    """Balanced, augmented batches on a device, or the part of each that belongs to one process.

    A step always gets the same batch, also after `load_state_dict`.
    """

    @property
    def batches_per_epoch(self) -> int:
        """⌊images / batch size⌋, at least 1."""

    @property
    def skipped(self) -> int:
        """How often an unreadable file has been replaced so far. A file counts each time it is drawn."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The images (n, …) uint8 and labels (n,) of this process's part. Call it once for each step, in order."""

    def names(self) -> list[str]:
        """Readable names of all images in the last batch, including those that other processes have."""

    def state_dict(self) -> dict[str, Tensor]:
        """The position after the last batch that was handed out."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue at the position that `state` was taken from."""

    def close(self) -> None:
        """Stop the worker processes that read files."""


def build_batches(
    config: DataConfig, train: LabeledImages, *, seed: int, device: torch.device, part: slice = WHOLE
) -> Batches:
    """Build the batches that `config` asks for.

    Args:
        config: how to draw and augment.
        train: the training images.
        seed: seed of the order of images and of the augmentation.
        device: where the batches go.
        part: the rows of each batch that this process makes. They are bit for bit those of the whole batch.

    Raises:
        UserError: a batch needs more classes than there are, or an optional package is missing.
    """
    sampler = BalancedBatchSampler(train.labels, config.classes_per_batch, config.samples_per_class, seed)
    if not isinstance(train, ImageFiles):
        return InMemoryBatches(train, sampler, max_shift=config.max_shift, seed=seed, device=device, part=part)
    count, side = config.classes_per_batch * config.samples_per_class, config.image_size
    check_fits(f"a batch of {count:,} images of {side:,} x {side:,} pixels", 3 * count * side**2, "cpu")
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
    """Batches of images in memory, shifted by whole pixels; implements `Batches`.

    Args:
        images: the training images; they are copied to `device` once.
        sampler: draws the batches.
        max_shift: largest shift in pixels, see `random_shifts`.
        seed: seed of the shifts.
        device: where the batches are made.
        part: the rows of each batch to make.
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
        """There is nothing to stop."""
