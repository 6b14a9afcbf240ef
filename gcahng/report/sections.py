"""The parts of the report's page, each a function from contents to markup."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from gcahng.data import ImageFiles, LabeledImages
from gcahng.report.charts import Line, bar_chart, line_chart
from gcahng.report.contents import NEIGHBORS, Contents, Run
from gcahng.report.ranking import confused_pairs
from gcahng.report.thumbnails import SPRITE_COLUMNS, data_uri, sprite
from gcahng.runs.metrics_table import metric_title
from gcahng.runs.records import LOSSES, metric_names, series

PAIRS = 12
COLORS = 6
MAP_WIDTH, MAP_HEIGHT, MAP_MARGIN = 900, 640, 20


def empty(reason: str) -> str:
    """What a part shows that has nothing else to show."""
    return f'<p class="empty">{escape(reason)}</p>'


def recall_chart(runs: Sequence[Run]) -> str:
    """Recall@K over K, one line for each run."""
    ks = sorted(int(name.removeprefix("recall@")) for name in runs[0].metrics if name.startswith("recall@"))
    lines = [
        Line(
            run.name,
            [(i, 100 * run.metrics[f"recall@{k}"]) for i, k in enumerate(ks) if f"recall@{k}" in run.metrics],
            color=place % COLORS + 1,
            dashed=place > 0,
            dots=True,
        )
        for place, run in enumerate(runs)
    ]
    return line_chart(
        lines, title="Recall@K", note="percent", x_label="K", x_names=[str(k) for k in ks]
    )  # fmt: skip


def curves(contents: Contents) -> str:
    """Metrics over training, beside those of the baselines, and the run's losses."""
    run, runs = contents.run, [contents.run, *contents.baselines]
    kind = "val" if any(record["kind"] == "val" for record in run.records) else "test"
    classes = "validation classes" if kind == "val" else "test classes"
    charts = []
    for name in ("map@r", "recall@1"):
        lines = [
            Line(other.name, _per_cent(series(other.records, kind, name)), place % COLORS + 1, place > 0, dots=True)
            for place, other in enumerate(runs)
        ]
        lines = [line for line in lines if line.points]
        if lines:
            charts.append(line_chart(lines, title=metric_title(name), note=f"percent, {classes}"))
    recalls = metric_names(run.records, kind)
    recalls = [name for name in recalls if name.startswith("recall@")]
    lines = [
        Line(metric_title(name), _per_cent(series(run.records, kind, name)), i % COLORS + 1, i >= COLORS)
        for i, name in enumerate(recalls)
    ]
    if lines:
        charts.append(line_chart(lines, title="Recall@K", note=f"percent, {classes}, this run"))
    for name, meaning in LOSSES.items():
        points = series(run.records, "train", name)
        if points:
            charts.append(line_chart([Line("", points, smooth=True)], title=_symbol(name), note=meaning))
    if not charts:
        return empty("Nothing was recorded: this is no run folder with a metrics.jsonl.")
    return f'<div class="charts">{"".join(charts)}</div>'


