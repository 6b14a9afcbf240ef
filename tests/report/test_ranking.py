"""Best and worst queries, confused classes: against what can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from gcahng.errors import UserError
from gcahng.report.ranking import confused_pairs, rank
from gcahng.retrieval import retrieval_metrics


def on_circle(*degrees: float) -> torch.Tensor:
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_neighbors_and_precision_by_hand() -> None:
    embeddings = on_circle(0, 1, 50, 53, 120, 124)
    labels = torch.tensor([0, 0, 1, 0, 1, 2])
    ranking = rank(embeddings, labels, neighbors=3)
    assert ranking.neighbors[0].tolist() == [1, 2, 3] and ranking.neighbors[2].tolist() == [3, 1, 0]
    assert ranking.matches.tolist() == [2, 2, 1, 2, 1, 0]
    assert ranking.right[0].tolist() == [True, False, True]
    torch.testing.assert_close(ranking.similarities[0], torch.deg2rad(torch.tensor([1.0, 50.0, 53.0])).cos())
    # Query 0 has R = 2 and finds [right, wrong]: (1/2)(1/1) = 1/2. Query 3 finds 2 (wrong), then 1: (1/2)(1/2) = 1/4.
    assert ranking.precision.tolist()[:5] == [0.5, 0.5, 0, 0.25, 0]
    assert ranking.precision[5].isnan()
    assert ranking.best(1) == [0] and set(ranking.best(9)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("gallery", [False, True])
def test_mean_precision_is_map_at_r(gallery: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(60, 5, generator=generator), torch.randint(7, (60,), generator=generator)
    others = {}
    if gallery:
        others = {
            "gallery_embeddings": torch.randn(41, 5, generator=generator),
            "gallery_labels": torch.randint(2, 9, (41,), generator=generator),
        }
    ranking = rank(embeddings, labels, 4, **others)
    expected = retrieval_metrics(embeddings, labels, **others)
    assert ranking.precision.nanmean().item() == pytest.approx(expected["map@r"], rel=1e-12)
    assert ranking.precision.isnan().sum() == expected["queries_without_match"]
    assert ranking.right[ranking.matches > 0, 0].double().mean().item() == pytest.approx(expected["recall@1"])


def test_ties_of_precision() -> None:
    # Three perfect pairs; two images of different classes that are nearest to one another.
    embeddings = on_circle(0, 2, 10, 13, 100, 102, 200, 201, 230, 260)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4, 3, 4])
    ranking = rank(embeddings, labels, neighbors=4)
    assert ranking.best(3) == [5, 3, 0]  # cos 2° - cos 89°, cos 3° - cos 11°, cos 2° - cos 10°
    assert set(ranking.worst(2)) == {6, 7}  # both 1 degree from a wrong image
    assert ranking.worst(1)[0] in (6, 7)
    assert len({int(labels[q]) for q in ranking.random(5, seed=1)}) == 5
    assert ranking.random(5, seed=1) == ranking.random(5, seed=1) != ranking.random(5, seed=2)
    assert sorted(ranking.random(99, seed=0)) == list(range(10))


def test_confused_classes_by_hand() -> None:
    # 0 and 1 interleave: all four images find the other class; one of class 2 finds class 3, which finds class 2.
    embeddings = on_circle(0, 1, 3, 3.5, 80, 80.5, 100, 101, 60)
    labels = torch.tensor([0, 1, 0, 1, 2, 2, 2, 3, 3])
    first, second, *rest = confused_pairs(rank(embeddings, labels, 3), 5)
    assert set(first.classes) == {0, 1} and (first.errors, first.images) == (4, 4)
    assert set(first.example) == {2, 3}  # the closest of them
    assert set(second.classes) == {2, 3} and (second.errors, second.images) == (3, 5) and not rest
    assert second.classes == (3, 2)  # two of class 3's images, one of class 2's
    assert confused_pairs(rank(embeddings[:2], torch.tensor([0, 0]), 3), 5) == []


def test_an_image_without_a_match_is_confused_with_nothing() -> None:
    embeddings, labels = on_circle(0, 1, 80, 81, 2), torch.tensor([0, 0, 1, 1, 2])
    assert rank(embeddings, labels, 2).neighbors[4, 0] == 1
    assert confused_pairs(rank(embeddings, labels, 2), 5) == []


def test_as_many_neighbors_as_the_largest_class_needs() -> None:
    """All its right ones, and the next: how far that is decides among the best."""
    embeddings, labels = on_circle(0, 1, 2, 60, 100, 101), torch.tensor([0, 0, 0, 1, 2, 2])
    assert rank(embeddings, labels, neighbors=1).neighbors.shape == (6, 3)
    assert rank(embeddings, labels, neighbors=1).best(2) == [0, 5]  # cos 2° - cos 60°, cos 1° - cos 41°


@pytest.mark.parametrize("room", [1, 100, 10**6])
def test_similarities_do_not_depend_on_how_many_are_gathered_at_once(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("gcahng.report.ranking.GATHERED", room)
    ranking = rank(embeddings, torch.arange(20) % 4, 3)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    torch.testing.assert_close(ranking.similarities, (unit @ unit.T).gather(1, ranking.neighbors))


def test_nothing_to_find() -> None:
    with pytest.raises(UserError, match="all have R = 0"):
        rank(on_circle(0, 10), torch.tensor([0, 1]), 3)
