"""The implementations' names, which of them are available here, and which one runs. Ops, engine and loss share them.

    reference   plain PyTorch, differentiated by autograd: what the op means
    torch       PyTorch with written backwards and little memory, on any device
    cpp         C++ on the CPU (_C_cpu)
    cuda        CUDA C++ (_C_cuda)
    triton      Triton kernels (gcahng.kernels)

"auto" takes the first available one of the op's own list. One asked for by name runs, or its absence is an error.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from gcahng import _native
from gcahng.errors import UserError

NAMES = ("reference", "torch", "cpp", "cuda", "triton")
_ANYWHERE = ("reference", "torch")
OLDEST = (8, 0)  # compute capability that CMakeLists.txt builds for, and the first with bf16 products
_log = logging.getLogger("gcahng")
_said: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Op:
    """What exists for an op: implementations for CPU and for CUDA tensors, best first; dtypes of those that do not take
    every floating one."""

    cpu: tuple[str, ...]
    cuda: tuple[str, ...]
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)

    def order(self, device_type: str) -> tuple[str, ...]:
        """The implementations for a device, best first; on devices other than CPU and CUDA those that run anywhere."""
        if device_type == "cpu":
            return self.cpu
        if device_type == "cuda":
            return self.cuda
        return tuple(name for name in self.cuda if name in _ANYWHERE)


OPS: dict[str, Op] = {}


def register(op: str, entry: Op) -> None:
    """Makes an op (or an engine, or the loss) known to `available` and `resolve`."""
    for name in (*entry.cpu, *entry.cuda, *entry.dtypes):
        assert name in NAMES, name
    OPS[op] = entry


def available(impl: str, device_type: str, op: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """None where the implementation can run on this kind of device, else the reason and the remedy, in one line.

    With op and dtype: whether it can run this op, on tensors of this dtype.
    """
    if op is not None and (reason := _not_for(impl, device_type, OPS[op], op, dtype)):
        return reason
    if impl == "cpp" and device_type != "cpu":
        return "it runs on CPU tensors alone"
    if impl == "cuda" and device_type != "cuda":
        return "it runs on CUDA tensors alone"
    if impl == "cpp":
        return _native.load("_C_cpu").reason
    if impl == "triton" and (reason := _triton_missing(device_type, dtype)):
        return reason
    if impl == "cuda" and (reason := _native.load("_C_cuda").reason):
        return reason
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _too_old() if impl in ("cuda", "triton") and device_type == "cuda" else None


def _not_for(impl: str, device_type: str, entry: Op, op: str, dtype: torch.dtype | None) -> str | None:
    if impl not in (*entry.cpu, *entry.cuda):
        return f"{op} has no such implementation; it has {', '.join(sorted({*entry.cpu, *entry.cuda}))}"
    dtypes = entry.dtypes.get(impl)
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        return f"it takes {', '.join(map(_name, dtypes))}, not {_name(dtype)}; cast, or use impl='torch'"
    return None


def _triton_missing(device_type: str, dtype: torch.dtype | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "gcahng[triton]"'
    if device_type == "cuda":
        return None
    if device_type != "cpu":
        return "it runs on CUDA tensors alone"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on CUDA tensors; only TRITON_INTERPRET=1, for tests, interprets the kernels on the CPU"
    if dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 wrongly; use float32 or float16"
    return None


def _too_old() -> str | None:
    have = torch.cuda.get_device_capability()
    if have >= OLDEST:
        return None
    return f"it needs a GPU of compute capability {_version(OLDEST)} or newer, and this one has {_version(have)}"


def resolve(impl: str, device_type: str, op: str, dtype: torch.dtype | None = None) -> str:
    """The implementation that runs: impl itself, or for "auto" the first available one of the op's list.

    Errors: UserError for an unknown name, and for an implementation asked for by name that is not available here.
    """
    if impl == "auto":
        return _choose(device_type, op, dtype)
    if impl not in NAMES:
        raise UserError(f"impl={impl!r}: choose one of auto, {', '.join(NAMES)}")
    if reason := available(impl, device_type, op, dtype):
        raise UserError(f"impl={impl!r} is not available for {op} on {device_type}: {reason}")
    return impl


# torch.compile takes the answer as a constant instead of tracing into the search. The same mark as
# torch.compiler.assume_constant_result sets, which would import the whole compiler.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choose(device_type: str, op: str, dtype: torch.dtype | None) -> str:
    passed = []
    for name in OPS[op].order(device_type):
        reason = available(name, device_type, op, dtype)
        if reason is None:
            _say_once(device_type, op, name, passed)
            return name
        passed.append(f"{name} is not: {reason}")
    raise UserError(f"{op} runs nowhere on {device_type}: {'; '.join(passed)}")


def _say_once(device_type: str, op: str, name: str, passed: list[str]) -> None:
    """Says what auto chose: a warning where something better is missing, else for those who listen."""
    key = (device_type, op, name)
    if key not in _said:
        _said.add(key)
        text = f"{op} on {device_type} uses impl={name!r}" + "".join(f"; {reason}" for reason in passed)
        _log.log(logging.WARNING if passed else logging.INFO, text)


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
