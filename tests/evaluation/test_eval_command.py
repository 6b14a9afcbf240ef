"""gcahng eval from the command line: what it measures, prints and writes, and every mistake one line."""

from __future__ import annotations

import csv
import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcahng.cli import main
from gcahng.data import DataSplits
from gcahng.errors import UserError
from gcahng.evaluation.evaluate import evaluate_embeddings
from gcahng.retrieval import retrieval_metrics
from gcahng.retrieval.embeddings import EmbeddingSet, read_embeddings, write_embeddings
from gcahng.retrieval.items import EmbeddingModel, Items, Source


def test_eval_of_embeddings_is_eval_of_the_network(
    run: str, finished_run: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "test.safetensors"
    assert main(["embed", run, "--out", str(file), "--device", "cpu"]) == 0
    assert main(["eval", "--embeddings", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"written     {tmp_path}/test.eval.json"
    written = json.loads((tmp_path / "test.eval.json").read_text())
    assert written["embeddings"] == finished_run[1]["test"] and written["protocol"] == "exact"


def test_eval_measures_what_is_asked_for(
    run: str, small_data: DataSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, table = tmp_path / "test.safetensors", tmp_path / "classes.csv"
    assert main(["embed", run, "--out", str(file), "--device", "cpu"]) == 0
    asked = f"eval {run} --recall_at 3 --precision_at 2 4 --map_at 5 --ties expected --json {tmp_path}/e.json"
    assert main([*asked.split(), "--per_class", str(table), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("Recall@3", "Precision@2", "Precision@4", "MAP@5", "MAP@R", "R-Precision"))
    result = retrieval_metrics(
        read_embeddings(file).embeddings,
        small_data.test.labels,
        metrics=("recall", "precision", "map", "map@r", "r_precision"),
        recall_at=(3,),
        precision_at=(2, 4),
        map_at=(5,),
        ties="expected",
        per_class=True,
    )
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["test"] == result.overall and written["ties"] == "expected"
    with open(table, encoding="utf-8", newline="") as lines:
        rows = {row["class"]: row for row in csv.DictReader(lines)}
    assert list(rows) == list(small_data.test.class_names)
    for label, values in result.per_class.items():
        row = rows[small_data.test.class_names[label]]
        assert {name: float(row[name]) for name in values} == values
    assert main(["eval", "--embeddings", str(file), "--protocol", "official"]) == 0
    official = retrieval_metrics(read_embeddings(file).embeddings, small_data.test.labels, protocol="official")
    assert json.loads((tmp_path / "test.eval.json").read_text())["embeddings"] == official


def test_eval_of_clusters(run: str, small_data: DataSplits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gcahng.retrieval import clustering_metrics

    file = tmp_path / "test.safetensors"
    assert main(["embed", run, "--out", str(file), "--device", "cpu"]) == 0
    assert main(["eval", "--embeddings", str(file), "--clustering", "--seed", "3"]) == 0
    written = json.loads((tmp_path / "test.eval.json").read_text())["embeddings"]
    expected = clustering_metrics(read_embeddings(file).embeddings, small_data.test.labels, seed=3)
    assert expected.items() <= written.items() and expected["clusters"] == 40
    out = capsys.readouterr().out
    assert f"{100 * expected['nmi']:.2f}" in out and "NMI" in out and "AMI" in out and "Clusters" not in out


def test_eval_of_a_data_set_with_a_gallery(
    run: str,
    small_data: DataSplits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Queries are searched in the gallery, with the data set's K; so are two files of embeddings."""
    from dataclasses import replace

    test = small_data.test
    queries, gallery = test.subset(torch.arange(0, 480, 3)), test.subset(torch.arange(1, 480, 2))
    data = replace(small_data, test=queries, gallery=gallery, recall_at=(1, 10), digest="0" * 16)
    for module in ("evaluate", "image_inputs"):
        monkeypatch.setattr(f"gcahng.evaluation.{module}.load_data", lambda config: data)
    assert main(["eval", run, "--data.name", "inshop", "--data.root", "x", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "Recall@10" in out and "Recall@8" not in out
    written = json.loads((Path(run) / "eval-last-inshop-test.json").read_text())
    assert written["data"] == "inshop" and written["same_data"] is None
    for split in ("test", "gallery"):
        assert main(["embed", run, "--split", split, "--out", str(tmp_path / f"{split}.npy"), "--device", "cpu"]) == 0
    files = [str(tmp_path / f"{split}.npy") for split in ("test", "gallery")]
    assert main(["eval", "--embeddings", files[0], "--gallery", files[1], "--recall_at", "1", "10"]) == 0
    by_file = json.loads((tmp_path / "test.eval.json").read_text())["embeddings"]
    a, b = (read_embeddings(Path(file)) for file in files)
    expected = retrieval_metrics(
        a.embeddings,
        queries.labels,
        gallery_embeddings=b.embeddings,
        gallery_labels=gallery.labels,
        recall_at=(1, 10),
    )
    assert by_file == written["test"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval", "the following arguments are required: RUN_OR_CHECKPOINT; see gcahng eval --help"),
        ("eval {run} --embeddings {tmp}/e.npy", "{run} and --embeddings {tmp}/e.npy are given; give only one of them"),
        ("eval {run} --gallery {tmp}/e.npy", "--gallery is {tmp}/e.npy; it needs --embeddings"),
        ("eval --embeddings {tmp}/e.npy", "{tmp}/e.npy has rows without a label; metrics need the class of each"),
        ("eval --embeddings {tmp}/e.npy --data.root x", "--embeddings supports no --data.root"),
        ("eval --embeddings {tmp}/none.npy", "{tmp}/none.npy is not a file"),
        ("eval {run} --data.name imagenet", "data.name is 'imagenet'; it must be one of glyphs, cub200"),
        (
            "eval {run} --data.name folder --data.root {tmp} --data.image_size 400",
            "data.resize is 256 and data.image_size 400",
        ),
        ("eval {run} --recall_at 0", "recall_at is 0; it must be a whole number of at least 1"),
        ("eval {run} --ties expected --protocol official", "ties is 'expected'; it must be \"index\" with"),
    ],
)
def test_mistakes_of_eval(
    arguments: str, message: str, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "e.npy", np.ones((2, 3), np.float32))
    assert main(arguments.format(run=run, tmp=tmp_path).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"gcahng: error: {message.format(run=run, tmp=tmp_path)}")
    assert err.count("\n") == 1


def test_eval_shows_what_it_measured_even_if_it_cannot_write_it(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    written = tmp_path / "x.json"
    assert main(["eval", run, "--json", str(written)]) == 2
    out, err = capsys.readouterr()
    assert "test (percent)" in out and "written" not in out
    assert err == f"gcahng: error: {written} cannot be written: No space left on device\n"


def test_eval_measures_nothing_for_a_place_that_cannot_be(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    written = tmp_path / "file" / "x.json"
    assert main(["eval", run, "--json", str(written)]) == 2
    assert capsys.readouterr() == (
        "",
        f"gcahng: error: --json is {written}; {tmp_path / 'file'} is a file, not a folder\n",
    )


def test_eval_makes_the_folder_that_it_is_to_write_to(run: str, tmp_path: Path) -> None:
    assert main(["eval", run, "--json", str(tmp_path / "new" / "folder" / "x.json")]) == 0
    assert "recall@1" in (tmp_path / "new" / "folder" / "x.json").read_text()


def test_queries_and_gallery_are_of_one_network(tmp_path: Path) -> None:
    model = EmbeddingModel("a" * 64, "glyph_conv", "runs/a", 256, 224)
    rows = Items(("1", "2"), torch.tensor([0, 1]), ("x", "y"), (Source(2),))
    for name, of in (
        ("a", model),
        ("b", replace(model, fingerprint="b" * 64, path="runs/b")),
        ("cropped", replace(model, crop=200)),
        ("unknown", None),
    ):
        write_embeddings(tmp_path / f"{name}.npy", EmbeddingSet(torch.eye(2), rows, of))
    for other, message in (
        ("b", "different networks"),
        ("cropped", "cropped to 224 pixels for one, and to 256 and 200"),
    ):
        with pytest.raises(UserError, match=rf"a\.npy and .*{other}\.npy do not fit: .*{message}"):
            evaluate_embeddings(tmp_path / "a.npy", tmp_path / f"{other}.npy")
    for other in ("a", "unknown"):
        found = evaluate_embeddings(tmp_path / "a.npy", tmp_path / f"{other}.npy")
        assert found["embeddings"]["recall@1"] == 1
