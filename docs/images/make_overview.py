"""Draws overview.svg, the picture of the README: how a synthetic hard negative is made.

    python docs/images/make_overview.py

The picture brings its own background, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

PICTURE = Path(__file__).with_name("overview.svg")
WIDTH, HEIGHT = 960, 348
PANELS = (20, 330, 640)  # left edges
PANEL_WIDTH = 300

# The share of the way from the anchor to the negative that each channel keeps. The first two are also those of the
# third panel's axes. None is below POSITIVE / NEGATIVE, the ratio of the two distances from the anchor.
SHARES = (0.58, 0.88, 0.70, 0.52, 0.82, 0.62)
POSITIVE, NEGATIVE = 74, (160, -112)

STYLE = """
  svg { font-family: 'DejaVu Sans', Verdana, Arial, sans-serif; font-size: 13px;
        --paper: #ffffff; --frame: #d0d7de; --ink: #1f2328; --quiet: #59636e; --faint: #c4ccd4;
        --anchor: #0969da; --negative: #8250df; --synthetic: #bc4c00; --other: #57606a; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #0d1117; --frame: #3d444d; --ink: #f0f6fc; --quiet: #9198a1; --faint: #3d444d;
          --anchor: #58a6ff; --negative: #bc8cff; --synthetic: #f0883e; --other: #8b949e; }
  }
  text { fill: var(--ink); }
  .title { font-size: 15px; font-weight: bold; }
  .quiet { fill: var(--quiet); }
  .paper { fill: var(--paper); stroke: var(--frame); }
  .faint { stroke: var(--faint); fill: none; }
  .axis { stroke: var(--faint); stroke-width: 2; stroke-linecap: round; }
  .anchor { fill: var(--anchor); } .negative { fill: var(--negative); }
  .synthetic { fill: var(--synthetic); } .other { fill: var(--other); }
  .edge { stroke: var(--synthetic); stroke-width: 3; }
  .pull { stroke: var(--synthetic); stroke-width: 2; fill: none; }
  .dashed { stroke: var(--quiet); stroke-dasharray: 4 4; fill: none; }
"""


def circle(x: float, y: float, radius: float, kind: str) -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'


def square(x: float, y: float, half: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x - half:.1f}" y="{y - half:.1f}" width="{2 * half}" height="{2 * half}"/>'


def diamond(x: float, y: float, half: float, kind: str) -> str:
    points = f"{x:.1f},{y - half:.1f} {x + half:.1f},{y:.1f} {x:.1f},{y + half:.1f} {x - half:.1f},{y:.1f}"
    return f'<polygon class="{kind}" points="{points}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str, end: str = "") -> str:
    marker = f' marker-end="url(#{end})"' if end else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{marker}/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def heading(left: float, number: int, title: str, *lines: str) -> list[str]:
    """A panel's title, and the lines that explain it below the drawing."""
    notes = [text(left, HEIGHT - 50 + 18 * i, words, "quiet") for i, words in enumerate(lines)]
    return [text(left, 38, f"{number}. {title}", "title"), *notes]


def graph(left: float) -> list[str]:
    """The batch as a complete graph: three classes of three samples, one edge picked out."""
    x, y, radius = left + 108, 166, 92
    angles = [2 * math.pi * i / 9 - 2.6 for i in range(9)]
    places = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    drawn = [line(*places[i], *places[j], "faint") for i, j in combinations(range(9), 2)]
    drawn.append(line(*places[1], *places[4], "edge"))
    drawn += [circle(*places[i], 8, "anchor") for i in (0, 1, 2)]
    drawn += [square(*places[i], 7, "negative") for i in (3, 4, 5)]
    drawn += [diamond(*places[i], 9, "other") for i in (6, 7, 8)]
    drawn.append(text(places[1][0], places[1][1] - 15, "anchor a", anchor="middle"))
    drawn.append(text(places[4][0] + 14, places[4][1] + 5, "negative b"))
    return [
        *heading(
            left, 1, "A batch is a complete graph", "A graph network learns a vector θ", "for each pair of samples."
        ),
        *drawn,
    ]


def channels(left: float) -> list[str]:
    """θ of the edge picked out: each channel of b moves toward a by a share of its own."""
    start, end = left + 34, left + PANEL_WIDTH - 62
    drawn = [text(start, 76, "a", anchor="middle"), text(end, 76, "b", anchor="middle")]
    for i, share in enumerate(SHARES):
        y = 98 + 29 * i
        pulled = start + share * (end - start)
        drawn.append(line(start, y, end, y, "axis"))
        drawn.append(line(end - 9, y, pulled + 12, y, "pull", "tip"))
        drawn += [circle(start, y, 6, "anchor"), square(end, y, 5.5, "negative"), diamond(pulled, y, 7.5, "synthetic")]
        drawn.append(text(start - 20, y + 5, "⋮" if i == len(SHARES) - 1 else str(i + 1), "quiet", "middle"))
    notes = ("θ of a and b says how far each channel", "of b moves toward a.")
    return [*heading(left, 2, "θ pulls channel by channel", *notes), *drawn]


def harder(left: float) -> list[str]:
    """Where the pulled negative lies among anchor, positive and real negative."""
    x, y = left + 96, 190
    b = (x + NEGATIVE[0], y + NEGATIVE[1])
    pulled = (x + SHARES[0] * NEGATIVE[0], y + SHARES[1] * NEGATIVE[1])
    p = (x - POSITIVE * math.cos(0.8), y - POSITIVE * math.sin(0.8))
    drawn = [circle(x, y, POSITIVE, "dashed"), line(*b, pulled[0] + 12, pulled[1], "pull", "tip")]
    drawn += [line(x, y, *pulled, "dashed"), line(x, y, *p, "dashed")]
    drawn += [circle(x, y, 9, "anchor"), circle(*p, 9, "anchor"), square(*b, 8, "negative")]
    drawn.append(diamond(*pulled, 11, "synthetic"))
    drawn.append(text(x + 6, y + 26, "anchor a", anchor="middle"))
    drawn.append(text(p[0] - 4, p[1] - 15, "positive p", anchor="middle"))
    drawn.append(text(b[0] + 8, b[1] - 16, "real negative b", anchor="end"))
    drawn.append(text(pulled[0] + 18, pulled[1] + 20, "synthetic"))
    drawn.append(text(pulled[0] + 18, pulled[1] + 37, "hard negative"))
    notes = ("It is never nearer to a than p is. The", "network trains on such negatives.")
    return [*heading(left, 3, "The result is harder than b", *notes), *drawn]


def picture() -> str:
    """The whole picture, as SVG."""
    tip = (
        '<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        '<path class="synthetic" d="M 0 0 L 10 5 L 0 10 z"/></marker>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title">'
    )
    drawn = [
        opening,
        '<title id="title">A graph network over the batch learns a vector for each pair of samples; with it a real '
        "negative is pulled toward the anchor, channel by channel, which makes a harder negative.</title>",
        f"<style>{STYLE}</style>",
        f"<defs>{tip}</defs>",
        f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        *(line(left - 15, 24, left - 15, HEIGHT - 24, "faint") for left in PANELS[1:]),
        *graph(PANELS[0]),
        *channels(PANELS[1]),
        *harder(PANELS[2]),
        "</svg>",
    ]
    return "\n".join(drawn) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
