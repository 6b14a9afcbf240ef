"""Indices of every kind: what they find, what they write, and what they refuse."""

import io
import logging
import sys

import numpy as np
import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import (
    IndexSettings,
    build_index,
    candidates,
    index_faiss,
    nearest,
    read_index,
    recall_against_exact,
)
from gcahng.retrieval.candidates import smallest
from gcahng.retrieval.index import KINDS

FLAT = [("flat", "torch"), ("flat", "faiss")]
EVERY = [*FLAT, ("ivf_flat", "faiss"), ("ivf_pq", "faiss"), ("hnsw", "faiss")]


def clustered(n, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, dim, generator=torch.Generator().manual_seed(99))
    return centers[torch.randint(0, 40, (n,), generator=generator)] + 0.5 * torch.randn(n, dim, generator=generator)


GALLERY, QUERIES = clustered(1500), clustered(60, seed=1)


@pytest.mark.parametrize(("kind", "backend"), FLAT)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_flat_is_exact(kind, backend, metric):
    index = build_index(GALLERY, kind, metric=metric, backend=backend)
    found = index.search(QUERIES, 7, chunk=13)
    assert torch.equal(found.indices, nearest(QUERIES, 7, gallery_embeddings=GALLERY, normalize=metric == "cosine"))
    pairs = QUERIES.double().unsqueeze(1), GALLERY[found.indices].double()
    expected = torch.cosine_similarity(*pairs, dim=2) if metric == "cosine" else (pairs[0] - pairs[1]).norm(dim=2)
    torch.testing.assert_close(found.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert recall_against_exact(index, GALLERY, QUERIES, 7) == 1.0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("kind", "least"), [("ivf_flat", 0.9), ("ivf_pq", 0.5), ("hnsw", 0.95)])
def test_approximate_kinds_find_most(kind, least, metric):
    index = build_index(GALLERY, kind, metric=metric, settings=IndexSettings(lists=20, probes=4))
    recall = recall_against_exact(index, GALLERY, QUERIES, 10)
    assert least <= recall <= 1.0
    # The count, done plainly.
    found = index.search(QUERIES, 10).indices.tolist()
    exact = nearest(QUERIES, 10, gallery_embeddings=GALLERY, normalize=metric == "cosine").tolist()
    assert recall == sum(len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)) / 600


def test_more_effort_finds_more_and_all_cells_find_all():
    index = build_index(GALLERY, "ivf_flat", settings=IndexSettings(lists=30, probes=1))
    recalls = [recall_against_exact(index, GALLERY, QUERIES, 20, effort=effort) for effort in (None, 3, 30, 500)]
    assert recalls[0] < recalls[1] < recalls[2] == recalls[3] == 1.0


def test_a_view_of_more_than_all_is_of_all():
    """Of so many nodes, faiss would take more memory than there is, or no number so large."""
    settings = IndexSettings(search_breadth=2**31 - 1)
    graph = build_index(GALLERY[:200], "hnsw", settings=settings)
    exact = nearest(QUERIES, 10, gallery_embeddings=GALLERY[:200])
    for effort in (None, 2**31 - 1, 2**70):
        assert torch.equal(graph.search(QUERIES, 10, effort=effort).indices, exact)


def test_settings_reach_the_index():
    graph = build_index(GALLERY, "hnsw", settings=IndexSettings(links=12, build_breadth=33, search_breadth=44)).raw
    assert (graph.hnsw.nb_neighbors(1), graph.hnsw.efConstruction, graph.hnsw.efSearch) == (12, 33, 44)
    cells = build_index(GALLERY, "ivf_flat", settings=IndexSettings(lists=20, probes=3)).raw
    assert (cells.nlist, cells.nprobe) == (20, 3)
    assert build_index(GALLERY, "ivf_pq", settings=IndexSettings(code_bytes=8)).raw.code_size == 8


def test_what_settings_leave_open_follows_from_the_gallery(monkeypatch):
    assert build_index(GALLERY, "ivf_flat", settings=IndexSettings(lists=100)).raw.nprobe == 3
    assert build_index(GALLERY, "ivf_flat", settings=IndexSettings(lists=10)).raw.nprobe == 1
    assert build_index(GALLERY, "ivf_flat").raw.nlist == 1500 // 39
    monkeypatch.setattr(index_faiss, "_ROWS_PER_LIST", 1)
    assert build_index(GALLERY, "ivf_flat").raw.nlist == round(4 * 1500**0.5)
    for dim, wanted in ((16, 4), (20, 5), (12, 3), (14, 2), (7, 1), (2, 1)):
        assert build_index(clustered(300, dim), "ivf_pq").raw.code_size == wanted


