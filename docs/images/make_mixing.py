"""Draws mixing.svg: how the negatives of a class are pulled toward an anchor, and mixed into one.

    python docs/images/make_mixing.py

The places are computed as docs/math/mix.md says, in two channels; a test holds them to `gcahng.ops.channel_mix`.
"""

from __future__ import annotations

import math
from pathlib import Path

from drawing import arrow, circle, diamond, frame, line, square, text

PICTURE = Path(__file__).with_name("mixing.svg")
WIDTH, HEIGHT = 600, 420
STYLE = """
  svg { font-size: 15px; }
  .chain { stroke: var(--quiet); stroke-width: 1.5; fill: none; }
  .ring { fill: none; stroke: var(--synthetic); stroke-width: 2; }
"""

ANCHOR, POSITIVE = (0.0, 0.0), (-0.5, -0.6)
NEGATIVES = ((0.9, 2.1), (2.7, 1.9), (3.7, 0.35))  # the K = 3 samples of one other class
THETA = ((0.15, 0.6), (0.75, 0.3), (0.35, 0.9))  # of the anchor and each of them, in each channel
PULL = 0.9
DRAWS = (0.55, 0.4)  # u of the second and of the third
TINY = 1e-6  # what a distance adds to each channel
SCALE, ORIGIN = 110.0, (120.0, 298.0)


def distance(x: tuple[float, float], y: tuple[float, float]) -> float:
    return math.hypot(x[0] - y[0] + TINY, x[1] - y[1] + TINY)


def pulled(b: tuple[float, float], theta: tuple[float, float]) -> tuple[float, float]:
    """ñ of one negative: each channel of b moves toward the anchor by a share of its own."""
    share = min(distance(ANCHOR, POSITIVE) / distance(ANCHOR, b), 1.0)
    ratios = [share + (1 - share) * PULL * t for t in theta]
    return ANCHOR[0] + (b[0] - ANCHOR[0]) * ratios[0], ANCHOR[1] + (b[1] - ANCHOR[1]) * ratios[1]


def chain() -> list[tuple[float, float]]:
    """t_0, t_1, t_2: the pulled negatives mixed one after the other. The last is the synthetic negative."""
    steps = [pulled(NEGATIVES[0], THETA[0])]
    for b, theta, u in zip(NEGATIVES[1:], THETA[1:], DRAWS, strict=True):
        new, before = pulled(b, theta), steps[-1]
        steps.append((new[0] + u * (before[0] - new[0]), new[1] + u * (before[1] - new[1])))
    return steps


def on_page(point: tuple[float, float]) -> tuple[float, float]:
    return ORIGIN[0] + SCALE * point[0], ORIGIN[1] - SCALE * point[1]


def picture() -> str:
    """The whole picture, as SVG."""
    title = (
        "Three negatives of one class are pulled toward the anchor, each channel by a share of its own, never nearer "
        "than the positive. The pulled ones are mixed into one synthetic negative."
    )
    anchor, positive = on_page(ANCHOR), on_page(POSITIVE)
    negatives = [on_page(b) for b in NEGATIVES]
    moved = [on_page(pulled(b, theta)) for b, theta in zip(NEGATIVES, THETA, strict=True)]
    steps = [on_page(t) for t in chain()]
    drawn = [circle(*anchor, SCALE * distance(ANCHOR, POSITIVE), "dashed")]
    drawn += [line(*anchor, *b, "faint") for b in negatives]
    drawn += [arrow(b, to, "pull", gap=11) for b, to in zip(negatives, moved, strict=True)]
    drawn += [line(*moved[0], *moved[1], "chain"), line(*steps[1], *moved[2], "chain")]
    drawn += [circle(*anchor, 9, "anchor"), circle(*positive, 9, "anchor")]
    drawn += [square(*b, 8, "negative") for b in negatives]
    drawn += [diamond(*place, 7, "synthetic") for place in moved]
    drawn += [circle(*steps[1], 4, "other"), diamond(*steps[2], 13, "synthetic"), circle(*steps[2], 19, "ring")]
    drawn.append(text(anchor[0] - 4, anchor[1] - 18, "anchor a", anchor="middle"))
    drawn.append(text(positive[0] + 16, positive[1] + 6, "positive p"))
    drawn += [text(b[0] + 15, b[1] + 5, f"b{'₀₁₂'[i]}") for i, b in enumerate(negatives)]
    drawn += [
        text(place[0] + 12 * (2 * i - 1), place[1] + 16 * i - 8, f"ñ{'₀₁₂'[i]}", "quiet", "start" if i else "end")
        for i, place in enumerate(moved[:2])
    ]
    drawn.append(text(moved[2][0] + 4, moved[2][1] + 24, "ñ₂", "quiet"))
    drawn.append(text(steps[2][0] + 26, steps[2][1] + 6, "N"))
    drawn.append(text(WIDTH - 20, HEIGHT - 40, "No pulled negative is nearer to a", "quiet", "end"))
    drawn.append(text(WIDTH - 20, HEIGHT - 19, "than p is (the dashed circle).", "quiet", "end"))
    drawn.append(text(20, 34, "Negatives of one class, pulled and mixed", "title"))
    return frame(WIDTH, HEIGHT, title, drawn, style=STYLE)


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