def negatives(run: Run) -> str:
    """How hard the generated negatives were, and the distribution of θ, at each evaluation."""
    records = sorted({r["step"]: r for r in run.records if r["kind"] == "negatives"}.values(), key=lambda r: r["step"])
    if not records:
        if run.loss.startswith("gca_hng"):
            return empty(
                "The run did not record its negatives: it is older than this record, or its metrics.jsonl is missing."
            )
        return empty(f"The loss {run.loss} generates no negatives.")

    def line(name: str, title: str, color: int, band: bool = False, dashed: bool = False) -> Line:
        edges = [(r["step"], r[f"{name}_p10"], r[f"{name}_p90"]) for r in records] if band else ()
        return Line(title, [(r["step"], r[name]) for r in records], color, dashed, band=edges)

    distances = line_chart(
        [
            line("real", "real negatives", 1, band=True),
            line("synthetic", "synthetic negatives", 2, band=True),
            line("positive", "positives", 3, dashed=True),
        ],
        title="Distance to the anchor",
        note="mean, and 10 % to 90 %",
        from_zero=True,
    )
    hardest = line_chart(
        [
            line("hardest_real", "real", 1),
            line("hardest_synthetic", "synthetic", 2),
        ],
        title="Hardest negative",
        note="distance of the nearest one to its anchor, mean",
        from_zero=True,
    )
    nearer = line_chart(
        [Line("", [(r["step"], 100 * r["nearer"]) for r in records], 2, dots=True)],
        title="Harder than real",
        note="percent nearer than every real sample of their class",
        from_zero=True,
    )
    apart = ""
    if between := series(records, "negatives", "apart"):
        apart = line_chart(
            [line("real", "real negatives, to the anchor", 1), Line("of one anchor, to each other", between, 2)],
            title="Diversity",
            note="distance between synthetic negatives, mean",
            from_zero=True,
        )
    first, last = records[0], records[-1]
    theta = bar_chart(
        last["theta_histogram"],
        first["theta_histogram"] if len(records) > 1 else None,
        title="Distribution of θ",
        note=f"percent in each of {len(last['theta_histogram'])} bins",
        x_label="θ, all channels, samples of different classes",
        key=(f"step {last['step']:,}", f"step {first['step']:,}"),
    )
    spread = line_chart(
        [
            Line(
                "mean ± standard deviation",
                [(r["step"], r["theta_mean"]) for r in records],
                1,
                band=[(r["step"], r["theta_mean"] - r["theta_std"], r["theta_mean"] + r["theta_std"]) for r in records],
            )
        ],
        title="θ over training",
        from_zero=True,
    )
    about = (
        "Measured at each evaluation on one fixed batch of training images. Distances are Euclidean, between "
        "embeddings as the loss sees them. A hard negative lies near its anchor."
    )
    return f'<p class="note">{about}</p><div class="charts">{distances}{hardest}{nearer}{apart}{theta}{spread}</div>'


def queries(contents: Contents) -> str:
    """Grids of the best, the worst and random queries with their neighbors."""
    ranking, count = contents.ranking, contents.queries
    grids = (
        ("Best", "highest AP@R, one query a class", ranking.best(count)),
        ("Worst", "lowest AP@R, one query a class; of equal ones those nearest to a wrong image", ranking.worst(count)),
        ("Random", "one query a class", ranking.random(count, contents.seed)),
    )
    about = (
        "Each row is a query with its average precision at R (the mean of all is MAP@R), then its nearest images, "
        "nearest first, each with its cosine similarity. "
        '<span class="right"><b class="mark">✓</b></span> and a solid frame: of the query’s class. '
        '<span class="wrong"><b class="mark">✗</b></span> and a dashed frame: of another class.'
    )
    parts = [f'<p class="note">{about}</p>']
    for title, meaning, chosen in grids:
        rows = "".join(_query(contents, query) for query in chosen)
        parts.append(f'<h3>{title} <span class="note">{meaning}</span></h3><div class="queries">{rows}</div>')
    return "".join(parts)


def confused(contents: Contents) -> str:
    """Pairs of classes that are taken for one another."""
    pairs = confused_pairs(contents.ranking, PAIRS)
    if not pairs:
        return empty("Every query's nearest neighbor is of its own class.")
    names = contents.images.class_names
    cards = []
    for pair in pairs:
        query, nearest = pair.example
        pictures = _picture(contents.images, query, "query") + _picture(contents.gallery, nearest, "its nearest")
        a, b = (escape(names[label]) for label in pair.classes)
        share = f"{pair.errors} of {pair.images} images find the other class first"
        cards.append(f'<div class="pair">{pictures}<div><b>{a}</b> / <b>{b}</b><span>{share}</span></div></div>')
    about = "Pairs of classes with the most images whose nearest neighbor is of the other class, and one such image."
    return f'<p class="note">{about}</p><div class="pairs">{"".join(cards)}</div>'


