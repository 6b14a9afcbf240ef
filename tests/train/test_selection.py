"""Which checkpoint of a run is the best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stopped_runs import lines_of

from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.runs.checkpoint import find_checkpoint, load_checkpoint
from gcahng.train import DataConfig, TrainConfig, fit
from gcahng.train.split_metrics import Measured

pytestmark = pytest.mark.usefixtures("without_pictures")


def fitted(config: TrainConfig, data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], Path]:
    monkeypatch.setattr("gcahng.train.loop.load_data", lambda _: data)
    return fit(config), Path(str(config.out))


def test_validation_classes_choose(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["selected_on"] == "val" and lines_of(whole, "val") == [3, 6, 8] and lines_of(whole, "test") == []
    values = [
        json.loads(line)["map@r"] for line in (whole / "metrics.jsonl").read_text().splitlines() if '"val"' in line
    ]
    assert summary["best"]["val"]["map@r"] == max(values)
    assert summary["best"]["step"] == [3, 6, 8][values.index(max(values))]
    assert (summary["test_best"] == summary["test"]) == (summary["best"]["step"] == 8)


def test_of_equal_checkpoints_the_first_is_the_best(
    config_of_whole: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((0.5, 0.75, 0.75))

    def measured(model: Any, data: Any, split: str, *_: Any) -> Measured:
        return Measured({"map@r": next(found) if split == "val" else 0.0, "recall@1": 0.0}, torch.zeros(1))

    monkeypatch.setattr("gcahng.train.session.measure", measured)
    summary = fit(config_of_whole)
    assert summary["best"]["step"] == 6 and summary["val"]["map@r"] == 0.75
    assert load_checkpoint(Path(str(config_of_whole.out)) / "checkpoints" / "best.pt")["step"] == 6


@pytest.mark.parametrize("select", ["auto", "last"])
def test_without_validation_classes_nothing_is_chosen(
    select: Any, config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, run = fitted(replace(config_of_whole, select=select), replace(small_data, val=None), monkeypatch)
    assert summary["selected_on"] is None and summary["best"] == {} and summary["val"] == {}
    assert summary["test_best"] is None
    assert lines_of(run, "test") == [3, 6, 8] and lines_of(run, "val") == []
    assert not (run / "checkpoints" / "best.pt").exists()
    with pytest.raises(UserError, match="holds no checkpoints/best.pt"):
        find_checkpoint(run, "best")


def test_the_last_may_be_wanted_beside_validation(config_of_whole: TrainConfig, tmp_path: Path) -> None:
    summary = fit(replace(config_of_whole, select="last"))
    assert summary["best"] == {} and summary["val"]["map@r"] > 0


def test_test_classes_choose_with_a_warning(
    config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="select is 'test', which chooses .* its numbers are too good") as warned:
        summary, run = fitted(replace(config_of_whole, select="test"), replace(small_data, val=None), monkeypatch)
    assert len([w for w in warned if "select is" in str(w.message)]) == 1
    assert summary["selected_on"] == "test" and summary["best"]["test"] == summary["test_best"]
    measured = [
        json.loads(line)["recall@1"] for line in (run / "metrics.jsonl").read_text().splitlines() if '"test"' in line
    ]
    assert summary["best"]["test"]["recall@1"] == max(measured)
    assert load_checkpoint(run / "checkpoints" / "best.pt")["step"] == summary["best"]["step"]


def test_validation_is_wanted_and_there_is_none(
    config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config_of_whole, select="val", data=DataConfig(val_classes=0))
    with pytest.raises(UserError, match="select is 'val' and data.val_classes is 0"):
        fitted(config, replace(small_data, val=None), monkeypatch)
    assert not Path(str(config.out)).exists()


def test_a_gallery(config_of_whole: TrainConfig, small_data: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for In-Shop, test queries are searched in a gallery and not among themselves."""
    test = small_data.test
    faces = torch.arange(len(test)) % 12
    queries, gallery = test.subset((faces < 2).nonzero().flatten()), test.subset((faces >= 2).nonzero().flatten())
    data = replace(small_data, test=queries, gallery=gallery, recall_at=(1, 10))
    config = replace(config_of_whole, steps=2, loss="npair")
    summary, run = fitted(config, data, monkeypatch)
    assert summary["test"]["queries"] == 2 * 40 and {"recall@1", "recall@10"} <= set(summary["test"])
    from gcahng.evaluation.embed import embed
    from gcahng.models.model_file import load_model
    from gcahng.retrieval import retrieval_metrics

    network = load_model(run).network
    z = [embed(network, images, torch.device("cpu")) for images in (queries, gallery)]
    expected = retrieval_metrics(
        z[0], queries.labels, gallery_embeddings=z[1], gallery_labels=gallery.labels, recall_at=(1, 10)
    )
    assert summary["test"] == pytest.approx(expected, rel=1e-12)
