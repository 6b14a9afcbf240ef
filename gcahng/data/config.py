"""The options of the data of a run: `gcahng train --data.NAME`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from gcahng.bounds import check_fields
from gcahng.errors import UserError

DataName = Literal["glyphs", "cub200", "cars196", "sop", "inshop", "folder", "csv"]


@dataclass
class DataConfig:
    """The data: the set, the balanced batches and the augmentation.

    Attributes:
        name: data set. glyphs: 2,135 characters in the 12 faces of DejaVu, 32x32 gray, without a download. cub200,
            cars196, sop, inshop: the original files. folder: train/CLASS/ and test/CLASS/ under root. csv: a file of
            path, label and split.
        root: folder of the data set's files.
        csv: file of path, label and split (csv); its paths are relative to root, or to its own folder.
        classes_per_batch: C, the classes in a batch.
        samples_per_class: K, the samples of each class; the batch has n = C·K.
        train_classes: number of classes that train (glyphs).
        val_classes: number of training classes that are set aside to choose the best checkpoint; 0: none; null: 100
            of glyphs, a tenth elsewhere.
        merge_lookalikes: whether characters of which a face draws the same pixels are one class, so that no image is in
            two classes (glyphs): 2,106 classes instead of 2,135.
        max_shift: training images are shifted by at most this many pixels in each direction (glyphs).
        exif_rotate: whether an image is rotated and mirrored as its EXIF orientation says (image files); null: true for
            folder and csv, false for the published sets, whose numbers are those of the images as they are stored.
        image_size: side of the square that the network sees, in pixels (image files).
        resize: length in pixels that the shorter side is scaled to before evaluation (image files).
        crop_scale_min: smallest part of an image's area that a training crop takes (image files).
        workers: processes that read image files for each process that trains; null: one less than there are cores,
            but at most 8.
        skip_unreadable: true: in training another image of the class replaces a file that cannot be read, and is
            counted; false: training stops and names the file.
    """

    name: DataName = "glyphs"
    root: str | None = None
    csv: str | None = None
    classes_per_batch: int = 16
    samples_per_class: int = 3
    train_classes: int = 200
    val_classes: int | None = None
    merge_lookalikes: bool = False
    max_shift: int = 2
    exif_rotate: bool | None = None
    image_size: int = 224
    resize: int = 256
    crop_scale_min: float = 0.08
    workers: int | None = None
    skip_unreadable: bool = False

    @property
    def rotates(self) -> bool:
        """`exif_rotate`, where null is replaced by what it means for the data set."""
        return self.name in ("folder", "csv") if self.exif_rotate is None else self.exif_rotate

    def decided(self) -> DataConfig:
        """The same with the value that a null `exif_rotate` stands for, as a run records it."""
        return self if self.name == "glyphs" else replace(self, exif_rotate=self.rotates)

    def check(self) -> None:
        """See that every option is in its range, and that the square that evaluation cuts out fits into the image.

        Raises:
            UserError: names the option, its value and what it must be.
        """
        check_fields(self, "data.")
        if self.name != "glyphs" and self.resize < self.image_size:
            raise UserError(
                f"data.resize is {self.resize} and data.image_size {self.image_size}; data.resize must be at least "
                "data.image_size"
            )
