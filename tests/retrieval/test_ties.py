"""Ties, deep Recall@K and the official protocol against plain implementations that try every order."""

import itertools
import statistics

import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import candidates, plan, queries, retrieval_metrics

BACKENDS = ["torch", "faiss"]
ALL = ("recall", "precision", "map", "map@r", "r_precision")
AT = dict(recall_at=(1, 2, 4, 9, 30), precision_at=(1, 3, 50), map_at=(2, 5, 100))


def values_of(right, size):
    """The definitions for one query, from its whole ranking (a list of 0 and 1)."""
    padded = [*right, *[0] * 100]
    precision = [sum(padded[: i + 1]) / (i + 1) for i in range(len(padded))]

    def summed(k):
        return sum(precision[i] * padded[i] for i in range(k))

    return (
        {f"recall@{k}": float(any(right[:k])) for k in AT["recall_at"]}
        | {f"precision@{k}": precision[k - 1] for k in AT["precision_at"]}
        | {f"map@{k}": summed(k) / min(size, k) for k in AT["map_at"]}
        | {"map@r": summed(size) / size, "r_precision": precision[size - 1]}
    )


def plain(embeddings, labels, gallery, gallery_labels, ties, own):
    """Every query by itself: all orders of every group of equal distances, of which there must be few."""
    found = []
    gallery_labels = gallery_labels.tolist()
    for i, (query, label) in enumerate(zip(embeddings.double(), labels.tolist(), strict=True)):
        distances = (gallery.double() - query).square().sum(dim=1).tolist()
        rows = sorted((d, j) for j, d in enumerate(distances) if not (own and i == j))
        size = sum(gallery_labels[j] == label for _, j in rows)
        if not size:
            continue
        groups = [
            [int(gallery_labels[j] == label) for _, j in group] for _, group in itertools.groupby(rows, lambda r: r[0])
        ]
        if ties == "optimistic":
            groups = [sorted(group, reverse=True) for group in groups]
        elif ties == "pessimistic":
            groups = [sorted(group) for group in groups]
        if ties == "expected":
            # Orders of equal rows are equal: as many sequences of 0 and 1 as there are places for the ones.
            places = [list(itertools.combinations(range(len(g)), sum(g))) for g in groups]
            rankings = [
                [int(t in ones) for group, ones in zip(groups, chosen, strict=True) for t in range(len(group))]
                for chosen in itertools.product(*places)
            ]
        else:
            rankings = [list(itertools.chain(*groups))]
        each = [values_of(ranking, size) for ranking in rankings]
        found.append({name: statistics.fmean(values[name] for values in each) for name in each[0]})
    return {name: statistics.fmean(values[name] for values in found) for name in found[0]} | {
        "queries": len(found),
        "queries_without_match": len(labels) - len(found),
    }


