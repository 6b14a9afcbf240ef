"""Holds GPU kernels to a budget: what each may cost in machine code, as gcahng.testing.sass reads it.

A budget is a file with a line for each kernel and architecture. Lines that begin with # are comments. The columns:

    kernel     its name; one of CUDA C++ with its template arguments, without namespaces and spaces; a Triton kernel of
               edges in bf16 alone with "<bf16>"
    by         triton or cuda
    D          embedding channels that it is compiled for (Triton; products are in bf16)
    arch       compute capability without its dot
    counted    which instructions: those of the main "loop" (one pass), the "rest" (outside the loop with a product's
               matrix instructions), or "all"
    values     how many values a thread works on in what is counted; -: those of the tile (Triton)
    each       instructions for each value, at most
    moves      percent of these that only move registers, at most
    bytes      that a thread reads and writes in global memory for each value, at most
    calls      of subroutines, at most
    registers  of a thread, at most
    shared     KB of a block, with the one that the system takes, at most
    ctas       blocks that fit into a multiprocessor at once, at least

No kernel may access local memory. For a process without TRITON_INTERPRET, as gcahng.testing.aot.
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gcahng.testing import sass
from gcahng.testing.multiprocessors import MULTIPROCESSORS, WARP
from gcahng.testing.sass import Kernel, Reading

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks" / "budget.txt"
SOURCES = ROOT / "csrc" / "cuda"
DTYPE = "bf16"
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}


class Limit(NamedTuple):
    """A line of a budget. values: None, those of the tile. moves: a share; shared: bytes."""

    kernel: str
    by: str
    dim: int
    arch: int
    counted: str
    values: float | None
    each: float
    moves: float
    bytes: float
    calls: int
    registers: int
    shared: float
    ctas: int

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.by}, D = {self.dim}, sm_{self.arch})"

    def excess(self, reading: Reading) -> list[str]:
        """What goes beyond the limits."""
        most = (
            ("instructions a value", reading.per_value, self.each),
            ("share of moves", reading.moves, self.moves),
            ("bytes a value", reading.bytes, self.bytes),
            ("calls of subroutines", reading.calls, self.calls),
            ("registers", reading.registers, self.registers),
            ("bytes of shared memory", reading.shared, self.shared),
            ("accesses to local memory", reading.spills, 0),
        )
        found = [f"{what}: {_brief(is_)}, at most {_brief(limit)}" for what, is_, limit in most if is_ > limit]
        if reading.ctas < self.ctas:
            found.append(f"blocks a multiprocessor: {reading.ctas}, at least {self.ctas}")
        return found

    def measured(self, reading: Reading) -> Limit:
        """The same line with what the kernel takes now."""
        return self._replace(
            each=_up(reading.per_value, 1),
            moves=_up(reading.moves, 2),
            bytes=_up(reading.bytes, 1),
            calls=reading.calls,
            registers=reading.registers,
            shared=_up(reading.shared / 1024, 1) * 1024,
            ctas=reading.ctas,
        )

    def line(self) -> str:
        cells = [self.kernel, self.by, self.dim, self.arch, self.counted]
        cells += ["-" if self.values is None else f"{self.values:g}", f"{self.each:g}", f"{100 * self.moves:.0f}"]
        cells += [f"{self.bytes:g}", self.calls, self.registers, f"{self.shared / 1024:g}", self.ctas]
        first, *others = map(str, cells)
        return f"{first:54s} {others[0]:7s}" + " ".join(f"{cell:>9s}" for cell in others[1:])


COLUMNS = ("kernel", "by", "D", "arch", "counted", "values", "each", "moves", "bytes", "calls", "registers", "shared")
COLUMNS += ("ctas",)


def load(path: Path = FILE) -> list[Limit]:
    """Read a budget.

    Raises:
        ValueError: a line is wrong; the message says which and why.
    """
    limits = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split()
        if not cells or line.lstrip().startswith("#"):
            continue
        try:
            if len(cells) != len(COLUMNS):
                raise ValueError(f"it has {len(cells)} columns; it must have {len(COLUMNS)}")
            kernel, by, dim, arch, counted, values, each, moves, moved, calls, registers, shared, ctas = cells
            if by not in ("triton", "cuda") or counted not in sass.COUNTED or int(arch) not in MULTIPROCESSORS:
                raise ValueError(f"{by}, {arch} or {counted} is none of the values that there are")
            if by == "cuda" and values == "-":
                raise ValueError("values is -; for CUDA C++ it must be a number")
            limit = Limit(
                kernel,
                by,
                int(dim),
                int(arch),
                counted,
                None if values == "-" else float(values),
                float(each),
                float(moves) / 100,
                float(moved),
                int(calls),
                int(registers),
                float(shared) * 1024,
                int(ctas),
            )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if any(limit[:4] == other[:4] for other in limits):
            raise ValueError(f"{path}, line {number}: {limit.name} has a line already")
        limits.append(limit)
    return limits


class Compiled(NamedTuple):
    """A kernel's machine code with what its launch says: values of the tile a thread, dynamic shared memory, threads;
    None and 0 for CUDA C++."""

    by: str
    dim: int
    kernel: Kernel
    values: float | None = None
    dynamic: int = 0
    threads: int | None = None


def compile_triton(
    archs: Iterable[int], dims: Iterable[int], name: str = "", limits: Iterable[Limit] = ()
) -> list[Compiled]:
    """Each Triton kernel with this in its name as training steps launch it most often, compiled.

    What has no line among the limits is left out where there is one for others of its family: for another D, or for
    edges of the accumulating dtype.
    """
    from gcahng.testing import aot

    lines = {(limit.kernel, limit.dim, limit.arch) for limit in limits}
    families = {(_family(kernel), arch) for kernel, _, arch in lines}
    found = []
    for arch in archs:
        for dim in dims:
            recorded = aot.record(aot.Case(dim, DTYPE, arch))
            for narrow in (False, True):
                for launch in aot.most_frequent(one for one in recorded if one.narrow == narrow):
                    called = f"{launch.name}<bf16>" if narrow else launch.name
                    other = (called, dim, arch) not in lines and (launch.name, arch) in families
                    if other or name not in called:
                        continue
                    built = aot.compile_launch(launch)
                    (kernel,) = sass.kernels_of(built.asm["cubin"])
                    kernel, threads = replace(kernel, name=called), built.metadata.num_warps * WARP
                    found.append(Compiled("triton", dim, kernel, launch.tile / threads, built.metadata.shared, threads))
    return found


def compile_cuda(archs: Iterable[int], sources: Sequence[Path] = ()) -> list[Compiled]:
    """The kernels of CUDA C++, compiled by nvcc.

    Raises:
        LookupError: there is no nvcc.
    """
    nvcc = sass.tool("nvcc")

    def build(job: tuple[Path, int]) -> list[Kernel]:
        source, arch = job
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = [nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={TARGETS[arch]}", "-o", cubin, source]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile: {done.stderr}")
            return sass.kernels_of(cubin)

    stems = [path for path in sorted(SOURCES.glob("*.cu")) if SOURCES.with_name(f"{path.stem}.h").exists()]
    jobs = [(source, arch) for arch in archs for source in sources or stems]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = [kernel for kernels in pool.map(build, jobs) for kernel in kernels]
    unique = {(kernel.name, kernel.arch): kernel for kernel in built}  # what several sources share
    return [Compiled("cuda", 512, kernel) for kernel in unique.values()]


class Checked(NamedTuple):
    """limits with their readings; failures: lines that say what goes beyond the budget or is missing in it."""

    rows: list[tuple[Limit, Reading]]
    failures: list[str]


def check(limits: Sequence[Limit], compiled: Sequence[Compiled]) -> Checked:
    """Compare what was compiled with the lines for its implementations and architectures.

    Every kernel needs a line, one of CUDA C++ for any of its template arguments; and every line a kernel.
    """
    made = {(c.by, c.dim, c.kernel.arch) for c in compiled}
    there = {(c.kernel.name, c.by, c.dim, c.kernel.arch): c for c in compiled}
    rows, failures = [], []
    for limit in limits:
        if limit[1:4] not in made:
            continue
        if (found := there.get(limit[:4])) is None:
            failures.append(f"{limit.name}: there is no such kernel")
            continue
        values = limit.values or found.values
        reading = sass.read(found.kernel, values, limit.counted, found.dynamic, found.threads)
        rows.append((limit, reading))
        if not reading.worked:
            failures.append(f"{limit.name}: nothing is counted as {limit.counted!r}")
        failures += [f"{limit.name}: {excess}" for excess in limit.excess(reading)]
    known = {(_family(limit.kernel), *limit[1:2], limit.arch) for limit in limits}
    missing = {(_family(c.kernel.name), c.by, c.kernel.arch) for c in compiled} - known
    failures += [f"{name} ({by}, sm_{arch}) has no line in the budget" for name, by, arch in sorted(missing)]
    return Checked(rows, failures)


def suggest(compiled: Compiled) -> Limit:
    """A line with what a kernel takes now."""
    kernel, counted = compiled.kernel, sass.usually_counted(compiled.kernel)
    limit = Limit(kernel.name, compiled.by, compiled.dim, kernel.arch, counted, None, 0, 0, 0, 0, 0, 0, 0)
    if compiled.values is None:
        limit = limit._replace(values=1.0)
    reading = sass.read(kernel, compiled.values or 1.0, counted, compiled.dynamic, compiled.threads)
    return limit.measured(reading)


def table(rows: Sequence[tuple[Limit, Reading]]) -> str:
    """What kernels take, as Markdown; limits behind a slash where they are not what a kernel takes."""
    head = [
        "kernel",
        "by",
        "D",
        "sm",
        "instructions",
        "main loop",
        "counted",
        "values a thread",
        "instructions a value",
    ]
    head += ["moves, %", "bytes a value", "calls", "registers", "shared, KB", "blocks at once"]
    lines = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for limit, r in rows:
        now = limit.measured(r)
        pairs = [(now.each, limit.each), (100 * now.moves, 100 * limit.moves), (now.bytes, limit.bytes)]
        pairs += [(r.calls, limit.calls), (r.registers, limit.registers), (now.shared / 1024, limit.shared / 1024)]
        pairs.append((r.ctas, limit.ctas))
        cells = [
            limit.kernel,
            limit.by,
            limit.dim,
            r.arch,
            f"{r.instructions:,}",
            r.loop,
            limit.counted,
            f"{r.values:g}",
        ]
        cells += [f"{is_:.4g}" if math.isclose(is_, may) else f"{is_:.4g} / {may:.4g}" for is_, may in pairs]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _family(name: str) -> str:
    return name.partition("<")[0]


def _up(x: float, digits: int) -> float:
    """Rounded up."""
    return math.ceil(round(x * 10**digits, 6)) / 10**digits


def _brief(x: float) -> str:
    return f"{x:,.3g}" if x < 1000 else f"{x:,.0f}"
