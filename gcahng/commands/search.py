"""gcahng search"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gcahng.commands.arguments import Parser, SourcePath, TargetPath, data_options
from gcahng.commands.image_options import add_image_options, is_embeddings, load_images
from gcahng.commands.progress_bar import progress_bar
from gcahng.errors import UserError

if TYPE_CHECKING:
    from gcahng.evaluation.search_plot import Hit
    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.index_file import IndexFile


def run(arguments: list[str]) -> int:
    """Print the nearest images of every query in an index."""
    parser = Parser(prog="gcahng search", description=run.__doc__)
    parser.add_argument("index", action=SourcePath, metavar="INDEX", help="an index that gcahng index build wrote")
    parser.add_argument(
        "queries",
        action=SourcePath,
        nargs="*",
        metavar="QUERY",
        help="images, folders and lists, or one file of embeddings or vectors (.safetensors, .npy, .parquet); or "
        "nothing, which is a split of --data.name",
    )
    parser.add_number("--k", "number of images for each query (10)", default=10, metavar="K")
    parser.add_number("--rows", "search only these queries, counted from 0", nargs="+", metavar="I")
    parser.add_number("--effort", "cells (ivf_flat, ivf_pq) or nodes (hnsw) that are compared (as built)", metavar="N")
    parser.add_argument(
        "--leave_out_same", action="store_true", help="leave out the query's own image where the index has it"
    )
    parser.add_argument(
        "--model", action=SourcePath, metavar="MODEL", help="network that embeds the queries (the index's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--picture", action=TargetPath, metavar="FILE.png", help="draw the queries and their nearest images"
    )
    add_image_options(parser)
    options = parser.parse_intermixed_args(arguments)

    from gcahng.devices import resolve_device
    from gcahng.retrieval.index_file import load

    if options.picture is not None and options.picture.suffix != ".png":
        raise UserError(f"--picture is {options.picture}; its name must end in .png")
    with progress_bar("checking", unit="bytes") as bar:
        contents = load(options.index, device=resolve_device(options.device), progress=bar)
    queries = _queries(options, contents)
    what = " ".join(map(str, options.queries)) or "the data set"
    with progress_bar("searching") as bar:
        result = contents.search(
            what,
            queries,
            options.k,
            effort=options.effort,
            leave_out_same=options.leave_out_same,
            progress=bar,
        )
    hits = _hits(contents, queries, result.indices.tolist(), result.values.tolist())
    if options.picture is not None:
        from gcahng.evaluation.search_plot import Pictures, plot_search

        pictures = Pictures(contents.model is not None and bool(contents.model.exif_rotate))
        plot_search(queries.items, contents.items, hits, contents.index.metric, options.picture, pictures)
    print(_as_json(contents, queries, hits) if options.json else _as_table(contents, queries, hits))
    if options.picture is not None and not options.json:
        print(f"\nwritten     {options.picture}")
    return 0


def _queries(options: argparse.Namespace, contents: IndexFile) -> EmbeddingSet:
    """The embeddings of the queries, which are read from a file or computed."""
    from gcahng.retrieval.embeddings import read_embeddings

    if any(map(is_embeddings, options.queries)):
        if len(options.queries) > 1:
            raise UserError(f"{len(options.queries)} queries are given; a file of embeddings must be the only one")
        queries = read_embeddings(options.queries[0])
        rows = _rows(options, len(queries))
        return replace(queries, embeddings=queries.embeddings[rows], items=queries.items.subset(rows))
    if not options.queries and "name" not in data_options(options):
        raise UserError("no queries are given; name images, a file of embeddings, or a data set with --data.name")
    return _embedded(options, contents)


def _embedded(options: argparse.Namespace, contents: IndexFile) -> EmbeddingSet:
    import torch

    from gcahng.data import usual_workers
    from gcahng.devices import resolve_device
    from gcahng.evaluation.embed import embed, embedding_model, normalized
    from gcahng.models.model_file import load_model
    from gcahng.retrieval.embeddings import EmbeddingSet

    where = options.model
    if where is None:
        if contents.model is None or not os.path.exists(contents.model.path):  # which fails for no path
            known = "it does not say which" if contents.model is None else f"{contents.model.path} is not there"
            raise UserError(f"the queries need the network of the index, and {known}; give --model")
        where = Path(contents.model.path)
    model = load_model(where, options.which)
    images, items, preprocessing = load_images(options, model, options.queries, contents.model)
    rows = _rows(options, len(images))
    images, items = images.subset(torch.tensor(rows)), items.subset(rows)
    normalize = contents.model is not None and contents.model.normalized
    identity = embedding_model(model, preprocessing, images, normalize)
    device = resolve_device(options.device)
    # Starting processes takes longer than reading a few images.
    workers = usual_workers(data_options(options).get("workers")) if len(images) > 64 else 0
    # A network that does not fit is refused before it embeds anything.
    contents.check(str(where), EmbeddingSet(torch.empty(0, contents.index.dim), items.subset([]), identity))
    with progress_bar("embedding") as bar:
        embeddings = embed(model.network.to(device), images, device, preprocessing, workers, bar)
    return EmbeddingSet((normalized(embeddings) if normalize else embeddings).cpu(), items, identity)


def _rows(options: argparse.Namespace, count: int) -> list[int]:
    if options.rows is None:
        return list(range(count))
    for row in options.rows:
        if not 0 <= row < count:
            raise UserError(f"--rows has {row}; it must be from 0 to {count - 1}, the rows of the queries")
    return options.rows


def _hits(
    contents: IndexFile, queries: EmbeddingSet, indices: list[list[int]], values: list[list[float]]
) -> list[list[Hit]]:
    from gcahng.evaluation.search_plot import Hit

    def right(query: int, row: int) -> bool | None:
        wanted, given = queries.items.class_name(query), contents.items.class_name(row)
        return None if wanted is None or given is None else wanted == given

    return [
        [Hit(row, value, right(query, row)) for row, value in zip(*nearest, strict=True) if row >= 0]
        for query, nearest in enumerate(zip(indices, values, strict=True))
    ]


def _as_table(contents: IndexFile, queries: EmbeddingSet, hits: list[list[Hit]]) -> str:
    items = contents.items
    value = {"cosine": "similarity", "euclidean": "distance"}[contents.index.metric]
    blocks = []
    for query, nearest in enumerate(hits):
        label = queries.items.class_name(query)
        names = [items.class_name(hit.row) or "" for hit in nearest]
        width = max([len(name) for name in names] + [5])
        title = f"query {queries.items.names[query]}{f' ({label})' if label else ''}"
        lines = [title, f"{'rank':>6}{value:>12}  {'label':<{width}}  {'':<5}  name"]
        for rank, (hit, name) in enumerate(zip(nearest, names, strict=True), start=1):
            verdict = {None: "", True: "right", False: "wrong"}[hit.right]
            lines.append(f"{rank:>6}{hit.value:>12.4f}  {name:<{width}}  {verdict:<5}  {items.names[hit.row]}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _as_json(contents: IndexFile, queries: EmbeddingSet, hits: list[list[Hit]]) -> str:
    value = {"cosine": "similarity", "euclidean": "distance"}[contents.index.metric]

    def about(items: Any, row: int) -> dict[str, Any]:
        path = items.path(row)
        return {"name": items.names[row], "path": path and str(path), "label": items.class_name(row)}

    results = [
        {
            **about(queries.items, query),
            "results": [
                {"rank": rank, "row": hit.row, **about(contents.items, hit.row), value: hit.value, "right": hit.right}
                for rank, hit in enumerate(nearest, start=1)
            ],
        }
        for query, nearest in enumerate(hits)
    ]
    model = contents.model.fingerprint if contents.model else None
    return json.dumps({"metric": contents.index.metric, "model": model, "queries": results}, indent=1)
