"""Peak memory of a training step, each case in a fresh process (gcahng.bench.peak says what the peak is).

python benchmarks/memory.py                          # n = 129 to 513, D = 512, L = 2, fp32
python benchmarks/memory.py --json benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from gcahng.bench.cases import Case
from gcahng.bench.peak import measure_peak

# (n, M, mode); steps cost seconds to minutes, so that the largest batches run in one mode each.
CASES = (
    (129, 100, "store"),
    (129, 100, "hidden"),
    (129, 100, "recompute"),
    (192, 100, "store"),
    (192, 100, "recompute"),
    (384, 200, "store"),
    (384, 200, "recompute"),
    (513, 200, "store"),
    (243, 11318, "store"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--most", type=int, default=10**9, help="leave out larger batches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for batch, classes, memory in tqdm([case for case in CASES if case[0] <= args.most], file=sys.stderr):
        case = Case(batch=batch, dim=args.dim, layers=args.layers, classes=classes, memory=memory)
        peak = measure_peak(case, steps=1)
        rows.append({"n": batch, "D": args.dim, "L": args.layers, "M": classes, "case": case.name} | peak._asdict())
    print("| n | M | case | peak, MB | kB per n² |")
    print("|---|---|---|---|---|")
    for row in rows:
        each = row["peak"] / row["n"] ** 2 / 1e3
        print(f"| {row['n']} | {row['M']} | {row['case']} | {row['peak'] / 1e6:.0f} | {each:.1f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
