"""Training batches of an image set that is held in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gcahng.data.augment import random_shifts
from gcahng.data.image_set import ImageSet
from gcahng.data.sampler import BalancedBatchSampler


class InMemoryBatches:
    """Balanced, augmented batches on a device; step s always gets the same ones, also after `load_state_dict`.

    Args:
        images: the training set; copied to `device` once.
        sampler: draws the batches.
        max_shift: see `random_shifts`.
        seed: of the shifts.
        device: where batches are made.
    """

    def __init__(
        self, images: ImageSet, sampler: BalancedBatchSampler, *, max_shift: int, seed: int, device: torch.device
    ) -> None:
        self._images, self._labels = images.images.to(device), images.labels.to(device)
        self._sampler, self._max_shift, self._seed = sampler, max_shift, seed

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (n, …) uint8 and labels (n,) of a step; call it once a step, in the order of steps."""
        index = self._sampler.draw().to(self._labels.device)
        return random_shifts(self._images[index], self._max_shift, seed=self._seed, step=step), self._labels[index]

    def state_dict(self) -> dict[str, Tensor]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._sampler.load_state_dict(state)
