"""Embeddings in several files, as several machines or jobs make them, as one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gcahng.errors import UserError
from gcahng.retrieval.embeddings import EmbeddingSet, read_embeddings


def read_shards(paths: Sequence[Path | str]) -> EmbeddingSet:
    """The rows of all files, one file after the other. Classes with the same name become one.

    Args:
        paths: of files that `read_embeddings` reads, at least one.

    Raises:
        UserError: a file cannot be read, or two of them have other channels or are of different networks.
    """
    first, *others = (read_embeddings(path) for path in paths)
    if not others:
        return first
    items, model = first.items, first.model
    for path, other in zip(paths[1:], others, strict=True):
        if other.embeddings.shape[1] != first.embeddings.shape[1]:
            raise UserError(
                f"{paths[0]} has embeddings of {first.embeddings.shape[1]} channels and {path} of "
                f"{other.embeddings.shape[1]}; all must have as many"
            )
        if model and other.model and (difference := model.difference(other.model)):
            raise UserError(f"{paths[0]} and {path} do not fit: {difference}")
        if model and other.model and model.normalized != other.model.normalized:
            raise UserError(f"{paths[0]} and {path} do not fit: only one of them has embeddings scaled to norm 1")
        items, model = items.followed_by(other.items), model or other.model
    rows = torch.cat([part.embeddings for part in (first, *others)])
    return replace(first, embeddings=rows, items=items, model=model, key=None)