def embedding_map(contents: Contents) -> str:
    """Points in the plane, colored by class; the page's script shows a point's image."""
    points, images = contents.map, contents.images
    rows = points.rows.tolist()
    labels = images.labels[points.rows]
    present = labels.unique()
    places = {int(label): place for place, label in enumerate(present)}
    ranking = contents.ranking
    lost = ~ranking.right[points.rows, 0] & (ranking.matches[points.rows] > 0)
    circles = []
    middle, scale = _fit(points.places)
    for (x, y), label, is_lost in zip(points.places.tolist(), labels.tolist(), lost.tolist(), strict=True):
        cx, cy = MAP_WIDTH / 2 + scale * (x - middle[0]), MAP_HEIGHT / 2 - scale * (y - middle[1])
        # Hues a golden angle apart, at three lightnesses that show on white and on black.
        color = f"hsl({places[label] * 137.508 % 360:.0f} 65% {(50, 40, 60)[places[label] % 3]}%)"
        circles.append(f'<circle{" class=lost" if is_lost else ""} cx="{cx:.1f}" cy="{cy:.1f}" r="5" fill="{color}"/>')
    picture, side = sprite(images, rows)
    known = {
        "side": side,
        "columns": SPRITE_COLUMNS,
        "labels": [places[label] for label in labels.tolist()],
        "classes": [images.class_names[int(label)] for label in present],
        "names": [images.name(row) if isinstance(images, ImageFiles) else f"image {row}" for row in rows],
    }
    # In a script element only "<" could end it or open a comment.
    data = json.dumps(known, separators=(",", ":")).replace("<", "\\u003c")
    axes = (
        "UMAP"
        if points.method == "umap"
        else f"PCA; the two components hold {100 * points.explained:.0f} % of the variance"
    )
    about = (
        f"{len(rows):,} of {len(images):,} test images: all of {len(present):,} random classes, a color each. {axes}. "
        "A rim says that the nearest neighbor is of another class. Point at an image, or use the arrow keys, to see it "
        "and its class."
    )
    label = f"Map of {len(rows)} images of {len(present)} classes"
    return (
        f'<p class="note">{about}</p><div class="map"><svg viewBox="0 0 {MAP_WIDTH} {MAP_HEIGHT}" tabindex="0" '
        f'role="img" aria-label="{label}">{"".join(circles)}</svg><div id="tip" role="status" hidden>'
        f'<div id="thumb" style="background-image:url({picture})"></div><div id="tip-name"></div>'
        f'<div id="tip-note"></div></div></div><script type="application/json" id="map-data">{data}</script>'
    )


def _fit(places: Tensor) -> tuple[tuple[float, float], float]:
    """The middle of the points (p, 2), and the scale, one for both axes, by which they fill the map."""
    low, high = places.amin(dim=0), places.amax(dim=0)
    room = torch.tensor([MAP_WIDTH, MAP_HEIGHT]) - 2 * MAP_MARGIN
    x, y = ((low + high) / 2).tolist()
    return (x, y), float((room / (high - low).clamp_min(1e-12)).min())


def _query(contents: Contents, query: int) -> str:
    ranking = contents.ranking
    neighbors = ranking.neighbors[query, :NEIGHBORS].tolist()
    right, similarities = ranking.right[query].tolist(), ranking.similarities[query].tolist()
    precision = f'<span class="score">AP@R {100 * float(ranking.precision[query]):.0f} %</span>'
    head = f'<div class="item">{_item(contents.images, query)}{precision}</div>'
    items = []
    for item, is_right, similarity in zip(neighbors, right, similarities, strict=False):
        mark = f'<span class="mark">{"✓" if is_right else "✗"}</span> <span class="score">{similarity:.3f}</span>'
        kind = "right" if is_right else "wrong"
        items.append(f'<li class="item {kind}">{_item(contents.gallery, item)}{mark}</li>')
    return f'<div class="query">{head}<ol class="found">{"".join(items)}</ol></div>'


def _item(images: LabeledImages, index: int) -> str:
    name = escape(images.class_names[int(images.labels[index])])
    return f'{_picture(images, index)}<span class="name" title="{escape(images.name(index))}">{name}</span>'


def _picture(images: LabeledImages, index: int, role: str = "") -> str:
    uri = data_uri(images, index)
    text = f"{role}: {images.name(index)}" if role else images.name(index)
    small = getattr(images, "images", None)
    pixels = ' class="pixels"' if small is not None and small.shape[-1] < 64 else ""
    return f'<img{pixels} src="{uri}" alt="{escape(text)}">'


def _per_cent(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    return [(step, 100 * value) for step, value in points]


def _symbol(name: str) -> str:
    """J_syn as markup."""
    symbol, _, index = name.partition("_")
    return f"<i>{symbol}</i><sub>{index}</sub>" if index else name.capitalize()
