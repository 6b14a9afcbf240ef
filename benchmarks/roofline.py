"""Writes benchmarks/results/roofline.md: what the engine's stages do in a training step on a GPU, and the least time
that it can take; and the table of docs/roofline.md.

    python benchmarks/roofline.py

docs/roofline.md says how it is counted and what follows. Everything is derived, nothing is measured. The modules of
gcahng/engine give the numbers: graph.py, metric_pass.py and generator_pass.py those of sweeps, plan.py those of
products, and schedule.py the tiles; benchmarks/budget.txt gives the instructions of kernels. A kernel takes as long as
its products at the chip's rate, its bytes at the memory's, or its instructions at the rate at which multiprocessors
issue them, whichever is longest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _roofline_kernels import CLASSES, DIM, VIEWS, issued

from gcahng.engine.plan import StepSize, work
from gcahng.engine.schedule import Schedule, default_tile_rows, make_schedule
from gcahng.engine.stages.cross_entropy import LOGITS_AT_ONCE

RESULTS = Path(__file__).parent / "results" / "roofline.md"
PAGE = Path(__file__).parents[1] / "docs" / "roofline.md"

# Assumptions, as docs/roofline.md states them.
RATE = {"bf16": 790e12, "fp32": 54e12}  # FLOP/s
BANDWIDTH = 3e12  # bytes/s
CLOCK, MULTIPROCESSORS, SCHEDULERS, SHARE = 1.755e9, 132, 4, 0.8
ISSUE = CLOCK * MULTIPROCESSORS * SCHEDULERS * SHARE  # instructions of a warp/s
LAUNCH = 3e-6  # s
WARP = 32
BATCHES = (255, 1023, 4095)
# Of the node side, forward and backward: a pass, and each of its layers.
NODE_LAUNCHES = {"bf16": (79, 97), "fp32": (76, 86)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYERS = (1, 2)
A = 4  # bytes of a number outside products: fp32


class Step(NamedTuple):
    """One training step.

    batch is n and layers is L. dtype is that of the products. epilogues: the products do their neighbors' work.
    rows: cuda or triton, for what is row-wise. narrow: edges, their gradients and coefficients are in the products'
    dtype alone.
    """

    batch: int
    layers: int
    dtype: str
    epilogues: bool
    memory: str = "store"
    narrow: bool = False
    rows: str = "cuda"

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
    """seconds: those of kernels, without launches; `without`: were no instruction issued but those of products."""

    flops: float
    bytes: float
    seconds: float
    launches: float
    instructions: float = 0
    without: float = 0

    @property
    def step(self) -> float:
        """Seconds with launches."""
        return self.seconds + LAUNCH * self.launches


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
    yield Kernel("mix: J_syn's logits", 1, 0, e)
    yield Kernel("mix: backward to z", 1, 0, e, 4)
    yield Kernel("mix: negatives", 1, 0, e + mixes * A)
    moved = mixes * (cast + c + A + 2 * logits * c)
    yield Kernel("J_soft: products", 1, 2 * mixes * logits, moved, (3 if cast else 2) * chunks)
    yield Kernel("J_soft, J_sim", 1, 0, mixes * (2 * logits * c + 3 * A), 1 + chunks)
    yield Kernel("mix: backward to θ", 1, 0, mixes * A + e)
    yield Kernel("J_div: sums", 1, 0, e, 2)
    yield Kernel("J_div: gradient", 1, 0, 3 * e)
    yield Kernel("head: backward, row-wise", 1, 0, 2 * e + c + (c + 2 * e), 4)
    yield Kernel("head: backward, products", 1, 2, 4 * c, 2)
    yield Kernel("head: BatchNorm backward", 1, 0, 3 * e)


def _backward(step: Step) -> Iterator[Kernel]:
    top, (c, e, low) = step.layers, _bytes(step)
    sweeps = top + top - 1
    add = 2 * e  # a product adds its result to the edges' gradient
    yield Kernel("mlp_out: backward", sweeps, 0, 4 * e + low + c, 2)
    if step.memory == "store":
        yield Kernel("mlp_in: product again", sweeps, 4, 5 * c)
    if step.epilogues:
        yield Kernel("mlp_in: backward product, GELU'", sweeps, 4, c + 4 * c + 8 * c, 2)
    else:
        yield Kernel("mlp_in: backward product", sweeps, 4, 5 * c)
        yield Kernel("mlp_in: backward, row-wise", sweeps, 0, 16 * c, 2)
    yield Kernel("edge MLP: weights' gradients", sweeps, 8, 10 * c, 2)
    yield Kernel("edge MLP: edges' gradient", sweeps, 4, 4 * c + add)
    yield Kernel("gate: backward", sweeps, 0, 3 * e, 6)
    yield Kernel("edge_to_node: product again", 2 * top, 1, 2 * c)
    yield Kernel("edge_to_node: backward, row-wise", 2 * top, 0, 2 * c, 2)
    yield Kernel("edge_to_node: weights' gradient", 2 * top, 1, 2 * c)
    yield Kernel("edge_to_node: edges' gradient", 2 * top - 1, 1, c + add)
    yield Kernel("edge_start: backward", 1, 0, e, 2)


def cost(step: Step, kernel: Kernel) -> Cost:
    """The cost of all sweeps of a kernel.

    Where only one block fits into a multiprocessor, what follows a product waits for it.
    """
    size, tiles = step.size, step.schedule.tiles
    channels = kernel.times * size.rows * DIM
    flops, moved = 2 * channels * DIM * kernel.products, channels * kernel.bytes
    each, overlaps = issued(kernel.stage, step.rows, step.narrow)
    instructions = channels * each / WARP
    product, memory, issue = flops / RATE[step.dtype], moved / BANDWIDTH, instructions / ISSUE
    seconds = max(product, memory, issue) if overlaps else max(product + issue, memory)
    launches = kernel.times * len(tiles) * kernel.launches
    return Cost(flops, moved, seconds, launches, instructions, max(product, memory))


def nodes(step: Step) -> Cost:
    """The cost of the node side, with its arithmetic at the full rate."""
    flops = 2 * work(step.size, step.memory).nodes
    of_pass, of_layer = NODE_LAUNCHES[step.dtype]
    launches = 2 * (of_pass + step.layers * of_layer)
    seconds = flops / RATE[step.dtype]
    return Cost(flops, 0, seconds, launches, 0, seconds)


def total(step: Step) -> Cost:
    """A whole step."""
    parts = [*(cost(step, kernel) for kernel in kernels(step)), nodes(step)]
    return Cost(*map(sum, zip(*parts, strict=True)))


# -- the tables

HEADING = """# The least time of a step on a GPU: all tables

