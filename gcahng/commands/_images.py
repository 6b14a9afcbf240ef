"""What `gcahng embed`, `index` and `search` share: a model, the images that are named, and how they are embedded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gcahng.commands._arguments import Parser, data_options
from gcahng.commands._progress import progress

if TYPE_CHECKING:
    from gcahng.data import LabeledImages, Preprocessing
    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.items import Items
    from gcahng.train.models import Model


def add_image_options(parser: Parser) -> None:
    """Options of how images are named, read and embedded."""
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_argument(
        "--split", choices=("test", "train", "val", "gallery"), default="test", help="of the data set (test)"
    )
    parser.add_argument(
        "--labels_from_folders", action="store_true", help="the folder that an image file lies in is its class"
    )
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out files that cannot be read, list them")
    parser.add_argument("--batch_size", type=int, default=256, metavar="N", help="images at once (256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_data_options()


def load_images(
    options: argparse.Namespace, model: Model, sources: list[Path]
) -> tuple[LabeledImages, Items, Preprocessing]:
    """The images of files that `sources` name, or else of the data set's split, and how the network wants them."""
    from gcahng.data import Preprocessing
    from gcahng.errors import UserError
    from gcahng.train.sources import dataset_images, files_images, with_data

    config = with_data(model.config.data, data_options(options))
    preprocessing = Preprocessing(config.resize, config.image_size)
    if not sources:
        return *dataset_images(config, options.split), preprocessing
    if config.name != model.config.data.name:
        raise UserError(f"--data.name is {config.name} and {sources[0]} is given too; embed one of them at a time")
    return *files_images(sources, labels_from_folders=options.labels_from_folders), preprocessing


def embed_sources(options: argparse.Namespace, model: Model, sources: list[Path], out: Path) -> EmbeddingSet:
    """Embed what `sources` name into `out`, with a bar, and tell what was left out and what was there already."""
    from gcahng.train.embedding import EmbedOptions, embed_to_file

    images, items, preprocessing = load_images(options, model, sources)
    how = EmbedOptions(
        options.device, options.batch_size, data_options(options).get("workers"), options.skip_unreadable
    )
    with progress("embedding") as bar:
        result = embed_to_file(model, images, items, out, preprocessing=preprocessing, options=how, progress=bar)
    if result.resumed:
        print(f"{result.resumed} rows were there already", file=sys.stderr)
    for name in result.skipped:
        print(f"left out, cannot be read: {name}", file=sys.stderr)
    return result.embeddings
