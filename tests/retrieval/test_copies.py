"""A gallery with many copies of one row: what is found, in which order, and what is said."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiers import few
from torch import Tensor

from gcahng.errors import UserError, UserNote
from gcahng.retrieval import IndexSettings, build_index, index_base, nearest, read_index, recall_against_exact
from gcahng.retrieval.copies import Copies, Group
from gcahng.retrieval.embeddings import EmbeddingSet
from gcahng.retrieval.index_base import Index
from gcahng.retrieval.index_file import build, load, save
from gcahng.retrieval.items import unnamed

EVERY = [("flat", "torch"), ("flat", "faiss"), ("ivf_flat", "faiss"), ("ivf_pq", "faiss"), ("hnsw", "faiss")]


def clusters(n: int, dim: int = 16, seed: int = 0) -> Tensor:
    centers = torch.randn(60, dim, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    return centers[torch.randint(0, 60, (n,), generator=generator)] + 0.6 * torch.randn(n, dim, generator=generator)


def with_placeholder(n: int) -> tuple[Tensor, Tensor]:
    """Rows of which a tenth are the same, and these (c,), ascending."""
    rows = clusters(n)
    copies = torch.randperm(n, generator=torch.Generator().manual_seed(1))[: n // 10].sort().values
    rows[copies] = rows[copies[0]].clone()
    return rows, copies


def queries(gallery: Tensor, copies: Tensor) -> Tensor:
    """Some near the copies, the others anywhere."""
    near = gallery[copies[0]] + 0.01 * clusters(5, seed=3)
    return torch.cat([near, gallery[copies[:1]], clusters(150, seed=2)])


@pytest.mark.parametrize(("kind", "backend"), EVERY)
@pytest.mark.parametrize("metric", few(["cosine", "euclidean"]))
@pytest.mark.parametrize("rows", [4000, pytest.param(20000, marks=pytest.mark.slow)])
def test_copies_hide_no_other_row_and_keep_their_order(kind: str, backend: str, metric: str, rows: int) -> None:
    gallery, copies = with_placeholder(rows)
    asked = queries(gallery, copies)
    settings = IndexSettings(lists=30, probes=8)
    index = build_index(gallery, kind, metric=metric, backend=backend, settings=settings)
    assert len(index) == rows and index.copies.stored == rows - rows // 10 + 1
    ten, hundred = index.search(asked, 10), index.search(asked, 100)
    assert torch.equal(ten.indices, hundred.indices[:, :10]) and torch.equal(ten.values, hundred.values[:, :10])
    assert torch.equal(hundred.indices[5], copies[:100])
    exact = nearest(asked, 10, gallery_embeddings=gallery, normalize=metric == "cosine")
    if kind == "flat":
        assert torch.equal(ten.indices, exact)
    others = torch.ones(rows, dtype=torch.bool)
    others[copies] = False
    found = (exact.unsqueeze(2) == ten.indices.unsqueeze(1)).any(dim=2)
    # As many as without copies. A tenth of them is lost by hnsw if every copy is in its graph.
    rest = build_index(gallery[others], kind, metric=metric, backend=backend, settings=settings)
    assert len(rest) == rows - rows // 10
    expected = recall_against_exact(rest, gallery[others], asked, 10)
    assert found[others[exact]].double().mean() >= expected - 0.02
    # In the order of the gallery, rows at the same distance.
    values = hundred.values if metric == "euclidean" else -hundred.values
    same = values[:, 1:] == values[:, :-1]
    assert (hundred.indices[:, 1:] > hundred.indices[:, :-1])[same].all() and (values[:, 1:] >= values[:, :-1]).all()


@pytest.mark.parametrize(("kind", "backend"), EVERY)
def test_written_read_and_added_to(kind: str, backend: str) -> None:
    gallery, copies = with_placeholder(2000)
    asked = queries(gallery, copies)
    settings = IndexSettings(lists=20, probes=8)
    index = build_index(gallery, kind, metric="euclidean", backend=backend, settings=settings)
    file = io.BytesIO()
    index.write(file)
    for reader in ("torch", "faiss") if kind == "flat" else ("faiss",):
        again = read_index(io.BytesIO(file.getvalue()), kind, "euclidean", backend=reader)
        assert (len(again), again.copies.stored) == (2000, 1801)
        before, after = index.search(asked, 50), again.search(asked, 50)
        assert torch.equal(before.indices, after.indices)
        rewritten = io.BytesIO()
        again.write(rewritten)
        assert rewritten.getvalue() == file.getvalue()
        # One at a time, too, copies join the others.
        again.add(gallery[copies[:1]])
        again.add(torch.cat([clusters(1, seed=5), gallery[copies[:2]], gallery[[3]]]))
        assert (len(again), again.copies.stored) == (2005, 1802)
        assert again.search(gallery[copies[:1]], 203).indices[0].tolist() == [*copies.tolist(), 2000, 2002, 2003]
        assert again.search(gallery[[3]], 2).indices.tolist() == [[3, 2004]]
        final = io.BytesIO()
        again.write(final)
        reread = read_index(io.BytesIO(final.getvalue()), kind, "euclidean", backend=reader)
        assert torch.equal(reread.search(asked, 50).indices, again.search(asked, 50).indices)


def test_a_flat_index_with_copies_is_a_file_that_numpy_reads() -> None:
    gallery, _ = with_placeholder(500)
    for backend in ("torch", "faiss"):
        file = io.BytesIO()
        build_index(gallery, metric="euclidean", backend=backend).write(file)
        file.seek(0)
        assert np.array_equal(np.load(file), gallery.numpy())


def test_an_index_of_an_earlier_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no list of copies: all its rows are stored, and new copies are found among the new rows alone."""
    gallery, copies = with_placeholder(500)

    def store_all(copies: Copies, rows: Tensor, _: object) -> Tensor:
        vars(copies).update(vars(Copies.none(len(rows))))
        return torch.arange(len(rows))

    monkeypatch.setattr(Copies, "write", lambda copies, file: None)
    monkeypatch.setattr(Copies, "place", store_all)
    file = io.BytesIO()
    build_index(gallery, "hnsw").write(file)
    monkeypatch.undo()
    for after in (b"", b"what follows it in an index file"):
        index = read_index(io.BytesIO(file.getvalue() + after), "hnsw", "cosine")
        assert (len(index), index.copies.stored) == (500, 500)
        index.add(gallery[copies[:2]])
        assert (len(index), index.copies.stored) == (502, 501)
        written = io.BytesIO()
        index.write(written)
        again = read_index(io.BytesIO(written.getvalue()), "hnsw", "cosine")
        again.add(gallery[copies[:1]])
        assert (len(again), again.copies.stored) == (503, 501)


