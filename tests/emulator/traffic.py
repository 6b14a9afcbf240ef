"""What CUDA C++ reads and writes in global memory, counted in the emulator.

    python tests/emulator/traffic.py          # writes benchmarks/results/traffic.json and traffic_narrow.json

The files have for each op, and each of its arguments, the bytes that are read and written for each edge and channel (of
D; hidden channels count for their edge). A mix counts for the edges in it. "scratch" is the partial sums. Kernels may
find in a cache what they read: tensors of size n x D and weights always, and what a thread has just read or written.
Products are in bf16; edges are in fp32 and, in the second file, in bf16, of the ops that take edges.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(folder) for folder in (TESTS.parent, TESTS) if str(folder) not in sys.path]

from emulator.ops import OPS, STEMS, EmulatedOps, Traffic  # noqa: E402
from stages.cases import Run, Some  # noqa: E402
from stages.checks import STAGES, inputs_of  # noqa: E402

from gcahng.engine.schema import OPS as SCHEMAS  # noqa: E402

_RESULTS = TESTS.parent / "benchmarks" / "results"
FILES = {"bfloat16": _RESULTS / "traffic.json", "narrow": _RESULTS / "traffic_narrow.json"}  # by precision
# A tile as in training, but with fewer edges: anchors of several groups, whole chunks of columns.
SETUP = Some(50, 3, 512, 0, p=0.1, tiles=((0, 4, 1, 21, 0),))

Count = dict[str, dict[str, list[float]]]


class _Counting:
    """Stands for the ops, as stages.backends.Emulated."""

    triton_products = False

    def __init__(self) -> None:
        self.traffic: Traffic = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in SCHEMAS:
            raise AttributeError(name)
        run = getattr(EmulatedOps(traffic=self.traffic), name)
        return lambda *values: run(*SCHEMAS[name].flat(*values))


def count(precision: str, *stems: str) -> Count:
    """The bytes of each op, or of those of these stems, in a precision of stages.cases."""
    for stem in STEMS:
        importlib.import_module(f"stages.test_{stem}")
    chosen = [stage for stage in STAGES.values() if stage.name.split(".")[0] in (stems or STEMS)]
    if precision == "narrow":
        chosen = [stage for stage in chosen if stage.edges]
    inputs = inputs_of(SETUP, precision)
    traffic: Traffic = {}
    for stage in chosen:
        ops = _Counting()
        stage.results(Run(SETUP, inputs, ops))
        own = stage.name.split(".")[0]
        traffic |= {op: found for op, found in ops.traffic.items() if OPS[op].stem == own}
    channels = SETUP.schedule.rows * SETUP.dim
    return {
        op: {
            name: [round(x / channels, 2) for x in (found.read, found.written)]
            for name, found in traffic[op].items()
            if found.read or found.written
        }
        for op in OPS
        if op in traffic
    }


def write() -> None:
    """Count all ops and write the files."""
    for precision, path in FILES.items():
        lines = [f'  "{op}": {json.dumps(found)}' for op, found in count(precision).items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
