"""Draws overview.svg, the picture of the README: how a synthetic hard negative is made.

python docs/images/make_overview.py
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

from drawing import circle, diamond, frame, line, square, text

PICTURE = Path(__file__).with_name("overview.svg")
WIDTH, HEIGHT = 960, 348
PANELS = (20, 330, 640)  # left edges
PANEL_WIDTH = 300

# The share of the way from the anchor to the negative that each channel keeps. The first two are also those of the
# third panel's axes. None is below POSITIVE / NEGATIVE, the ratio of the two distances from the anchor.
SHARES = (0.58, 0.88, 0.70, 0.52, 0.82, 0.62)
POSITIVE, NEGATIVE = 74, (160, -112)


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
    title = (
        "A graph network over the batch learns a vector for each pair of samples; with it a real negative is pulled "
        "toward the anchor, channel by channel, which makes a harder negative."
    )
    drawn = [
        *(line(left - 15, 24, left - 15, HEIGHT - 24, "faint") for left in PANELS[1:]),
        *graph(PANELS[0]),
        *channels(PANELS[1]),
        *harder(PANELS[2]),
    ]
    return frame(WIDTH, HEIGHT, title, drawn)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
