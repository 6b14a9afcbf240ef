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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported

import torch
import triton

from gcahng.testing.aot import ARCHS, DIMS, DTYPES, Build, Case, build_all
from gcahng.testing.multiprocessors import MULTIPROCESSORS

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
        found = [_as_json(b) for b in builds]
        arguments.json.write_text(json.dumps(found, indent=1))
    return 1 if any(b.failures() for b in builds) else 0


def _as_json(b: Build) -> dict[str, Any]:
    reading = None if b.reading is None else b.reading._asdict()
    return asdict(b) | {"case": b.case._asdict(), "reading": reading, "failures": b.failures()}


def markdown(builds: Iterable[Build]) -> str:
    """One row for each kernel, D and dtype, with the largest numbers of launches that Triton compiles separately."""
    builds = list(builds)
    archs = sorted({b.case.arch for b in builds})
    limits = ", ".join(f"sm_{arch} {MULTIPROCESSORS[arch].block_shared // 1024}" for arch in archs)
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
        "the largest numbers among them, and the fewest blocks. "
        f"Numbers with slashes are for {', '.join(f'sm_{arch}' for arch in archs)}, in this order. "
        "Instructions a value: of a product's epilogue, of a pass through the loop that does most of the work, or of "
        "all (gcahng/testing/sass.py); moves: the share of them that only move registers, in percent. "
        f"Shared memory in KB a block, without the system's; limits: {limits}. "
        "Blocks: how many of them fit into a multiprocessor at once. Spills: instructions that access local memory.",
        "",
        "| kernel | D | dtype | variants | instructions a value | moves | registers | shared | blocks | spills "
        "| instructions of note |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (kernel, dim, dtype), group in sorted(groups.items()):
        of = [[b for b in group if b.case.arch == arch] for arch in archs]
        readings = [[b.reading for b in some if b.reading] for some in of]
        cells = [kernel.removesuffix("_kernel"), dim, dtype, max(map(len, of))]
        cells += [_worst(readings, lambda r: r.per_value, ".0f"), _worst(readings, lambda r: 100 * r.moves, ".0f")]
        cells.append(_worst(readings, lambda r: r.registers, "d"))
        cells.append(_worst([[b for b in some if b.reading] for some in of], lambda b: b.shared / 1024, ".1f"))
        cells += [_worst(readings, lambda r: r.ctas, "d", min), _worst(readings, lambda r: r.spills, "d")]
        cells.append(_notes(group))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"Beyond the gate: {len(failed)} of {len(builds)} compilations.", "", *failed]
    return "\n".join(lines).rstrip() + "\n"


def _worst(
    groups: Iterable[Sequence[Any]], number: Callable[[Any], float], form: str, worst: Callable[..., float] = max
) -> str:
    """The worst number of each group; one of them if all are the same."""
    found = [format(worst(map(number, some)), form) if some else "–" for some in groups]
    return found[0] if len(set(found)) == 1 else " / ".join(found)


def _name(b: Build) -> str:
    return f"{b.kernel}, D = {b.case.dim}, {b.case.dtype}, sm_{b.case.arch}"


def _notes(group: list[Build]) -> str:
    products = sorted({product for b in group for product in b.products})
    atomics = sorted({atomic for b in group for atomic in b.atomics})
    errors = ["does not compile"] if any(b.error for b in group) else []
    return ", ".join([*errors, *products, *atomics, f"{max(b.width for b in group)}-bit accesses"])


if __name__ == "__main__":
    sys.exit(main())
