"""Compiles every Triton kernel as a training step launches it, without a GPU, and prints the resources that it uses.

    python benchmarks/aot.py
    python benchmarks/aot.py --dim 512 --dtype bf16 --arch 90 --kernel mlp_in_product_forward_kernel

Without --dim, --dtype, --arch and --kernel, the table is also written to benchmarks/results/aot.md. The exit status is
1 if a kernel does not compile, spills registers, or uses more than a chip has (see gcahng/testing/aot.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported

import torch
import triton

from gcahng.testing.aot import ARCHS, DIMS, DTYPES, SHARED_LIMIT, Build, Case, build_all

OUT = Path(__file__).parent / "results" / "aot.md"
DEFAULT_DTYPES = ("bf16", "fp16", "fp32", "tf32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", default=list(DIMS), help="embedding channels")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DEFAULT_DTYPES))
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--kernel", nargs="+", default=[])
    parser.add_argument("--once", action="store_true", help="compile only the most frequent launch of each kernel")
    parser.add_argument("--workers", type=int, help="processes that compile")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args(argv)
    cases = [Case(d, dtype, arch) for d in arguments.dim for dtype in arguments.dtype for arch in arguments.arch]

    def progress(done: int, count: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {count}", end="\n" if done == count else "", file=sys.stderr)

    builds = build_all(cases, arguments.kernel, arguments.once, arguments.workers, progress)
    text = markdown(builds)
    print(text)
    chosen = (arguments.dim, arguments.dtype, arguments.arch, arguments.kernel, arguments.once)
    if chosen == (list(DIMS), list(DEFAULT_DTYPES), list(ARCHS), [], False):
        OUT.write_text(text)
    if arguments.json:
        found = [asdict(b) | {"case": b.case._asdict(), "failures": b.failures()} for b in builds]
        arguments.json.write_text(json.dumps(found, indent=1))
    return 1 if any(b.failures() for b in builds) else 0


def markdown(builds: Iterable[Build]) -> str:
    """One row for each kernel, D and dtype, with the largest numbers of launches that Triton compiles separately."""
    builds = list(builds)
    archs = sorted({b.case.arch for b in builds})
    limits = ", ".join(f"sm_{arch} {SHARED_LIMIT[arch] // 1024}" for arch in archs)
    groups: dict[tuple[str, int, str], list[Build]] = {}
    for b in builds:
        groups.setdefault((b.kernel, b.case.dim, b.case.dtype), []).append(b)
    failed = [f"- {_name(b)}: {'; '.join(b.failures())}" for b in builds if b.failures()]
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "`python benchmarks/aot.py`, without a GPU: every kernel as a training step of 510 samples (3 a class, 2 "
        "layers) launches it. "
        f"torch {torch.__version__}, triton {triton.__version__}.",
        "",
        "dtype: that of the products' operands; in fp16 and tf32 (fp32 where torch allows it) products alone. "
        "Variants: launches that Triton compiles apart, by alignment, optional arguments and block sizes; a row holds "
        "the largest numbers among them. Spills: instructions that access local memory. "
        f"Shared memory in KB a block; limits: {limits}.",
        "",
        f"| kernel | D | dtype | variants | {' | '.join(f'registers sm_{a}' for a in archs)} "
        f"| {' | '.join(f'shared sm_{a}' for a in archs)} | spills | instructions of note |",
        f"|---|---:|---|---:|{'---:|' * (2 * len(archs))}---:|---|",
    ]
    for (kernel, dim, dtype), group in sorted(groups.items()):
        of = {arch: [b for b in group if b.case.arch == arch] for arch in archs}
        cells = [kernel.removesuffix("_kernel"), dim, dtype, max(map(len, of.values()))]
        cells += [max((b.registers for b in of[a]), default="–") for a in archs]
        cells += [f"{max(b.shared for b in of[a]) / 1024:.1f}" if of[a] else "–" for a in archs]
        cells += [_spills(of), _notes(group)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"Beyond the gate: {len(failed)} of {len(builds)} compilations.", "", *failed]
    return "\n".join(lines).rstrip() + "\n"


def _name(b: Build) -> str:
    return f"{b.kernel}, D = {b.case.dim}, {b.case.dtype}, sm_{b.case.arch}"


def _spills(of: dict[int, list[Build]]) -> str:
    found = {arch: max((b.spills for b in builds), default=0) for arch, builds in of.items()}
    return ", ".join(f"sm_{arch} {count}" for arch, count in found.items() if count) or "0"


def _notes(group: list[Build]) -> str:
    products = sorted({product for b in group for product in b.products})
    atomics = sorted({atomic for b in group for atomic in b.atomics})
    errors = ["does not compile"] if any(b.error for b in group) else []
    return ", ".join([*errors, *products, *atomics, f"{max(b.width for b in group)}-bit accesses"])


if __name__ == "__main__":
    sys.exit(main())
