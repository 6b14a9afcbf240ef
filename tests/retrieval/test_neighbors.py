"""Nearest neighbors against a plain search, with ties, duplicates and every way to split the work."""

import sys

import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import candidates, nearest, neighbors

faiss = pytest.importorskip("faiss")
BACKENDS = ["torch", "faiss"]


def plain_nearest(queries, gallery, k, normalize, own_index):
    """One query after the other, in float64: sort (distance, index) pairs."""
    queries, gallery = queries.double(), gallery.double()
    if normalize:
        queries = queries / queries.norm(dim=1, keepdim=True)
        gallery = gallery / gallery.norm(dim=1, keepdim=True)
    found = []
    for i, query in enumerate(queries):
        distances = (gallery - query).square().sum(dim=1).tolist()
        pairs = sorted((d, j) for j, d in enumerate(distances) if not (own_index and j == i))
        found.append([j for _, j in pairs[:k]])
    return torch.tensor(found)


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_self_retrieval(backend, normalize, dtype):
    x = seeded(203, 17).to(dtype)
    expected = plain_nearest(x, x, 9, normalize, own_index=True)
    assert torch.equal(nearest(x, 9, normalize=normalize, backend=backend, chunk=50), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_query_gallery(backend, normalize):
    queries, gallery = seeded(37, 5, seed=1), seeded(211, 5, seed=2)
    expected = plain_nearest(queries, gallery, 211, normalize, own_index=False)
    for k in (1, 8, 211):
        found = nearest(queries, k, gallery_embeddings=gallery, normalize=normalize, backend=backend)
        assert torch.equal(found, expected[:, :k])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5, 40, 299])
