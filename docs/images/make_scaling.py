"""Draws scaling.svg: how long a step of up to 1,024 processes takes, as derived from what each computes and sends.

    python docs/images/make_scaling.py

Nothing in it is measured. A step takes the matrix products of the process with the most pairs, at RATE, and then its
collectives one after the other, over links of BANDWIDTH with LATENCY a message (see gcahng/engine/traffic.py).
"""

from __future__ import annotations

from math import log10
from pathlib import Path

import torch
from drawing import curve, frame, line, text

from gcahng.engine.plan import work
from gcahng.engine.step_size import StepSize
from gcahng.engine.traffic import link_seconds, product_seconds

PICTURE = Path(__file__).with_name("scaling.svg")
RATE, BANDWIDTH, LATENCY = 200e12, 25e9, 10e-6
RANKS = [2**power for power in range(11)]
STRONG, WEAK = 65536, 2048  # samples; the weak batch grows with √R, which keeps the pairs of a process the same
WIDTH, HEIGHT, TOP, BOTTOM, WIDE = 860, 380, 90, 310, 320
PANELS = (75, 500)
LOWEST, HIGHEST = -3.0, 3.0  # log10 of seconds
STYLE = """
  .pairs { stroke: var(--anchor); stroke-width: 2.5; fill: none; }
  .nodes { stroke: var(--negative); stroke-width: 2.5; fill: none; }
  .sending { stroke: var(--synthetic); stroke-width: 2.5; fill: none; }
"""


def seconds(batch: int, ranks: int) -> tuple[float, float, float]:
    """What a step takes for the products of a process's pairs, for those of all nodes, and for sending."""
    bf16 = torch.bfloat16
    size = StepSize(batch, 512, 2, 4, max(11318, batch // 4), bf16, edge_dtype=bf16, device="cuda", ranks=ranks)
    nodes = 2 * work(size, "store").nodes / RATE
    return product_seconds(size, "store", RATE) - nodes, nodes, link_seconds(size, BANDWIDTH, LATENCY)


def strong() -> list[tuple[float, float, float]]:
    """The same batch for each number of processes."""
    return [seconds(STRONG, ranks) for ranks in RANKS]


def weak() -> list[tuple[float, float, float]]:
    """A batch that grows with √R, to a multiple of the views and the processes."""
    return [seconds(max(1, round(WEAK * ranks**0.5 / (4 * ranks))) * 4 * ranks, ranks) for ranks in RANKS]


def overtakes(times: list[tuple[float, float, float]]) -> int | None:
    """The least number of processes for which nodes and sending, which are not shared, take longer than pairs."""
    for ranks, (pairs, nodes, sending) in zip(RANKS, times, strict=True):
        if nodes + sending > pairs:
            return ranks
    return None


def panel(left: float, title: str, times: list[tuple[float, float, float]]) -> list[str]:
    """One plot, with logarithmic axes."""

    def across(power: int) -> float:
        return left + WIDE * power / (len(RANKS) - 1)

    def height(value: float) -> float:
        share = (log10(max(value, 10**LOWEST)) - LOWEST) / (HIGHEST - LOWEST)
        return BOTTOM - (BOTTOM - TOP) * share

    drawn = [text(left, TOP - 44, title, "title")]
    for power in range(int(LOWEST), int(HIGHEST) + 1):
        drawn.append(line(left, height(10.0**power), left + WIDE, height(10.0**power), "faint"))
        drawn.append(text(left - 8, height(10.0**power) + 4, f"{10.0**power:g} s", "quiet", "end"))
    for power in range(0, len(RANKS), 2):
        drawn.append(text(across(power), BOTTOM + 20, f"{RANKS[power]:,}", "quiet", "middle"))
    drawn.append(text(left + WIDE / 2, BOTTOM + 40, "processes", "quiet", "middle"))
    for at, kind in enumerate(("pairs", "nodes", "sending")):
        points = [(across(p), height(pair[at])) for p, pair in enumerate(times) if pair[at] > 0]
        drawn.append(curve(points, kind))
    most = overtakes(times)
    said = (
        "pairs take longest throughout"
        if most is None
        else f"from {most:,} processes on, nodes and sending take longer"
    )
    drawn.append(text(left, TOP - 22, said, "quiet"))
    return drawn


def picture() -> str:
    """The whole picture, as SVG."""
    title = "Derived seconds of a step for pairs, for nodes and for sending, by the number of processes."
    legend = [
        curve([(75, 20), (105, 20)], "pairs"),
        text(112, 24, "products of a process's pairs"),
        curve([(330, 20), (360, 20)], "nodes"),
        text(367, 24, "of all nodes"),
        curve([(500, 20), (530, 20)], "sending"),
        text(537, 24, "collectives"),
        text(
            75,
            HEIGHT - 10,
            f"Derived, not measured: {RATE / 1e12:.0f} TFLOP/s, links of {BANDWIDTH / 1e9:.0f} GB/s, "
            f"{LATENCY * 1e6:.0f} µs a message; D = 512, L = 2, K = 4, bf16, store.",
            "quiet",
        ),
    ]
    drawn = [
        *legend,
        *panel(PANELS[0], f"The same batch, n = {STRONG:,}", strong()),
        *panel(PANELS[1], f"n = {WEAK:,} √R, up to {WEAK * 32:,}", weak()),
    ]
    return frame(WIDTH, HEIGHT, title, drawn, style=STYLE)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
