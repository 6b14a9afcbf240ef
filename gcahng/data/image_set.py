"""Images with labels, and the three sets of a retrieval task: training, validation and test classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, held in memory.

    Attributes:
        images: (N, H, W) uint8 grey images, or (N, C, H, W).
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


@dataclass(frozen=True)
class DataSplits:
    """Training, validation and test images of classes that do not overlap.

    `digest` identifies the pixels and the split (SHA-256, 16 hexadecimal digits): two runs are comparable if it agrees.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    digest: str
