"""Compiles the GPU kernels without a GPU, and holds their machine code to benchmarks/budget.txt.

    python benchmarks/budget.py                          # every kernel with what it takes and what it may take
    python benchmarks/budget.py --by cuda --arch 90 --kernel gate_forward_kernel
    python benchmarks/budget.py --by triton --write      # sets the limits to what the kernels take now

gcahng/testing/budget.py says what the columns of the file mean. Limits are set with triton 3.8 and nvcc 13.0; others
count a little differently. A run for all kernels and architectures also writes its table to
benchmarks/results/budget.md. The exit status is 1 if a kernel goes beyond its limits.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before a kernel is imported

from gcahng.testing import budget
from gcahng.testing.budget import Compiled, Limit

OUT = Path(__file__).parent / "results" / "budget.md"
DIMS = (512, 128)  # at 128 some kernels run that do not at 512

HEADING = """# What GPU kernels cost in machine code

Counted without a GPU by `python benchmarks/budget.py`, and held to [benchmarks/budget.txt](../budget.txt). Products are
in bf16. counted: the instructions that work on a thread's values: those of the main loop, the rest around a product's
main loop, or all. calls: of subroutines, for rare numbers. blocks at once: on a multiprocessor. Behind a slash: the
limit, where it is another number. <bf16>, of a Triton kernel: for edges in bf16 alone. Of CUDA C++'s kernels that take
edges, the second type is that of edges (of head_moments_kernel the first).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", nargs="+", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(budget.TARGETS), default=list(budget.TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels with this in their names")
    parser.add_argument("--source", type=Path, nargs="+", default=[], help="only these files of CUDA C++")
    parser.add_argument("--budget", type=Path, default=budget.FILE, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="set the limits in the file to what the kernels take now")
    arguments = parser.parse_args(argv)
    partial = bool(arguments.kernel or arguments.source)
    compiled: list[Compiled] = []
    limits = budget.load(arguments.budget) if arguments.budget.exists() else []
    if "triton" in arguments.by:
        dims = sorted({limit.dim for limit in limits if limit.by == "triton"} or DIMS, reverse=True)
        compiled += budget.compile_triton(arguments.arch, dims, arguments.kernel, limits)
    if "cuda" in arguments.by:
        compiled += budget.compile_cuda(arguments.arch, arguments.source)
    compiled = [c for c in compiled if arguments.kernel in c.kernel.name]
    if partial:
        names = {c.kernel.name for c in compiled}
        checked = budget.check([limit for limit in limits if limit.kernel in names], compiled)
    else:
        checked = budget.check(limits, compiled)
    table = budget.table(checked.rows)
    print(table)
    if not partial and set(arguments.by) == {"triton", "cuda"} and set(arguments.arch) == set(budget.TARGETS):
        OUT.write_text(f"{HEADING}\n{table}\n", encoding="utf-8")
    for failure in checked.failures:
        print(failure)
    if arguments.write:
        write(arguments.budget, checked.rows)
    return 1 if checked.failures else 0


def write(path: Path, rows: Sequence[tuple[Limit, budget.Reading]]) -> None:
    """Set the limits of these lines to what was read, and leave the other lines and the comments as they are."""
    lines = path.read_text(encoding="utf-8").splitlines()
    now = {limit[:4]: limit.measured(reading).line() for limit, reading in rows}
    for number, line in enumerate(lines):
        cells = line.split()
        if cells and not line.lstrip().startswith("#"):
            key = (cells[0], cells[1], int(cells[2]), int(cells[3]))
            lines[number] = now.get(key, line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
