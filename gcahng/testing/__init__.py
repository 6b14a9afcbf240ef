"""Inputs, comparisons and measurements that tests and benchmarks share."""

from gcahng.testing.compare import assert_close_to_truth, nan_poisoned
from gcahng.testing.inputs import moved, seeded
from gcahng.testing.memory import peak_memory

__all__ = ["assert_close_to_truth", "moved", "nan_poisoned", "peak_memory", "seeded"]
