"""Operations on tiles of edges: one meaning each (gcahng.reference), several implementations, chosen by impl=."""

from gcahng.ops.edge_start import edge_start

__all__ = ["edge_start"]
