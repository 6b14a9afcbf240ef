"""Compiles mlp_in's products in CuTe DSL and in Triton for sm_90a, and counts their instructions.

    pip install quack-kernels
    python benchmarks/aot_cutlass.py

Nothing runs, and no GPU is needed. Where quack-kernels is missing, the script says so and does nothing. What follows
from the table is in docs/experiments/cutlass.md.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

ROWS, DIM, WIDTH = 65536, 512, 2048
VALUES = 16384  # what the table counts for: a tile of 128 x 128, 128 values a thread of four warps
# Kernel, tile, and whether two groups of warps take turns with tiles of their own ("pingpong"), or share one.
CASES = (
    ("forward", (128, 128), True),
    ("forward_with_h", (64, 256), True),
    ("forward_with_h", (128, 256), False),
    ("backward", (128, 128), True),
)
# Of an H100, as docs/roofline.md assumes them; and an instruction in each cycle of each scheduler.
MULTIPROCESSORS, PRODUCTS, BANDWIDTH, CLOCK = 132, 790e12, 3e12, 1.755e9
REGISTERS, SHARED = 65536, 228  # of a multiprocessor; shared memory in KB
COLUMNS = ("by", "kernel", "tile", "instructions a value", "moves", "issued", "registers", "stack", "blocks")
COLUMNS += ("products, µs", "bytes, µs", "issue, µs")
BYTES = {"forward": 10, "forward_with_h": 18, "backward": 26}  # of an edge and channel


class Built(NamedTuple):
    """A kernel for the table. shared: KB of a block, 0 where registers alone decide how many blocks there are."""

    by: str
    kernel: str
    tile: str
    threads: int
    shared: int
    cubin: Path


class Code(NamedTuple):
    """A kernel's machine code: addresses and instructions; registers of a thread at its start, and of one that
    multiplies; bytes of a thread's stack."""

    instructions: list[tuple[int, str]]
    first_registers: int
    registers: int
    stack: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    if missing := [name for name in ("quack", "cutlass", "triton") if find_spec(name) is None]:
        print(f"skipped: not installed: {', '.join(missing)}; pip install quack-kernels triton brings all")
        return 0
    packages = ("quack-kernels", "nvidia-cutlass-dsl", "triton", "torch")
    print(", ".join(f"{name} {version(name)}" for name in packages), end="\n\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- | --- |{' ---: |' * (len(COLUMNS) - 3)}")
    with tempfile.TemporaryDirectory() as folder:
        for built in chain(_cutlass(Path(folder)), _triton(Path(folder))):
            print(_line(built), flush=True)
    return 0