def grid(n, seed, classes):
    """Rows on a line of few points, so that many distances are equal, and exactly so."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 7, (n, 1), generator=generator).float(),
        torch.randint(0, classes, (n,), generator=generator),
    )


@pytest.fixture(params=[True, False], ids=["ranked", "counted_out"])
def ranked_recall(request, monkeypatch):
    """Recall@K from the ranking, or, which takes the ranking to be short, by counting who is nearer, a few rows at
    once."""
    if not request.param:
        monkeypatch.setattr(plan, "_RANKED_RECALL", 0)
        monkeypatch.setattr("gcahng.retrieval.neighbors._DOUBT_WIDTH", 4)
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ties", ["index", "expected", "optimistic", "pessimistic"])
@pytest.mark.parametrize("margin", [0, 32])
def test_ties_in_self_retrieval(ties, backend, margin, ranked_recall, monkeypatch):
    monkeypatch.setattr("gcahng.retrieval.neighbors._MARGIN", margin)
    embeddings, labels = grid(14, 1, 4)
    expected = plain(embeddings, labels, embeddings, labels, ties, own=True)
    options = dict(normalize=False, ties=ties, backend=backend, **AT)
    assert retrieval_metrics(embeddings, labels, metrics=ALL, **options) == pytest.approx(expected, abs=1e-14)
    for name in ALL:
        found = retrieval_metrics(embeddings, labels, metrics=(name,), chunk=5, **options)
        assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ties", ["index", "expected", "optimistic", "pessimistic"])
def test_ties_in_a_gallery(ties, backend, ranked_recall):
    embeddings, labels = grid(12, 2, 5)
    gallery, gallery_labels = grid(15, 3, 4)
    expected = plain(embeddings, labels, gallery, gallery_labels, ties, own=False)
    assert expected["queries_without_match"] > 0
    options = dict(gallery_embeddings=gallery, gallery_labels=gallery_labels, normalize=False, ties=ties, **AT)
    for metrics in (ALL, ("recall",)):
        found = retrieval_metrics(embeddings, labels, metrics=metrics, backend=backend, **options)
        assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-14)


def test_ties_beyond_every_margin_are_all_counted():
    # 200 copies of one row: 50 of class 0, then 150 of class 1. A query of class 0 has 49 right among 199.
    labels = torch.tensor([0] * 50 + [1] * 150)
    found = {
        ties: retrieval_metrics(
            torch.ones(200, 3), labels, metrics=("recall", "precision"), recall_at=(1, 120), ties=ties, per_class=True
        ).per_class
        for ties in ("index", "expected", "optimistic", "pessimistic")
    }
    assert found["index"][0]["precision@10"] == 1.0 and found["index"][1]["recall@1"] == 0.0
    assert found["index"][1]["recall@120"] == 1.0
    assert found["expected"][0]["recall@1"] == pytest.approx(49 / 199)
    assert found["expected"][0]["precision@10"] == pytest.approx(49 / 199)
    assert found["optimistic"][0]["recall@1"] == found["optimistic"][1]["precision@10"] == 1.0
    assert found["pessimistic"][0]["recall@120"] == 0.0
    # Of class 1, 149 are right and 50 wrong: past the 50th the first right one has come.
    assert found["pessimistic"][1]["recall@1"] == 0.0 and found["pessimistic"][1]["recall@120"] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_deep_recall_is_the_same_ranked_and_counted_out(backend, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 90, (400,), generator=generator)
    embeddings = torch.randn(400, 8, generator=generator)
    # Rows apart by less than float32 products can tell, so that counting has to look twice.
    embeddings = torch.cat([embeddings, embeddings[:100] * (1 + 1e-7)])
    labels = torch.cat([labels, torch.randint(0, 90, (100,), generator=generator)])
    recall_at = (1, 5, 20, 60, 100, 300, 499)
    for ties in ("index", "pessimistic"):
        monkeypatch.setattr(plan, "_RANKED_RECALL", 1000)
        ranked = retrieval_metrics(embeddings, labels, recall_at=recall_at, backend=backend, ties=ties)
        monkeypatch.setattr(plan, "_RANKED_RECALL", 0)
        monkeypatch.setattr(candidates, "_GALLERY_BLOCK", 333)
        assert retrieval_metrics(embeddings, labels, recall_at=recall_at, backend=backend, ties=ties) == ranked
    assert 0 < ranked["recall@60"] < ranked["recall@300"] < 1


def test_autocast_changes_no_count(ranked_recall):
    """Products of bfloat16 would put rows on the wrong side of a K."""
    generator = torch.Generator().manual_seed(6)
    embeddings, labels = torch.randn(300, 64, generator=generator), torch.arange(300) % 40
    options = dict(recall_at=(1, 3, 10, 30), backend="torch")
    expected = retrieval_metrics(embeddings, labels, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(embeddings, labels, **options) == expected


def test_products_less_precise_than_promised_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    embeddings, labels = torch.randn(300, 8, generator=generator), torch.arange(300) // 3
    expected = retrieval_metrics(embeddings, labels, backend="torch")
    honest = candidates.TorchCandidates.__call__

    def sloppy(self, rows, k):
        distances, _ = honest(self, rows, len(self._gallery))
        distances, indices = honest(self, (rows * 8).round() / 8, k)
        return distances, indices

    monkeypatch.setattr(candidates.TorchCandidates, "__call__", sloppy)
    assert retrieval_metrics(embeddings, labels, backend="torch") == expected


def plain_official(embeddings, labels, recall_at, gallery=None, gallery_labels=None, depth=1000):
    """What the authors' evaluation computes, with exact distances and ties by index."""
    own = gallery is None
    gallery, gallery_labels = (embeddings, labels) if own else (gallery, gallery_labels)
    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (embeddings, gallery))
    hits = {k: [] for k in recall_at}
    map_at_r, r_precision = [], []
    for i, label in enumerate(labels):
        distances = (b - a[i]).square().sum(dim=1)
        ranking = distances.sort(stable=True).indices[int(own) :][:depth]
        right = gallery_labels[ranking] == label
        size = int((gallery_labels == label).sum()) - int(own)
        for k in recall_at:
            if own:
                hits[k].append(bool(right[:k].any()))
            else:
                positive = gallery_labels == label
                hits[k].append(int((distances[~positive] < distances[positive].min()).sum()) < k)
        precision = right.cumsum(0).double() / torch.arange(1, len(right) + 1)
        map_at_r.append(float((precision * right)[:size].sum() / size))
        r_precision.append(int(right[:size].sum()) / size)
    return {f"recall@{k}": statistics.fmean(v) for k, v in hits.items()} | {
        "map@r": statistics.fmean(map_at_r),
        "r_precision": statistics.fmean(r_precision),
        "queries": len(labels),
        "queries_without_match": 0,
    }


