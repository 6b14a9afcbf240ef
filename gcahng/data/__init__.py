"""Data sets, batch sampling and augmentation."""

from gcahng.data.augment import random_shifts
from gcahng.data.batches import InMemoryBatches
from gcahng.data.glyphs import load_glyphs
from gcahng.data.image_set import DataSplits, ImageSet
from gcahng.data.sampler import BalancedBatchSampler

__all__ = ["BalancedBatchSampler", "DataSplits", "ImageSet", "InMemoryBatches", "load_glyphs", "random_shifts"]
