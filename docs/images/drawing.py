"""What the pictures of the documentation share: colors for a light and a dark page, shapes, and the frame.

A picture brings its own background, and follows the reader's light or dark setting.
"""

from __future__ import annotations

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


def arrow(start: tuple[float, float], end: tuple[float, float], kind: str, gap: float = 13, tip: str = "tip") -> str:
    """A line with a tip between two shapes, which it does not touch."""
    (x1, y1), (x2, y2) = start, end
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = (x2 - x1) / length * gap, (y2 - y1) / length * gap
    return line(x1 + dx, y1 + dy, x2 - dx, y2 - dy, kind, tip)


def curve(points: list[tuple[float, float]], kind: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"/>'


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'


def frame(width: int, height: int, title: str, drawn: list[str], *, style: str = "") -> str:
    """A whole picture, as SVG.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        title: what it shows, for those who cannot see it.
        drawn: its shapes.
        style: further rules of CSS.
    """
    tip = (
        '<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" markerHeight="6" orient="auto">'
        '<path class="synthetic" d="M 0 0 L 10 5 L 0 10 z"/></marker>'
    )
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">'
    )
    lines = [
        opening,
        f'<title id="title">{title}</title>',
        f"<style>{STYLE}{style}</style>",
        f"<defs>{tip}</defs>",
        f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        *drawn,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
