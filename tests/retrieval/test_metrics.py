"""Retrieval metrics against the authors' numbers, a plain implementation and pytorch-metric-learning."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gcahng.errors import UserError
from gcahng.retrieval import nearest, retrieval_metrics

BACKENDS = ["torch", "faiss"]
GOLDEN = Path(__file__).parents[1] / "golden" / "retrieval.safetensors"


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["expected"])  # noqa: SIM118


def plain_metrics(neighbors, labels, gallery_labels, sizes, recall_at):
    """The definitions, query by query, from the full ranking (lists of gallery indices)."""
    recall, map_at_r, r_precision = {k: [] for k in recall_at}, [], []
    for ranking, label, size in zip(neighbors, labels, sizes, strict=True):
        if size == 0:
            continue
        right = [gallery_labels[j] == label for j in ranking]
        for k in recall_at:
            recall[k].append(any(right[:k]))
        r_precision.append(sum(right[:size]) / size)
        map_at_r.append(sum(sum(right[: i + 1]) / (i + 1) for i in range(size) if right[i]) / size)
    n = len(map_at_r)
    return {f"recall@{k}": sum(v) / n for k, v in recall.items()} | {
        "map@r": sum(map_at_r) / n,
        "r_precision": sum(r_precision) / n,
        "queries": n,
        "queries_without_match": len(labels) - n,
    }


def check_golden(metrics, expected):
    for k, value in expected["recall"].items():
        assert metrics[f"recall@{k}"] == value
    assert abs(metrics["map@r"] - expected["map_at_r"]) <= 1e-7
    assert abs(metrics["r_precision"] - expected["r_precision"]) <= 1e-7
    assert metrics["queries_without_match"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_self_retrieval(golden, backend):
    tensors, expected = golden
    recall_at = [int(k) for k in expected["single"]["recall"]]
    metrics = retrieval_metrics(tensors["embeddings"], tensors["labels"], recall_at=recall_at, backend=backend)
    check_golden(metrics, expected["single"])
    assert metrics["queries"] == 1500


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_query_gallery(golden, backend):
    tensors, expected = golden
    metrics = retrieval_metrics(
        tensors["query"],
        tensors["query_labels"],
        recall_at=[int(k) for k in expected["query_gallery"]["recall"]],
        gallery_embeddings=tensors["gallery"],
        gallery_labels=tensors["gallery_labels"],
        backend=backend,
    )
    check_golden(metrics, expected["query_gallery"])
    assert metrics["queries"] == 300


def odd_data(seed):
    """Classes of 1 to 12 samples in a mixed order, with duplicates across and within classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((size,), 7 * size - 3) for size in range(1, 13)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centers = torch.randn(100, 6, generator=generator)
    embeddings = centers[labels] + torch.randn(len(labels), 6, generator=generator)
    copies = torch.randint(0, len(labels), (40, 2), generator=generator)
    embeddings[copies[:, 0]] = embeddings[copies[:, 1]]
    return embeddings, labels


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("normalize", [True, False])
def test_self_retrieval_is_the_definition(seed, normalize):
    embeddings, labels = odd_data(seed)
    ranking = nearest(embeddings, len(labels) - 1, normalize=normalize).tolist()
    sizes = [int((labels == label).sum()) - 1 for label in labels]
    recall_at = (1, 3, 5, 200)
    expected = plain_metrics(ranking, labels.tolist(), labels.tolist(), sizes, recall_at)
    assert expected["queries_without_match"] == 1
    for backend in BACKENDS:
        for chunk in (1, 7, 64, 1024):
            metrics = retrieval_metrics(
                embeddings, labels, recall_at=recall_at, normalize=normalize, backend=backend, chunk=chunk
            )
            assert metrics == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_gallery_is_the_definition(backend):
    embeddings, labels = odd_data(5)
    gallery, gallery_labels = odd_data(6)
    keep = gallery_labels != labels[0]
    gallery, gallery_labels = gallery[keep], gallery_labels[keep]
    ranking = nearest(embeddings, len(gallery), gallery_embeddings=gallery).tolist()
    sizes = [int((gallery_labels == label).sum()) for label in labels]
    expected = plain_metrics(ranking, labels.tolist(), gallery_labels.tolist(), sizes, (1, 2, 4, 8))
    assert expected["queries_without_match"] == int((labels == labels[0]).sum()) > 0
    metrics = retrieval_metrics(
        embeddings, labels, gallery_embeddings=gallery, gallery_labels=gallery_labels, backend=backend, chunk=13
    )
    assert metrics == pytest.approx(expected, abs=1e-14)