def duplicates(seed, classes=6):
    """Directions of which many are equal, to the last bit; each class at least twice."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(25, 4, generator=generator)[torch.randint(0, 25, (60,), generator=generator)]
    labels = torch.cat(
        [torch.arange(classes).repeat(2), torch.randint(0, classes, (60 - 2 * classes,), generator=generator)]
    )
    return rows, labels


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1000, 7])
def test_official_self_retrieval(backend, depth, ranked_recall, monkeypatch):
    monkeypatch.setattr(plan, "OFFICIAL_DEPTH", depth)
    monkeypatch.setattr(queries, "OFFICIAL_DEPTH", depth)
    recall_at = (1, 2, 5, 40)
    for seed in range(5):
        embeddings, labels = duplicates(seed)
        expected = plain_official(embeddings, labels, recall_at, depth=depth)
        options = dict(recall_at=recall_at, protocol="official", backend=backend)
        found = retrieval_metrics(embeddings, labels, **options)
        assert found == pytest.approx(expected, abs=1e-14)
        found = retrieval_metrics(embeddings, labels, metrics=("recall",), **options)
        assert found == pytest.approx({key: expected[key] for key in found}, abs=1e-14)
    # A query dropped by index and one dropped by rank are not the same thing here.
    assert retrieval_metrics(embeddings, labels, recall_at=recall_at)["recall@1"] != expected["recall@1"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depth", [1000, 7])
def test_official_in_shop(backend, depth, ranked_recall, monkeypatch):
    monkeypatch.setattr(plan, "OFFICIAL_DEPTH", depth)
    recall_at = (1, 2, 5, 40)
    embeddings, labels = duplicates(10)
    gallery, gallery_labels = duplicates(11)
    gallery[:40] = embeddings[20:]
    expected = plain_official(embeddings, labels, recall_at, gallery, gallery_labels, depth=depth)
    options = dict(gallery_embeddings=gallery, gallery_labels=gallery_labels, recall_at=recall_at, backend=backend)
    assert retrieval_metrics(embeddings, labels, protocol="official", **options) == pytest.approx(expected, abs=1e-14)
    assert retrieval_metrics(embeddings, labels, **options)["recall@1"] < expected["recall@1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("protocol", ["exact", "official"])
def test_cuda_equals_cpu(protocol, ranked_recall):
    embeddings, labels = duplicates(12)
    options = dict(metrics=ALL, protocol=protocol, **AT)
    assert retrieval_metrics(embeddings.cuda(), labels.cuda(), **options) == retrieval_metrics(
        embeddings, labels, **options
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ties="random"), "ties is 'random'; it must be one of index, expected, optimistic, pessimistic"),
        (dict(protocol="paper"), "protocol is 'paper'; it must be one of exact, official"),
        (dict(protocol="official", ties="expected"), 'ties is .*; it must be "index" with protocol="official"'),
        (dict(protocol="official", normalize=False), 'normalize is False; it must be True with protocol="official"'),
        (
            dict(protocol="official", labels=torch.tensor([0, 0, 1, 2])),
            "labels has 2 queries without another item of their class, the first in row 2",
        ),
        (dict(metrics=("ndcg",)), "must be one or more of recall, precision, map, map@r, r_precision"),
        (dict(metrics=()), r"metrics is \(\); it must be one or more of"),
        (dict(metrics="mrr"), r"metrics is \('mrr',\); it must be one or more of"),
        (dict(precision_at=(0,)), r"precision_at is \(0,\); it must be a sequence of positive integers"),
        (dict(map_at=7), "map_at is 7; it must be a sequence of positive integers"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        retrieval_metrics(**(dict(embeddings=torch.eye(4), labels=torch.tensor([0, 0, 1, 1])) | arguments))
    assert "\n" not in str(error.value)
