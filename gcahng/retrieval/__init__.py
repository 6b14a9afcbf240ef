"""Retrieval: exact nearest neighbours, the metrics made of them, and indices for large galleries."""

from gcahng.retrieval.index import IndexSettings, build_index, read_index, recall_against_exact
from gcahng.retrieval.metrics import retrieval_metrics
from gcahng.retrieval.neighbours import nearest

__all__ = ["IndexSettings", "build_index", "nearest", "read_index", "recall_against_exact", "retrieval_metrics"]