def cells_of(seed, metric="euclidean"):
    """The centers of 20 cells, trained on a hundred rows of a gallery in the order of their first channel."""
    gallery = GALLERY[GALLERY[:, 0].argsort()]
    index = build_index(gallery, "ivf_flat", metric=metric, settings=IndexSettings(lists=20, seed=seed))
    return torch.as_tensor(index.raw.quantizer.reconstruct_n(0, 20))


def test_cells_are_trained_on_a_sample_that_the_seed_draws(monkeypatch):
    monkeypatch.setattr(index_faiss, "_TRAINING_ROWS_PER_LIST", 5)
    monkeypatch.setattr(index_faiss, "_PQ_CENTROIDS", 1)
    state = torch.get_rng_state()
    first, again, other = (cells_of(seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    # Rows from the whole gallery, not its first: cells lie on both sides.
    middle = GALLERY[:, 0].median()
    assert 4 <= int((first[:, 0] < middle).sum()) <= 16
    seeds = []

    def first_rows(n, generator):
        seeds.append(generator.initial_seed())
        return torch.arange(n)

    monkeypatch.setattr("torch.randperm", first_rows)
    assert not torch.equal(cells_of(1), first) and seeds == [1]


def test_cells_of_the_cosine_are_directions():
    torch.testing.assert_close(cells_of(0, "cosine").norm(dim=1), torch.ones(20))
    assert (cells_of(0).norm(dim=1) - 1).abs().min() > 0.1


@pytest.mark.parametrize(("kind", "backend"), FLAT)
def test_a_row_is_at_no_distance_to_itself(kind, backend):
    """The square of one may come out below zero."""
    found = build_index(GALLERY, kind, metric="euclidean", backend=backend).search(GALLERY, 1)
    assert torch.equal(found.indices[:, 0], torch.arange(1500))
    assert found.values.min() >= 0 and found.values.max() < 0.02


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_autocast_changes_no_search(metric):
    index = build_index(GALLERY, metric=metric, backend="torch")
    expected = index.search(QUERIES, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = index.search(QUERIES, 9)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


@pytest.mark.parametrize("scale", [1e-100, 1e100])
def test_directions_of_rows_that_float32_does_not_hold(scale):
    expected = build_index(GALLERY, backend="torch").search(QUERIES, 5)
    found = build_index(GALLERY.double() * scale, backend="torch").search(QUERIES.double() / scale, 5)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.values, expected.values)


def test_faiss_for_torch_changes_nothing():
    index = build_index(GALLERY, "ivf_flat", settings=IndexSettings(lists=30, probes=2))
    before = index.search(QUERIES, 5), index.search(QUERIES, 5, effort=30)
    import faiss.contrib.torch_utils  # noqa: F401  pytorch-metric-learning does so; it replaces faiss's methods

    assert hasattr(index.raw, "search_numpy")
    after = index.search(QUERIES, 5), index.search(QUERIES, 5, effort=30)
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True))
    assert build_index(GALLERY, "hnsw").search(GALLERY[:3], 1).indices.tolist() == [[0], [1], [2]]


def test_too_few_found_is_minus_one():
    index = build_index(torch.eye(6), "ivf_flat", settings=IndexSettings(lists=6, probes=1))
    for metric, nothing in (("cosine", -torch.inf), ("euclidean", torch.inf)):
        index = build_index(torch.eye(6), "ivf_flat", metric=metric, settings=IndexSettings(lists=6, probes=1))
        found = index.search(torch.eye(6)[:2], 3)
        assert found.indices.tolist() == [[0, -1, -1], [1, -1, -1]]
        assert found.values[:, 1:].tolist() == [[nothing, nothing]] * 2


