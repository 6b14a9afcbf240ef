"""Sizes beyond which fused stages can't go; plain torch's have no such limit."""

from __future__ import annotations

from typing import NamedTuple


class Limit(NamedTuple):
    """what: views (samples a class) or dim (channels); most: the largest that is taken."""

    what: str
    most: int


VIEWS = Limit("views", 64)  # csrc/bindings_stages.h
CUDA_DIM = Limit("dim", 1024)  # csrc/cuda/rows.cuh


def exceeded(stages: str, views: int, dim: int) -> Limit | None:
    """The limit that so many samples a class and channels are beyond on these stages (cpp, triton, cuda…, torch)."""
    if stages != "torch" and views > VIEWS.most:
        return VIEWS
    return CUDA_DIM if stages.startswith("cuda") and dim > CUDA_DIM.most else None
