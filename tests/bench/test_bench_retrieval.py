"""benchmarks/bench_retrieval.py: its cases give the numbers they should, at sizes that take milliseconds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from gcahng.retrieval import retrieval_metrics

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_retrieval.py"
spec = importlib.util.spec_from_file_location("bench_retrieval", SCRIPT)
bench_retrieval = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_retrieval)


def test_sop() -> None:
    result = bench_retrieval.run_sop(Namespace(n=300, classes=60, backend="torch"))
    embeddings, labels = bench_retrieval.clustered(300, 60)
    assert len(labels.unique()) == 60 and embeddings.shape == (300, 512)
    assert result["metrics"]["map@r"] == retrieval_metrics(embeddings, labels)["map@r"]
    assert 0.1 < result["peak_gb"] < 24 and result["seconds"] > 0


@pytest.mark.parametrize(("kind", "backend"), [("flat", "torch"), ("hnsw", "faiss")])
def test_index(kind: str, backend: str, tmp_path: Path) -> None:
    options = dict(n=300, queries=20, classes=60, k=5, exact=str(tmp_path / "exact.pt"))
    bench_retrieval.run_exact(Namespace(**options))
    assert torch.load(options["exact"]).shape == (20, 5)
    result = bench_retrieval.run_index(Namespace(**options, kind=kind, backend=backend, efforts=(None,)))
    (search,) = result["searches"]
    assert search["recall"] == 1.0 if kind == "flat" else search["recall"] > 0.9
    assert result["index_gb"] >= 300 * 512 * 4 / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sop", "index", "clustering"])
def test_the_command(case: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), case, "--quick", "--threads", "1", "--json", str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{case}: 3,000 x 512") and (tmp_path / "x.json").exists()