def _line(built: Built) -> str:
    code = _read(built.cubin)
    issued, epilogue = issued_by_warp(code.instructions)
    moves = sum(re.match(r"(MOV|IMAD\.MOV)\b", name) is not None for name in epilogue)
    seconds = (2 * VALUES * DIM / PRODUCTS, BYTES[built.kernel] * VALUES * DIM / WIDTH / BANDWIDTH)
    times = [1e6 * MULTIPROCESSORS * time for time in seconds] + [1e6 * issued / CLOCK]
    blocks = REGISTERS // (-(-code.first_registers // 8) * 8 * built.threads)
    if built.shared:
        blocks = min(blocks, SHARED // (built.shared + 1))
    cells = [built.by, built.kernel, built.tile, f"{len(epilogue) / 128:.1f}", f"{moves / len(epilogue):.0%}"]
    cells += [f"{issued:,}", code.registers, code.stack, blocks, *(f"{time:.2f}" for time in times)]
    return f"| {' | '.join(map(str, cells))} |"


# -- compiling


def _cutlass(folder: Path) -> Iterator[Built]:
    settings = {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_ENABLED": "0"}
    os.environ.update(settings | {"CUTE_DSL_KEEP": "cubin", "CUTE_DSL_DUMP_DIR": str(folder)})
    arguments, sys.argv[1:] = sys.argv[1:], []  # cutlass reads them as its own
    import _cutlass_epilogues as epilogues

    for kernel, (tile_m, tile_n), pingpong in CASES:
        module = getattr(epilogues, kernel)
        rows = {name: _empty(1, ROWS, dtype=torch.float32) for name in epilogues.ROWS}
        parts = {n: _empty(1, ROWS, WIDTH // tile_n, dtype=torch.float32) for n in epilogues.MOMENTS}
        sums = {"db": _empty(1, ROWS // tile_m, WIDTH, dtype=torch.float32)}
        backward = kernel == "backward"
        others = {"bias": _empty(1, WIDTH, dtype=torch.float32)} | (rows | sums if backward else parts)
        if "g" in module.outputs:
            others["g"] = _empty(1, ROWS, WIDTH)
        with patch("quack.gemm_runtime.host.get_max_active_clusters", lambda *_, **__: MULTIPROCESSORS):
            module.gemm(
                _empty(1, ROWS, DIM),
                _empty(1, DIM, WIDTH) if backward else _empty(1, WIDTH, DIM),
                _empty(1, ROWS, WIDTH),
                _empty(1, ROWS, WIDTH) if backward else None,
                epi_args=others,
                tile_M=tile_m,
                tile_N=tile_n,
                cluster_M=1,
                pingpong=pingpong,
                b_kn=backward,
                _launch=False,
            )
        (cubin,) = folder.glob("*.cubin")
        by = "CuTe DSL, in turn" if pingpong else "CuTe DSL, together"
        yield Built(by, kernel, f"{tile_m}×{tile_n}", 3 * 128, 0, cubin)
        cubin.unlink()
    sys.argv[1:] = arguments


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _triton(folder: Path) -> Iterator[Built]:
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gcahng.testing.aot import Case, record

    names = {"mlp_in_product_forward_kernel": "forward", "mlp_in_product_backward_kernel": "backward"}
    launches: dict[str, Any] = {}
    for launch in sorted(record(Case(DIM, "bf16", 90)), key=lambda launch: launch.times):
        at = {name: (place,) for place, name in enumerate(launch.function.arg_names)}
        absent = {name for name in ("p_h", "p_part") if launch.constants.get(at.get(name), 0) is None}
        kernel = names.get(launch.name)
        if kernel == "forward" and "p_h" not in absent:
            kernel = "forward_with_h"
        if kernel and "p_part" not in absent:  # with the bias's gradient
            launches[kernel] = launch
    for kernel, launch in sorted(launches.items()):
        at = {name: (place,) for place, name in enumerate(launch.function.arg_names)}
        source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)
        path = folder / "triton.cubin"
        path.write_bytes(built.asm["cubin"])
        tile = "×".join(str(launch.constants[at[name]]) for name in ("BLOCK_M", "BLOCK_N"))
        warps = launch.options["num_warps"]
        yield Built(f"Triton, {warps} warps", kernel, tile, 32 * warps, built.metadata.shared // 1024, path)


# -- reading machine code


def _read(cubin: Path) -> Code:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage, text = (
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    )
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?(.*?)\s*;", text, re.M)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # Where warps have tasks of their own, those that load give registers to those that multiply.
    given = [int(number, 16) for number in re.findall(r"USETMAXREG\.TRY_ALLOC\S* UP0, (0x[0-9a-f]+)", text)]
    return Code([(int(at, 16), instruction) for at, instruction in found], registers, *given or [registers], stack)


def issued_by_warp(instructions: Sequence[tuple[int, str]]) -> tuple[int, list[str]]:
    """How many instructions a warp that multiplies issues for 128 values a thread, and its epilogue.

    Args:
        instructions: addresses and instructions without predicates; the product is of 64 x n x 16 at a time.

    Returns:
        The number, where the loop over the product's inner dimension counts as often as it runs, without loops that
        wait; and the names of the instructions behind the last product, up to the next tile or to the end.
    """
    products = [at for at, text in instructions if text.startswith("HGMMA")]
    columns = next(int(text[len("HGMMA.64x") :].split("x")[0]) for _, text in instructions if text.startswith("HGMMA"))
    needed = VALUES // (64 * columns) * DIM // 16
    back = [(int(to, 16), at) for at, text in instructions for to in re.findall(r"^BRA\b.*?(0x[0-9a-f]+)$", text)]
    loops = [(first, last) for first, last in back if any(first <= at <= last for at in products)]
    loops.sort(key=lambda loop: loop[1] - loop[0])
    inner = loops[0] if loops and sum(loops[0][0] <= at <= loops[0][1] for at in products) < needed else (0, -1)
    over_tiles = [loop for loop in loops if loop != inner]
    first, last = over_tiles[-1] if over_tiles else (0, max(at for at, text in instructions if text == "EXIT"))
    within = [(at, text.split()[0]) for at, text in instructions if first <= at <= last and text != "NOP"]
    body = sum(inner[0] <= at <= inner[1] for at, _ in within)
    inside = sum(inner[0] <= at <= inner[1] for at in products)
    again = (needed - len(products)) // inside if inside else 0
    return len(within) + again * body, [name for at, name in within if at > products[-1]]


if __name__ == "__main__":
    sys.exit(main())
