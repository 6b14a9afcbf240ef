"""Image files: decoding them to RGB, reading them ahead in worker processes, and preparing them for evaluation."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gcahng.data.decoding import decode
from gcahng.data.image_set import ImageFiles, LabeledImages
from gcahng.engine.fits import check_fits
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import regular_file

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


@dataclass(frozen=True)
class Preprocessing:
    """How to prepare image files for a network.

    Attributes:
        resize: length in pixels that the shorter side is scaled to.
        crop: side in pixels of the square that is cut from the middle.
    """

    resize: int = 256
    crop: int = 224


class UnreadableImage(UserError):
    """A file that is missing, damaged or not an image.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[UserError], tuple[Path, str]]:  # worker processes send it pickled
        return UnreadableImage, (self.path, self.reason)


def read_rgb(path: Path, *, exif_rotate: bool = False) -> PILImage:
    """Read an image file as RGB, see `gcahng.data.decoding.decode`.

    Args:
        path: the file.
        exif_rotate: whether the image is rotated and mirrored as its EXIF orientation says.

    Raises:
        UnreadableImage: the file is missing, truncated or not an image.
    """
    require("PIL", extra="train", purpose="reading image files")
    from PIL import Image, UnidentifiedImageError

    try:
        # PIL maps a file that it opens itself into memory, and then scrambles TIFF files that it turns.
        with open(regular_file(path), "rb") as file, Image.open(file) as image:
            return decode(image, exif_rotate=exif_rotate)
    except UnidentifiedImageError:
        raise UnreadableImage(path, "it is in no format that Pillow knows, or its beginning is damaged") from None
    except Exception as error:  # PIL raises what its codecs raise: OSError, SyntaxError, ValueError, struct.error …
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(path, reason) from None


def read_image(files: ImageFiles, index: int) -> PILImage:
    """Image `index` of `files` as RGB, upright where `files.exif_rotate` says so.

    Raises:
        UnreadableImage: the file is missing, truncated or not an image.
    """
    return read_rgb(files.file(index), exif_rotate=files.exif_rotate)


def evaluation_batches(
    images: LabeledImages,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = 0,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Tensor]:
    """Yield the images in order, `batch_size` at a time, resized and cropped but not augmented.

    No random number is drawn, so this does not disturb a training run.

    Args:
        images: images in memory, which are yielded as they are, or files.
        preprocessing: how to resize and crop files.
        batch_size: number of images in a batch; the last one may be smaller.
        workers: number of processes that read files; 0 reads in this process, None means `usual_workers`. The result is
            the same for any number.
        progress: called with the number of images in each batch once the caller has dealt with it.

    Yields:
        (b, H, W) uint8 for images in memory, (b, 3, crop, crop) uint8 for files.

    Raises:
        UnreadableImage: a file cannot be read.
        UserError: a worker process was killed, or `crop` is larger than `resize`.
    """
    if isinstance(images, ImageFiles):
        count, side = min(batch_size, len(images)), preprocessing.crop
        check_fits(f"a batch of {count:,} images of {side:,} x {side:,} pixels", 3 * count * side**2, "cpu")
        starts = range(0, len(images), batch_size)
        chunks = [range(start, min(start + batch_size, len(images))) for start in starts]
        batches = read_in_order(_ChunkReader(images, preprocessing), chunks, usual_workers(workers))
    else:
        batches = iter(images.images.split(batch_size))
    for batch in batches:
        yield batch
        if progress is not None:
            progress(len(batch))


def usual_workers(workers: int | None) -> int:
    """The number of worker processes to use.

    Args:
        workers: returned as it is, unless it is None. Then the result is one less than the cores of this process, at
            most 8. Processes that torchrun started on this machine share its cores.
    """
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Reader(Protocol[_Job, _Result]):
    """Does one job in a worker process. A file that cannot be read is returned as an error, not raised."""

    def __getitem__(self, job: _Job) -> _Result | UserError: ...


def read_in_order(
    reader: Reader[_Job, _Result], jobs: Iterable[_Job], workers: int, pin_memory: bool = False
) -> Iterator[_Result]:
    """Yield the results of `jobs` in order, while `workers` processes read ahead.

    Closing the iterator stops the processes.

    Args:
        reader: does a job.
        jobs: the jobs; they may be endless.
        workers: number of processes; 0 does the jobs in this process.
        pin_memory: put the results into pinned memory.

    Raises:
        UserError: a reader returned one, or a worker was killed.
    """
    loader = DataLoader(
        reader,  # type: ignore[arg-type]  # a mapping from jobs to results, as a DataLoader with a sampler expects
        batch_size=None,
        sampler=jobs,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Without a generator of its own, a loader draws from torch's global one, and a resumed run would differ.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        results = iter(loader)
    except OSError as error:  # fork: too little memory, too many processes or open files
        raise UserError(
            f"data.workers is {workers}, and so many processes that read images cannot be started: {error.strerror}"
        ) from error
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker (pid" not in str(error):
                    raise
                raise UserError(
                    f"data.workers is {workers} and a process that reads images was killed, perhaps because memory or "
                    "shared memory ran out (in a container, --shm-size sets the latter); with fewer workers, less of "
                    "both is needed"
                ) from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        del results  # its destructor stops the workers


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and leave the process group: the parent still needs its last batch when it is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class _ChunkReader:
    """Reads consecutive images as one batch."""

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        require("torchvision", extra="train", purpose="resizing and cropping image files")
        from torchvision.transforms import v2

        if preprocessing.resize < preprocessing.crop:
            raise UserError(
                f"resize is {preprocessing.resize} and crop is {preprocessing.crop}; resize must be at least crop"
            )
        self._files = files
        self._transform = v2.Compose(
            [v2.Resize(preprocessing.resize), v2.CenterCrop(preprocessing.crop), v2.PILToTensor()]
        )

    def __getitem__(self, chunk: range) -> Tensor | UserError:
        try:
            return torch.stack([self._transform(read_image(self._files, index)) for index in chunk])
        except UserError as error:
            return error
