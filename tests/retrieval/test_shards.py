"""Embeddings in several files are one set, and an index of them is that of their rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gcahng import UserError
from gcahng.cli import main
from gcahng.retrieval.embeddings import EmbeddingSet, read_embeddings, write_embeddings
from gcahng.retrieval.index_file import load
from gcahng.retrieval.items import EmbeddingModel, Items, Source
from gcahng.retrieval.shards import read_shards
from gcahng.testing import seeded

MODEL = EmbeddingModel(fingerprint="f", backbone="b", path="p", resize=8, crop=8)


def write(path: Path, rows: range, dim: int = 4, model: EmbeddingModel | None = MODEL) -> Path:
    labels = torch.tensor([row % 3 for row in rows])
    items = Items(tuple(f"{row}.png" for row in rows), labels, ("a", "b", "c"), (Source(len(rows), "/images"),))
    write_embeddings(path, EmbeddingSet(seeded(20, dim, seed=1)[rows.start : rows.stop].float(), items, model))
    return path


def test_an_index_builds_from_shards(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.safetensors", range(20))
    shards = [
        write(tmp_path / f"{i}.safetensors", part) for i, part in enumerate((range(7), range(7, 9), range(9, 20)))
    ]
    one, several = read_shards([whole]), read_shards(shards)
    assert torch.equal(one.embeddings, several.embeddings) and several.model == MODEL
    assert one.items.names == several.items.names and torch.equal(one.items.labels, several.items.labels)
    for name, files in (("one", [whole]), ("several", shards)):
        assert main(["index", "build", *map(str, files), "--out", str(tmp_path / f"{name}.index")]) == 0
    first, second = (load(tmp_path / f"{name}.index") for name in ("one", "several"))
    queries = read_embeddings(whole).embeddings
    for found, wanted in zip(second.index.search(queries, 5), first.index.search(queries, 5), strict=True):
        assert torch.equal(found, wanted)


def test_shards_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", range(5))
    with pytest.raises(UserError, match=r"embeddings of 4 channels and .*b.safetensors of 3; all must have as many"):
        read_shards([first, write(tmp_path / "b.safetensors", range(5, 9), dim=3)])
    others = {"different networks": replace(MODEL, fingerprint="g"), "norm 1": replace(MODEL, normalized=True)}
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            read_shards([first, write(tmp_path / "c.safetensors", range(5, 9), model=other)])
