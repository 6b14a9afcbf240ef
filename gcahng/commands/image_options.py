"""What `gcahng embed`, `index` and `search` share: options that name images, and how these are embedded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gcahng.commands.arguments import Parser, data_options
from gcahng.commands.progress_bar import progress_bar
from gcahng.errors import UserError
from gcahng.launch import launched

if TYPE_CHECKING:
    from gcahng.data import LabeledImages, Preprocessing
    from gcahng.models.model_file import Model
    from gcahng.retrieval.embeddings import EmbeddingSet
    from gcahng.retrieval.items import EmbeddingModel, Items


def add_image_options(parser: Parser) -> None:
    """Add the options that say which images are embedded, and how."""
    parser.add_argument("--which", choices=("last", "best"), default="last", help="checkpoint of a run folder (last)")
    parser.add_argument(
        "--split", choices=("test", "train", "val", "gallery"), default="test", help="split of the data set (test)"
    )
    parser.add_argument(
        "--labels_from_folders", action="store_true", help="take the name of an image file's folder as its class"
    )
    parser.add_device()
    parser.add_data_options()


def add_stream_options(parser: Parser) -> None:
    """Add the options of embedding many images into a file."""
    parser.add_argument("--skip_unreadable", action="store_true", help="leave out and list files that cannot be read")
    parser.add_number("--batch_size", "images that are embedded at once (256)", default=256, metavar="N")
    parser.add_timeout()


def load_images(
    options: argparse.Namespace, model: Model, sources: list[Path], like: EmbeddingModel | None = None
) -> tuple[LabeledImages, Items, Preprocessing]:
    """The images that the command line names.

    Args:
        options: of the command line.
        model: the network; its data options hold where the command line has none.
        sources: image files, folders and lists; empty: the split of the data set.
        like: the model of embeddings that these will be compared with; images are rotated and resized as for it where
            no option says otherwise.

    Returns:
        The images, what they are, and how image files are prepared.

    Raises:
        UserError: a source is not there, or a data set is named beside sources.
    """
    from gcahng.data import Preprocessing
    from gcahng.evaluation.image_inputs import dataset_images, files_images, rotates_files, with_data

    given = data_options(options)
    if like is not None:
        rotation = {} if like.exif_rotate is None else {"exif_rotate": like.exif_rotate}
        given = {"resize": like.resize, "image_size": like.crop} | rotation | given
    config = with_data(model.config.data, given)
    preprocessing = Preprocessing(config.resize, config.image_size)
    if not sources:
        return *dataset_images(config, options.split), preprocessing
    if "name" in given:
        raise UserError(f"--data.name is {given['name']} and {sources[0]} is given too; embed one of them at a time")
    images, items = files_images(
        sources,
        labels_from_folders=options.labels_from_folders,
        exif_rotate=rotates_files(model.config.data, given.get("exif_rotate")),
        skip_unreadable=getattr(options, "skip_unreadable", False),
    )
    return images, items, preprocessing


def embed_sources(
    options: argparse.Namespace,
    model: Model,
    sources: list[Path],
    out: Path,
    like: EmbeddingModel | None = None,
    check: Callable[[Items], None] = lambda items: None,
    normalize: bool = False,
) -> EmbeddingSet:
    """Embed the images that the command line names into a file, with a progress bar.

    Args:
        options, model, sources, like: as for `load_images`.
        out: the file.
        check: called with what the images are before they are embedded; it may refuse them.
        normalize: whether the embeddings are scaled to norm 1; they are, too, where those of `like` are.
    """
    from gcahng.devices import resolve_device
    from gcahng.evaluation.embed import EmbedOptions, embed_to_file

    resolve_device(options.device)  # before images are listed or drawn, which takes a while
    images, items, preprocessing = load_images(options, model, sources, like)
    check(items)
    workers = data_options(options).get("workers")
    normalize = normalize or (like is not None and like.normalized)
    how = EmbedOptions(options.device, options.batch_size, workers, options.skip_unreadable, normalize, options.timeout)
    with progress_bar("embedding") as bar:
        result = embed_to_file(model, images, items, out, preprocessing=preprocessing, options=how, progress=bar)
    if launched().rank:  # the first process prints for all
        return result.embeddings
    if result.resumed:
        print(f"{result.resumed} rows were there already", file=sys.stderr)
    for name in result.skipped:
        print(f"left out, cannot be read: {name}", file=sys.stderr)
    return result.embeddings


def is_embeddings(path: Path) -> bool:
    """Whether a path has the suffix of a file of embeddings."""
    from gcahng.retrieval.embeddings import SUFFIXES

    return path.suffix in SUFFIXES
