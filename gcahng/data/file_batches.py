"""Training batches of image files, read and augmented by worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gcahng.data.augment import drawing
from gcahng.data.image_set import ImageFiles
from gcahng.data.reading import UnreadableImage, read_in_order, read_rgb
from gcahng.data.sampler import BalancedBatchSampler
from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


WHOLE = slice(None)


class FileBatches:
    """Batches of image files: a random part of each, scaled to a square, and half of them mirrored; see `Batches`.

    Crops and flips follow from (`seed`, step, place in the batch) alone, so that the bits depend neither on the number
    of workers nor on where a run was resumed.

    Args:
        files: the training set.
        sampler: draws the batches.
        image_size: side of the square, in pixels.
        crop_scale_min: least part of an image's area that a crop keeps; the most is all of it.
        seed: of the crops and flips.
        device: where the batches go.
        workers: processes that read ahead; 0: this one reads.
        skip_unreadable: put the next readable image of the class in the place of one that cannot be read.
        part: rows of each batch that are read.
    """

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
        if not 0 < crop_scale_min <= 1:
            raise UserError(f"crop_scale_min is {crop_scale_min}; it must be above 0 and at most 1")
        self._files, self._sampler, self._device, self._workers = files, sampler, device, workers
        self._part = part
        self._reader = _BatchReader(files, image_size, crop_scale_min, seed, skip_unreadable, part)
        self._ahead: Iterator[_Read] | None = None
        self._next_step = -1
        self._last = torch.empty(0, dtype=torch.int64)
        self.skipped = 0

    @property
    def batches_per_epoch(self) -> int:
        return self._sampler.batches_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (n, 3, image_size, image_size) uint8 and labels (n,) of a step, of the part.

        Raises:
            UnreadableImage: a file cannot be read (with skip_unreadable: nor any other of its class).
            UserError: a worker was killed.
        """
        if self._ahead is None or step != self._next_step:
            self.close()
            # The workers are ahead of the run; this sampler stays with it, and so does the state that is saved.
            jobs = _jobs(copy.deepcopy(self._sampler), step)
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
        """End the workers; `batch` starts them again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()  # type: ignore[attr-defined]  # a generator


class _Job(NamedTuple):
    step: int
    indices: Tensor


class _Read(NamedTuple):
    """A part of a batch: the images, which they are, and how many of them stand for a file that cannot be read."""

    images: Tensor
    indices: Tensor
    skipped: int


def _jobs(sampler: BalancedBatchSampler, step: int) -> Iterator[_Job]:
    for indices in sampler:
        yield _Job(step, indices)
        step += 1


class _BatchReader:
    """Reads and augments the part of a job's batch."""

    def __init__(
        self, files: ImageFiles, image_size: int, crop_scale_min: float, seed: int, skip_unreadable: bool, part: slice
    ) -> None:
        require("torchvision", extra="train", purpose="image files are augmented")
        from torchvision.transforms import v2

        self._files, self._seed, self._skip_unreadable, self._part = files, seed, skip_unreadable, part
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(crop_scale_min, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
            ]
        )

    def __getitem__(self, job: _Job) -> _Read | UserError:
        batch = job.indices.tolist()
        places, wanted = range(len(batch))[self._part], batch[self._part]
        images, indices = [], []
        try:
            for place, index in zip(places, wanted, strict=True):
                image, read = self._read(index, avoid=batch + indices)
                with drawing(self._seed, job.step, place):
                    images.append(self._transform(image))
                indices.append(read)
        except UserError as error:
            return error
        skipped = sum(read != index for read, index in zip(indices, wanted, strict=True))
        return _Read(torch.stack(images), torch.tensor(indices), skipped)

    def _read(self, index: int, avoid: list[int]) -> tuple[PILImage, int]:
        """The image `index`, or the one that stands for it: of its class, the next that the batch has not."""
        try:
            return read_rgb(self._files.file(index)), index
        except UnreadableImage as error:
            if not self._skip_unreadable:
                remedy = "restore it, or pass data.skip_unreadable=true to train on another image of its class"
                raise UnreadableImage(error.path, f"{error.reason}; {remedy}") from None
        same = (self._files.labels == self._files.labels[index]).nonzero().flatten().tolist()
        after = same.index(index) + 1
        others = same[after:] + same[: after - 1]
        for other in sorted(others, key=lambda candidate: candidate in avoid):
            try:
                return read_rgb(self._files.file(other)), other
            except UnreadableImage:
                continue
        raise UserError(
            f"no image of {self._files.class_names[int(self._files.labels[index])]} can be read, "
            f"{self._files.file(index)} among them; restore them, or take the class out"
        )
