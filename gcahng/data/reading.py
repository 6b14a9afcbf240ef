"""Image files to batches for evaluation: decoded, resized, cropped, never augmented."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gcahng._extras import require
from gcahng.data.image_set import ImageFiles, LabeledImages
from gcahng.errors import UserError


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

    `path` is the file.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be read as an image: {reason}")
        self.path = path

    def __reduce__(self) -> tuple[type[UserError], tuple[Path, str]]:  # worker processes hand it over pickled
        return UnreadableImage, (self.path, str(self).split("cannot be read as an image: ", 1)[1])


def read_rgb(path: Path):  # a PIL.Image.Image; PIL is an extra
    """The image of a file in RGB: grey, CMYK and palette images are converted, transparency is laid on white.

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
            return image.convert("RGB")
    except Exception as error:  # PIL raises what its codecs raise: OSError, SyntaxError, ValueError, struct.error …
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableImage(path, reason) from None


def evaluation_batches(
    images: LabeledImages, preprocessing: Preprocessing, batch_size: int, workers: int = 0
) -> Iterator[Tensor]:
    """The images in their order, (b, H, W) or (b, 3, crop, crop) uint8, `batch_size` at a time.

    Args:
        images: in memory (given out as they are) or as files.
        preprocessing: of files.
        batch_size: b, but for the last.
        workers: processes that read files; 0: this one. The result is the same.

    Raises:
        UnreadableImage: a file cannot be read.
    """
    if not isinstance(images, ImageFiles):
        yield from images.images.split(batch_size)
        return
    loader = torch.utils.data.DataLoader(
        _Files(images, preprocessing), batch_size=batch_size, num_workers=workers, persistent_workers=False
    )
    yield from loader


class _Files(torch.utils.data.Dataset):
    def __init__(self, files: ImageFiles, preprocessing: Preprocessing) -> None:
        require("torchvision", extra="train", purpose="image files are resized and cropped")
        from torchvision.transforms import v2

        self._files = files
        self._transform = v2.Compose(
            [v2.Resize(preprocessing.resize), v2.CenterCrop(preprocessing.crop), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        return self._transform(read_rgb(self._files.file(index)))
