"""Which indices are moved to a GPU, with a stand-in for faiss on a GPU. tests/gpu has the real one."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import candidates, index_faiss
from gcahng.retrieval.index import KINDS, IndexSettings, build_index, read_index

faiss = pytest.importorskip("faiss")

GALLERY = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0))
GPU = torch.device("cuda", 1)


class GpuStandIn:
    """Looks like an index of faiss on a GPU: it has another type, and otherwise behaves like the one on the CPU."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """GPU and type of every index that is moved to one."""
    found = []

    def to_gpu(resources: object, device: int, raw: Any) -> GpuStandIn:
        if isinstance(raw, faiss.IndexIVFPQ) and raw.pq.M == 16:
            raise RuntimeError("Error in void verifyPQSettings_()\n16 bytes a code are not supported")
        found.append((device, type(raw).__name__))
        return GpuStandIn(raw)

    for module in (index_faiss, candidates):
        monkeypatch.setattr(module, "faiss_sees_gpus", lambda: True)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", to_gpu, raising=False)
    monkeypatch.setattr(faiss, "index_gpu_to_cpu", lambda index: index.raw, raising=False)
    return found


def _written(kind: str, **settings: int) -> io.BytesIO:
    file = io.BytesIO()
    build_index(GALLERY, kind, settings=IndexSettings(**settings)).write(file)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_searched_on_the_gpu_and_written_from_it(kind: str, moves: list[tuple[int, str]]) -> None:
    file = _written(kind)
    index = read_index(file, kind, "cosine", device=GPU)
    assert moves == {"flat": [(1, "IndexFlat")], "ivf_flat": [(1, "IndexIVFFlat")], "ivf_pq": [(1, "IndexIVFPQ")]}.get(
        kind, []
    )
    own = read_index(io.BytesIO(file.getvalue()), kind, "cosine")
    assert torch.equal(index.search(GALLERY[:20], 7).indices, own.search(GALLERY[:20], 7).indices)
    again = io.BytesIO()
    index.write(again)
    assert again.getvalue() == file.getvalue()


def test_what_a_gpu_does_not_take_stays_on_the_cpu(
    moves: list[tuple[int, str]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "gcahng"):
        index = read_index(_written("ivf_pq", code_bytes=16), "ivf_pq", "cosine", device=GPU)
    assert not moves and index.search(GALLERY[:3], 5).indices.shape == (3, 5)
    assert [record.message for record in caplog.records] == [
        "ivf_pq is searched on the CPU, because faiss does not support it on the GPU: 16 bytes a code are not supported"
    ]


def test_limits_of_a_gpu(moves: list[tuple[int, str]]) -> None:
    index = read_index(_written("flat"), "flat", "cosine", device=GPU)
    assert index.search(GALLERY[:2], 2048).indices.shape == (2, 2048)
    with pytest.raises(UserError, match="k is 2049; it must be at most 2048 for faiss on a GPU"):
        index.search(GALLERY[:2], 2049)


def test_without_a_gpu_in_faiss_only_flat_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_faiss, candidates):
        monkeypatch.setattr(module, "faiss_sees_gpus", lambda: False)
    assert candidates.choose_backend("auto", GPU) == "torch"
    index = read_index(_written("ivf_flat"), "ivf_flat", "cosine", device=GPU)
    assert not isinstance(index.raw, GpuStandIn) and index.search(GALLERY[:3], 5).indices.shape == (3, 5)
