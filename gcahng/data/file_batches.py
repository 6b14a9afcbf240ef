"""Training batches of image files, read and augmented by worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gcahng.bounds import check_number
from gcahng.data.augment import drawing
from gcahng.data.image_set import ImageFiles
from gcahng.data.reading import UnreadableImage, read_image
from gcahng.data.sampler import BalancedBatchSampler
from gcahng.data.strings import Strings
from gcahng.data.workers import read_in_order
from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


WHOLE = slice(None)


class FileBatches:
    """Batches of image files, randomly cropped, scaled to a square, and mirrored half of the time.

    Implements `Batches`. Crops and flips depend on `seed`, the step and the place in the batch alone. The bits are
    therefore the same for any number of workers, and after a resume.

    Args:
        files: the training images.
        sampler: draws the batches.
        image_size: side of the square, in pixels.
        crop_scale_min: smallest share of an image's area that a crop may keep, in (0, 1]; the largest is 1.
        seed: seed of the crops and flips.
        device: where the batches go.
        workers: number of processes that read ahead; 0 reads in this process.
        skip_unreadable: replace an image that cannot be read by the next readable one of its class.
        part: the rows of each batch to read.

    Raises:
        UserError: `crop_scale_min` is out of range, or an optional package is missing.
    """

    # Nine arguments: each but the first two is an option of its own, which callers pass by name.
    def __init__(
        self,
        files: ImageFiles,
        sampler: BalancedBatchSampler,
        *,
        image_size: int,
        crop_scale_min: float,
        seed: int,
        device: torch.device,
        workers: int = 0,
        skip_unreadable: bool = False,
        part: slice = WHOLE,
    ) -> None:
        check_number("crop_scale_min", crop_scale_min)
        self._files, self._sampler, self._device, self._workers = files, sampler, device, workers
        self._part = part
        self._reader = _BatchReader(files, image_size, crop_scale_min, seed, skip_unreadable, part)
        self._ahead: Iterator[_ReadPart] | None = None
        self._next_step = -1
        self._last = torch.empty(0, dtype=torch.int64)
        self.skipped = 0

    @property
    def batches_per_epoch(self) -> int:
        return self._sampler.batches_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The images (n, 3, image_size, image_size) uint8 and labels (n,) of this process's part of a step.

        Raises:
            UnreadableImage: a file cannot be read, and `skip_unreadable` is False.
            UserError: no file of a class can be read, or a worker was killed.
        """
        if self._ahead is None or step != self._next_step:
            self.close()
            # The workers read ahead with a copy. Our own sampler, whose state is saved, stays at the step of the run.
            jobs = _number_steps(copy.deepcopy(self._sampler), step)
            self._ahead = read_in_order(self._reader, jobs, self._workers, pin_memory=self._device.type == "cuda")
        try:
            read = next(self._ahead)
        except BaseException:
            self.close()
            raise
        self._last = self._sampler.draw()
        self._next_step = step + 1
        self._last[self._part] = read.indices
        self.skipped += read.skipped
        labels = self._files.labels[read.indices].to(self._device)
        return read.images.to(self._device, non_blocking=True), labels

    def names(self) -> list[str]:
        return [self._files.name(index) for index in self._last.tolist()]

    def state_dict(self) -> dict[str, Tensor]:
        return {**self._sampler.state_dict(), "skipped": torch.tensor(self.skipped)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.close()
        self._sampler.load_state_dict(state)
        self.skipped = int(state["skipped"])

    def close(self) -> None:
        """Stop the workers. The next call of `batch` starts them again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()  # type: ignore[attr-defined]  # a generator


class _Job(NamedTuple):
    step: int
    indices: Tensor


class _ReadPart(NamedTuple):
    """The part of a batch that was read.

    Attributes:
        images: (n, 3, image_size, image_size) uint8.
        indices: (n,) int64 places of the images in the training set.
        skipped: how many of them replace a file that cannot be read.
    """

    images: Tensor
    indices: Tensor
    skipped: int


def _number_steps(sampler: BalancedBatchSampler, step: int) -> Iterator[_Job]:
    while True:
        yield _Job(step, sampler.draw())
        step += 1


class _BatchReader:
    """Reads and augments one process's part of a batch."""

    def __init__(
        self, files: ImageFiles, image_size: int, crop_scale_min: float, seed: int, skip_unreadable: bool, part: slice
    ) -> None:
        require("torchvision", extra="train", purpose="augmenting image files")
        from torchvision.transforms import v2

        self._files = replace(files, class_names=Strings(files.class_names))  # type: ignore[arg-type]
        self._seed, self._skip_unreadable, self._part = seed, skip_unreadable, part
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(crop_scale_min, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __getitem__(self, job: _Job) -> _ReadPart | UserError:
        batch = job.indices.tolist()
        places, drawn = range(len(batch))[self._part], batch[self._part]
        images, indices = [], []
        try:
            for place, index in zip(places, drawn, strict=True):
                image, read = self._read(index, avoid=batch + indices)
                with drawing(self._seed, job.step, place):
                    images.append(self._transform(image))
                indices.append(read)
        except UserError as error:
            return error
        skipped = sum(read != index for read, index in zip(indices, drawn, strict=True))
        return _ReadPart(torch.stack(images), torch.tensor(indices), skipped)

    def _read(self, index: int, avoid: list[int]) -> tuple[PILImage, int]:
        """The image `index`, or the next readable one of its class, which should not be in the batch already."""
        try:
            return read_image(self._files, index), index
        except UnreadableImage as error:
            if not self._skip_unreadable:
                remedy = "restore it, or set data.skip_unreadable=true to train on another image of its class"
                raise UnreadableImage(error.path, f"{error.reason}; {remedy}") from None
        same_class = (self._files.labels == self._files.labels[index]).nonzero().flatten().tolist()
        after = same_class.index(index) + 1
        others = same_class[after:] + same_class[: after - 1]
        for other in sorted(others, key=lambda candidate: candidate in avoid):
            try:
                return read_image(self._files, other), other
            except UnreadableImage:
                continue
        raise UserError(
            f"no image of {self._files.class_names[int(self._files.labels[index])]} can be read, "
            f"{self._files.file(index)} included; restore the images, or remove the class"
        )
