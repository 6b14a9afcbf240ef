"""NMI and AMI against their definitions, scikit-learn and pytorch-metric-learning."""

import sys
import warnings

import pytest
import torch

from gcahng.errors import UserError
from gcahng.retrieval import clustering, clustering_metrics

BACKENDS = ["faiss", "scikit-learn"]


def blobs(apart, n=240, classes=8, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return apart * torch.eye(dim)[labels] + torch.randn(n, dim, generator=generator), labels * 5 - 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_cluster_a_class_is_one_and_random_is_zero(backend):
    # From random rows k-means may put two classes into one cluster; some seed does not.
    embeddings, labels = blobs(apart=30, classes=3)
    best = max(
        (clustering_metrics(embeddings, labels, seed=s, backend=backend) for s in range(4)), key=lambda m: m["nmi"]
    )
    assert best == pytest.approx({"nmi": 1.0, "ami": 1.0, "clusters": 3})
    found = clustering_metrics(blobs(apart=0)[0], labels, clusters=120, backend=backend)
    assert found["clusters"] == 120
    # What NMI gives for nothing, AMI does not.
    assert found["nmi"] > 0.2 and abs(found["ami"]) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_definition(backend, monkeypatch):
    embeddings, labels = blobs(apart=2)
    kmeans = "_faiss_kmeans" if backend == "faiss" else "_sklearn_kmeans"
    assigned = []
    original = getattr(clustering, kmeans)
    monkeypatch.setattr(clustering, kmeans, lambda *args: assigned.append(original(*args)) or assigned[0])
    found = clustering_metrics(embeddings, labels, clusters=11, backend=backend)
    clusters = torch.as_tensor(assigned[0]).long()
    joint = torch.zeros(8, 11, dtype=torch.float64)
    joint.index_put_(((labels + 3) // 5, clusters), torch.tensor(1 / 240, dtype=torch.float64), accumulate=True)
    entropy = [-torch.special.xlogy(p, p).sum() for p in (joint, joint.sum(0), joint.sum(1))]
    information = entropy[1] + entropy[2] - entropy[0]
    assert 0.1 < found["nmi"] < 0.95
    assert found["nmi"] == pytest.approx(float(2 * information / (entropy[1] + entropy[2])), abs=1e-12)
    # Of all relabelings, the expected information is that of the mean over many.
    generator = torch.Generator().manual_seed(0)
    shuffled = []
    for _ in range(300):
        joint.zero_()
        joint.index_put_(
            ((labels[torch.randperm(240, generator=generator)] + 3) // 5, clusters),
            torch.tensor(1 / 240, dtype=torch.float64),
            accumulate=True,
        )
        shuffled.append(float(entropy[1] + entropy[2] + torch.special.xlogy(joint, joint).sum()))
    expected, spread = torch.tensor(shuffled).mean().item(), torch.tensor(shuffled).std().item() / 300**0.5
    mean = float(entropy[1] + entropy[2]) / 2
    from_shuffles = (float(information) - expected) / (mean - expected)
    assert abs(found["ami"] - from_shuffles) < 5 * spread / (mean - expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_decides(backend):
    embeddings, labels = blobs(apart=2.5)
    runs = [clustering_metrics(embeddings, labels, seed=seed, backend=backend) for seed in (3, 3, 4, 5)]
    assert runs[0] == runs[1]
    assert len({run["nmi"] for run in runs}) > 1
    assert clustering_metrics(embeddings * 3, labels, seed=3, backend=backend) == pytest.approx(runs[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_as_they_are_or_their_directions(backend):
    """Classes by direction at two lengths, or two lengths in all directions."""
    embeddings, labels = blobs(apart=30, classes=3)
    far = torch.arange(240) // 3 % 2 == 0
    stretched = torch.where(far[:, None], 40 * embeddings, embeddings)
    by_direction, as_they_are = (
        max(clustering_metrics(stretched, labels, normalize=n, seed=s, backend=backend)["ami"] for s in range(4))
        for n in (True, False)
    )
    assert by_direction == pytest.approx(1) and as_they_are < 0.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_iterations_are_those_asked_for(backend):
    found = {clustering_metrics(*blobs(apart=1), iterations=n, backend=backend)["nmi"] for n in (1, 2, 25)}
    assert len(found) == 3


def test_every_row_takes_part():
    """More than 256 rows a cluster, of which faiss would take a sample: both backends then see other means."""
    embeddings, labels = blobs(apart=1, n=1200, classes=2)
    rows = torch.nn.functional.normalize(embeddings, dim=1)
    found = torch.from_numpy(clustering._faiss_kmeans(rows, 2, 100, 0))
    means = torch.stack([rows[found == c].mean(dim=0) for c in (0, 1)])
    assert torch.equal(torch.cdist(rows, means).argmin(dim=1), found), "it has come to rest on all of them"


def test_agrees_with_pytorch_metric_learning():
    # faiss's k-means from a seed: theirs is 1234. No more than 256 rows a cluster, so that theirs, too, uses all.
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import FaissKMeans

    embeddings, labels = blobs(apart=2)
    embeddings = torch.nn.functional.normalize(embeddings, dim=1)
    calculator = AccuracyCalculator(
        include=("NMI", "AMI"), kmeans_func=FaissKMeans(seed=1234, niter=25, min_points_per_centroid=1)
    )
    theirs = calculator.get_accuracy(embeddings, labels, include=("NMI", "AMI"))
    ours = clustering_metrics(embeddings, labels, seed=1234, normalize=False)
    assert ours["nmi"] == pytest.approx(theirs["NMI"], abs=1e-12)
    assert ours["ami"] == pytest.approx(theirs["AMI"], abs=1e-12)


def test_without_faiss_or_scikit_learn(monkeypatch):
    embeddings, labels = blobs(apart=2)
    by_sklearn = clustering_metrics(embeddings, labels, backend="scikit-learn")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert clustering_metrics(embeddings, labels) == by_sklearn
    with pytest.raises(UserError, match='backend="faiss": faiss is not installed'):
        clustering_metrics(embeddings, labels, backend="faiss")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'sklearn is not installed; pip install "gcahng\[train\]"'):
        clustering_metrics(embeddings, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_warned_of(backend, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clustering_metrics(*blobs(apart=2), clusters=100, backend=backend)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(clusters=241), "clusters is 241; it must be an integer from 1 to 240"),
        (dict(iterations=0), "iterations is 0; it must be an integer from 1 to 1000000"),
        (dict(seed=-1), "seed is -1; it must be a whole number of at least 0 and at most 2\\^31 - 1"),
        (dict(backend="torch"), "backend is 'torch'; it must be one of auto, faiss, scikit-learn"),
        (dict(labels=torch.zeros(3, dtype=torch.int64)), r"labels has shape \(3,\); it must have shape \(240,\)"),
    ],
)
def test_errors(arguments, message):
    embeddings, labels = blobs(apart=1)
    with pytest.raises(UserError, match=message):
        clustering_metrics(**(dict(embeddings=embeddings, labels=labels) | arguments))