@pytest.mark.parametrize(("kind", "backend"), EVERY)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_written_and_read_again(kind, backend, metric):
    index = build_index(GALLERY, kind, metric=metric, backend=backend, settings=IndexSettings(lists=20, probes=5))
    file = io.BytesIO()
    index.write(file)
    for reader in ("torch", "faiss") if kind == "flat" else ("faiss",):
        again = read_index(io.BytesIO(file.getvalue()), kind, metric, backend=reader)
        assert (len(again), again.dim, again.kind, again.metric, again.backend) == (1500, 16, kind, metric, reader)
        before, after = index.search(QUERIES, 5), again.search(QUERIES, 5)
        assert torch.equal(before.indices, after.indices)
        torch.testing.assert_close(before.values, after.values)
        again.add(QUERIES)
        assert len(again) == 1560
        if kind != "ivf_pq":
            assert torch.equal(again.search(QUERIES, 1).indices[:, 0], torch.arange(1500, 1560))


def test_a_flat_index_is_a_file_that_numpy_reads():
    file = io.BytesIO()
    build_index(GALLERY, metric="euclidean", backend="torch").write(file)
    file.seek(0)
    assert np.array_equal(np.load(file), GALLERY.numpy())


def test_rows_of_a_file_in_either_order(tmp_path):
    for order in "CF":
        np.save(tmp_path / "rows.npy", np.asarray(GALLERY.numpy(), order=order))
        with open(tmp_path / "rows.npy", "rb") as file:
            found = read_index(file, "flat", "euclidean", backend="torch").search(QUERIES, 3)
        assert torch.equal(found.indices, build_index(GALLERY, metric="euclidean").search(QUERIES, 3).indices)


@pytest.mark.parametrize(("kind", "backend"), EVERY)
def test_a_broken_file_is_one_line(kind, backend):
    file = io.BytesIO()
    build_index(GALLERY, kind, backend=backend, settings=IndexSettings(lists=20)).write(file)
    for content in (b"", b"no index at all", file.getvalue()[: len(file.getvalue()) // 2]):
        with pytest.raises(UserError, match="the file is not an index .*; it must be") as error:
            read_index(io.BytesIO(content), kind, "cosine")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [GALLERY.numpy()[0], GALLERY.double().numpy(), GALLERY.numpy()[:, :0]])
def test_rows_that_no_index_wrote(rows):
    file = io.BytesIO()
    np.save(file, rows)
    with pytest.raises(UserError, match=r"the index has .* rows of shape \(.*; it must have float32 rows \(n, D\)"):
        read_index(io.BytesIO(file.getvalue()), "flat", "cosine")


def test_kind_and_metric_are_checked_when_read():
    file = io.BytesIO()
    build_index(GALLERY, "hnsw").write(file)
    with pytest.raises(UserError, match="is a IndexHNSWFlat for cosine; it must be a IndexIVFFlat for cosine"):
        read_index(io.BytesIO(file.getvalue()), "ivf_flat", "cosine")
    with pytest.raises(UserError, match="is a IndexHNSWFlat for cosine; it must be a IndexHNSWFlat for euclidean"):
        read_index(io.BytesIO(file.getvalue()), "hnsw", "euclidean")


def test_progress():
    steps = []
    index = build_index(GALLERY, progress=lambda *step: steps.append(step))
    index.search(QUERIES, 2, chunk=25, progress=lambda *step: steps.append(step))
    recall_against_exact(index, GALLERY, QUERIES, 2, progress=lambda *step: steps.append(step))
    assert steps == [(1500, 1500), (25, 60), (50, 60), (60, 60), (60, 60)]


def test_a_gallery_in_many_blocks(monkeypatch):
    monkeypatch.setattr("gcahng.retrieval.index_torch._BLOCK", 100)
    index = build_index(GALLERY[:700], backend="torch")
    index.add(GALLERY[700:])
    assert torch.equal(index.search(QUERIES, 150).indices, nearest(QUERIES, 150, gallery_embeddings=GALLERY))


@pytest.mark.parametrize(("m", "k"), [(1, 1), (50, 50), (800, 3), (805, 25), (4003, 100), (4007, 4007)])
def test_smallest_is_topk(m, k):
    values = torch.randint(0, 1000, (9, m), generator=torch.Generator().manual_seed(m)).float()
    found, indices = smallest(values, k)
    assert torch.equal(found, values.topk(k, dim=1, largest=False).values)
    assert torch.equal(values.gather(1, indices), found)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_without_faiss(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(candidates, "_warned", set())
    with caplog.at_level(logging.WARNING, "gcahng"):
        assert build_index(GALLERY).backend == "torch"
        nearest(GALLERY[:20], 2)
    assert (
        [record.message for record in caplog.records].count(
            "retrieval searches without faiss, which would be faster in large galleries: "
            'faiss is not installed; pip install "gcahng[faiss-cpu]" or "gcahng[faiss-gpu]" brings it'
        )
        == len(caplog.records)
        == 1
    )
    for kind in KINDS[1:]:
        with pytest.raises(UserError, match=rf'kind=\'{kind}\': faiss is not installed; pip install "gcahng\[faiss-c'):
            build_index(GALLERY, kind)
    with pytest.raises(UserError, match='backend="faiss": faiss is not installed'):
        build_index(GALLERY, backend="faiss")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="lsh"), "kind is 'lsh'; it must be one of flat, ivf_flat, ivf_pq, hnsw"),
        (dict(metric="dot"), "metric is 'dot'; it must be one of cosine, euclidean"),
        (dict(backend="annoy"), "backend is 'annoy'; it must be one of auto, torch, faiss"),
        (dict(kind="hnsw", backend="torch"), 'backend is "torch" and kind is \'hnsw\'; it must be "faiss" or "auto"'),
        (dict(embeddings=GALLERY[0]), r"embeddings has shape \(16,\); it must have shape \(n, D\)"),
        (dict(embeddings=GALLERY * 0), 'norm 0.0 in row 0; it must be positive and finite with metric="cosine"'),
        (dict(kind="ivf_pq", embeddings=GALLERY[:255]), "embeddings has 255 rows; it must have at least 256"),
        (
            dict(kind="ivf_pq", settings=IndexSettings(code_bytes=5)),
            "code_bytes is 5; it must divide 16, the number of channels",
        ),
        (
            dict(kind="ivf_flat", settings=IndexSettings(lists=1501)),
            "lists is 1501; it must be at most 1500, the number of",
        ),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        build_index(**(dict(embeddings=GALLERY) | arguments))
    assert "\n" not in str(error.value)


