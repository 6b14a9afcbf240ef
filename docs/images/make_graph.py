"""Draws graph.svg: what a layer of the graph network does to nodes and edges.

python docs/images/make_graph.py
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

from drawing import arrow, circle, diamond, frame, line, square, text

PICTURE = Path(__file__).with_name("graph.svg")
WIDTH, ROW = 600, 158
CENTER, RADIUS = 98, 54
STYLE = """
  svg { font-size: 15px; }
  .thin { stroke: var(--synthetic); stroke-width: 1.5; fill: none; }
"""

# Three classes of two samples, clockwise; the first of them is the anchor.
PLACES = [
    (RADIUS * math.cos(math.radians(angle)), RADIUS * math.sin(math.radians(angle)))
    for angle in (-115, -65, -5, 45, 115, 175)
]
ANCHOR, OTHER = 0, 3
ROWS = (
    (
        "Start: an edge for each pair",
        "Every sample of the batch is a node. An edge",
        "starts as x̂ᵢ ∘ x̂ⱼ, channel by channel.",
    ),
    (
        "1. Nodes attend to other classes",
        "A node gathers what the samples of the other",
        "classes hold. Its own class is left out.",
    ),
    (
        "2. Edges add up at their nodes",
        "A node adds the sum of all its edges, and",
        "goes through an MLP.",
    ),
    (
        "3. Edges attend to their two nodes",
        "An edge takes from the nodes at its ends,",
        "and goes through an MLP.",
    ),
    (
        "Result: θ for each pair",
        "After the last layer, a linear map and a",
        "sigmoid make θ of an edge, in (0, 1).",
    ),
)


def nodes(x: float, y: float) -> list[str]:
    """The six samples: a shape for each class."""
    shapes = [(circle, 9, "anchor"), (square, 8, "negative"), (diamond, 10, "other")]
    drawn = []
    for i, (dx, dy) in enumerate(PLACES):
        shape, size, kind = shapes[i // 2]
        drawn.append(shape(x + dx, y + dy, size, kind))
    return drawn


def edges(x: float, y: float, chosen: list[tuple[int, int]], kind: str) -> list[str]:
    """All edges, with some of them picked out."""
    drawn = []
    for i, j in combinations(range(len(PLACES)), 2):
        (x1, y1), (x2, y2) = PLACES[i], PLACES[j]
        drawn.append(line(x + x1, y + y1, x + x2, y + y2, kind if (i, j) in chosen else "faint"))
    return drawn


def row(number: int) -> list[str]:
    """One row: the drawing, and its explanation on the right."""
    x, y = CENTER, ROW * number + ROW / 2
    at = [(x + dx, y + dy) for dx, dy in PLACES]
    pair = [(ANCHOR, OTHER)]
    if number == 1:
        drawn = [*edges(x, y, [], ""), *(arrow(at[i], at[ANCHOR], "thin") for i in range(2, len(PLACES)))]
    elif number == 2:
        drawn = edges(x, y, [(ANCHOR, i) for i in range(1, len(PLACES))], "edge")
    elif number == 3:
        middle = ((at[ANCHOR][0] + at[OTHER][0]) / 2, (at[ANCHOR][1] + at[OTHER][1]) / 2)
        drawn = [*edges(x, y, pair, "edge"), *(arrow(at[i], middle, "thin", gap=11) for i in pair[0])]
        drawn.append(diamond(*middle, 7, "synthetic"))
    else:
        drawn = edges(x, y, pair if number else list(combinations(range(len(PLACES)), 2)), "edge" if number else "thin")
    title, *lines = ROWS[number]
    words = [
        text(206, y - 16, title, "title"),
        *(text(206, y + 8 + 21 * i, said, "quiet") for i, said in enumerate(lines)),
    ]
    if number == 4:
        middle = ((at[ANCHOR][0] + at[OTHER][0]) / 2, (at[ANCHOR][1] + at[OTHER][1]) / 2)
        words.append(text(middle[0] + 8, middle[1] - 6, "θ", "title"))
    rule = [line(20, ROW * number, WIDTH - 20, ROW * number, "faint")] if number else []
    return [*rule, *drawn, *nodes(x, y), *words]


def picture() -> str:
    """The whole picture, as SVG."""
    title = (
        "A layer of the graph network: nodes attend to nodes of other classes, edges add up at their nodes, and each "
        "edge attends to its two nodes. At the end each edge gives the coefficients of its pair."
    )
    drawn = [shape for number in range(len(ROWS)) for shape in row(number)]
    return frame(WIDTH, ROW * len(ROWS), title, drawn, style=STYLE)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
