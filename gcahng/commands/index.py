"""gcahng index"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gcahng.commands.arguments import Parser, SourcePath, TargetPath
from gcahng.commands.image_options import add_image_options, add_stream_options, embed_sources, is_embeddings
from gcahng.commands.progress_bar import progress_bar
from gcahng.errors import UserError
from gcahng.launch import launched
from gcahng.paths import check_target

if TYPE_CHECKING:
    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.index_file import IndexFile
    from gcahng.retrieval.items import EmbeddingModel, Items

# Options of `gcahng.retrieval.index.IndexSettings`.
_SETTINGS = {
    "lists": "k-means cells of ivf_flat and ivf_pq (4 √rows, with at least 39 rows in a cell)",
    "probes": "cells that a search looks at (one in 32)",
    "code_bytes": "bytes for a row of ivf_pq, a divisor of the channels (up to a quarter of them)",
    "links": "neighbors of each node in hnsw's graph, 2 to 4096 (32)",
    "build_breadth": "nodes that hnsw compares at a time while it is built (80)",
    "search_breadth": "nodes that hnsw compares at a time in a search (128)",
    "seed": "seed of k-means and its sample (0)",
}


def run(arguments: list[str]) -> int:
    """Build a search index of embeddings, add to one, print what is in one, or export one to faiss."""
    actions = {"build": _build, "add": _add, "info": _info, "export": _export}
    if arguments and arguments[0] in actions:
        return actions[arguments[0]](arguments[1:])
    parser = Parser(
        prog="gcahng index",
        description=run.__doc__,
        epilog="gcahng index ACTION --help lists the options of an action.",
    )
    parser.add_argument("action", choices=actions, help=", ".join(actions))
    parser.parse_args(arguments)
    raise AssertionError("parse_args ends with what is no action")


def _build(arguments: list[str]) -> int:
    """Build an index of files of embeddings, or of images that a model embeds first."""
    parser = Parser(prog="gcahng index build", description=_build.__doc__)
    parser.add_argument("--out", action=TargetPath, required=True, metavar="INDEX", help="the file to write")
    parser.add_argument(
        "--kind",
        choices=("flat", "ivf_flat", "ivf_pq", "hnsw"),
        default="flat",
        help="flat compares all rows; the others compare a part of them and need faiss (flat)",
    )
    parser.add_argument(
        "--metric", choices=("cosine", "euclidean"), default="cosine", help="cosine normalizes the rows (cosine)"
    )
    settings_of_kinds = parser.add_argument_group("settings of --kind")
    for name, meaning in _SETTINGS.items():
        key = "index seed" if name == "seed" else None
        parser.add_number(f"--{name}", meaning, key=key, group=settings_of_kinds, metavar="N")
    parser.leave_to_help_all(settings_of_kinds)
    options = _parse_sources(parser, arguments)

    from gcahng.retrieval.index import IndexSettings
    from gcahng.retrieval.index_file import build

    if options.out.exists():
        raise UserError(
            f"--out is {options.out}, which exists; it must be a new file: gcahng index add extends an index"
        )
    settings = IndexSettings(**{n: getattr(options, n) for n in _SETTINGS if getattr(options, n) is not None})
    embedded, temporary = _embeddings(options, options.out)
    if embedded is None:
        return 0
    with progress_bar("indexing") as bar:
        contents = build(embedded, options.kind, options.metric, settings, bar)
    _save(options.out, contents, temporary)
    print(f"{len(contents)} rows of {contents.index.dim} channels, {options.kind}, {options.metric}")
    print(f"written     {options.out}")
    return 0


def _add(arguments: list[str]) -> int:
    """Add embeddings, or images that the index's model embeds first, to an index."""
    parser = Parser(prog="gcahng index add", description=_add.__doc__)
    parser.add_argument("index", action=SourcePath, metavar="INDEX", help="the index")
    parser.add_argument(
        "--allow_duplicates", action="store_true", help="add images that are in the index already once more"
    )
    options = _parse_sources(parser, arguments)
    check_target("INDEX", options.index)

    from gcahng.retrieval.index_file import load

    version = _version(options.index)
    with progress_bar("checking", unit="bytes") as bar:
        contents = load(options.index, to_add=True, progress=bar)
    before = len(contents)
    what = " ".join(map(str, options.sources)) or "the data set"

    def check(items: Items) -> None:
        if not options.allow_duplicates:
            contents.check_new(what, items)

    embedded, temporary = _embeddings(options, options.index, contents.model, check)
    if embedded is None:
        return 0
    check(embedded.items)
    with progress_bar("adding") as bar:
        contents = contents.add(what, embedded, allow_duplicates=True, progress=bar)
    if _version(options.index) != version:
        raise UserError(f"{options.index} was written by another process meanwhile; run this command again")
    _save(options.index, contents, temporary)
    print(f"{len(contents)} rows, {len(contents) - before} of them new")
    print(f"written     {options.index}")
    return 0