def test_chunks_and_backends_agree_to_the_last_bit():
    embeddings, labels = odd_data(7)
    runs = [
        retrieval_metrics(embeddings, labels, backend=backend, chunk=chunk)
        for backend in (*BACKENDS, "auto")
        for chunk in (1, 10, 1024)
    ]
    assert all(run == runs[0] for run in runs)


def test_the_order_of_the_rows_leaves_no_trace():
    embeddings, labels = labeled(seed=13)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    options = dict(metrics=ALL, per_class=True)
    assert retrieval_metrics(embeddings[order], labels[order], **options) == retrieval_metrics(
        embeddings, labels, **options
    )


def test_a_duplicate_of_another_class_is_a_wrong_neighbor():
    # Removing the query by rank instead of by index would drop row 0 for query 1, and count row 2 first.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    metrics = retrieval_metrics(embeddings, labels, recall_at=(1, 2, 3))
    assert metrics["recall@1"] == 0.0
    # Query 0 finds row 3 second, query 1 row 2 third, query 2 row 1 third, query 3 row 0 second.
    assert metrics["recall@2"] == 0.5
    assert metrics["recall@3"] == 1.0


def labeled(seed=11, n=500, classes=40):
    """Embeddings of norm 1 in float64 without duplicates, some classes larger than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    embeddings = torch.randn(classes, 8, generator=generator)[labels] + torch.randn(n, 8, generator=generator)
    return torch.nn.functional.normalize(embeddings.double(), dim=1), labels


ALL = ("recall", "precision", "map", "map@r", "r_precision")


def test_agrees_with_pytorch_metric_learning():
    """Precision@1, R-Precision and MAP@R are the same. Two differences are of definition:

    - A query is removed from its own neighbors by rank there, by index here: no duplicates in these data.
    - Their mean_average_precision at K divides by R, ours by min(R, K), the most that K neighbors can reach: theirs
      times R / min(R, K), query by query, is ours.
    """
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    def theirs(*data, k="max_bin_count", include=("precision_at_1", "r_precision", "mean_average_precision_at_r")):
        # Their own search, not faiss's, so that it runs in float64; some of their means are float32.
        knn = CustomKNN(LpDistance(normalize_embeddings=False), batch_size=100)
        return AccuracyCalculator(include=include, k=k, knn_func=knn).get_accuracy(*data)

    embeddings, labels = labeled()
    query, query_labels, gallery, gallery_labels = embeddings[:100], labels[:100], embeddings[100:], labels[100:]
    in_gallery = dict(gallery_embeddings=gallery, gallery_labels=gallery_labels)
    for ours, expected in [
        (retrieval_metrics(embeddings, labels, metrics=ALL), theirs(embeddings, labels)),
        (
            retrieval_metrics(query, query_labels, metrics=ALL, normalize=False, **in_gallery),
            theirs(query, query_labels, gallery, gallery_labels),
        ),
    ]:
        assert ours["recall@1"] == ours["precision@1"] == pytest.approx(expected["precision_at_1"], abs=1e-6)
        assert ours["r_precision"] == pytest.approx(expected["r_precision"], abs=1e-6)
        assert ours["map@r"] == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)

    include = ("mean_average_precision",)
    whole = theirs(query, query_labels, gallery, gallery_labels, k=400, include=include)["mean_average_precision"]
    ours = retrieval_metrics(query, query_labels, metrics=("map",), map_at=(5, 400), **in_gallery)
    assert ours["map@400"] == pytest.approx(whole, abs=1e-6)
    at_5 = theirs(query, query_labels, gallery, gallery_labels, k=5, include=include)["mean_average_precision"]
    assert ours["map@5"] > at_5 + 0.01
    rescaled = 0.0
    for i, label in enumerate(query_labels):
        one = theirs(query[i : i + 1], label.view(1), gallery, gallery_labels, k=5, include=include)
        size = int((gallery_labels == label).sum())
        rescaled += one["mean_average_precision"] * size / min(5, size)
    assert ours["map@5"] == pytest.approx(rescaled / 100, abs=1e-6)


def test_agrees_with_torchmetrics():
    """Hit rate, precision, R-Precision and MAP over the whole gallery are the same. Two differences are of definition:

    - Their RetrievalRecall(K) is the part of the R right items that is found, our Recall@K, as in metric learning,
      whether one is: their RetrievalHitRate.
    - Their RetrievalMAP(K) divides by the right items among the K, ours by min(R, K).
    """
    from torchmetrics import retrieval

    n = 120
    embeddings, labels = labeled(seed=12, n=n, classes=10)
    # Theirs takes an item with a score of zero or less for a wrong one.
    similarities = 2 + embeddings @ embeddings.T
    others = ~torch.eye(n, dtype=torch.bool)
    scores = similarities[others]
    target = (labels.unsqueeze(1) == labels)[others]
    indexes = torch.arange(n).unsqueeze(1).expand(n, n)[others]

    def theirs(metric):
        return float(metric(scores, target, indexes=indexes))

    ours = retrieval_metrics(embeddings, labels, metrics=ALL, precision_at=(1, 5, 20), map_at=(5, n - 1))
    for k in (1, 2, 4, 8):
        assert ours[f"recall@{k}"] == pytest.approx(theirs(retrieval.RetrievalHitRate(top_k=k)), abs=1e-6)
    for k in (1, 5, 20):
        assert ours[f"precision@{k}"] == pytest.approx(theirs(retrieval.RetrievalPrecision(top_k=k)), abs=1e-6)
    assert ours["r_precision"] == pytest.approx(theirs(retrieval.RetrievalRPrecision()), abs=1e-6)
    assert ours[f"map@{n - 1}"] == pytest.approx(theirs(retrieval.RetrievalMAP()), abs=1e-6)

    assert ours["recall@8"] > theirs(retrieval.RetrievalRecall(top_k=8)) + 0.1
    assert ours["map@5"] < theirs(retrieval.RetrievalMAP(top_k=5)) - 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_official_golden(golden, backend):
    """No duplicates and no ties in these data: the authors' protocol and the definitions give the same numbers."""
    tensors, expected = golden
    for name, data in (
        ("single", dict(embeddings=tensors["embeddings"], labels=tensors["labels"])),
        (
            "query_gallery",
            dict(
                embeddings=tensors["query"],
                labels=tensors["query_labels"],
                gallery_embeddings=tensors["gallery"],
                gallery_labels=tensors["gallery_labels"],
            ),
        ),
    ):
        recall_at = [int(k) for k in expected[name]["recall"]]
        check_golden(
            retrieval_metrics(**data, recall_at=recall_at, protocol="official", backend=backend), expected[name]
        )


