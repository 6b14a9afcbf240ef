"""Neighbors and indices on a GPU against those on the CPU."""

from __future__ import annotations

import io

import pytest
import torch

from gcahng.retrieval import nearest
from gcahng.retrieval.candidates import faiss_sees_gpus
from gcahng.retrieval.index import build_index, read_index

pytestmark = pytest.mark.gpu

GALLERY = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
QUERIES = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))


def _needs_faiss_on_gpu() -> None:
    pytest.importorskip("faiss")
    if not faiss_sees_gpus():
        pytest.skip("needs a faiss with GPUs: pip install faiss-gpu")


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [5, 3000])
def test_neighbors_are_those_of_the_cpu(backend: str, k: int) -> None:
    if backend == "faiss":
        _needs_faiss_on_gpu()
    found = nearest(QUERIES.cuda(), k, gallery_embeddings=GALLERY.cuda(), backend=backend)
    assert found.is_cuda
    assert torch.equal(found.cpu(), nearest(QUERIES, k, gallery_embeddings=GALLERY, backend="torch"))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_flat_index_in_torch(metric: str) -> None:
    index = build_index(GALLERY.cuda(), metric=metric, backend="torch")
    found = index.search(QUERIES.cuda(), 10)
    wanted = build_index(GALLERY, metric=metric, backend="torch").search(QUERIES, 10)
    assert torch.equal(found.indices.cpu(), wanted.indices)
    assert torch.allclose(found.values.cpu(), wanted.values, atol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_pq"])
def test_indices_of_faiss(kind: str) -> None:
    _needs_faiss_on_gpu()
    file = io.BytesIO()
    own = build_index(GALLERY, kind, backend="faiss")
    own.write(file)
    wanted = own.search(QUERIES, 10, effort=None if kind == "flat" else 20)
    file.seek(0)
    index = read_index(file, kind, "cosine", backend="faiss", device="cuda")
    assert type(index.raw).__name__.startswith("Gpu")
    found = index.search(QUERIES, 10, effort=None if kind == "flat" else 20)
    assert torch.allclose(found.values, wanted.values, atol=1e-4)
    index.add(QUERIES.cuda())
    again = io.BytesIO()
    index.write(again)
    again.seek(0)
    assert len(read_index(again, kind, "cosine", backend="faiss")) == len(GALLERY) + len(QUERIES)
