"""Images with labels, in memory or as files, and the sets of a retrieval task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, held in memory.

    Attributes:
        images: (N, H, W) uint8 gray images, or (N, C, H, W).
        labels: (N,) int64, 0 … classes - 1, counted within this split.
        class_names: the name of each label, so that `class_names[labels[i]]` is what image i shows.
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
        """What a person calls image `index`: its class, and its place in the set."""
        return f"{self.class_names[int(self.labels[index])]} (image {index})"

    def subset(self, indices: Tensor) -> ImageSet:
        """The images `indices` (k,), with the labels and class names of the whole."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


@dataclass(frozen=True)
class ImageFiles:
    """Images of one split as files that are read when they are needed.

    Attributes:
        root: the folder that `paths` are relative to.
        paths: N file names with forward slashes.
        labels: (N,) int64, 0 … classes - 1, counted within this split.
        class_names: the name of each label.
    """

    root: Path
    paths: tuple[str, ...]
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def file(self, index: int) -> Path:
        """The file of image `index`."""
        return self.root / self.paths[index]

    def name(self, index: int) -> str:
        """What a person calls image `index`: its path below the root."""
        return self.paths[index]

    def subset(self, indices: Tensor) -> ImageFiles:
        """The images `indices` (k,), with the labels and class names of the whole."""
        chosen: Sequence[int] = indices.tolist()
        return replace(self, paths=tuple(self.paths[i] for i in chosen), labels=self.labels[indices])


LabeledImages = ImageSet | ImageFiles


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test images; no class of one is in another.

    Attributes:
        train: what trains.
        val: of classes that choose the best checkpoint; None: there are none.
        test: of classes that nobody has seen; the queries where there is a gallery.
        gallery: what `test` is searched in, with the same class names; None: `test` itself, each image without itself.
        recall_at: the K of Recall@K that are usual for this data set.
        digest: identifies pixels (files: paths, labels and sizes) and the split (SHA-256, 16 hexadecimal digits): two
            runs are comparable if it agrees.
        listing: the same of paths and labels alone, which hold while a file is replaced; None where there are no files.
    """

    train: LabeledImages
    val: LabeledImages | None
    test: LabeledImages
    digest: str
    gallery: LabeledImages | None = None
    recall_at: tuple[int, ...] = (1, 2, 4, 8)
    listing: str | None = None