def test_ties_are_in_the_order_of_the_index(backend, k):
    # Small integers: distances are exact, and hundreds of them are equal, also at the k-th and beyond every margin.
    x = torch.randint(0, 2, (300, 3), generator=torch.Generator().manual_seed(3)).float()
    expected = plain_nearest(x, x, k, normalize=False, own_index=True)
    assert torch.equal(nearest(x, k, normalize=False, backend=backend, chunk=64), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_tie_exactly_when_normalized(backend):
    # 60 copies of each of five rows, by powers of two: the same direction to the last bit.
    x = seeded(5, 24).repeat(60, 1) * 2.0 ** torch.arange(300).remainder(7).unsqueeze(1)
    expected = plain_nearest(x, x, 45, normalize=True, own_index=True)
    assert torch.equal(nearest(x, 45, backend=backend), expected)
    # All of them are copies of the query, in ascending order, without the query itself.
    assert expected[0].tolist() == list(range(5, 230, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel_has_two_directions(backend):
    x = seeded(150, 1, seed=10)
    found = nearest(x, 149, backend=backend)
    for i, row in enumerate(found.tolist()):
        same = [j for j in range(150) if j != i and x[j].sign() == x[i].sign()]
        assert row[: len(same)] == same and row[len(same) :] == sorted(row[len(same) :])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_closer_than_float32_products_can_tell(backend):
    # 100 rows around one point, apart by 1e-9: only the float64 distances order them.
    x = (seeded(1, 32, dtype=torch.float64) + 1e-9 * seeded(100, 32, seed=4, dtype=torch.float64)).contiguous()
    expected = plain_nearest(x, x, 10, normalize=False, own_index=True)
    assert torch.equal(nearest(x, 10, normalize=False, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_collapsed_embedding(backend):
    found = nearest(torch.ones(150, 8), 3, backend=backend)
    assert found[0].tolist() == [1, 2, 3]
    assert found[1].tolist() == [0, 2, 3]
    assert found[149].tolist() == [0, 1, 2]


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e30, 1e100])
@pytest.mark.parametrize("normalize", [True, False])
def test_scale_does_not_matter(scale, normalize):
    x = seeded(120, 11, seed=5, dtype=torch.float32 if 1e-38 < scale < 1e38 else torch.float64).mul(scale)
    expected = plain_nearest(x, x, 6, normalize, own_index=True)
    for backend in BACKENDS:
        assert torch.equal(nearest(x, 6, normalize=normalize, backend=backend), expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_chunks_leave_no_trace(backend):
    x = seeded(101, 6, seed=6).repeat(2, 1)
    whole = nearest(x, 7, backend="torch", chunk=1000)
    for chunk in (1, 2, 33, 202):
        assert torch.equal(nearest(x, 7, backend=backend, chunk=chunk), whole)


@pytest.mark.parametrize("k", [1, 30, 190])
def test_a_gallery_in_many_blocks(k, monkeypatch):
    x = seeded(101, 6, seed=6).repeat(2, 1)
    whole = nearest(x, k, backend="torch")
    monkeypatch.setattr(candidates, "_GALLERY_BLOCK", 60)
    assert torch.equal(nearest(x, k, backend="torch"), whole)


def test_some_queries():
    x = seeded(64, 4, seed=7)
    whole = nearest(x, 5)
    rows = torch.tensor([40, 3, 3, 63])
    assert torch.equal(nearest(x, 5, queries=rows), whole[rows])
    assert nearest(x, 5, queries=rows[:0]).shape == (0, 5)


def test_low_precision_settings_change_nothing():
    x = seeded(400, 64, seed=8)
    expected = plain_nearest(x, x, 4, normalize=True, own_index=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest(x, 4, backend="torch"), expected)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        assert candidates.float32_products_are_float32(x.device) is False
        assert torch.equal(nearest(x, 4, backend="torch"), expected)
    finally:
        matmul.fp32_precision = before


def test_rounding_bound_holds():
    for dim in (1, 24, 512):
        x = torch.nn.functional.normalize(seeded(200, dim, seed=dim, dtype=torch.float64), dim=1)
        exact = (x.unsqueeze(1) - x).square().sum(dim=2)
        error = (candidates.square_distances(x.float(), x.float()).double() - exact).abs().max()
        assert error <= candidates.rounding(dim, torch.float32)


def test_only_what_is_needed_is_searched(monkeypatch):
    asked = []
    propose = candidates.TorchCandidates.__call__

    def spy(self, queries, k):
        asked.append((len(queries), k))
        return propose(self, queries, k)

    def never(*_):
        raise AssertionError("the whole gallery was scanned again, although no query needs it")

    monkeypatch.setattr(candidates.TorchCandidates, "__call__", spy)
    monkeypatch.setattr(neighbors.NeighborSearch, "_rescan", never)
    nearest(seeded(500, 8), 6, backend="torch", chunk=200)
    assert asked == [(rows, 6 + 1 + neighbors._MARGIN) for rows in (200, 200, 100)]


def test_gradients_and_inputs_are_left_alone():
    x = seeded(30, 4).requires_grad_()
    before = x.detach().clone()
    assert not nearest(x, 2).requires_grad
    assert torch.equal(x.detach(), before) and x.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(embeddings=seeded(8)), r"embeddings has shape \(8,\); it must have shape \(n, D\) with n, D >= 1"),
        (dict(embeddings=torch.empty(0, 4)), r"embeddings has shape \(0, 4\); it must have shape"),
        (dict(embeddings=[[1.0, 2.0]]), "embeddings is a list; it must be a tensor"),
        (dict(embeddings=torch.ones(8, 4, dtype=torch.int64)), "embeddings is int64; it must be floating point"),
        (
            dict(embeddings=seeded(8, 4).index_fill(0, torch.tensor([5]), torch.nan)),
            "embeddings .* in row 5; it must be finite",
        ),
        (
            dict(embeddings=seeded(8, 4).index_fill(0, torch.tensor([2]), 0.0)),
            "embeddings has norm 0.0 in row 2; it must",
        ),
        (
            dict(embeddings=seeded(8, 4).double().index_fill(0, torch.tensor([1]), 1e300)),
            "has norm inf in row 1; it must",
        ),
        (dict(gallery_embeddings=seeded(8, 5)), "gallery_embeddings has 5 channels; it must have 4, like the"),
        (dict(gallery_embeddings=seeded(8, 4) / 0), "gallery_embeddings .* in row 0; it must be finite"),
        (dict(k=0), "k is 0; it must be an integer from 1 to 7,"),
        (dict(k=8), "k is 8; it must be an integer from 1 to 7,"),
        (dict(k=2.0), r"k is 2\.0; it must be an integer from 1 to 7,"),
        (dict(queries=torch.tensor([0, 8])), "queries has values from 0 to 8; they must be from 0 to 7"),
        (dict(queries=torch.tensor([-1])), "queries has values from -1 to -1; they must be from 0 to 7"),
        (
            dict(queries=torch.tensor([0.5])),
            r"queries is float32 of shape \(1,\); it must be int64 or int32 row indices",
        ),
        (dict(backend="hnsw"), "backend is 'hnsw'; it must be one of auto, torch, faiss"),
        (dict(chunk=0), "chunk is 0; it must be a positive integer"),
    ],
)
def test_errors(arguments, message):
    arguments = dict(embeddings=seeded(8, 4), k=3) | arguments
    with pytest.raises(UserError, match=message) as error:
        nearest(**arguments)
    assert "\n" not in str(error.value)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    x = seeded(40, 4)
    with pytest.raises(UserError, match=r'backend="faiss": faiss is not installed; pip install "gcahng\[faiss-cpu\]"'):
        nearest(x, 3, backend="faiss")
    assert torch.equal(nearest(x, 3, backend="auto"), nearest(x, 3, backend="torch"))


def test_more_neighbors_than_a_gpus_index_gives(monkeypatch):
    x = seeded(300, 8, seed=10)
    wanted = nearest(x, 40, backend="faiss")
    search = faiss.IndexFlatL2.search
    asked = []

    class Few(candidates.FaissCandidates):
        def __init__(self, gallery):
            super().__init__(gallery)
            self._most = 50

    def counted(index, queries, k):
        asked.append(k)
        return search(index, queries, k)

    monkeypatch.setattr(neighbors, "FaissCandidates", Few)
    monkeypatch.setattr(faiss.IndexFlatL2, "search", counted)
    assert torch.equal(nearest(x, 40, backend="faiss"), wanted) and asked == []
    assert torch.equal(nearest(x, 5, backend="faiss"), wanted[:, :5]) and asked and max(asked) <= 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_equals_cpu():
    x = seeded(500, 32, seed=9).repeat(2, 1)
    found = nearest(x.cuda(), 12)
    assert found.is_cuda
    assert torch.equal(found.cpu(), nearest(x, 12, backend="torch"))
