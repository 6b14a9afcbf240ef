"""Charts as inline SVG. The page's style sheet sets their colors, so that they follow light and dark.

Text that these functions take is escaped here; they return markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from gcahng.runs.records import running_mean

WIDTH, HEIGHT = 380, 230
MAX_POINTS = 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: its name in the key; "" leaves it out there.
        points: (x, y) by ascending x; values that are not finite leave a gap.
        color: 1 to 6, one of the style sheet's.
        dashed: whether it is dashed instead of solid.
        band: (x, low, high) of a band around the line.
        smooth: whether the points are drawn thin, and their running mean over a twentieth of them thick.
        dots: whether the points are marked.
    """

    name: str
    points: Sequence[Point]
    color: int = 1
    dashed: bool = False
    band: Sequence[tuple[float, float, float]] = field(default=())
    smooth: bool = False
    dots: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    note: str = "",
    x_label: str = "step",
    x_names: Sequence[str] | None = None,
    from_zero: bool = False,
) -> str:
    """A figure of lines over a common axis.

    Args:
        lines: with at least one point among them.
        title: the heading, as markup.
        note: a small text beside it.
        x_label: the label of the horizontal axis.
        x_names: the names of x = 0, 1, …; None: x are numbers.
        from_zero: whether the vertical axis starts at 0.
    """
    values = [y for line in lines for _, y in line.points] + [
        y for line in lines for band in line.band for y in band[1:]
    ]
    values = [y for y in values if math.isfinite(y)] or [0.0]
    positions = [x for line in lines for x, _ in line.points] or [0.0]
    low, high = (min(values) if not from_zero else min(0.0, *values)), max(values)
    y_ticks = ticks(low, high, 5)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    if x_names is None:
        left, right = min(positions), max(positions)
        x_ticks = [(x, number(x)) for x in ticks(left, right, 6) if left <= x <= right]
        pad = 0.0
    else:
        x_ticks = [(float(i), name) for i, name in enumerate(x_names)]
        left, right, pad = 0.0, float(len(x_names) - 1), 14.0
    x_of = _scale(left, right, _LEFT + pad, WIDTH - _RIGHT - pad)
    y_of = _scale(low, high, HEIGHT - _BOTTOM, _TOP)
    parts = [_axes(x_ticks, y_ticks, x_of, y_of, x_label)]
    for line in lines:
        parts.append(_drawn(line, x_of, y_of))
    key = "".join(
        f'<li class="c{line.color}{" dashed" if line.dashed else ""}">{escape(line.name)}</li>'
        for line in lines
        if line.name
    )
    return figure(
        title, note, _svg("".join(parts), f"{_plain(title)} {note}"), f'<ul class="key">{key}</ul>' if key else ""
    )


def bar_chart(
    shares: Sequence[float], earlier: Sequence[float] | None, *, title: str, note: str, x_label: str, key: Sequence[str]
) -> str:
    """A figure of a histogram over [0, 1] in equal parts, with the outline of an earlier one.

    Args:
        shares: the share of each part.
        earlier: the shares of the outline; None: no outline.
        title, note, x_label: as in `line_chart`.
        key: the names of the bars and of the outline.
    """
    top = max(*shares, *(earlier or [0.0]), 1e-9)
    y_ticks = ticks(0.0, 100 * top, 4)
    x_of = _scale(0.0, 1.0, _LEFT, WIDTH - _RIGHT)
    y_of = _scale(0.0, max(100 * top, y_ticks[-1]), HEIGHT - _BOTTOM, _TOP)
    x_ticks = [(i / 5, f"{i / 5:.1f}") for i in range(6)]
    width = (x_of(1.0) - x_of(0.0)) / len(shares)
    bars = "".join(
        f'<rect class="bar" x="{x_of(i / len(shares)) + 0.5:.1f}" y="{y_of(100 * share):.1f}" width="{width - 1:.1f}" '
        f'height="{y_of(0) - y_of(100 * share):.1f}"/>'
        for i, share in enumerate(shares)
    )
    outline = names = ""
    if earlier is not None:
        steps = []
        for i, share in enumerate(earlier):
            steps += [(i / len(earlier), 100 * share), ((i + 1) / len(earlier), 100 * share)]
        outline = _path(steps, x_of, y_of, "line c2")
        names = f'<li class="c2">{escape(key[1])}</li>'
    axes = _axes(x_ticks, y_ticks, x_of, y_of, x_label)
    picture = _svg(axes + bars + outline, f"{_plain(title)} {note}")
    return figure(title, note, picture, f'<ul class="key"><li class="c1">{escape(key[0])}</li>{names}</ul>')


def figure(title: str, note: str, picture: str, key: str = "") -> str:
    """A figure as markup.

    Args:
        title: the heading, as markup.
        note: a small text beside it.
        picture: the SVG.
        key: the key, as markup.
    """
    caption = f"<figcaption><b>{title}</b> <span>{escape(note)}</span></figcaption>"
    return f'<figure class="chart">{caption}{key}{picture}</figure>'


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers for the ticks of an axis.

    Args:
        low: the first tick is at or below it.
        high: the last tick is at or above it.
        about: about how many ticks there are.
    """
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's text, with no more digits than needed: 12,000 or 0.25."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def _drawn(line: Line, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    style = f"line c{line.color}{' dashed' if line.dashed else ''}"
    points = _thinned(line.points)
    parts = []
    if line.band:
        edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        places = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in edge)
        parts.append(f'<polygon class="band c{line.color}" points="{places}"/>')
    window = max(1, len(points) // 20) if line.smooth else 1
    if window > 1:
        parts.append(_path(points, x_of, y_of, style + " thin"))
        means = running_mean([y for _, y in points], window)
        points = [(x, mean) for (x, _), mean in zip(points, means, strict=True)]
    parts.append(_path(points, x_of, y_of, style))
    if line.dots or len(points) == 1:
        parts += [
            f'<circle class="dot c{line.color}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3"/>'
            for x, y in points
            if math.isfinite(y)
        ]
    return "".join(parts)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MAX_POINTS` points, each the mean of the same number of neighbors."""
    group = -(-len(points) // MAX_POINTS)
    if group <= 1:
        return list(points)
    means = []
    for start in range(0, len(points), group):
        some = [y for _, y in points[start : start + group] if math.isfinite(y)]
        means.append((points[min(start + group, len(points)) - 1][0], sum(some) / len(some) if some else math.nan))
    return means


def _path(points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float], style: str) -> str:
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{pen}{x_of(x):.1f},{y_of(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{style}" d="{"".join(commands)}"/>' if commands else ""


def _axes(
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_label: str,
) -> str:
    bottom = HEIGHT - _BOTTOM
    lines = "".join(f"M{_LEFT},{y_of(y):.1f}H{WIDTH - _RIGHT}" for y in y_ticks)
    parts = [f'<path class="grid" d="{lines}"/>']
    parts += [f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{number(y)}</text>' for y in y_ticks]
    parts += [
        f'<text x="{x_of(x):.1f}" y="{bottom + 15}" text-anchor="{_anchor(x_of(x), name)}">{escape(name)}</text>'
        for x, name in x_ticks
    ]
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _anchor(x: float, text: str) -> str:
    """Where a tick's text is anchored: in its middle, unless it would then be cut off on the right."""
    return "end" if x + 3.5 * len(text) > WIDTH else "middle"


def _svg(content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label.strip())}">{content}</svg>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda value: start + (end - start) * ((value - low) / span if span else 0.5)


def _plain(markup: str) -> str:
    """The text of a heading, for screen readers."""
    return re.sub("<[^>]*>", "", markup.replace("<sub>", "_"))
