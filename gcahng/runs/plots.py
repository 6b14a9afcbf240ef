"""Pictures of a run: the curves of its losses and metrics, and a grid of retrieved images.

Figures are drawn through matplotlib's objects and not through pyplot, which has global state and opens windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import atomic_write
from gcahng.retrieval import nearest
from gcahng.runs.metrics_table import metric_title
from gcahng.runs.records import LOSSES, metric_names, read_records, running_mean, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any kind of color blindness can tell apart.
_GREEN, _RED, _BLUE, _ORANGE, _PURPLE, _SKY = "#009E73", "#D55E00", "#0072B2", "#E69F00", "#CC79A7", "#56B4E9"
_INK, _GRAY = "#222222", "#767676"
_DASHES = (0, (2.0, 1.0))


def plot_curves(metrics_jsonl: Path, out_png: Path) -> None:
    """Draw the losses of a run over its steps, and its validation metrics, or its test metrics where it has no others.

    Where a step was recorded twice, as after resuming from a checkpoint, the later record counts. A last line that was
    cut short, as by a kill, is left out.

    Args:
        metrics_jsonl: lines {"step": int, "kind": "train", "loss": ..., "J_m": ...} and {"step": int, "kind": "val"
            or "test", "recall@1": ..., "map@r": ...}, metrics as fractions.
        out_png: the picture, which is replaced as a whole or not at all.

    Raises:
        UserError: matplotlib is missing; the file is missing, or a line is no such record.
    """
    records = read_records(Path(metrics_jsonl))
    losses = {name: series(records, "train", name) for name in LOSSES}
    losses = {name: values for name, values in losses.items() if values}
    kind = "val" if any(record["kind"] == "val" for record in records) else "test"
    metrics = {name: series(records, kind, name) for name in metric_names(records, kind)}
    # The panel of metrics is two wide, for its legend.
    first = 2 if metrics else 0
    places = first + len(losses)
    columns = 2 if places == 4 else min(max(places, 1), 4)
    rows = max(1, math.ceil(places / columns))
    figure = new_figure(0.6 + 4.1 * columns, 0.5 + 2.75 * rows)
    if not places:
        figure.text(0.5, 0.5, "Nothing was recorded.", ha="center", va="center", color=_GRAY, fontsize=11)
    grid = figure.add_gridspec(rows, columns)
    if metrics:
        _draw_metrics(figure.add_subplot(grid[0, :2]), metrics)
    for place, (name, values) in enumerate(losses.items(), start=first):
        _draw_loss(figure.add_subplot(grid[place // columns, place % columns]), name, values)
    for ax in figure.axes:
        ax.set_xlabel("step", fontsize=8, color=_INK)
    figure.suptitle("Training curves", x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK)
    save_png(figure, Path(out_png))


def plot_retrieval_grid(
    images: Tensor | Callable[[int], Tensor],
    labels: Tensor,
    embeddings: Tensor,
    out_png: Path,
    queries: int = 8,
    neighbors: int = 8,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> None:
    """Draw random queries, one in each row, followed by their nearest neighbors by cosine similarity.

    Neighbors of the query's class have a green solid frame, wrong ones a red dashed frame with a cross. Queries are
    drawn from the samples whose class has another sample: one from each class, then more where there are fewer classes.

    Args:
        images: (N, H, W), (N, 1, H, W) or (N, 3, H, W) in [0, 1]; or a function that gives image i of N.
        labels: (N,) integers.
        embeddings: (N, D).
        out_png: the picture, which is replaced as a whole or not at all.
        queries: the number of rows; there are fewer where there are fewer samples.
        neighbors: the number of images after the query; there are fewer where there are fewer samples.
        seed: of the choice of queries.
        class_names: the name of each label, which is written under the images; None: the label itself is.

    Raises:
        UserError: matplotlib is missing, shapes do not fit, values lie outside [0, 1], or no class has two samples.
    """
    labels = torch.as_tensor(labels).cpu()
    picture = _pictures(images, labels, embeddings)
    for name, value in (("queries", queries), ("neighbors", neighbors)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    chosen = _choose_queries(labels, queries, seed)
    nearest_rows = nearest(embeddings, min(neighbors, len(labels) - 1), queries=chosen).cpu()
    right = labels[nearest_rows] == labels[chosen].unsqueeze(1)
    rows, columns = nearest_rows.shape[0], 1 + nearest_rows.shape[1]

    head = 0.62  # inches for title and key
    figure = new_figure(0.3 + 1.0 * columns, head + 0.1 + 1.2 * rows, layout=None)
    height = figure.get_figheight()
    widths = [1.0, 0.12] + [1.0] * (columns - 1)  # a gap sets the query apart
    grid = figure.add_gridspec(
        rows,
        columns + 1,
        width_ratios=widths,
        left=0.02,
        right=0.98,
        bottom=0.2 / height,
        top=1 - (head + 0.08) / height,
    )
    grid.update(wspace=0.12, hspace=0.3)
    for row, query in enumerate(chosen.tolist()):
        draw_picture(figure.add_subplot(grid[row, 0]), picture(query), _name(labels[query], class_names), None)
        for column, neighbor in enumerate(nearest_rows[row].tolist()):
            ax = figure.add_subplot(grid[row, column + 2])
            is_right = bool(right[row, column])
            draw_picture(ax, picture(neighbor), _name(labels[neighbor], class_names), is_right)
    text = "Random query (left), then its nearest samples, nearest first."
    counts = f"{int(right.sum())} of {right.numel()} are of the query's class."
    draw_head(figure, head / height, "Nearest neighbors", f"{text} {counts}")
    save_png(figure, Path(out_png))


def _draw_metrics(ax: Axes, metrics: dict[str, list[tuple[int, float]]]) -> None:
    """One line for each metric, in percent, with its last value in the key."""
    colors = [_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _SKY]
    for i, (name, points) in enumerate(metrics.items()):
        steps, values = zip(*points, strict=True)
        ax.plot(
            steps,
            [100 * value for value in values],
            color=colors[i % len(colors)],
            linestyle=("-", "--", ":")[i // len(colors) % 3],
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=f"{metric_title(name)}  {100 * values[-1]:.1f}",
        )
    _style(ax, "Validation", "percent, classes not trained on")
    ax.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        title="last value",
        alignment="left",
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        handlelength=1.6,
    )


def _draw_loss(ax: Axes, name: str, points: list[tuple[int, float]]) -> None:
    """The recorded values as a thin line, and their running mean over a twentieth of the records."""
    steps, values = zip(*points, strict=True)
    color = _BLUE if name in ("loss", "J_m", "J_syn", "J_gce") else _RED
    window = max(1, len(values) // 20)
    ax.plot(
        steps,
        values,
        color=color,
        linewidth=0.8,
        alpha=0.35 if window > 1 else 1.0,
        marker="o" if len(values) == 1 else None,
    )
    if window > 1:
        ax.plot(steps, running_mean(values, window), color=color, linewidth=1.6)
    symbol, _, index = name.partition("_")
    _style(ax, rf"${symbol}_\mathrm{{{index}}}$" if index else name.capitalize(), LOSSES[name])


def _style(ax: Axes, title: str, meaning: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=_INK)
    ax.set_title(meaning, loc="right", fontsize=7.5, color=_GRAY)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_GRAY)
    ax.tick_params(labelsize=8, colors=_INK, color=_GRAY)
    ax.grid(True, color="#E6E6E6", linewidth=0.6)
    ax.set_axisbelow(True)


def _pictures(images: Tensor | Callable[[int], Tensor], labels: Tensor, embeddings: Tensor) -> Callable[[int], Tensor]:
    """A function that gives image i as (H, W, 3), and raises UserError where shapes or values do not fit."""
    if isinstance(images, Tensor):
        return _check_images(images, labels, embeddings).__getitem__
    one = images
    return lambda i: _check_images(one(i)[None], labels[i : i + 1], embeddings[i : i + 1])[0]


def _check_images(images: Tensor, labels: Tensor, embeddings: Tensor) -> Tensor:
    """The images as (N, H, W, 3) on the CPU; raises UserError where shapes or values do not fit."""
    images = images.detach().cpu().float()
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"images are {tuple(images.shape)}; they must be (N, H, W), (N, 1, H, W) or (N, 3, H, W)")
    if not len(images) == len(labels) == len(embeddings):
        raise UserError(
            f"there are {len(images)} images, {len(labels)} labels and {len(embeddings)} embeddings; there must be as "
            "many of each"
        )
    low, high = images.aminmax() if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise UserError(f"images have values from {float(low):.4g} to {float(high):.4g}; they must be in [0, 1]")
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)


def _choose_queries(labels: Tensor, queries: int, seed: int) -> Tensor:
    """(q,) random samples whose class has another one: first one of each class, then more of the same classes."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sizes = dict(zip(*(t.tolist() for t in labels.unique(return_counts=True)), strict=True))
    seen: set[int] = set()
    first, later = [], []
    for i in order.tolist():
        label = int(labels[i])
        if sizes[label] > 1:
            (later if label in seen else first).append(i)
            seen.add(label)
    if not first:
        raise UserError("every sample is alone in its class; labels must have a class with at least two samples")
    return torch.tensor((first + later)[:queries])