def _info(arguments: list[str]) -> int:
    """Check an index and print what is in it."""
    parser = Parser(prog="gcahng index info", description=_info.__doc__)
    parser.add_argument("index", action=SourcePath, metavar="INDEX", help="the index")
    options = parser.parse_args(arguments)
    if launched().rank:  # the first process prints for all
        return 0

    from gcahng.retrieval.index_file import read_header
    from gcahng.retrieval.items import model_from

    with progress_bar("checking", unit="bytes") as bar:
        header, items = read_header(options.index, bar)
    model = model_from(header["model"])
    print(f"kind        {header['kind']}, {header['metric']}{', rows normalized' if header['normalised'] else ''}")
    print(f"rows        {header['rows']} of {header['dim']} channels, {options.index.stat().st_size} bytes")
    print(f"labels      {f'{len(items.class_names)} classes' if items.class_names else 'none'}")
    if model is None:
        print("model       not known")
    else:
        scaled = ", embeddings normalized" if model.normalized else ""
        print(f"model       {model.backbone} {model.fingerprint[:12]}, from {model.path}{scaled}")
        rotated = "rotated by EXIF, " if model.exif_rotate else ""
        print(f"images      {rotated}resized to {model.resize}, cropped to {model.crop} pixels")
    for source in items.sources:
        place = source.root or (f"{source.data['name']}, {source.split}" if source.data else "not known")
        print(f"source      {source.rows} rows: {place}")
    return 0


def _export(arguments: list[str]) -> int:
    """Write an index as a file of faiss, which needs no gcahng, with a table of what its ids are."""
    parser = Parser(prog="gcahng index export", description=_export.__doc__)
    parser.add_argument("index", action=SourcePath, metavar="INDEX", help="the index")
    parser.add_argument("out", action=TargetPath, metavar="X.faiss", help="the file to write; its table is X.csv")
    options = parser.parse_args(arguments)
    if launched().rank:  # the first process writes and prints for all
        return 0

    from gcahng.retrieval.index_export import export_faiss

    with progress_bar("checking", unit="bytes") as bar:
        print(export_faiss(options.index, options.out, bar))
    print(f"written     {options.out} and {options.out.with_suffix('.csv')}")
    return 0


def _save(index: Path, contents: IndexFile, temporary: Path | None) -> None:
    """Write the index, and remove the file of embeddings that was made for it."""
    from gcahng.retrieval.index_file import save

    save(index, contents)
    if temporary is not None:
        temporary.unlink(missing_ok=True)


def _version(index: Path) -> tuple[int, ...] | None:
    """What changes whenever a file is written; None if there is no such file."""
    try:
        status = index.stat()
    except OSError:
        return None  # loading it says why
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _parse_sources(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    parser.add_argument(
        "sources",
        action=SourcePath,
        nargs="*",
        metavar="SOURCE",
        help="files of embeddings (.safetensors, .npy, .parquet); or with --model images, folders and lists, or "
        "nothing, which is a split of the data set",
    )
    parser.add_argument(
        "--model",
        action=SourcePath,
        metavar="MODEL",
        help="network that embeds images: a run folder, a checkpoint or a .safetensors file",
    )
    add_stream_options(parser)
    add_image_options(parser)
    return parser.parse_intermixed_args(arguments)


def _embeddings(
    options: argparse.Namespace,
    index: Path,
    like: EmbeddingModel | None = None,
    check: Callable[[Items], None] = lambda items: None,
) -> tuple[EmbeddingSet | None, Path | None]:
    """The embeddings that the command line names, in one process; None in the others of several, which only embed.

    Args:
        options: of the command line.
        index: the index that they are for.
        like, check: as for `embed_sources`.

    Returns:
        The embeddings, and the file that was made for them, which is removed once they are in the index; None where
        they come from a file of the user's.
    """
    from gcahng.models.model_file import load_model
    from gcahng.retrieval.shards import read_shards

    first = launched().rank == 0
    if options.model is None:
        if not options.sources or not all(map(is_embeddings, options.sources)):
            raise UserError(
                "name files of embeddings (.safetensors, .npy, .parquet), or images and the --model that embeds them"
            )
        return read_shards(options.sources) if first else None, None
    if options.sources and all(map(is_embeddings, options.sources)):
        raise UserError(f"--model is given and {options.sources[0]} is a file of embeddings; leave --model out")
    model = load_model(options.model, options.which)
    temporary = index.with_name(f"{index.name}.embeddings.safetensors")
    embedded = embed_sources(options, model, options.sources, temporary, like, check)
    return embedded if first else None, temporary
