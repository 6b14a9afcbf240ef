"""Data sets, batch sampling and augmentation."""

from gcahng.data.augment import random_shifts
from gcahng.data.batches import Batches, InMemoryBatches, build_batches
from gcahng.data.file_batches import FileBatches
from gcahng.data.glyphs import load_glyphs
from gcahng.data.image_set import DataSplits, ImageFiles, ImageSet, LabeledImages
from gcahng.data.load import DATA_SETS, load_data
from gcahng.data.reading import Preprocessing, UnreadableImage, evaluation_batches, read_image, read_rgb
from gcahng.data.sampler import BalancedBatchSampler
from gcahng.data.workers import usual_workers

__all__ = [
    "DATA_SETS",
    "BalancedBatchSampler",
    "Batches",
    "DataSplits",
    "FileBatches",
    "ImageFiles",
    "ImageSet",
    "InMemoryBatches",
    "LabeledImages",
    "Preprocessing",
    "UnreadableImage",
    "build_batches",
    "evaluation_batches",
    "load_data",
    "load_glyphs",
    "random_shifts",
    "read_image",
    "read_rgb",
    "usual_workers",
]
