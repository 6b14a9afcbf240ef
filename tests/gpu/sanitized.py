"""One training step in small, for compute-sanitizer: python tests/gpu/sanitized.py IMPL PRECISION [DEVICE]"""

from __future__ import annotations

import sys

import torch

from gcahng.bench.cases import Case, Problem


def main(impl: str, precision: str = "fp32", device: str = "cuda") -> None:
    """impl "nothing": one addition, to see whether the sanitizer runs at all."""
    if impl == "nothing":
        torch.ones(1, device=device).add_(1)
        print("ready")
        return
    for memory in ("store", "recompute"):
        for n, dim in ((15, 40), (12, 64)):
            Problem(Case(n, 3, dim, 2, impl=impl, precision=precision, memory=memory, device=device)).step()
    print("finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
