"""gcahng data"""

from __future__ import annotations

import argparse
from pathlib import Path

from gcahng.commands.arguments import Parser, SourceText
from gcahng.commands.progress_bar import progress_bar
from gcahng.extras import require

_SETS = ("cub200", "cars196", "sop", "inshop", "folder", "csv")


def run(arguments: list[str]) -> int:
    """Data sets that are read from files: `verify` checks one, `list` prints what each must have."""
    parser = Parser(prog="gcahng data", description=run.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{verify,list}", parser_class=Parser)
    verify = commands.add_parser("verify", help="compare files with the data set", description=_verify.__doc__)
    verify.add_argument("name", choices=_SETS, metavar="NAME", help=", ".join(_SETS))
    verify.add_argument(
        "--root", action=SourceText, metavar="DIR", help="folder of the files (csv: the folder of the CSV file)"
    )
    verify.add_argument("--csv", action=SourceText, metavar="FILE", help="CSV file of path, label and split (csv)")
    verify.add_argument("--no-images", action="store_true", help="leave out decoding the images")
    commands.add_parser("list", help="splits, images and classes of each", description=_list.__doc__)
    options = parser.parse_args(arguments)
    return {"verify": _verify, "list": _list}[options.command](options)


def _verify(options: argparse.Namespace) -> int:
    """Check label files, paths, counts and classes, decode every image, list all differences, and write an index.

    The exit status is 0 without a difference and 1 with differences.
    """
    require("rich", "PIL", extra="train", purpose="images are decoded, with a progress bar")
    from gcahng.data.verify import describe, verify_data

    with progress_bar("decoding images") as progress:
        result = verify_data(options.name, options.root, options.csv, images=not options.no_images, progress=progress)
    print(describe(result, Path(options.root) if options.root else Path(options.csv).parent))
    return 1 if result.differences else 0


def _list(options: argparse.Namespace) -> int:
    """Print the splits of each data set, how many images and classes they must have, and the K of its Recall@K."""
    from gcahng.data.verify import table

    print(table())
    return 0
