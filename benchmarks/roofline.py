"""Writes benchmarks/results/roofline.md: what the engine's stages do in a training step on a GPU, and the least time
that it can take.

    python benchmarks/roofline.py

docs/roofline.md says how it is counted and what follows. Everything is derived, nothing is measured. The modules of
gcahng/engine give the numbers: graph.py, metric_pass.py and generator_pass.py those of sweeps, plan.py those of
products, and schedule.py the tiles. A kernel takes as long as its products at the chip's rate or its bytes at the
memory's, whichever is longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gcahng.engine.generator_pass import LOGITS_AT_ONCE
from gcahng.engine.plan import StepSize, work
from gcahng.engine.schedule import Schedule, default_tile_rows, make_schedule

RESULTS = Path(__file__).parent / "results" / "roofline.md"

# Assumptions, as docs/roofline.md states them.
RATE = {"bf16": 790e12, "fp32": 54e12}  # FLOP/s
BANDWIDTH = 3e12  # bytes/s
LAUNCH = 3e-6  # s
BATCHES, VIEWS, DIM, CLASSES = (255, 1023, 4095), 3, 512, 100
NODE_LAUNCHES = {"pass": 80, "layer": 132}  # node side, forward and backward
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AIMS = {1: 32e-3, 2: 75e-3}
A = 4  # bytes of a number outside products: fp32


class Step(NamedTuple):
    """One training step.

    batch is n and layers is L. dtype is that of the products. epilogues: the products do their neighbors' work.
    The last two are what the engine does not do yet. gathered: J_div is formed within the kernels of head and mix,
    which hold θ anyway. narrow: edges and their gradients are stored in the products' dtype everywhere.
    """

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
    """One kernel, or a few that share their bytes.

    times: how often it goes over all edges. products: D x D products for each edge. bytes: for each edge and channel.
    launches: for each tile.
    """

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
    """Bytes of a number in a product, in an edge's vector, and in the vector's second copy that products read."""
    c = DTYPES[step.dtype].itemsize
    return (c, c, 0) if step.narrow else (c, A, c if c < A else 0)


def _forward(step: Step) -> Iterator[Kernel]:
    top, (c, e, low) = step.layers, _bytes(step)
    below = top - 1  # layers with a backward in phase 1
    yield Kernel("edge_start", 7 + (below > 0), 0, e + low)
    yield Kernel("N of stored sums", (2 * below + max(0, below - 1) + 1) + 3 * top, 0, 2 * e + low)
    yield Kernel("edge_to_node: product", 2 * top, 1, 2 * c)
    yield Kernel("edge_to_node: GELU, sums", 2 * top, 0, c, 2)
    yield Kernel("gate", 2 * top + below + top, 0, 2 * e + low)
    saved = 4 * c if step.memory == "hidden" else 0
    if step.epilogues:
        yield Kernel("mlp_in: product, GELU, moments", 2 * top, 4, 5 * c + saved, 2)
        yield Kernel("mlp_out: product, fold, residual", 2 * top, 4, 4 * c + 2 * e)
        yield Kernel("mlp_out: N", 2 * top, 0, 2 * e + low)
    else:
        yield Kernel("mlp_in: product", 2 * top, 4, 5 * c)
        yield Kernel("mlp_in: GELU, moments", 2 * top, 0, 8 * c)
        yield Kernel("mlp_out: product", 2 * top, 4, 5 * c)
        yield Kernel("mlp_out: fold, residual, N", 2 * top, 0, c + 3 * e + low)
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
    stored = step.layers  # θ or dy once, and each gradient of edges that the next sweep reads
    yield Kernel("θ and edges' gradients, stored", 2 * stored, 0, 2 * e)
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
    yield Kernel("mlp_out: backward", sweeps, 0, 4 * e + low + c, 2)
    if step.memory == "store":
        yield Kernel("mlp_in: product again", sweeps, 4, 5 * c)
    if step.epilogues:
        yield Kernel("mlp_in: backward product, GELU'", sweeps, 4, c + 4 * c + 8 * c, 2)
    else:
        yield Kernel("mlp_in: backward product", sweeps, 4, 5 * c)
        yield Kernel("mlp_in: backward, row-wise", sweeps, 0, 16 * c, 2)
    yield Kernel("edge MLP: weights' gradients", sweeps, 8, 10 * c, 2 if c == A else 4)
    yield Kernel("edge MLP: edges' gradient", sweeps, 4, 4 * c + add, adds)
    yield Kernel("gate: backward", sweeps, 0, 3 * e, 6)
    yield Kernel("edge_to_node: product again", 2 * top, 1, 2 * c)
    yield Kernel("edge_to_node: backward, row-wise", 2 * top, 0, 2 * c, 2)
    yield Kernel("edge_to_node: weights' gradient", 2 * top, 1, 2 * c, 1 if c == A else 2)
    yield Kernel("edge_to_node: edges' gradient", 2 * top - 1, 1, c + add, adds)
    yield Kernel("edge_start: backward", 1, 0, e, 2)


def cost(step: Step, kernel: Kernel) -> Cost:
    """The cost of all sweeps of a kernel."""
    size, tiles = step.size, step.schedule.tiles
    channels = kernel.times * size.rows * DIM
    flops, moved = 2 * channels * DIM * kernel.products, channels * kernel.bytes
    seconds = max(flops / RATE[step.dtype], moved / BANDWIDTH)
    return Cost(flops, moved, seconds, kernel.times * len(tiles) * kernel.launches)


def nodes(step: Step) -> Cost:
    """The cost of the node side, with its arithmetic at the full rate."""
    flops = 2 * work(step.size, step.memory).nodes
    launches = 2 * (NODE_LAUNCHES["pass"] + step.layers * NODE_LAUNCHES["layer"])
    return Cost(flops, 0, flops / RATE[step.dtype], launches)


def total(step: Step) -> Cost:
    """A whole step."""
    parts = [*(cost(step, kernel) for kernel in kernels(step)), nodes(step)]
    return Cost(*map(sum, zip(*parts, strict=True)))


# -- the tables

HEADING = """# The least time of a step on a GPU: all tables

Derived, not measured; [docs/roofline.md](../../docs/roofline.md) says how. `python benchmarks/roofline.py` writes this
file.
"""


def tables() -> str:
    """All of them, as Markdown."""
    parts = [HEADING, whole_steps(), aims()]
    for layers in AIMS:
        for dtype in RATE:
            for epilogues in (False, True):
                parts.append(stages(layers, dtype, epilogues))
    return "\n".join(parts)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---:" if cell[:1].isdigit() or cell == "–" else "---" for cell in rows[0]]
    lines = [f"| {' | '.join(row)} |" for row in (columns, aligned, *rows)]
    return "\n".join([f"## {title} (derived)", "", *lines, ""])


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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    RESULTS.write_text(tables(), encoding="utf-8")
    print(f"wrote {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
