"""Time, peak memory and recall of retrieval, each case in a process of its own.

    python benchmarks/bench_retrieval.py sop            # all metrics of 60,502 × 512 embeddings, self-retrieval
    python benchmarks/bench_retrieval.py clustering     # NMI and AMI of the same
    python benchmarks/bench_retrieval.py index          # flat, IVF and HNSW in a gallery of a million
    python benchmarks/bench_retrieval.py index --n 100000 --kinds ivf_flat ivf_pq
    python benchmarks/bench_retrieval.py sop --quick    # a check that it runs

The embeddings are random, with about five items per class and 512 channels. `seconds` is wall time and `cpu` is the
time of all threads; on a busy machine, only the latter is meaningful. Peak memory is the resident memory of the whole
process, including torch and the embeddings. The metrics of torch and of faiss must be the same to the last bit, or
nothing is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOP = (60502, 11316)
SINGLE_QUERIES = 50  # queries that are searched one at a time

# Kind, backend, and the efforts of a search (None: the default).
INDICES = (
    ("flat", "torch", (None,)),
    ("flat", "faiss", (None,)),
    ("ivf_flat", "faiss", (8, None, 512)),
    ("ivf_pq", "faiss", (None, 512)),
    ("hnsw", "faiss", (32, None, 512)),
)


def clustered(n: int, classes: int, dim: int = 512, seed: int = 0):
    """Random embeddings (n, dim) float32 and their labels (n,): 50 groups of classes of equal spread, which overlap.

    The variance of channel j is proportional to 1 / (1 + j). As in trained networks, a few dozen directions carry most
    of it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, dim + 1).rsqrt()
    groups = torch.randn(50, dim, generator=generator)
    group = torch.randint(0, 50, (classes,), generator=generator)
    centers = groups[group] + torch.randn(classes, dim, generator=generator)
    labels = torch.arange(n).remainder(classes)[torch.randperm(n, generator=generator)]
    embeddings = torch.randn(n, dim, generator=generator)
    for start in range(0, n, 1 << 16):
        rows = slice(start, start + (1 << 16))
        embeddings[rows] = (1.5 * embeddings[rows] + centers[labels[rows]]) * spread
    return embeddings, labels


class Clock:
    """Measures wall and CPU seconds since it was made, and the peak memory of the process."""

    def __init__(self):
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "seconds": time.perf_counter() - self._wall,
            "cpu": time.process_time() - self._cpu,
            "peak_gb": peak / 1e9,
        }


