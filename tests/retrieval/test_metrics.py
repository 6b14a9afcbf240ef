"""Retrieval metrics against the authors' numbers, a plain implementation and pytorch-metric-learning."""

import json
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


def plain_metrics(neighbours, labels, gallery_labels, sizes, recall_at):
    """The definitions, query by query, from the full ranking (lists of gallery indices)."""
    recall, map_at_r, r_precision = {k: [] for k in recall_at}, [], []
    for ranking, label, size in zip(neighbours, labels, sizes, strict=True):
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
    centres = torch.randn(100, 6, generator=generator)
    embeddings = centres[labels] + torch.randn(len(labels), 6, generator=generator)
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


def test_a_duplicate_of_another_class_is_a_wrong_neighbour():
    # Removing the query by rank instead of by index would drop row 0 for query 1, and count row 2 first.
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1, 0])
    metrics = retrieval_metrics(embeddings, labels, recall_at=(1, 2, 3))
    assert metrics["recall@1"] == 0.0
    # Query 0 finds row 3 second, query 1 row 2 third, query 2 row 1 third, query 3 row 0 second.
    assert metrics["recall@2"] == 0.5
    assert metrics["recall@3"] == 1.0


def test_agrees_with_pytorch_metric_learning():
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    # No duplicates here: theirs removes a query from its neighbours by rank.
    generator = torch.Generator().manual_seed(11)
    labels = torch.randint(0, 40, (500,), generator=generator)
    embeddings = torch.randn(40, 8, generator=generator)[labels] + torch.randn(500, 8, generator=generator)
    embeddings = torch.nn.functional.normalize(embeddings.double(), dim=1)
    # Their own search, not faiss's, so that it runs in float64; some of their means are float32.
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False), batch_size=100),
    )
    theirs = calculator.get_accuracy(embeddings, labels)
    ours = retrieval_metrics(embeddings, labels)
    assert ours["recall@1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)

    query, query_labels = embeddings[:100], labels[:100]
    theirs = calculator.get_accuracy(query, query_labels, embeddings[100:], labels[100:])
    ours = retrieval_metrics(
        query, query_labels, gallery_embeddings=embeddings[100:], gallery_labels=labels[100:], normalize=False
    )
    assert ours["recall@1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


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
        (dict(labels=L1[:3]), r"labels must have shape \(4,\) like the embeddings, got \(3,\)"),
        (dict(labels=L1.unsqueeze(1)), r"labels must have shape \(4,\) like the embeddings, got \(4, 1\)"),
        (dict(labels=L1.float()), "labels must be integers, got torch.float32"),
        (dict(labels=torch.arange(4)), "labels must give some query another item of its class"),
        (dict(embeddings=E1[0]), r"embeddings must have shape \(n, D\) .* got \(4,\)"),
        (dict(embeddings=E1 / 0), "embeddings must be finite, row 0"),
        (dict(embeddings=E1 * 0), "embeddings must have rows whose norm is positive"),
        (dict(gallery_embeddings=E1), "go together, gallery_labels is None"),
        (dict(gallery_labels=L1), "go together, gallery_embeddings is None"),
        (dict(gallery_embeddings=E1, gallery_labels=L1[:2]), r"gallery_labels must have shape \(4,\)"),
        (dict(gallery_embeddings=E1[:, :2], gallery_labels=L1), "gallery_embeddings must have 4 channels"),
        (dict(gallery_embeddings=E1, gallery_labels=L1 + 2), "labels must give some query another item"),
        (dict(recall_at=()), r"recall_at must be a sequence of positive integers, got \(\)"),
        (dict(recall_at=(0, 1)), r"recall_at must be a sequence of positive integers, got \(0, 1\)"),
        (dict(recall_at=3), "recall_at must be a sequence of positive integers, got 3"),
        (dict(recall_at="12"), "recall_at must be a sequence of positive integers, got '12'"),
        (dict(backend="annoy"), "backend must be one of auto, torch, faiss, got 'annoy'"),
        (dict(chunk=-1), "chunk must be a positive integer, got -1"),
    ],
)
def test_errors(arguments, message):
    arguments = dict(embeddings=E1, labels=L1) | arguments
    with pytest.raises(UserError, match=message) as error:
        retrieval_metrics(**arguments)
    assert "\n" not in str(error.value)
