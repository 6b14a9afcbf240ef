"""Reads machine code for NVIDIA GPUs (SASS) of Triton's and nvcc's kernels, and holds it to a budget.

For each kernel: how many instructions it has, how many of them are in its main loop, how many are issued for each value
that a thread works on, which share only moves registers, and how many blocks fit into a multiprocessor. Nothing runs.

What is counted is the usual path: subroutines (of division and square root, for numbers that are not normal) and the
blocks that call them are left out and told apart.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gcahng.testing.multiprocessors import RESERVED_SHARED, WARP, blocks_at_once

_MAX_THREADS = 0x05  # EIATTR_MAX_THREADS in .nv.info


class Instruction(NamedTuple):
    """at: its address; predicate: "" or the condition; name: with its modifiers; operands: the rest."""

    at: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes, if the instruction says so."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands.strip().rstrip("`()"))
        return int(found[1], 16) if found else None

    @property
    def access(self) -> int:
        """Bytes that it reads or writes in global memory, a thread's."""
        if not re.match(r"(LDG|STG|LDGSTS)\b", self.name):
            return 0
        width = re.search(r"\.(128|64)\b", self.name)
        return int(width[1]) // 8 if width else 2 if ".U16" in self.name or ".S16" in self.name else 4


_CALLING = 16  # instructions that lead to a call, at most
_MATRIX = re.compile(r"\b(HGMMA|[HDI]MMA|QGMMA|UTC\w*MMA)\b")
_MOVES = re.compile(r"(U?MOV|IMAD\.MOV|R2UR|UR2UR|S2R|S2UR)\b")


