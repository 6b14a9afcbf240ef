"""The report's page: head, summary and foot around the sections. It is one file and names no other address."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import gcahng
from gcahng.config import config_to_dict
from gcahng.report import sections
from gcahng.report.contents import Contents, Run
from gcahng.runs.metrics_table import metric_title


def page(contents: Contents) -> str:
    """The whole page as HTML."""
    parts = {
        "results": ("Results", _results(contents)),
        "curves": ("Training curves", sections.curves(contents)),
        "negatives": ("Generated negatives", sections.negatives(contents.run)),
        "queries": ("Queries", sections.queries(contents)),
        "confused": ("Confused classes", sections.confused(contents)),
        "map": ("Map of the embedding", sections.embedding_map(contents)),
        "options": ("Options", _options(contents)),
    }
    config = contents.model.config
    title = f"{config.loss_title} on {config.data.name}"
    path = f"{escape(str(contents.model.path))}{_trained(contents)}"
    return html_page(contents.run.name, title, path, parts)


def html_page(name: str, title: str, path: str, parts: Mapping[str, tuple[str, str]]) -> str:
    """A whole page around parts, in the report's style. It needs no other file, and may load none.

    Args:
        name: the first part of what the browser calls the page.
        title: the page's heading.
        path: the line below it, as markup.
        parts: the heading of each part and its markup, by the anchor that leads to it.
    """
    links = "".join(f'<a href="#{anchor}">{heading}</a>' for anchor, (heading, _) in parts.items())
    body = "".join(
        f'<section id="{anchor}"><h2>{heading}</h2>{part}</section>' for anchor, (heading, part) in parts.items()
    )
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only this script runs and nothing is loaded, whatever a class or a file is called.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(name)}: {escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><div>
<h1>{escape(title)}</h1>
<div class="path">{path}</div>
<nav aria-label="Parts of this page">{links}</nav>
</div></header>
<main>
{body}
<footer>Written by gcahng {escape(gcahng.__version__)}. The page needs no other file.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _resource(name: str) -> str:
    return (files("gcahng.report") / name).read_text(encoding="utf-8")


def _trained(contents: Contents) -> str:
    config, step = contents.model.config, contents.run.step
    backbone = f"{config.backbone.name}, D = {config.backbone.embedding_dim}"
    return f" · {escape(backbone)}" + (f" · after {step:,} steps" if step is not None else "")


def _results(contents: Contents) -> str:
    metrics = contents.run.metrics
    shown = [name for name in ("recall@1", "map@r", "r_precision") if name in metrics]
    cards = "".join(f"<div><b>{100 * metrics[name]:.2f} %</b><span>{metric_title(name)}</span></div>" for name in shown)
    cards += f"<div><b>{metrics['queries']:,}</b><span>queries, {contents.images.num_classes:,} classes</span></div>"
    notes = [
        f"Test classes, which training never saw; {len(contents.gallery):,} images are searched by cosine similarity."
    ]
    if metrics["queries_without_match"]:
        notes.append(f"Queries with nothing right to find, left out: {metrics['queries_without_match']:,}.")
    if not contents.same_data:
        notes.append("These images differ from those of the training run.")
    comparison = _comparison([contents.run, *contents.baselines])
    none = "" if contents.baselines else sections.empty("No baseline runs: name some with --baseline RUN.")
    return f'<p class="note">{" ".join(notes)}</p><div class="cards">{cards}</div>{comparison}{none}'


def _comparison(runs: Sequence[Run]) -> str:
    """All runs' metrics in percent: a table with the best of each column bold, and a chart of Recall@K."""
    names = [name for name in runs[0].metrics if name not in ("queries", "queries_without_match")]
    top = {name: max(run.metrics.get(name, -1.0) for run in runs) for name in names}
    rows = []
    for run in runs:
        cells = []
        for name in names:
            value = run.metrics.get(name)
            best = ' class="top"' if value is not None and value == top[name] and len(runs) > 1 else ""
            cells.append(f"<td{best}>{'–' if value is None else f'{100 * value:.2f}'}</td>")
        about = run.loss + ("" if run.step is None else f", {run.step:,} steps")
        if None not in (run.digest, runs[0].digest) and run.digest != runs[0].digest:
            about += "; trained on other data, so the numbers may not compare"
        rows.append(
            f'<tr><th>{escape(run.name)}<br><span class="note">{escape(about)}</span></th>{"".join(cells)}</tr>'
        )
    head = "".join(f"<th>{metric_title(name)}</th>" for name in names)
    table = f"<table><thead><tr><th>percent</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    table = f'<div class="scroll" tabindex="0">{table}</div>'
    return f'<h3>Recall@K against baseline runs</h3><div class="two">{table}{sections.recall_chart(runs)}</div>'


def _options(contents: Contents) -> str:
    import yaml

    options = yaml.safe_dump(config_to_dict(contents.model.config), sort_keys=False)
    return f"<details><summary>All options of the run</summary><pre>{escape(options)}</pre></details>"
