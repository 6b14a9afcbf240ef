"""Prints the tables of docs/roofline.md: what the engine's stages do in a training step on a GPU, and the least time it
can take.

    python benchmarks/roofline.py           prints
    python benchmarks/roofline.py --write   puts them into the page

Derived, not measured: numbers of sweeps are the engine's (gcahng/engine/graph.py, passes.py), products are those of
gcahng/engine/plan.py, tiles those of its schedule; a kernel takes as long as its products at the chip's rate, or as its
bytes at the memory's, whichever is longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gcahng.engine.passes import LOGITS_AT_ONCE
from gcahng.engine.plan import StepSize, work
from gcahng.engine.schedule import Schedule, default_tile_rows, make_schedule

PAGE = Path(__file__).parents[1] / "docs" / "roofline.md"
BEGIN, END = "<!-- roofline -->\n", "<!-- /roofline -->\n"

# Assumptions, as the page states them.
RATE = {"bf16": 790e12, "fp32": 54e12}  # FLOP/s
BANDWIDTH = 3e12  # bytes/s
LAUNCH = 3e-6  # s
BATCHES, VIEWS, DIM, CLASSES = (255, 1023, 4095), 3, 512, 100
NODE_LAUNCHES = {"pass": 80, "layer": 132}  # node side, forward and backward
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AIMS = {1: 32e-3, 2: 75e-3}
A = 4  # bytes of a number outside products: fp32


class Step(NamedTuple):
    """n, L, dtype of products, whether products carry their neighbours as epilogues, edge_memory; and what the engine
    does not do yet. gathered: J_div within the kernels of head and mix, which hold θ anyway; narrow: edges and their
    gradients in the products' dtype wherever they lie."""

    batch: int
    layers: int
    dtype: str
    epilogues: bool
    memory: str
    gathered: bool = False
    narrow: bool = False

    @property
    def size(self) -> StepSize:
        return StepSize(
            self.batch, DIM, self.layers, VIEWS, CLASSES, compute=DTYPES[self.dtype], stages="triton", device="cuda"
        )

    @property
    def schedule(self) -> Schedule:
        rows = default_tile_rows(DIM, DTYPES[self.dtype], self.memory, "cuda")
        return make_schedule(self.batch // VIEWS, VIEWS, symmetric=True, tile_rows=rows)


class Kernel(NamedTuple):
    """One kernel, or a few that share their bytes: D x D products an edge, bytes an edge and channel, launches a tile,
    and how often it goes over all edges."""

    stage: str
    times: int
    products: float
    bytes: float
    launches: float = 1


class Cost(NamedTuple):
    flops: float
    bytes: float
    seconds: float
    launches: float


def kernels(step: Step) -> Iterator[Kernel]:
    """Everything that a step does to edges."""
    yield from _forward(step)
    yield from _losses(step)
    yield from _backward(step)


def _bytes(step: Step) -> tuple[int, int, int]:
    """Of a number in a product; in an edge's vector; in its second copy, as operand of products."""
    c = DTYPES[step.dtype].itemsize
    return (c, c, 0) if step.narrow else (c, A, c if c < A else 0)


def _forward(step: Step) -> Iterator[Kernel]:
    top, (c, e, low) = step.layers, _bytes(step)
    below = top - 1  # layers with a backward in phase 1
    yield Kernel("edge start", 7 + (below > 0), 0, e + low)
    yield Kernel("N of stored sums", (2 * below + max(0, below - 1) + 1) + 3 * top, 0, 2 * e + low)
    yield Kernel("edge to node: product", 2 * top, 1, 2 * c)
    yield Kernel("edge to node: GELU, sums", 2 * top, 0, c, 2)
    yield Kernel("gate", 2 * top + below + top, 0, 2 * e + low)
    kept = 4 * c if step.memory == "hidden" else 0
    if step.epilogues:
        yield Kernel("hidden: product, GELU, moments", 2 * top, 4, 5 * c + kept, 2)
        yield Kernel("close: product, fold, residual", 2 * top, 4, 4 * c + 2 * e)
        yield Kernel("close: N", 2 * top, 0, 2 * e + low)
    else:
        yield Kernel("hidden: product", 2 * top, 4, 5 * c)
        yield Kernel("hidden: GELU, moments", 2 * top, 0, 8 * c)
        yield Kernel("close: product", 2 * top, 4, 5 * c)
        yield Kernel("close: fold, residual, N", 2 * top, 0, c + 3 * e + low)
    yield Kernel("head: BatchNorm's moments", 2, 0, e, 2)
    yield Kernel("head: product", 3, 1, 2 * c)
    yield Kernel("head: sigmoid", 3, 0, c + e)


def _losses(step: Step) -> Iterator[Kernel]:
    c, e, _ = _bytes(step)
    size = step.size
    mixes = size.batch**2 / VIEWS / size.rows  # negatives an edge
    logits = CLASSES / DIM  # channels of an edge → classes of a negative
    chunks = -(-int(mixes * step.schedule.tile_rows) * CLASSES // LOGITS_AT_ONCE)
    cast = A + c if c < A else 0
    kept = step.layers  # once θ or dy, and each edges' gradient that the next sweep takes
    yield Kernel("θ and edges' gradients, kept", 2 * kept, 0, 2 * e)
    yield Kernel("mix: J_syn's logits", 1, 0, e, 20)
    yield Kernel("mix: backward to z", 1, 0, e, 24)
    yield Kernel("mix: negatives", 1, 0, e + mixes * A)
    moved = mixes * (cast + 3 * c + A + 2 * logits * c)
    yield Kernel("J_soft: products", 1, 2 * mixes * logits, moved, 4 * chunks)
    yield Kernel("J_soft, J_sim", 1, 0, mixes * (2 * logits * c + 3 * A), 17 + 3 * chunks)
    if step.gathered:
        yield Kernel("mix, J_div, head: backward to what the sigmoid takes", 1, 0, mixes * A + e + c, 2)
        yield Kernel("head: BatchNorm's sums", 1, 0, c + 2 * e, 2)
    else:
        yield Kernel("mix: backward to θ", 1, 0, mixes * A + e)
        yield Kernel("J_div: sums", 1, 0, e, 2)
        yield Kernel("J_div: gradient", 1, 0, 3 * e)
        yield Kernel("head: backward, row-wise", 1, 0, 2 * e + c + (c + 2 * e), 4)
    yield Kernel("head: backward, products", 1, 2, 4 * c, 3)
    yield Kernel("head: BatchNorm backward", 1, 0, 3 * e)


def _backward(step: Step) -> Iterator[Kernel]:
    top, (c, e, low) = step.layers, _bytes(step)
    sweeps = top + top - 1
    add, adds = (2 * c + 2 * e, 2) if low else (2 * e, 1)  # a product's result added to the edges' gradient
    yield Kernel("close: backward", sweeps, 0, 4 * e + low + c, 2)
    if step.memory == "store":
        yield Kernel("hidden: product again", sweeps, 4, 5 * c)
    if step.epilogues:
        yield Kernel("hidden: backward product, GELU'", sweeps, 4, c + 4 * c + 8 * c, 2)
    else:
        yield Kernel("hidden: backward product", sweeps, 4, 5 * c)
        yield Kernel("hidden: backward, row-wise", sweeps, 0, 16 * c, 2)
    yield Kernel("edge MLP: weights' gradients", sweeps, 8, 10 * c, 2 if c == A else 4)
    yield Kernel("edge MLP: edges' gradient", sweeps, 4, 4 * c + add, adds)
    yield Kernel("gate: backward", sweeps, 0, 3 * e, 6)
    yield Kernel("edge to node: product again", 2 * top, 1, 2 * c)
    yield Kernel("edge to node: backward, row-wise", 2 * top, 0, 2 * c, 2)
    yield Kernel("edge to node: weights' gradient", 2 * top, 1, 2 * c, 1 if c == A else 2)
    yield Kernel("edge to node: edges' gradient", 2 * top - 1, 1, c + add, adds)
    yield Kernel("edge start: backward", 1, 0, e, 2)


def cost(step: Step, kernel: Kernel) -> Cost:
    """Of all its sweeps."""
    size, tiles = step.size, step.schedule.tiles
    channels = kernel.times * size.rows * DIM
    flops, moved = 2 * channels * DIM * kernel.products, channels * kernel.bytes
    seconds = max(flops / RATE[step.dtype], moved / BANDWIDTH)
    return Cost(flops, moved, seconds, kernel.times * len(tiles) * kernel.launches)


def nodes(step: Step) -> Cost:
    """The node side: its arithmetic at the full rate."""
    flops = 2 * work(step.size, step.memory).nodes
    launches = 2 * (NODE_LAUNCHES["pass"] + step.layers * NODE_LAUNCHES["layer"])
    return Cost(flops, 0, flops / RATE[step.dtype], launches)


def total(step: Step) -> Cost:
    """A whole step."""
    parts = [*(cost(step, kernel) for kernel in kernels(step)), nodes(step)]
    return Cost(*map(sum, zip(*parts, strict=True)))


# -- the page's tables


def page_tables() -> str:
    """All of them, as Markdown."""
    parts = [whole_steps(), aims()]
    for layers in AIMS:
        for dtype in RATE:
            for epilogues in (False, True):
                parts.append(stages(layers, dtype, epilogues))
    return "\n".join(parts)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---:" if cell[:1].isdigit() or cell == "–" else "---" for cell in rows[0]]
    lines = [f"| {' | '.join(row)} |" for row in (columns, aligned, *rows)]
    return "\n".join([f"### {title} (derived)", "", *lines, ""])


def _version(epilogues: bool) -> str:
    return "products with epilogues" if epilogues else "row-wise stages beside library products"


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def _ms(seconds: float) -> str:
    return _number(1e3 * seconds)


def whole_steps() -> str:
    columns = ("L", "dtype", "edge_memory", "n", "TFLOP", "GB row-wise", "GB epilogues", "ms row-wise")
    columns += ("ms epilogues", "launches row-wise", "launches epilogues", "ms of launches")
    rows = []
    for layers in AIMS:
        for dtype in RATE:
            for memory in ("store", "hidden"):
                for n in BATCHES:
                    apart, fused = (total(Step(n, layers, dtype, version, memory)) for version in (False, True))
                    cells = [_number(apart.flops / 1e12), _number(apart.bytes / 1e9), _number(fused.bytes / 1e9)]
                    cells += [
                        _ms(apart.seconds),
                        _ms(fused.seconds),
                        f"{apart.launches:,.0f}",
                        f"{fused.launches:,.0f}",
                    ]
                    cells += [f"{1e3 * LAUNCH * apart.launches:.1f}"]
                    rows.append([str(layers), dtype, memory, str(n), *cells])
    return _table("Whole steps", columns, rows)


def aims() -> str:
    columns = ("L", "version", "edge_memory", "GB", "products alone, ms", "all, ms", "launches, ms", "aim, ms")
    columns += ("share of the ceilings that the aim asks for",)
    rows = []
    for layers, aim in AIMS.items():
        plain = Step(1023, layers, "bf16", True, "store")
        ladder = {
            _version(False): plain._replace(epilogues=False),
            _version(True): plain,
            "that, and J_div within head and mix": plain._replace(gathered=True),
            "that, and edges and gradients in bf16": plain._replace(gathered=True, narrow=True),
        }
        for name, chosen in ladder.items():
            for memory in ("store", "hidden"):
                step = chosen._replace(memory=memory)
                found = total(step)
                cells = [_number(found.bytes / 1e9), _ms(found.flops / RATE["bf16"]), _ms(found.seconds)]
                cells += [
                    f"{1e3 * LAUNCH * found.launches:.1f}",
                    f"{1e3 * aim:.0f}",
                    f"{100 * found.seconds / aim:.0f} %",
                ]
                rows.append([str(layers), name, memory, *cells])
    return _table("The aims at n = 1,024, in bf16", columns, rows)


def stages(layers: int, dtype: str, epilogues: bool) -> str:
    columns = ["stage", "sweeps", "launches a tile", "products an edge", "bytes an edge and channel"]
    for n in BATCHES:
        columns += [f"TFLOP, {n}", f"GB, {n}", f"ms, {n}"]
    steps = [Step(n, layers, dtype, epilogues, "store") for n in BATCHES]
    rows = []
    for same in zip(*(kernels(step) for step in steps), strict=True):
        k = same[-1]
        if k.times:
            cells = [k.stage, str(k.times), f"{k.launches:.0f}", f"{k.products:.3g}", f"{k.bytes:.3g}"]
            rows.append(cells + _at(cost(step, kernel) for step, kernel in zip(steps, same, strict=True)))
    rows.append(["node side", "", "", "", "", *_at(map(nodes, steps))])
    rows.append(["all", "", "", "", "", *_at(map(total, steps))])
    launches = ", ".join(f"{total(step).launches:,.0f} at {step.batch:,}" for step in steps)
    tiles = ", ".join(f"{len(step.schedule.tiles)} at {step.batch:,}" for step in steps)
    text = _table(f"L = {layers}, {dtype}, {_version(epilogues)}, store", columns, rows)
    return f"{text}\nTiles: {tiles}. Launches: {launches}.\n"


def _at(costs: Iterator[Cost]) -> list[str]:
    cells = []
    for c in costs:
        cells += [_number(c.flops / 1e12) if c.flops else "–", _number(c.bytes / 1e9), _ms(c.seconds)]
    return cells


def written(page: str) -> str:
    """The page with its tables replaced."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + page_tables() + "\n" + END + rest.split(END)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/roofline.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(page_tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
