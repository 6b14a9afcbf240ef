"""What `gcahng embed`, `index` and `search` share: a model, the images that are named, and how they are embedded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gcahng.commands.arguments import Parser, data_options
from gcahng.commands.progress_bar import progress_bar
from gcahng.errors import UserError

if TYPE_CHECKING:
    from gcahng.data import LabeledImages, Preprocessing
    from gcahng.models.model_file import Model
    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.items import EmbeddingModel, Items


def add_image_options(parser: Parser) -> None:
    """Options of how images are named and embedded."""
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_argument(
        "--split", choices=("test", "train", "val", "gallery"), default="test", help="of the data set (test)"
    )
    parser.add_argument(
        "--labels_from_folders", action="store_true", help="the folder that an image file lies in is its class"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_data_options()


def add_stream_options(parser: Parser) -> None:
    """Options of embedding many images into a file."""
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out files that cannot be read, list them")
    parser.add_argument("--batch_size", type=int, default=256, metavar="N", help="images at once (256)")


def load_images(
    options: argparse.Namespace, model: Model, sources: list[Path], like: EmbeddingModel | None = None
) -> tuple[LabeledImages, Items, Preprocessing]:
    """The images of files that `sources` name, or else of the data set's split, and how the network wants them.

    Args:
        options: of the command line.
        model: the network, whose data options hold where none are given.
        sources: image files, folders and lists; empty: the data set's split.
        like: what the embeddings will be compared with: images are resized as for it where no option says otherwise.
    """
    from gcahng.data import Preprocessing
    from gcahng.evaluation.image_inputs import dataset_images, files_images, with_data

    given = data_options(options)
    if like is not None:
        given = {"resize": like.resize, "image_size": like.crop} | given
    config = with_data(model.config.data, given)
    preprocessing = Preprocessing(config.resize, config.image_size)
    if not sources:
        return *dataset_images(config, options.split), preprocessing
    if "name" in given:
        raise UserError(f"--data.name is {given['name']} and {sources[0]} is given too; embed one of them at a time")
    return *files_images(sources, labels_from_folders=options.labels_from_folders), preprocessing


def embed_sources(
    options: argparse.Namespace,
    model: Model,
    sources: list[Path],
    out: Path,
    like: EmbeddingModel | None = None,
    check: Callable[[Items], None] = lambda items: None,
) -> EmbeddingSet:
    """Embed what `sources` name into the file `out`, with a bar; tell what was left out and what was there already.

    Args:
        options, model, sources, like: as for `load_images`.
        out: the file.
        check: may refuse the images before they are embedded.
    """
    from gcahng.evaluation.embed import EmbedOptions, embed_to_file

    images, items, preprocessing = load_images(options, model, sources, like)
    check(items)
    workers = data_options(options).get("workers")
    how = EmbedOptions(options.device, options.batch_size, workers, options.skip_unreadable)
    with progress_bar("embedding") as bar:
        result = embed_to_file(model, images, items, out, preprocessing=preprocessing, options=how, progress=bar)
    if result.resumed:
        print(f"{result.resumed} rows were there already", file=sys.stderr)
    for name in result.skipped:
        print(f"left out, cannot be read: {name}", file=sys.stderr)
    return result.embeddings


def is_embeddings(path: Path) -> bool:
    """Whether `path` is named like a file of embeddings."""
    from gcahng.retrieval.embeddings import SUFFIXES

    return path.suffix in SUFFIXES
