"""GPU kernels keep to benchmarks/budget.txt, and one that does not is noticed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gcahng.testing import budget, sass
from gcahng.testing.budget import Compiled, Limit
from gcahng.testing.multiprocessors import blocks_at_once
from gcahng.testing.sass import Instruction, Kernel

TOOL = Path(__file__).parents[2] / "benchmarks" / "budget.py"


def has_tool(name: str) -> bool:
    try:
        sass.tool(name)
    except LookupError:
        return False
    return True


nvcc = pytest.mark.skipif(not has_tool("nvcc"), reason="there is no nvcc")


def run(*arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """benchmarks/budget.py, in a process where kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TOOL.parents[1]), *sys.path])
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


# -- the kernels of this package


@pytest.mark.simulated
def test_triton_keeps_to_the_budget() -> None:
    done = run("--by", "triton", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("_kernel | triton | 512 | 90 |") > 20
    assert done.stdout.count("<bf16> | triton | 512 | 90 |") > 15


@nvcc
@pytest.mark.simulated
def test_cuda_keeps_to_the_budget() -> None:
    done = run("--by", "cuda", "--arch", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| cuda | 512 | 90 |") > 20


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "100"])
@pytest.mark.parametrize("by", ["triton", pytest.param("cuda", marks=nvcc)])
def test_other_chips_keep_to_the_budget(by: str, arch: str) -> None:
    done = run("--by", by, "--arch", arch, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr


# -- planted excess


@pytest.mark.simulated
def test_a_triton_kernel_beyond_its_budget_fails(tmp_path: Path) -> None:
    (limit,) = [x for x in budget.load() if x[:4] == ("norm_gelu_kernel", "triton", 512, 90)]
    tighter = limit._replace(each=limit.each - 1, registers=limit.registers - 1, ctas=limit.ctas + 1)
    file = tmp_path / "budget.txt"
    file.write_text(tighter.line() + "\n")
    done = run("--by", "triton", "--arch", "90", "--kernel", "norm_gelu_kernel", "--budget", file)
    assert done.returncode == 1, done.stderr
    name = "norm_gelu_kernel (triton, D = 512, sm_90)"
    assert f"{name}: instructions a value: " in done.stdout
    assert f"{name}: registers: {limit.registers}, at most {limit.registers - 1}" in done.stdout
    assert f"{name}: blocks a multiprocessor: {limit.ctas}, at least {limit.ctas + 1}" in done.stdout


@nvcc
@pytest.mark.simulated
def test_a_cuda_kernel_beyond_its_budget_fails(tmp_path: Path) -> None:
    """Too few registers: some are spilled, and that takes instructions."""
    shutil.copytree(budget.ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / "norm_gelu.cu"
    text, count = re.subn(r"__launch_bounds__\(.*\)", "__maxnreg__(24)", path.read_text())
    assert count
    path.write_text(text)
    limits = [x for x in budget.load() if x.by == "cuda" and x.arch == 90 and x.kernel.startswith("norm_gelu")]
    assert limits and not budget.check(limits, budget.compile_cuda([90], [budget.SOURCES / "norm_gelu.cu"])).failures
    found = budget.check(limits, budget.compile_cuda([90], [path])).failures
    for what in ("accesses to local memory", "instructions a value"):
        assert any(what in failure for failure in found), found


# -- the reader

#        a loop with a branch around a rare case, which is out of line and calls a subroutine
LISTING = """
    MOV R1, c[0x0][0x28]
    LDG.E.128 R4, [R2.64]
head:
    LDG.E.128 R4, [R2.64]
    MUFU.RCP R8, R4
    @P0 BRA rare
back:
    FFMA R8, R8, R4, R5
    STG.E.128 [R2.64], R8
    MOV R9, R8
    @P1 BRA head
    STG.E [R2.64], R9
    EXIT
rare:
    MOV R10, back
    CALL.REL.NOINC function
    BRA back
function:
    FADD R8, R8, R8
    RET.REL.NODEC R10
"""


def kernel(listing: str = LISTING, **numbers: int) -> Kernel:
    at, places, lines = 0, {}, []
    for line in map(str.strip, listing.split("\n")):
        if line.endswith(":"):
            places[line[:-1]] = at
        elif line:
            lines.append((at, line.split()))
            at += 16
    instructions = []
    for at, words in lines:
        predicate = words.pop(0) if words[0].startswith("@") else ""
        operands = " ".join(hex(places[word]) if word in places else word for word in words[1:])
        instructions.append(Instruction(at, predicate, words[0], operands))
    return Kernel("some_kernel<float,4>", 90, tuple(instructions), **({"registers": 40, "threads": 256} | numbers))


def test_the_usual_path_leaves_out_rare_numbers() -> None:
    code = kernel()
    reading = sass.read(code, values=4, counted="loop")
    assert (reading.instructions, reading.loop, reading.calls) == (11, 7, 1)
    assert (reading.per_value, reading.bytes, reading.moves) == (7 / 4, 8, 1 / 7)
    assert sass.usually_counted(code) == "loop"
    assert sass.read(code, 1, "rest").worked == 4 and sass.read(code, 1, "all").worked == 11


def test_a_products_main_loop_is_the_innermost_with_matrix_instructions() -> None:
    code = kernel(
        LISTING.replace("@P1 BRA head", "inner:\n HGMMA.64x256x16.F32.BF16 R4\n @P2 BRA inner\n @P1 BRA head")
    )
    assert code.matrix and sass.read(code, 1, "loop").worked == 2
    assert sass.usually_counted(code) == "rest"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (90, 235, 148480, 256, 1),
        (90, 128, 99 * 1024, 128, 2),
        (90, 255, 3072, 128, 2),
        (80, 64, 1024, 256, 4),
        (80, 32, 1024, 128, 16),
        (86, 32, 1024, 1024, 1),
        (120, 128, 101 * 1024, 128, 0),  # more than a block may have
        (90, 24, 1024, 32, 32),
    ],
)
def test_blocks_at_once(arch: int, registers: int, shared: int, threads: int, blocks: int) -> None:
    assert blocks_at_once(arch, registers, shared, threads) == blocks