@dataclass(frozen=True)
class Kernel:
    """The machine code of a kernel.

    registers: of a thread; shared: bytes of a block, static ones and the system's; threads: of a block, at most;
    stack and local: bytes of a thread.
    """

    name: str
    arch: int
    instructions: tuple[Instruction, ...]
    registers: int = 0
    shared: int = 0
    threads: int = 0
    stack: int = 0
    local: int = 0

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Basic blocks by the address of their first instruction, without subroutines."""
        return _blocks(self.instructions)

    @cached_property
    def loops(self) -> list[set[int]]:
        """Natural loops, as the blocks of each."""
        return _loops(self.blocks)

    @cached_property
    def usual(self) -> set[int]:
        """Blocks that can be reached without a call that a condition leads to, which is one for rare numbers."""
        branched = {f for block in self.blocks.values() if len(block.followers) > 1 for f in block.followers}
        rare = {at for at, block in self.blocks.items() if block.calls and at in branched}
        found, waiting = set(), [next(iter(self.blocks))]
        while waiting:
            at = waiting.pop()
            if at not in found and (at not in rare or len(self.blocks[at].instructions) > _CALLING):
                found.add(at)
                waiting += self.blocks[at].followers
        return found

    @property
    def calls(self) -> int:
        return sum(block.calls for block in self.blocks.values())

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return sum(bool(re.match(r"(LDL|STL)\b", i.name)) for i in self.instructions)

    @cached_property
    def matrix(self) -> bool:
        """Whether it multiplies matrices on the units for that."""
        return any(_MATRIX.search(i.name) for i in self.instructions)

    @cached_property
    def main_loop(self) -> set[int]:
        """The loop that a product's time goes into, or the outermost loop with most instructions; else nothing.

        A product's: the innermost loops with matrix instructions.
        """
        if self.matrix:
            with_products = [loop for loop in self.loops if any(_MATRIX.search(i.name) for i in self.within(loop))]
            inner = [loop for loop in with_products if not any(other < loop for other in with_products)]
            return set().union(*inner) if inner else set()
        longest: set[int] = set()
        for loop in self.loops:
            if sum(1 for _ in self.within(loop)) > sum(1 for _ in self.within(longest)):
                longest = loop
        return longest

    def within(self, blocks: Iterable[int] | None = None) -> Iterator[Instruction]:
        """The instructions of the usual path, in these blocks or in all."""
        for at in sorted(self.blocks if blocks is None else blocks):
            if at in self.usual:
                yield from self.blocks[at].instructions


@dataclass(frozen=True)
class Block:
    """A basic block: its instructions, the blocks that may follow, and how many calls it has."""

    instructions: tuple[Instruction, ...]
    followers: tuple[int, ...]
    calls: int


class Reading(NamedTuple):
    """What a kernel costs.

    values: how many a thread works on in what is counted. instructions: of the usual path. loop: those of the main
    loop. worked: those that are counted. moves: the share of these that only moves registers. bytes: what these read
    and write in global memory for each value. calls: to subroutines. spills: accesses to local memory. shared: bytes of
    a block with the system's. ctas: blocks that fit into a multiprocessor at once.
    """

    kernel: str
    arch: int
    values: float
    instructions: int
    loop: int
    worked: int
    moves: float
    bytes: float
    calls: int
    spills: int
    registers: int
    shared: int
    threads: int
    ctas: int

    @property
    def per_value(self) -> float:
        """Instructions for each value of a thread."""
        return self.worked / self.values


COUNTED = ("loop", "rest", "all")


def usually_counted(kernel: Kernel) -> str:
    """What says most about a kernel: "rest" of a product, "loop" where one does most of the work, else "all"."""
    if kernel.matrix:
        return "rest"
    loop, every = list(kernel.within(kernel.main_loop)), list(kernel.within())
    bytes_of = [sum(i.access for i in some) for some in (loop, every)]
    return "loop" if 2 * bytes_of[0] > bytes_of[1] or 3 * len(loop) > len(every) else "all"


def read(kernel: Kernel, values: float, counted: str, dynamic: int = 0, threads: int | None = None) -> Reading:
    """Read a kernel's costs.

    Args:
        kernel: the machine code.
        values: how many values a thread works on in what is counted: those of a product's epilogue, or of one pass of
            the main loop.
        counted: "loop", one pass of the main loop; "rest", what is outside it; "all".
        dynamic: bytes of shared memory beside the static ones.
        threads: of a block; None: the most that the kernel was compiled for.
    """
    loop = kernel.main_loop
    parts = {"loop": loop, "rest": kernel.blocks.keys() - loop, "all": kernel.blocks.keys()}
    worked = list(kernel.within(parts[counted]))
    # ptxas counts what the system takes from 9.0 on.
    shared = kernel.shared + dynamic + (RESERVED_SHARED if kernel.arch < 90 or not kernel.shared else 0)
    threads = threads or kernel.threads or WARP
    return Reading(
        kernel.name,
        kernel.arch,
        values,
        instructions=sum(1 for _ in kernel.within()),
        loop=sum(1 for _ in kernel.within(loop)),
        worked=len(worked),
        moves=sum(bool(_MOVES.match(i.name)) for i in worked) / max(len(worked), 1),
        bytes=sum(i.access for i in worked) / values,
        calls=kernel.calls,
        spills=kernel.spills,
        registers=kernel.registers,
        shared=shared,
        threads=threads,
        ctas=blocks_at_once(kernel.arch, kernel.registers, shared, threads),
    )


# -- the flow of a kernel


def _blocks(instructions: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks that can be reached from the first without a call."""
    ends = re.compile(r"(BRA|BRX|JMP|JMX|EXIT|RET|BREAK|BSYNC|CALL)\b")
    starts = {instructions[0].at} | {i.target for i in instructions if re.match(r"(BRA|JMP)\b", i.name)}
    starts |= {i.target for i in instructions if re.match(r"(BSSY|CALL)\b", i.name)}
    for before, after in zip(instructions, instructions[1:], strict=False):
        if ends.match(before.name):
            starts.add(after.at)
    parts: dict[int, list[Instruction]] = {}
    at = None
    for instruction in instructions:
        if instruction.at in starts:
            at = instruction.at
        parts.setdefault(at, []).append(instruction)
    order = list(parts)
    following = dict(zip(order, [*order[1:], None], strict=True))
    found: dict[int, Block] = {}
    waiting = [order[0]]
    while waiting:
        at = waiting.pop()
        if at is None or at in found or at not in parts:
            continue
        inside = [i for i in parts[at] if i.name != "NOP"]
        last = parts[at][-1]
        followers = [last.target] if re.match(r"(BRA|JMP)\b", last.name) else []
        leaves = re.match(r"(BRA|JMP|BRX|JMX|EXIT|RET|BREAK)\b", last.name) is not None
        # "BRA P1, 0x…" and "BRA.DIV" go on where the condition does not hold, as predicated ones do.
        if not leaves or last.predicate or "," in last.operands or ".DIV" in last.name:
            followers.append(following[at])
        calls = sum(i.name.startswith("CALL") for i in inside)
        found[at] = Block(tuple(inside), tuple(f for f in followers if f in parts), calls)
        waiting += found[at].followers
    return {at: found[at] for at in order if at in found}