def test_per_class_is_the_mean_over_its_queries():
    embeddings, labels = odd_data(8)
    result = retrieval_metrics(embeddings, labels, metrics=ALL, per_class=True, chunk=9)
    assert result.overall == retrieval_metrics(embeddings, labels, metrics=ALL)
    # The class of one item has no query that counts.
    assert sorted(result.per_class) == sorted(set(labels.tolist()) - {7 * 1 - 3})
    for name in set(result.overall) - {"queries", "queries_without_match"}:
        total = sum(values[name] * values["queries"] for values in result.per_class.values())
        assert result.overall[name] == pytest.approx(total / result.overall["queries"], abs=1e-14)
    label = 7 * 12 - 3
    own = labels == label
    alone = retrieval_metrics(
        embeddings[own],
        labels[own],
        metrics=ALL,
        gallery_embeddings=torch.cat([embeddings[own].flip(0), embeddings[~own]]),
        gallery_labels=torch.cat([labels[own], labels[~own]]),
        map_at=(1,),
    )
    # Against a gallery that holds it, each query finds itself first.
    assert alone["precision@1"] == 1.0 and result.per_class[label]["queries"] == 12
    ranking = nearest(embeddings, 11)[own]
    assert result.per_class[label]["r_precision"] == pytest.approx(float((labels[ranking] == label).double().mean()))


