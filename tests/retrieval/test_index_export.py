"""An exported index in faiss alone finds what gcahng finds."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcahng.cli import main
from gcahng.errors import UserError
from gcahng.retrieval.embeddings import EmbeddingSet
from gcahng.retrieval.index import KINDS, IndexSettings
from gcahng.retrieval.index_export import export_faiss
from gcahng.retrieval.index_file import build, load, save
from gcahng.retrieval.items import Items, Source

faiss = pytest.importorskip("faiss")

ROWS, DIM = 600, 8


def embeddings(copies: bool) -> EmbeddingSet:
    values = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 3, ROWS)[:, None]
    if copies:
        values[100::50] = values[50].clone()
    names = tuple(f"ü {i}, b.png" for i in range(ROWS))
    return EmbeddingSet(values, Items(names, torch.arange(ROWS) % 3 - 1, ("x", "y"), (Source(ROWS, "/p"),)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("copies", [False, True])
def test_faiss_alone_finds_the_same(kind: str, metric: str, copies: bool, tmp_path: Path) -> None:
    whole = embeddings(copies)
    index, out = tmp_path / "x.index", tmp_path / "plain.faiss"
    save(index, build(whole, kind, metric, IndexSettings(lists=10, probes=4)))
    line = export_faiss(index, out)
    asked = torch.randn(20, DIM, generator=torch.Generator().manual_seed(1))
    found = load(index).search("queries", EmbeddingSet(asked, whole.items.subset(list(range(20)))), 5)

    plain = faiss.read_index(str(out))
    assert plain.metric_type == (faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2)
    queries = asked.numpy().copy()
    if metric == "cosine":
        faiss.normalize_L2(queries)
    with open(out.with_suffix(".csv"), encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["id"] for row in table] == [str(i) for i in range(ROWS)]
    assert [row["path"] for row in table] == [f"/p/{name}" for name in whole.items.names]
    assert [row["label"] for row in table] == [whole.items.class_name(i) or "" for i in range(ROWS)]
    same_as = {int(row["id"]): int(row["same_as"]) for row in table if row["same_as"]}
    assert same_as == ({row: 50 for row in range(100, ROWS, 50)} if copies and kind != "flat" else {})
    assert plain.ntotal == ROWS - len(same_as) and line.startswith(f"{plain.ntotal} rows of {DIM} channels, ")
    values, ids = plain.search(queries, 5)
    values = np.sqrt(values.clip(0)) if metric == "euclidean" else values
    # Copies are at one distance, and all stand for the first of them.
    first = torch.tensor([50 if copies and row >= 50 and row % 50 == 0 else row for row in range(ROWS)])
    for query in range(20):
        wanted = dict(zip(first[found.indices[query]].tolist(), found.values[query].tolist(), strict=True))
        got = dict(zip(first[torch.from_numpy(ids[query])].tolist(), values[query].tolist(), strict=True))
        assert set(wanted) <= set(got)
        assert all(got[row] == pytest.approx(wanted[row], abs=1e-5) for row in wanted)


def test_the_command_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index, out = tmp_path / "x.index", tmp_path / "plain.faiss"
    save(index, build(replace(embeddings(True)), "hnsw"))
    assert main(["index", "export", str(index), str(out)]) == 0
    assert capsys.readouterr().out == (
        f"590 rows of 8 channels, inner product of rows of norm 1, 10 copies left out\n"
        f"written     {out} and {tmp_path}/plain.csv\n"
    )
    content = out.read_bytes()
    (tmp_path / "other.csv").write_text("my own table\n")
    for arguments, message in (
        ([index, out], f"out is {out}, and {out} exists; both must be new files"),
        ([index, tmp_path / "other.faiss"], f"and {tmp_path}/other.csv exists; both must be new files"),
        ([index, tmp_path / "x.bin"], f"out is {tmp_path}/x.bin; its name must end in .faiss"),
        ([out, tmp_path / "y.faiss"], f"{out} is not an index of gcahng"),
        ([tmp_path / "no.index", tmp_path / "y.faiss"], "no.index cannot be read: No such file"),
    ):
        assert main(["index", "export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("gcahng: error: ") and message in error
    assert out.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"x.index", "plain.faiss", "plain.csv", "other.csv"}


def test_without_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.index", build(embeddings(False)))
    monkeypatch.setattr("gcahng.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'exporting to faiss: faiss is not installed; pip install "gcahng\[faiss-cpu'):
        export_faiss(tmp_path / "x.index", tmp_path / "x.faiss")