def test_errors_of_settings_and_search():
    with pytest.raises(UserError, match="probes is 0; it must be None or a whole number of at least 1"):
        IndexSettings(probes=0)
    with pytest.raises(UserError, match="links is None; it must be a whole number of at least 2"):
        IndexSettings(links=None)
    with pytest.raises(UserError, match="seed is 2147483648; it must be a whole number of at least 0 and at most"):
        IndexSettings(seed=2**31)
    with pytest.raises(UserError, match="links is 1; it must be a whole number of at least 2"):  # faiss would crash
        IndexSettings(links=1)
    for name, value, most in (
        ("links", 2**30, "4,096"),
        ("build_breadth", 2**31, r"2\^31 - 1"),
        ("search_breadth", 2**70, r"2\^31 - 1"),
    ):
        with pytest.raises(
            UserError, match=rf"{name} is {value}; it must be a whole number of at least [12] and at most {most}"
        ):
            IndexSettings(**{name: value})
    for backend in ("torch", "faiss"):
        index = build_index(GALLERY, backend=backend)
        for arguments, message in [
            (dict(k=0), "k is 0; it must be an integer from 1 to 1500, the number of rows in the index"),
            (dict(k=1501), "k is 1501; it must be an integer from 1 to 1500"),
            (dict(effort=3), 'effort is 3; it must be None for kind "flat", which compares all rows'),
            (dict(effort=0), "effort is 0; it must be a positive integer"),
            (dict(chunk=0), "chunk is 0; it must be a positive integer"),
            (dict(queries=QUERIES[:, :3]), "queries has 3 channels; it must have 16, like the embeddings"),
            (
                dict(queries=QUERIES * 0),
                'queries has norm 0.0 in row 0; it must be positive and finite with metric="cosine"',
            ),
        ]:
            with pytest.raises(UserError, match=message):
                index.search(**(dict(queries=QUERIES, k=3) | arguments))
    with pytest.raises(
        UserError, match=r"embeddings has shape \(60, 16\); it must have that of the index, \(1500, 16\)"
    ):
        recall_against_exact(index, QUERIES, QUERIES)