def run_sop(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all metrics except NMI and AMI."""
    from gcahng.retrieval import retrieval_metrics

    embeddings, labels = clustered(options.n, options.classes)
    clock = Clock()
    metrics = retrieval_metrics(
        embeddings,
        labels,
        metrics=("recall", "precision", "map", "map@r", "r_precision"),
        recall_at=(1, 10, 100, 1000),
        backend=options.backend,
        progress=show_progress("queries"),
    )
    return clock.read() | {"metrics": metrics}


def run_clustering(options: argparse.Namespace) -> dict[str, Any]:
    """Measure NMI and AMI."""
    from gcahng.retrieval import clustering_metrics

    embeddings, labels = clustered(options.n, options.classes)
    clock = Clock()
    metrics = clustering_metrics(embeddings, labels, backend=options.backend)
    return clock.read() | {"metrics": metrics}


def run_exact(options: argparse.Namespace) -> dict[str, Any]:
    """Find the exact neighbors of the queries, and write them to a file to compare the indices with."""
    import torch

    from gcahng.retrieval import nearest

    embeddings, _ = clustered(options.n + options.queries, options.classes)
    clock = Clock()
    exact = nearest(
        embeddings[options.n :],
        options.k,
        gallery_embeddings=embeddings[: options.n],
        progress=show_progress("exact queries"),
    )
    torch.save(exact, options.exact)
    return clock.read()


def run_index(options: argparse.Namespace) -> dict[str, Any]:
    """Build an index, search it, and compare it with the exact neighbors."""
    import torch

    from gcahng.retrieval import build_index

    embeddings, _ = clustered(options.n + options.queries, options.classes)
    gallery, queries = embeddings[: options.n], embeddings[options.n :]
    clock = Clock()
    index = build_index(gallery, options.kind, backend=options.backend, progress=show_progress("rows"))
    built = clock.read()
    with tempfile.TemporaryFile() as file:
        index.write(file)
        size = file.tell()
    exact = torch.load(options.exact)
    index.search(queries[:16], options.k)
    searches = []
    for effort in options.efforts:
        clock = Clock()
        indices = index.search(queries, options.k, effort=effort, progress=show_progress("queries")).indices
        together = clock.read()
        clock = Clock()
        for query in queries[:SINGLE_QUERIES]:
            index.search(query[None], options.k, effort=effort)
        alone = clock.read()
        searches.append(
            {
                "effort": effort,
                "milliseconds_a_query": 1000 * together["seconds"] / len(queries),
                "cpu_milliseconds_a_query": 1000 * together["cpu"] / len(queries),
                "milliseconds_one_at_a_time": 1000 * alone["seconds"] / min(SINGLE_QUERIES, len(queries)),
                "recall": (indices.unsqueeze(2) == exact.unsqueeze(1)).sum().item() / exact.numel(),
            }
        )
    return {
        "build_seconds": built["seconds"],
        "build_cpu": built["cpu"],
        "index_gb": size / 1e9,
        "peak_gb": together["peak_gb"],
        "searches": searches,
    }


CASES = {"sop": run_sop, "clustering": run_clustering, "exact": run_exact, "index": run_index}


def show_progress(what: str):
    """A callback that shows the progress on a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r  {what} {done:,} of {total:,}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def in_a_process(case: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Run `case` in a fresh process, and return its result."""
    settings = {**vars(options), **changes, "case": case}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        settings["result"] = result.name
        command = [sys.executable, __file__, "--child", json.dumps(settings)]
        subprocess.run(command, env=environment, check=True)
        return json.load(result)


def child(settings: dict[str, Any]) -> None:
    """Run a case in this process, and write its result to a file."""
    import torch

    torch.set_num_threads(settings["threads"])
    result = CASES[settings["case"]](argparse.Namespace(**settings))
    Path(settings["result"]).write_text(json.dumps(result))


def compare_metrics(case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `case` with every backend, and stop if the metrics differ."""
    backends = ("faiss", "torch") if case == "sop" else ("faiss",)
    rows = [in_a_process(case, options, backend=backend) | {"backend": backend} for backend in backends]
    if any(row["metrics"] != rows[0]["metrics"] for row in rows):
        raise SystemExit(f"the backends differ: {[row['metrics'] for row in rows]}")
    print(f"{case}: {options.n:,} x 512, {options.classes:,} classes, {options.threads} threads")
    print("| backend | seconds | CPU seconds | peak GB |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['backend']} | {row['seconds']:.1f} | {row['cpu']:.1f} | {row['peak_gb']:.2f} |")
    print(", ".join(f"{name} {value:.6g}" for name, value in rows[0]["metrics"].items()))
    return rows


def compare_indices(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare every index of `INDICES` with the exact neighbors."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exact = str(Path(folder) / "exact.pt")
        in_a_process("exact", options, exact=exact)
        print(f"index: {options.n:,} x 512, {options.queries:,} queries, k = {options.k}, {options.threads} threads")
        print(
            "| kind | backend | effort | build s (CPU) | ms a query (CPU) | one at a time, ms "
            "| index GB | peak GB | recall |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for kind, backend, efforts in INDICES:
            if kind not in options.kinds:
                continue
            settings = dict(exact=exact, kind=kind, backend=backend, efforts=efforts)
            row = in_a_process("index", options, **settings) | {"kind": kind, "backend": backend}
            rows.append(row)
            for search in row["searches"]:
                print(
                    f"| {kind} | {backend} | {search['effort'] or 'default'} | "
                    f"{row['build_seconds']:.1f} ({row['build_cpu']:.1f}) | "
                    f"{search['milliseconds_a_query']:.2f} ({search['cpu_milliseconds_a_query']:.2f}) | "
                    f"{search['milliseconds_one_at_a_time']:.2f} | "
                    f"{row['index_gb']:.3f} | {row['peak_gb']:.2f} | {search['recall']:.4f} |",
                    flush=True,
                )
    return rows


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=("sop", "clustering", "index"))
    parser.add_argument("--n", type=int, help=f"number of embeddings, or of gallery rows ({SOP[0]}; index: 1000000)")
    parser.add_argument("--classes", type=int, help=f"number of classes ({SOP[1]}; index: a fifth of the rows)")
    parser.add_argument("--queries", type=int, default=1000, help="queries for the index (1000)")
    parser.add_argument("--k", type=int, default=10, help="neighbors per query of the index (10)")
    parser.add_argument(
        "--kinds", nargs="+", default=sorted({kind for kind, _, _ in INDICES}), help="kinds of index (all)"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (2)")
    parser.add_argument("--quick", action="store_true", help="small sizes, as a check that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to this file")
    options = parser.parse_args()
    options.n = options.n or (3000 if options.quick else 1_000_000 if options.case == "index" else SOP[0])
    options.classes = options.classes or (SOP[1] if options.n == SOP[0] else max(2, options.n // 5))
    if options.quick:
        options.queries = min(options.queries, 100)
    written = {"case": options.case, "n": options.n, "classes": options.classes, "threads": options.threads}
    written |= {"machine": platform.platform(), "load": os.getloadavg()[0]}
    json_file = options.json
    del options.json
    written["rows"] = compare_indices(options) if options.case == "index" else compare_metrics(options.case, options)
    if json_file:
        json_file.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
