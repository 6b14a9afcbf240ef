"""The peak memory of a training step, in a process of its own.

    python -m gcahng.bench.peak CASE STEPS

prints one line of JSON. The peak is the high-water mark of the process over STEPS steps, minus its resident size after
one warm-up step at n = 2 K, when freed memory has been returned to the system and every weight has a gradient. So
weights, gradients, optimizer states and libraries do not count, nor does what the allocator happened to keep. On CUDA,
it is the same for the memory that torch's allocator has handed out.
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
    """Peak memory in bytes.

    Attributes:
        peak: peak of the whole step.
        phase1: peak of the loss and its backward pass.
        phase3: peak of the generator's step. Both phases are None if the system does not let a process reset its
            high-water mark; then `peak` includes the warm-up step.
        resident: the same as `peak`, but minus the plain resident size after the warm-up step, with everything that the
            allocator kept.
    """

    peak: int
    phase1: int | None
    phase3: int | None
    resident: int


def measure_peak(case: Case, steps: int = 2) -> Peak:
    """Measure a case in a fresh process with the environment of this one.

    Args:
        case: what to measure.
        steps: number of steps after the warm-up.

    Raises:
        UserError: the system is not Linux, or the process fails, for example because memory runs out.
    """
    if sys.platform != "linux" and case.device == "cpu":
        raise UserError(f"the platform is {sys.platform}; it must be Linux, because peak memory is read from /proc")
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
    """The case as one line that `from_json` reads."""
    values = asdict(case)
    values["edge_dtype"] = case.edge_dtype and str(case.edge_dtype).removeprefix("torch.")
    return json.dumps(values)


def from_json(text: str) -> Case:
    """The case that `to_json` wrote."""
    values = json.loads(text)
    values["edge_dtype"] = values["edge_dtype"] and getattr(torch, values["edge_dtype"])
    return Case(**values)


class _ProcessMemory:
    """The resident memory of this process."""

    def resident(self) -> int:
        return _status("VmRSS")

    def reset(self) -> bool:
        """Set the high-water mark back to the resident size; False if the system does not allow it."""
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
            return  # another C library, whose allocator cannot be asked to return memory


class _DeviceMemory:
    """The memory that torch's CUDA allocator has handed out."""

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
    raise UserError(f"/proc/self/status has no {key}; peak memory can be measured on Linux only")


def measure_here(problem: Problem, steps: int = 2, warm_up: int | None = None) -> Peak:
    """Measure a problem in this process, which should be fresh.

    Args:
        problem: what to measure.
        steps: number of steps after the warm-up.
        warm_up: batch of the warm-up step; None means 2 K.
    """
    case = problem.case
    memory = _ProcessMemory() if case.device == "cpu" else _DeviceMemory()
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
