"""The peak memory of a training step, in a process of its own.

    python -m gcahng.bench.peak CASE STEPS

prints one line of JSON. The peak is the process's high-water mark over STEPS steps, less its resident size after one
warm-up step at n = 2 K, once freed memory has gone back to the system and a gradient lies beside every weight: weights,
gradients, the optimizers' state and libraries do not count, and neither does what the allocator happened to keep. On
CUDA the same of what torch's allocator has given out.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from gcahng.bench.cases import Case, Problem
from gcahng.errors import UserError

_CLEAR = Path("/proc/self/clear_refs")


class Peak(NamedTuple):
    """Bytes. peak: of the step; phase1: of the loss and its backward; phase3: of the generator's step (None where the
    system does not let a process reset its high-water mark: then peak includes the warm-up's); resident: as peak,
    less the plain resident size after the warm-up step, whatever the allocator keeps in it."""

    peak: int
    phase1: int | None
    phase3: int | None
    resident: int


def measure_peak(case: Case, steps: int = 2) -> Peak:
    """Runs a case in a fresh process with this one's environment.

    Errors: UserError on other systems than Linux, and if the process fails (memory running out included).
    """
    if sys.platform != "linux" and case.device == "cpu":
        raise UserError(f"peak memory is read from /proc, which {sys.platform} does not have; use Linux")
    command = [sys.executable, "-m", "gcahng.bench.peak", to_json(case), str(steps)]
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}; is memory short?"]
        raise UserError(f"the process that measures {case.name} failed: {lines[-1]}")
    return Peak(**json.loads(result.stdout.splitlines()[-1]))


def to_json(case: Case) -> str:
    """See from_json."""
    values = asdict(case)
    values["edge_dtype"] = case.edge_dtype and str(case.edge_dtype).removeprefix("torch.")
    return json.dumps(values)


def from_json(text: str) -> Case:
    """The case that to_json wrote."""
    values = json.loads(text)
    values["edge_dtype"] = values["edge_dtype"] and getattr(torch, values["edge_dtype"])
    return Case(**values)


class _Process:
    """Memory of this process."""

    def resident(self) -> int:
        return _status("VmRSS")

    def reset(self) -> bool:
        """The high-water mark back to the resident size, if the system allows it."""
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def high_water(self, resettable: bool) -> int:
        return _status("VmHWM") if resettable else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def trim(self) -> None:
        gc.collect()
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # another C library: the allocator keeps what it keeps


class _Device:
    """The same of torch's CUDA allocator."""

    def resident(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def reset(self) -> bool:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True

    def high_water(self, resettable: bool) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def trim(self) -> None:
        gc.collect()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {key}; peak memory needs Linux")


def measure_here(problem: Problem, steps: int = 2, warm_up: int | None = None) -> Peak:
    """In this process, which should be fresh. warm_up: n of the step before (2 K)."""
    case = problem.case
    memory = _Process() if case.device == "cpu" else _Device()
    whole = problem.embeddings, problem.labels
    problem.embeddings, problem.labels = problem.batch(warm_up or 2 * case.views)
    problem.step()
    plain = memory.resident()
    memory.trim()
    for parameter in problem.gca.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    baseline = memory.resident()
    problem.embeddings, problem.labels = whole
    resettable = memory.reset()
    marks: dict[int, int] = {1: 0, 3: 0}
    for _ in range(steps):
        problem.embeddings.grad = None
        with problem.products():
            problem.loss().backward()
            marks[1] = max(marks[1], memory.high_water(resettable))
            memory.reset()
            problem.gca.generator_step()
            marks[3] = max(marks[3], memory.high_water(resettable))
            memory.reset()
    top = max(marks.values())
    phases = [marks[phase] - baseline if resettable else None for phase in (1, 3)]
    return Peak(top - baseline, *phases, top - plain)


if __name__ == "__main__":
    print(json.dumps(measure_here(Problem(from_json(sys.argv[1])), int(sys.argv[2]))._asdict()))