def _loops(blocks: Mapping[int, Block]) -> list[set[int]]:
    """Natural loops: a branch back to a block that every way to the branch passes through."""
    order = list(blocks)
    before: dict[int, list[int]] = {at: [] for at in order}
    for at, block in blocks.items():
        for follower in block.followers:
            before[follower].append(at)
    everything = set(order)
    dominators = {at: {at} if at == order[0] else everything for at in order}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            through = set.intersection(*(dominators[b] for b in before[at])) if before[at] else set()
            if (new := through | {at}) != dominators[at]:
                dominators[at], changed = new, True
    loops: dict[int, set[int]] = {}
    for at, block in blocks.items():
        for head in block.followers:
            if head in dominators[at]:
                loop, waiting = loops.setdefault(head, {head}), [at]
                while waiting:
                    if (inside := waiting.pop()) not in loop:
                        loop.add(inside)
                        waiting += before[inside]
    return list(loops.values())


# -- files


def tool(name: str) -> Path:
    """Where a tool of CUDA is: in Triton's package, in the toolkit, or on the path.

    Raises:
        LookupError: nowhere.
    """
    places = []
    if (spec := find_spec("triton")) and spec.submodule_search_locations:
        places.append(Path(next(iter(spec.submodule_search_locations))) / "backends" / "nvidia" / "bin" / name)
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            places.append(Path(home) / "bin" / name)
    for place in places:
        if place.is_file():
            return place
    if found := shutil.which(name):
        return Path(found)
    raise LookupError(f"there is no {name}: it comes with triton (pip install triton) and with the CUDA toolkit")


def _run(*command: str | Path, text: str | None = None) -> str:
    return subprocess.run([*map(str, command)], input=text, capture_output=True, text=True, check=True).stdout


def kernels_of(code: bytes | Path) -> list[Kernel]:
    """The kernels of a cubin (its bytes or its file) or of a library, with their names as in the source.

    A library's are those of every architecture that it holds machine code for.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(code, bytes):
            path = Path(folder) / "kernels.cubin"
            path.write_bytes(code)
        else:
            path = code.resolve()
        if path.suffix == ".cubin":
            return _of_cubin(path)
        subprocess.run([tool("cuobjdump"), "-xelf", "all", path], cwd=folder, capture_output=True, check=True)
        return [kernel for cubin in sorted(Path(folder).glob("*.cubin")) for kernel in _of_cubin(cubin)]


def _of_cubin(path: Path) -> list[Kernel]:
    usage, code = _run(tool("cuobjdump"), "-res-usage", path), _run(tool("cuobjdump"), "-sass", path)
    arch = int(re.search(r"\bsm_(\d+)", code)[1])
    resources = dict(re.findall(r"Function (\S+?):?\s*\n\s*(REG:.*)", usage))
    threads = _most_threads(path.read_bytes())
    bodies: dict[str, list[Instruction]] = {}
    name = ""
    for line in code.splitlines():
        if found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
        elif found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line):
            bodies.setdefault(name, []).append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4]))
    readable = dict(zip(bodies, _readable(list(bodies)), strict=True))
    kernels = []
    for name, instructions in bodies.items():
        used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", resources[name])}
        numbers = (used["REG"], used["SHARED"], threads.get(name, 0), used["STACK"], used["LOCAL"])
        kernels.append(Kernel(readable[name], arch, tuple(instructions), *numbers))
    return kernels


def _readable(names: Sequence[str]) -> list[str]:
    """Names as in the source, without namespaces, arguments and spaces: gate_forward_kernel<float,RowShape<4,16>>."""
    if not any(name.startswith("_Z") for name in names):
        return list(names)
    lines = _run("c++filt", text="\n".join(names)).splitlines()
    plain = (re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", line) for line in lines)
    return [re.sub(r"\(.*| ", "", line) for line in plain]


def _most_threads(elf: bytes) -> dict[str, int]:
    """The threads of a block that each kernel was compiled for at most, where its source says so."""
    table, count, names = *struct.unpack_from("<Q", elf, 0x28), *struct.unpack_from("<HH", elf, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + 64 * k) for k in range(count)]
    found = {}
    for section in sections:
        start = sections[names][4] + section[0]
        name = elf[start : elf.index(b"\0", start)].decode()
        if not name.startswith(".nv.info."):
            continue
        at, stop = section[4], section[4] + section[5]
        while at < stop:
            kind, attribute, size = struct.unpack_from("<BBH", elf, at)
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<III", elf, at + 4)
                found[name.removeprefix(".nv.info.")] = x * y * z
            at += 4 + (size if kind == 4 else 0)
    return found