def _name(label: Tensor, class_names: Sequence[str] | None) -> str:
    """What is written under an image of class `label`, short enough for its width."""
    name = str(int(label)) if class_names is None else class_names[int(label)]
    return name if len(name) <= 15 else name[:14] + "…"


def draw_picture(ax: Axes, picture: Tensor, name: str, right: bool | None) -> None:
    """Draw one image (H, W, 3) with its name below.

    Args:
        ax: where.
        picture: (H, W, 3) in [0, 1].
        name: written below.
        right: whether the image is of the query's class, which its frame shows; None: it is a query.
    """
    ax.imshow(
        picture.numpy(), vmin=0, vmax=1, interpolation="nearest" if max(picture.shape[:2]) < 64 else "antialiased"
    )
    ax.set_xticks([])
    ax.set_yticks([])
    color = {None: _GRAY, True: _GREEN, False: _RED}[right]
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=1.0 if right is None else 3.0)
        if right is False:
            spine.set(linestyle=_DASHES, capstyle="butt")
    name = name.encode("utf-8", "replace").decode()  # matplotlib draws no names that are invalid UTF-8
    ax.set_xlabel(name, fontsize=7.5, color=_INK, labelpad=3, parse_math=False)
    if right is False:
        # The cross says the same without a color.
        place = {"transform": ax.transAxes, "clip_on": False, "zorder": 4}
        ax.plot(0.9, 0.9, "o", markersize=11, color=_RED, markeredgecolor="white", **place)
        ax.plot(0.9, 0.9, "x", markersize=4.5, color="white", markeredgewidth=1.4, **place)


