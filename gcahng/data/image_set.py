"""Labeled images, in memory or as files, and the splits of a retrieval task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from gcahng.data.strings import Strings


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, held in memory.

    Attributes:
        images: (N, H, W) uint8 gray images, or (N, C, H, W).
        labels: (N,) int64 in 0 … classes - 1, numbered within this split.
        class_names: the name of each label; image i shows `class_names[labels[i]]`.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def name(self, index: int) -> str:
        """A readable name of image `index`: its class and its place in the set."""
        return f"{self.class_names[int(self.labels[index])]} (image {index})"

    def subset(self, indices: Tensor) -> ImageSet:
        """The images `indices` (k,), with the labels and class names of the whole set."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split as files, which are read when needed.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: N paths with forward slashes; any sequence becomes `Strings`, which worker processes share.
        labels: (N,) int64 in 0 … classes - 1, numbered within this split.
        class_names: the name of each label.
        exif_rotate: whether each image is rotated and mirrored as its EXIF orientation says.
    """

    root: Path
    paths: Sequence[str]
    labels: Tensor
    class_names: tuple[str, ...]
    exif_rotate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.paths, Strings):
            object.__setattr__(self, "paths", Strings(self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def file(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        """A readable name of image `index`: its path below the root."""
        return self.paths[index]

    def subset(self, indices: Tensor) -> ImageFiles:
        """The images `indices` (k,), with the labels and class names of the whole set."""
        return replace(self, paths=self.paths.take(indices), labels=self.labels[indices])  # type: ignore[attr-defined]


LabeledImages = ImageSet | ImageFiles


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test images. No two of them share a class.

    Attributes:
        train: the training images.
        val: the images that choose the best checkpoint; None if there are none.
        test: images of classes that are never trained on; the queries if there is a gallery.
        gallery: the images that `test` is searched in, with the same class names. None: `test` is searched in itself,
            each image without itself.
        recall_at: the values of K for Recall@K that are usual for this data set.
        digest: 16 hexadecimal digits of a SHA-256 of the pixels (of files: paths, labels and sizes) and of the split.
            Two runs are comparable if they have the same digest.
        listing: the same for paths and labels alone, which do not change when a file is replaced; None if the images
            are not files.
    """

    train: LabeledImages
    val: LabeledImages | None
    test: LabeledImages
    digest: str
    gallery: LabeledImages | None = None
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    listing: str | None = None
