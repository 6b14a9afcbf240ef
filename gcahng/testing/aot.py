"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and reads from the machine code what they
take.

What is compiled is what would run: the engine launches its kernels on meta tensors (gcahng.testing.launches), Triton
itself works out type, alignment and value of every argument as it does before each launch, and a hook takes that down
where Triton would compile. For a process without TRITON_INTERPRET, in which nothing else uses Triton.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pkgutil
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from gcahng.testing import sass
from gcahng.testing.multiprocessors import MULTIPROCESSORS, RESERVED_SHARED, WARP
from gcahng.testing.sass import Reading

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,  # with torch's switch on
    "fp64": torch.float64,
}
PRODUCTS_ALONE = ("fp16", "tf32")  # what they change is in products; the rest is as in bf16 and in fp32
DIMS, ARCHS = (128, 384, 512), tuple(MULTIPROCESSORS)
FEW_AND_MANY = (64, 512)  # channels that between them every kernel is for
TENSOR_MEMORY_LIMIT = 512  # columns, on sm_100


class Case(NamedTuple):
    """Channels D, dtype of products (see DTYPES), compute capability without its dot."""

    dim: int
    dtype: str
    arch: int


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched in a case, as Triton would compile it; times: how often it was launched like that;
    narrow: whether for edges in bf16 alone."""

    case: Case
    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    times: int = 1
    narrow: bool = False

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def blocks(self) -> dict[str, int]:
        """The constants BLOCK_…"""
        names = self.function.arg_names
        values = {names[place]: value for (place, *_), value in self.constants.items()}
        return {name: value for name, value in values.items() if name.startswith("BLOCK_")}

    @property
    def tile(self) -> int:
        """The values that a program works on in one pass.

        BLOCK_V rows come one after the other in a loop, and BLOCK_K and BLOCK_H are along the sum of a product.
        """
        inside = ("BLOCK_V", "BLOCK_K", "BLOCK_H")
        return prod(n for name, n in self.blocks.items() if n and name not in inside)

    @property
    def holds_rows(self) -> bool:
        """Whether a program has all channels of a row at once."""
        return self.blocks.get("BLOCK_D", 0) >= self.case.dim


@dataclass(frozen=True)
class Build:
    """What a launch's machine code takes: reading: its costs (gcahng.testing.sass), of what says most about it; stack
    and local memory a thread, in bytes; tensor_memory: columns; narrow: has a product of bf16 or fp16 operands;
    products: shapes of matrix instructions; atomics: those on floats; width: bits of the widest global access. error:
    why it does not compile; then there is no reading."""

    kernel: str
    case: Case
    times: int
    reading: Reading | None = None
    stack: int = 0
    local: int = 0
    tensor_memory: int = 0
    narrow: bool = False
    products: list[str] = field(default_factory=list)
    atomics: list[str] = field(default_factory=list)
    width: int = 0
    error: str | None = None

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, without those that the system takes."""
        return self.reading.shared - RESERVED_SHARED

    def failures(self) -> list[str]:
        """What the gate does not let pass."""
        if self.reading is None:
            return [self.error]
        limit, spills = MULTIPROCESSORS[self.case.arch].block_shared, self.reading.spills
        found = []
        if self.stack or self.local or spills:
            found.append(f"{self.stack} B of stack, {self.local} B local, {spills} accesses to local memory")
        if self.shared > limit:
            found.append(f"{self.shared} B of shared memory, of {limit}")
        if self.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"{self.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY_LIMIT}")
        if self.atomics:
            found.append(f"atomics on floats: {', '.join(self.atomics)}")
        if self.narrow and self.case.arch == 90:
            least = min(128, self.case.dim)  # a product onto D channels has no more columns
            shapes = [re.fullmatch(r"HGMMA (\d+)x(\d+)x\d+", product) for product in self.products]
            if not shapes or not all(m and int(m[1]) == 64 and int(m[2]) >= least for m in shapes):
                found.append(f"matrix instructions {self.products}, not HGMMA of at least 64 x {least}")
        return found