def draw_head(figure: Figure, height: float, title: str, text: str, key: bool = True) -> None:
    """Draw the head of a picture.

    Args:
        figure: of the picture.
        height: the part of the figure, from its top, that the head takes.
        title: large.
        text: below the title.
        key: whether it says what the frames of images mean.
    """
    from matplotlib.lines import Line2D

    figure.text(0.02, 1 - 0.3 * height, title, fontsize=13, fontweight="bold", color=_INK, va="center")
    figure.text(0.02, 1 - 0.78 * height, text, fontsize=8.5, color=_GRAY, va="center")
    if not key:
        return
    figure.legend(
        handles=[
            Line2D([], [], color=_GREEN, linewidth=3, label="right"),
            Line2D([], [], color=_RED, linewidth=3, linestyle=_DASHES, label="wrong (×)"),
        ],
        loc="center right",
        bbox_to_anchor=(0.98, 1 - 0.3 * height),
        ncols=2,
        frameon=False,
        fontsize=8.5,
        handlelength=2.4,
        borderaxespad=0,
    )


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    """A figure of `width` x `height` inches that draws into memory."""
    require("matplotlib", extra="train", purpose="plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, out_png: Path) -> None:
    """Write the figure as a PNG, whole or not at all."""
    # Without the version of matplotlib in it, equal pictures are equal files.
    atomic_write(out_png, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))