# -- the file


def limit(**values: object) -> Limit:
    plain = Limit("some_kernel<float,4>", "cuda", 512, 90, "loop", 4.0, 2.0, 0.2, 8.0, 1, 40, 1024.0, 6)
    return plain._replace(**values)


def test_a_line_says_what_it_was_read_from(tmp_path: Path) -> None:
    file = tmp_path / "budget.txt"
    lines = [limit(), limit(kernel="other_kernel", by="triton", values=None, moves=0.07, shared=99.5 * 1024)]
    file.write_text("# what it means\n\n" + "\n".join(x.line() for x in lines) + "\n")
    assert budget.load(file) == lines


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("a_kernel cuda 512 90 loop", "it has 5 columns; it must have 13"),
        (limit(values=None).line(), "values is -; for CUDA C\\+\\+ it must be a number"),
        (limit(by="hip").line(), "hip, 90 or loop is none"),
        (limit().line().replace("2", "two", 1), "could not convert|invalid literal"),
        (limit().line() + "\n" + limit().line(), "has a line already"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, what: str) -> None:
    file = tmp_path / "budget.txt"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=rf"budget.txt, line [12]: .*({what})"):
        budget.load(file)


@pytest.mark.parametrize(
    ("tighter", "failure"),
    [
        ({}, None),
        ({"each": 1.7}, "instructions a value: 1.75, at most 1.7"),
        ({"moves": 0.1}, "share of moves: 0.143, at most 0.1"),
        ({"bytes": 7.0}, "bytes a value: 8, at most 7"),
        ({"calls": 0}, "calls of subroutines: 1, at most 0"),
        ({"registers": 39}, "registers: 40, at most 39"),
        ({"shared": 1000.0}, "bytes of shared memory: 1,024, at most 1,000"),
        ({"ctas": 7}, "blocks a multiprocessor: 6, at least 7"),
    ],
)
def test_every_limit_is_held(tighter: dict[str, object], failure: str | None) -> None:
    checked = budget.check([limit(**tighter)], [Compiled("cuda", 512, kernel())])
    expected = [] if failure is None else [f"some_kernel<float,4> (cuda, D = 512, sm_90): {failure}"]
    assert checked.failures == expected and len(checked.rows) == 1


def test_a_kernel_without_a_line_and_a_line_without_a_kernel_fail() -> None:
    other = limit(kernel="gone_kernel<8>")
    checked = budget.check([other], [Compiled("cuda", 512, kernel())])
    assert checked.failures == [
        "gone_kernel<8> (cuda, D = 512, sm_90): there is no such kernel",
        "some_kernel (cuda, sm_90) has no line in the budget",
    ]