# -- recording


class _Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # one cache of kernels each

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(case: Case) -> Iterator[dict[str, Launch]]:
    """Launches within it are taken down, by all that Triton distinguishes them by, and not run."""
    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    launches: dict[str, Launch] = {}

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        kernel = fn.jit_function
        key = f"{kernel.module}.{kernel.__name__} {compile['key']}"
        if key in launches:
            launches[key] = replace(launches[key], times=launches[key].times + 1)
        else:
            options = json.loads(compile["specialization_data"])["options"]
            options = {name: tuple(x) if isinstance(x, list) else x for name, x in options.items()}
            (attributes,) = compile["configs"]
            launches[key] = Launch(case, kernel, compile["signature"], compile["constants"], attributes, options)
        return True  # Triton: do not compile, and so do not launch

    before = driver._active, knobs.runtime.jit_cache_hook, torch.backends.cuda.matmul.fp32_precision
    driver.set_active(_Absent(case.arch))
    knobs.runtime.jit_cache_hook = take
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.dtype == "tf32" else "ieee"
    try:
        yield launches
    finally:
        driver._active, knobs.runtime.jit_cache_hook, torch.backends.cuda.matmul.fp32_precision = before


def record(case: Case) -> list[Launch]:
    """What a training step launches; with more channels than DIMS have, only what holds whole rows. Other kernels take
    as many channels at a time as with 512."""
    from gcahng.engine.stages import edge_update
    from gcahng.testing.launches import launch_all, launch_narrow

    shared = MULTIPROCESSORS[case.arch].block_shared
    with recording(case) as launches, patch.object(edge_update, "shared_memory", lambda _: shared):
        launch_all(case.dim, DTYPES[case.dtype])
        wide = set(launches)
        if case.dtype == "bf16":
            launch_narrow(case.dim)
    found = [replace(launch, narrow=key not in wide) for key, launch in launches.items()]
    if case.dim > max(DIMS):
        found = [launch for launch in found if launch.holds_rows]
    return [launch for launch in found if _has_product(launch)] if case.dtype in PRODUCTS_ALONE else found


def never_launched(launches: Iterable[Launch], package: str = "gcahng.kernels") -> list[str]:
    """The package's Triton functions that are neither launched nor called by what is."""
    root = importlib.import_module(package)
    defined = {}
    for module in pkgutil.iter_modules(root.__path__):
        for name, value in vars(importlib.import_module(f"{package}.{module.name}")).items():
            if isinstance(value, JITFunction) and value.module == f"{package}.{module.name}":
                defined[f"{value.module}.{name}"] = value
    reached = {f"{f.module}.{f.__name__}" for launch in launches for f in _reached(launch.function)}
    return sorted(defined.keys() - reached)


def _missing(recorded: Sequence[Launch], cases: Sequence[Case]) -> list[str]:
    """never_launched, of these cases or with few or many channels, which some kernels are for."""
    missing, seen = never_launched(recorded), list(recorded)
    for dim in FEW_AND_MANY:
        case = Case(dim, "bf16", cases[0].arch)
        if missing and case not in cases:
            seen += record(case)
            missing = never_launched(seen)
    return missing


def _has_product(launch: Launch) -> bool:
    return any(re.search(r"\btl\.dot\(", inspect.getsource(f.fn)) for f in _reached(launch.function))


@cache
def _reached(function: JITFunction) -> tuple[JITFunction, ...]:
    """A Triton function and all that it calls."""
    found, waiting = [], [function]
    while waiting:
        at = waiting.pop()
        if at not in found:
            found.append(at)
            tree = ast.parse(textwrap.dedent(inspect.getsource(at.fn)))
            names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
            waiting += [f for f in map(at.fn.__globals__.get, names) if isinstance(f, JITFunction)]
    return tuple(found)


