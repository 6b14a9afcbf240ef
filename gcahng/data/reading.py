"""Image files: decoding them to RGB, and preparing them for evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gcahng.data.decoding import decode
from gcahng.data.image_set import ImageFiles, LabeledImages
from gcahng.data.workers import read_in_order, usual_workers
from gcahng.engine.fits import check_fits
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import regular_file

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


# How images are scaled: over all pixels that an output pixel covers, as Pillow does.
INTERPOLATION = "bilinear, antialiased"


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
        with open(regular_file(path), "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PIL's, of tags that nothing here looks at
            with Image.open(file) as image:
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


class _ChunkReader:
    """Reads consecutive images as one batch."""

    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        require("torchvision", extra="train", purpose="resizing and cropping image files")
        from torchvision.transforms import v2

        if preprocessing.resize < preprocessing.crop:
            raise UserError(
                f"resize is {preprocessing.resize} and crop is {preprocessing.crop}; resize must be at least crop"
            )
        self._files = replace(files, class_names=())
        self._transform = v2.Compose(
            [v2.Resize(preprocessing.resize), v2.CenterCrop(preprocessing.crop), v2.PILToTensor()]
        )

    def __getitem__(self, chunk: range) -> Tensor | UserError:
        try:
            return torch.stack([self._transform(read_image(self._files, index)) for index in chunk])
        except UserError as error:
            return error
