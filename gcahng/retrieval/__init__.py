"""Retrieval: exact nearest neighbours and the metrics made of them."""

from gcahng.retrieval.metrics import retrieval_metrics
from gcahng.retrieval.neighbours import nearest

__all__ = ["nearest", "retrieval_metrics"]