# -- compiling


def compile_launch(launch: Launch) -> Any:
    """What triton.compile returns of a launch."""
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", launch.case.arch, 32), options=launch.options)


def most_frequent(launches: Iterable[Launch]) -> list[Launch]:
    """Of each kernel's launches in a case that differ for Triton, the one that happens most often, with edges in the
    accumulating dtype if there is one."""
    most: dict[tuple[str, Case], Launch] = {}
    for launch in launches:
        best = most.setdefault((launch.name, launch.case), launch)
        if (not launch.narrow, launch.times) > (not best.narrow, best.times):
            most[launch.name, launch.case] = launch
    return list(most.values())


def build(launch: Launch) -> Build:
    """Compiles a launch and reads its machine code."""
    result = Build(launch.name, launch.case, launch.times)
    try:
        built = compile_launch(launch)
    except Exception as error:  # whatever a compiler throws
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return replace(result, error=f"does not compile: {type(error).__name__}: {lines[0]} … {lines[-1]}")
    (kernel,) = sass.kernels_of(built.asm["cubin"])
    threads = built.metadata.num_warps * WARP
    counted = sass.usually_counted(kernel)
    names = [instruction.name for instruction in kernel.instructions]
    widths = [m[1] for m in map(re.compile(r"(?:LDG|STG|LDGSTS)\.E[.\w]*?\.(64|128)\b").match, names) if m]
    return replace(
        result,
        reading=sass.read(kernel, launch.tile / threads, counted, built.metadata.shared, threads),
        stack=kernel.stack,
        local=kernel.local,
        tensor_memory=getattr(built.metadata, "tmem_size", None) or 0,
        narrow=re.search(r"tt\.dot .*: tensor<\d+x\d+x(?:bf16|f16)>", built.asm["ttir"]) is not None,
        products=_matrix_instructions(names),
        atomics=sorted({name for name in names if re.match(r"(?:ATOM|ATOMG|RED|REDG)\.[.\w]*F(?:16|32|64)", name)}),
        width=max(map(int, widths), default=32),
    )


def _matrix_instructions(names: Iterable[str]) -> list[str]:
    found = set()
    for name in names:
        if shape := re.match(r"HGMMA\.(\d+x\d+x\d+)", name):
            found.add(f"HGMMA {shape[1]}")
        elif shape := re.match(r"([HD]MMA)\.(\d+)", name):
            found.add(f"{shape[1]} {shape[2]}")
        elif shape := re.match(r"UTC\w*MMA\b", name):
            found.add(shape[0])
    return sorted(found)


_launches: list[Launch] = []  # what forked workers compile


def _build_numbered(number: int) -> Build:
    return build(_launches[number])


def build_all(
    cases: Sequence[Case],
    kernels: Sequence[str] = (),
    once: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Build]:
    """Records all cases and compiles what was launched; an error if a kernel of the package never is.

    kernels: these alone; once: of each kernel's launches in a case that differ for Triton, the most frequent one.
    """
    recorded = [launch for case in cases for launch in record(case)]
    # In fp64 products are the library's.
    whole = any(case.dtype in ("bf16", "fp32") and case.dim <= max(DIMS) for case in cases)
    if whole and (missing := _missing(recorded, cases)):
        raise LookupError(f"nothing launches {', '.join(missing)}: see gcahng/testing/launches.py")
    if unknown := set(kernels) - {launch.name for launch in recorded}:
        raise LookupError(f"no kernel that these cases launch is called {', '.join(sorted(unknown))}")
    chosen = [launch for launch in recorded if not kernels or launch.name in kernels]
    if once:
        chosen = most_frequent(chosen)
    _launches[:] = chosen
    builds = []
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("fork")) as pool:
        for result in pool.map(_build_numbered, range(len(chosen))):
            builds.append(result)
            progress(len(builds), len(chosen))
    return builds
