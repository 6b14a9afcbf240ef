"""Labels of any size, and rows without a label, in every function that takes labels."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch

from gcahng.data.sampler import BalancedBatchSampler
from gcahng.errors import UserError
from gcahng.losses import GCAHNGLoss
from gcahng.losses.npair import npair_loss
from gcahng.report.ranking import confused_pairs, rank
from gcahng.retrieval import clustering_metrics, nearest, retrieval_metrics
from gcahng.retrieval.labels import Classes, check_labels

ALL = ("recall", "precision", "map", "map@r", "r_precision")
LARGE = [10**12, 2**63 - 1, -(2**63), 2**31, 7]


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


SMALL = torch.arange(60) % 5
RENAMED = torch.tensor(LARGE)[SMALL]


def test_the_size_of_a_label_means_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = retrieval_metrics(rows(60), SMALL, metrics=ALL, per_class=True)
    found = retrieval_metrics(rows(60), RENAMED, metrics=ALL, per_class=True)
    assert found.overall == expected.overall
    assert found.per_class == {LARGE[label]: values for label, values in expected.per_class.items()}
    assert clustering_metrics(rows(60), RENAMED) == clustering_metrics(rows(60), SMALL)
    ours, theirs = rank(rows(60), RENAMED, 3), rank(rows(60), SMALL, 3)
    assert torch.equal(ours.matches, theirs.matches) and torch.equal(ours.precision, theirs.precision)
    assert sorted(pair.errors for pair in confused_pairs(ours, 99)) == sorted(
        p.errors for p in confused_pairs(theirs, 99)
    )
    drawn = BalancedBatchSampler(RENAMED, 5, 4, seed=3).draw()
    assert torch.unique(RENAMED[drawn], return_counts=True)[1].tolist() == [4] * 5
    # In KiB: one counter for each value up to 10¹² would be 8 TB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("ties", ["index", "expected"])
def test_rows_without_a_label_are_wrong_in_a_gallery_and_no_queries(backend: str, ties: str) -> None:
    """The same as giving each of them a class of its own."""
    embeddings = rows(60)
    embeddings[50:] = embeddings[0] + 0.01 * rows(10, seed=1)  # as near to each other as no class is
    unlabeled, alone = SMALL.clone(), SMALL.clone()
    unlabeled[50:] = -1
    alone[50:] = torch.arange(1000, 1010)
    options = dict(metrics=ALL, recall_at=(1, 2, 40), backend=backend, ties=ties)
    found = retrieval_metrics(embeddings, unlabeled, **options)
    assert found == retrieval_metrics(embeddings, alone, **options)
    assert (found["queries"], found["queries_without_match"]) == (50, 10)
    assert sorted(retrieval_metrics(embeddings, unlabeled, per_class=True, **options).per_class) == [0, 1, 2, 3, 4]
    gallery = dict(gallery_embeddings=embeddings, gallery_labels=unlabeled)
    searched = retrieval_metrics(rows(60, seed=2), unlabeled, **gallery, **options)
    assert searched == retrieval_metrics(
        rows(60, seed=2), alone, gallery_embeddings=embeddings, gallery_labels=alone + (alone > 999) * 99, **options
    )
    assert searched["queries"] == 50


def test_one_row_without_a_label_has_no_match() -> None:
    labels = torch.tensor([0, 0, -1])
    found = retrieval_metrics(rows(3), labels)
    assert (found["queries"], found["queries_without_match"]) == (2, 1)
    with pytest.raises(UserError, match="labels has no query with another item of its class"):
        retrieval_metrics(rows(3), torch.full((3,), -1))
    with pytest.raises(UserError, match='labels has 1 queries without another .* row 2; .* none with protocol="offic'):
        retrieval_metrics(rows(3), labels, protocol="official")


def test_clusters_are_of_labeled_rows() -> None:
    labels = SMALL.clone()
    labels[::7] = -1
    expected = clustering_metrics(rows(60)[labels >= 0], labels[labels >= 0])
    assert clustering_metrics(rows(60), labels) == expected and expected["clusters"] == 5
    with pytest.raises(UserError, match="labels is -1 for every row, which means no label"):
        clustering_metrics(rows(60), torch.full((60,), -1))


def test_the_report_ranks_no_row_without_a_label() -> None:
    labels = SMALL.clone()
    labels[50:] = -1
    ranking = rank(rows(60), labels, 3)
    assert torch.equal(ranking.neighbors[:, :3], nearest(rows(60), ranking.neighbors.shape[1])[:, :3])
    assert ranking.matches.tolist() == [9] * 50 + [0] * 10 and not ranking.right[50:].any()
    assert all(-1 not in pair.classes for pair in confused_pairs(ranking, 99))


def test_training_takes_no_row_without_a_label() -> None:
    labels = SMALL.clone()
    labels[40:] = -1
    sampler = BalancedBatchSampler(labels, 5, 4, seed=0)
    assert all((labels[sampler.draw()] >= 0).all() for _ in range(30)) and sampler.batches_per_epoch == 2
    pair = torch.tensor([3, 3, -1, -1])
    for given in (None, 2):
        with pytest.raises(UserError, match="labels has -1, which means no label; every sample of a batch must have"):
            npair_loss(rows(4), pair, num_per_class=given)
    gca = GCAHNGLoss(4, 6, layers=1, heads=2)
    for label in (-1, 10**12, 2**63 - 1):
        with pytest.raises(UserError, match="labels is out of range; with num_classes=4 labels must lie in 0 … 3"):
            gca(rows(4), torch.tensor([3, 3, label, label]))


def test_every_integer_type_and_container() -> None:
    expected = retrieval_metrics(rows(60), SMALL)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64):
        assert retrieval_metrics(rows(60), SMALL.to(dtype)) == expected
    assert retrieval_metrics(rows(60), SMALL.tolist()) == expected
    assert retrieval_metrics(rows(60), SMALL.numpy().astype(np.uint64)) == expected
    assert check_labels("labels", torch.tensor([2**63 - 1], dtype=torch.uint64), rows(1)).tolist() == [2**63 - 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2**64 - 1, 0], r"labels has (no whole numbers|18446744073709551615 in row 0; it must be less than 2\*\*63)"),
        (
            np.array([0, 2**64 - 1], np.uint64),
            r"labels has 18446744073709551615 in row 1; it must be less than 2\*\*63",
        ),
        ([10**30, 0], "labels has no whole numbers"),
        (["cat", "dog"], "labels has no whole numbers .* it must be integer: numpy.unique"),
        (np.array(["cat", "dog"]), "labels has no whole numbers .* it must be integer: numpy.unique"),
        (np.array([0, None]), "labels has no whole numbers .* it must be integer: numpy.unique"),
        (torch.tensor([1.0, 2.0]), "labels is float32; it must be integer: numpy.unique"),
        ([1.0, 1e300], "labels is float32; it must be integer"),
    ],
)
def test_what_is_no_label(labels: object, message: str) -> None:
    for name, use in (("retrieval", retrieval_metrics), ("clustering", clustering_metrics)):
        with pytest.raises(UserError, match=message) as error:
            use(rows(2), labels)
        assert "\n" not in str(error.value), name


def test_sizes_of_classes() -> None:
    classes = Classes(torch.tensor([5, -1, 2**63 - 1, 5, -1, -(2**63)]))
    assert classes.sizes(torch.tensor([5, -1, 2**63 - 1, 4, -(2**63), 6])).tolist() == [2, 0, 1, 0, 1, 0]
    assert [part.tolist() for part in classes.members(torch.tensor([2**63 - 1, 5]))] == [[0, 1, 1], [2, 0, 3]]