Derived, not measured; [docs/roofline.md](../../docs/roofline.md) says how. `python benchmarks/roofline.py` writes this
file.
"""


class Version(NamedTuple):
    """A way to run the engine: products with epilogues (Triton) or not, what is row-wise, and bf16 edges or not."""

    name: str
    epilogues: bool
    rows: str = "cuda"
    narrow: bool = False

    def of(self, batch: int, layers: int, dtype: str) -> Step:
        return Step(batch, layers, dtype, self.epilogues, narrow=self.narrow and dtype == "bf16", rows=self.rows)


VERSIONS = (
    Version("cuda", False),
    Version("cuda+triton", True),
    Version("triton", True, "triton"),
    Version("cuda+triton, bf16 edges", True, narrow=True),
    Version("triton, bf16 edges", True, "triton", narrow=True),
)


def tables() -> str:
    """All of them, as Markdown."""
    parts = [HEADING, whole_steps()]
    parts += [stages(layers, version) for layers in LAYERS for version in VERSIONS]
    return "\n".join(parts)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    aligned = ["---:" if cell[:1].isdigit() or cell == "–" else "---" for cell in rows[0]]
    lines = [f"| {' | '.join(row)} |" for row in (columns, aligned, *rows)]
    return "\n".join([f"## {title} (derived)", "", *lines, ""])


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 999.5 else f"{x:,.0f}"


def _ms(seconds: float) -> str:
    return _number(1e3 * seconds)


def whole_steps(dtypes: Sequence[str] = tuple(RATE)) -> str:
    columns = ("L", "dtype", "version", "n", "TFLOP", "GB", "10⁹ instructions", "products alone, ms")
    columns += ("products or bytes, ms", "and instructions, ms", "launches", "launches, ms", "all, ms")
    rows = []
    for layers in LAYERS:
        for dtype in dtypes:
            for version in VERSIONS if dtype == "bf16" else [v for v in VERSIONS if not v.narrow]:
                for n in BATCHES:
                    found = total(version.of(n, layers, dtype))
                    cells = [_number(found.flops / 1e12), _number(found.bytes / 1e9)]
                    cells += [_number(found.instructions / 1e9), _ms(found.flops / RATE[dtype]), _ms(found.without)]
                    cells += [_ms(found.seconds), f"{found.launches:,.0f}", _ms(LAUNCH * found.launches)]
                    rows.append([str(layers), dtype, version.name, str(n), *cells, _ms(found.step)])
    return _table("Whole steps", columns, rows)


def stages(layers: int, version: Version) -> str:
    """One table: what each stage takes at the middle size, and what bounds it."""
    n = BATCHES[1]
    columns = ["stage", "sweeps", "launches a tile", "products an edge", "bytes", "instructions", "TFLOP", "GB"]
    columns += ["10⁹ instructions", "ms", "bound by"]
    step = version.of(n, layers, "bf16")
    rows = []
    for kernel in kernels(step):
        if kernel.times:
            c, each = cost(step, kernel), issued(kernel.stage, step.rows, step.narrow)
            cells = [kernel.stage, str(kernel.times), f"{kernel.launches:.0f}", f"{kernel.products:.3g}"]
            cells += [f"{kernel.bytes:.3g}", f"{each.instructions:.3g}", *_amounts(c), _bound(c, each.overlaps)]
            rows.append(cells)
    for name, c in (("node side", nodes(step)), ("all", total(step))):
        rows.append([name, "", "", "", "", "", *_amounts(c), ""])
    title = f"L = {layers}, n = {n:,}, bf16, {version.name}"
    return _table(title, columns, rows) + f"\nTiles: {len(step.schedule.tiles)}.\n"


def _amounts(c: Cost) -> list[str]:
    return [
        _number(c.flops / 1e12) if c.flops else "–",
        _number(c.bytes / 1e9) if c.bytes else "–",
        _number(c.instructions / 1e9) if c.instructions else "–",
        _ms(c.seconds),
    ]


def _bound(c: Cost, overlaps: bool) -> str:
    """What a stage waits for."""
    times = {
        "products": c.flops / RATE["bf16"],
        "bytes": c.bytes / BANDWIDTH,
        "instructions": c.instructions / ISSUE,
    }
    if not overlaps and c.flops and times["products"] + times["instructions"] > times["bytes"]:
        return "products, then instructions"
    return max(times, key=times.__getitem__)


def page(text: str) -> str:
    """docs/roofline.md with its table, the whole steps in bf16, as it follows now."""
    shown = [line for line in whole_steps(("bf16",)).splitlines() if line.startswith("|")]
    before, _, after = text.partition("\n| L |")
    return f"{before}\n" + "\n".join(shown) + "\n\n" + after.partition("\n\n")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    RESULTS.write_text(tables(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {RESULTS} and the table in {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
