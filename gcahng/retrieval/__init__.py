"""Retrieval: exact nearest neighbors, retrieval metrics, and indices for large galleries."""

from gcahng.retrieval.clustering import clustering_metrics
from gcahng.retrieval.index import IndexSettings, build_index, read_index, recall_against_exact
from gcahng.retrieval.metrics import RetrievalResult, retrieval_metrics
from gcahng.retrieval.neighbors import nearest

__all__ = [
    "IndexSettings",
    "RetrievalResult",
    "build_index",
    "clustering_metrics",
    "nearest",
    "read_index",
    "recall_against_exact",
    "retrieval_metrics",
]