def test_a_column_of_labels_is_no_warning(request):
    request.addfinalizer(lambda: torch.set_warn_always(False))
    torch.set_warn_always(True)
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 3], [2, 4], [2, 5]])[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert retrieval_metrics(embeddings, labels) == retrieval_metrics(embeddings, labels.clone())


def test_progress_counts_the_queries():
    embeddings, labels = odd_data(9)
    steps = []
    metrics = retrieval_metrics(embeddings, labels, chunk=30, progress=lambda *step: steps.append(step))
    assert steps == [(30, 77), (60, 77), (77, 77)] and metrics["queries"] == 77


def test_cosine_and_euclidean_differ_where_they_should():
    # By direction every row is nearest to its class; by distance rows 0 and 2 are nearest to each other.
    embeddings = torch.tensor([[1.0, 0.0], [9.0, 0.0], [1.0, 2.0], [0.0, 9.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert retrieval_metrics(embeddings, labels, recall_at=(1,))["recall@1"] == 1.0
    assert retrieval_metrics(embeddings, labels, recall_at=(1,), normalize=False)["recall@1"] == 0.5


E1, L1 = torch.eye(4), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(labels=L1[:3]), r"labels has shape \(3,\); it must have shape \(4,\), like the embeddings"),
        (dict(labels=L1.unsqueeze(1)), r"labels has shape \(4, 1\); it must have shape \(4,\), like the embeddings"),
        (dict(labels=L1.float()), "labels is float32; it must be integer"),
        (dict(labels=L1 > 0), "labels is bool; it must be integer"),
        (dict(labels=torch.arange(4)), "labels has no query with another item of its class; it must"),
        (dict(embeddings=E1[0]), r"embeddings has shape \(4,\); it must have shape \(n, D\)"),
        (dict(embeddings=E1 / 0), "embeddings has non-finite values in row 0; it must be finite"),
        (dict(embeddings=E1 * 0), "embeddings has norm 0.0 in row 0; it must be positive"),
        (dict(gallery_embeddings=E1), "gallery_labels is None; it must be given together with gallery_embeddings"),
        (dict(gallery_labels=L1), "gallery_embeddings is None; it must be given together with gallery_labels"),
        (
            dict(gallery_embeddings=E1, gallery_labels=L1[:2]),
            r"gallery_labels has shape \(2,\); it must have shape \(4,\)",
        ),
        (dict(gallery_embeddings=E1[:, :2], gallery_labels=L1), "gallery_embeddings has 2 channels; it must have 4"),
        (dict(gallery_embeddings=E1, gallery_labels=L1 + 2), "labels has no query with another item"),
        (dict(recall_at=()), r"recall_at is \(\); it must be a sequence of positive integers"),
        (dict(recall_at=(0, 1)), r"recall_at is \(0, 1\); it must be a sequence of positive integers"),
        (dict(recall_at=3), "recall_at is 3; it must be a sequence of positive integers"),
        (dict(recall_at="12"), "recall_at is '12'; it must be a sequence of positive integers"),
        (dict(backend="annoy"), "backend is 'annoy'; it must be one of auto, torch, faiss"),
        (dict(chunk=-1), "chunk is -1; it must be a positive integer"),
    ],
)
def test_errors(arguments, message):
    arguments = dict(embeddings=E1, labels=L1) | arguments
    with pytest.raises(UserError, match=message) as error:
        retrieval_metrics(**arguments)
    assert "\n" not in str(error.value)
