"""Image files: decoded to RGB, and read ahead by processes; for evaluation resized and cropped, never augmented."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gcahng.data.image_set import ImageFiles, LabeledImages
from gcahng.errors import UserError
from gcahng.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images.

    Attributes:
        resize: the shorter side is scaled to this, in pixels.
        crop: side of the square that is cut from the middle, in pixels.
    """

    resize: int = 256
    crop: int = 224


class UnreadableImage(UserError):
    """An image file that is missing, damaged or no image.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[UserError], tuple[Path, str]]:  # worker processes hand it over pickled
        return UnreadableImage, (self.path, self.reason)


def read_rgb(path: Path) -> PILImage:
    """The image of a file in RGB: grey (of 8 or 16 bits), CMYK and palette images are converted, transparency is laid
    on white.

    Raises:
        UnreadableImage: the file is missing, truncated or no image.
    """
    require("PIL", extra="train", purpose="image files are read")
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            if image.mode.startswith("I;16"):  # PIL's own conversion cuts everything above 255 off
                return Image.fromarray((np.asarray(image, dtype=np.uint16) / 257).round().astype(np.uint8)).convert(
                    "RGB"
                )
            if image.mode in ("I", "F"):
                raise ValueError(f"it has {image.mode} pixels of 32 bits; 8 or 16 bits a channel can be read")
            return image.convert("RGB")
    except Exception as error:  # PIL raises what its codecs raise: OSError, SyntaxError, ValueError, struct.error …
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(path, reason) from None


def evaluation_batches(
    images: LabeledImages,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int | None = 0,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Tensor]:
    """The images in their order, (b, H, W) or (b, 3, crop, crop) uint8, `batch_size` at a time.

    Draws no random number, and so leaves a training run's alone.

    Args:
        images: in memory (given out as they are) or as files.
        preprocessing: of files.
        batch_size: b, but for the last.
        workers: processes that read files; 0: this one; None: `usual_workers`. The result is the same.
        progress: called with the number of images of each batch, once it is dealt with.

    Raises:
        UnreadableImage: a file cannot be read.
        UserError: a reading process was killed; crop is larger than resize.
    """
    if isinstance(images, ImageFiles):
        starts = range(0, len(images), batch_size)
        chunks = [range(start, min(start + batch_size, len(images))) for start in starts]
        batches = read_in_order(_Chunks(images, preprocessing), chunks, usual_workers(workers))
    else:
        batches = iter(images.images.split(batch_size))
    for batch in batches:
        yield batch
        if progress is not None:
            progress(len(batch))


def usual_workers(workers: int | None) -> int:
    """`workers`, or where that is None one less than this process may use cores, at most 8; of several that torchrun
    started here each takes its share of the cores."""
    if workers is not None:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class Reader(Protocol[_Job, _Result]):
    """Does one job in a worker process; a file that cannot be read is a result, not an exception."""

    def __getitem__(self, job: _Job) -> _Result | UserError: ...


def read_in_order(
    reader: Reader[_Job, _Result], jobs: Iterable[_Job], workers: int, pin_memory: bool = False
) -> Iterator[_Result]:
    """The results of `jobs` in their order, read ahead by `workers` processes; `jobs` may be endless.

    Closing the iterator ends the processes.

    Raises:
        UserError: a result that is one; a worker was killed.
    """
    loader = DataLoader(
        reader,  # type: ignore[arg-type]  # a mapping from jobs, as a DataLoader with a sampler wants it
        batch_size=None,
        sampler=jobs,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        # Without one of its own a loader takes a number from torch's generator, and a resumed run would differ.
        generator=torch.Generator().manual_seed(0),
    )
    results = iter(loader)
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
                    "shared memory (of a container: --shm-size) ran out; fewer workers need less, 0 needs neither"
                ) from error
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        del results  # its destructor ends the workers


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a kill of the process group reach the workers too, while the parent still wants its last batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class _Chunks:
    """Reader of runs of images, one batch each."""

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        require("torchvision", extra="train", purpose="image files are resized and cropped")
        from torchvision.transforms import v2

        if preprocessing.resize < preprocessing.crop:
            raise UserError(
                f"resize is {preprocessing.resize} and crop {preprocessing.crop}; resize must be at least crop"
            )
        self._files = files
        self._transform = v2.Compose(
            [v2.Resize(preprocessing.resize), v2.CenterCrop(preprocessing.crop), v2.PILToTensor()]
        )

    def __getitem__(self, chunk: range) -> Tensor | UserError:
        try:
            return torch.stack([self._transform(read_rgb(self._files.file(index))) for index in chunk])
        except UserError as error:
            return error