def test_a_file_of_an_index_with_copies(tmp_path: Path) -> None:
    gallery, copies = with_placeholder(600)
    whole = EmbeddingSet(gallery, unnamed(600))
    for kind in ("flat", "hnsw"):
        path = tmp_path / f"{kind}.index"
        save(path, build(whole, kind))
        contents = load(path)
        assert len(contents) == len(contents.index) == 600
        found = contents.search("queries", replace(whole, embeddings=gallery[copies[:1]], items=unnamed(1)), 60)
        assert found.indices[0].tolist() == copies.tolist()
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match="its checksum is wrong"):
            load(path)


@pytest.mark.parametrize("cut", [3, 12, 30, 200])
def test_a_list_of_copies_that_ends_early(cut: int) -> None:
    file = io.BytesIO()
    build_index(with_placeholder(300)[0], "hnsw").write(file)
    start = file.getvalue().index(b"GCAHNGCP")
    with pytest.raises(UserError, match="the file is not an index .its list of copies is .*; it must be") as error:
        read_index(io.BytesIO(file.getvalue()[: start + 8 + cut]), "hnsw", "cosine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("at_once", few([3000, 1 << 24]))
def test_different_rows_at_one_distance_are_in_order(
    backend: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hash codes: hundreds of rows that differ are at the same distance, more than a search asks for at first."""
    monkeypatch.setattr(index_base, "_AT_ONCE", at_once)
    codes = torch.randint(0, 2, (3000, 14), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    index = build_index(codes, metric="euclidean", backend=backend)
    exact = nearest(codes[:40], 500, gallery_embeddings=codes, normalize=False)
    for k in (1, 10, 100, 500):
        assert torch.equal(index.search(codes[:40], k).indices, exact[:, :k])


def test_the_order_among_all_found() -> None:
    """Against the definition: all rows of the stored ones that were found, by distance, then by row."""
    generator = torch.Generator().manual_seed(0)
    for trial in range(30):
        originals = torch.randint(0, 12, (40,), generator=generator)
        values = torch.randn(12, 3, generator=generator)
        copies, stored = Copies.among(values[originals])
        assert torch.equal(values[originals][stored][torch.from_numpy(copies.stored_rows)], values[originals])
        placed = Copies()
        pieces = [placed.place(piece, ()) for piece in values[originals].split(7)]
        assert np.array_equal(placed.stored_rows, copies.stored_rows) and sum(map(len, pieces)) == len(stored)
        found = torch.randperm(copies.stored, generator=generator)[:8][None]
        distances = torch.randint(0, 3, (1, 8), generator=generator).float()
        found[0, -1], distances[0, -1] = -1, torch.inf
        every = sorted(
            (float(away), row)
            for place, away in zip(found[0].tolist(), distances[0], strict=True)
            for row in range(40)
            if place == copies.stored_rows[row]
        )
        for k in (1, 2, 5, 40):
            rows, away = copies.ranked(found, distances, k)
            wanted = (every + [(np.inf, -1)] * k)[:k]
            assert list(zip(away[0].tolist(), rows[0].tolist(), strict=True)) == wanted, trial


def test_many_copies_are_said_once(recwarn: pytest.WarningsRecorder) -> None:
    gallery, copies = with_placeholder(2000)
    index: Index = build_index(gallery, backend="torch")
    first = int(copies[0])
    index.add(gallery[copies])
    said = [str(warning.message) for warning in recwarn if warning.category is UserNote]
    assert said == [
        f"199 of the 2000 rows of the index are the same as row {first}, and a search that finds one finds all; if "
        "they are of a placeholder image, leave it out"
    ]
    assert index.copies.largest() == Group(first, 400)
    recwarn.clear()
    for size in (15, 19):  # some copies are usual
        build_index(torch.cat([clusters(1000), clusters(1).expand(size - 1, -1)]))
    assert not [warning for warning in recwarn if warning.category is UserNote]


def test_a_gallery_of_one_row_only() -> None:
    for kind, backend in (("flat", "torch"), ("flat", "faiss"), ("hnsw", "faiss")):
        index = build_index(torch.ones(50, 8), kind, backend=backend)
        assert index.copies.stored == 1
        assert index.search(torch.ones(2, 8), 50).indices.tolist() == [list(range(50))] * 2
        assert index.search(torch.ones(2, 8), 1).indices.tolist() == [[0]] * 2
