"""argparse as the command line uses it: a mistake is a `UserError` of one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from gcahng.errors import UserError

# The fields of `gcahng.train.DataConfig` that say which images are used and how they are read.
_DATA_OPTIONS: dict[str, tuple[type, str, str]] = {
    "name": (str, "SET", "the data set, if not the model's: glyphs, cub200, cars196, sop, inshop, folder or csv"),
    "root": (str, "DIR", "folder of the data set's files"),
    "csv": (str, "FILE", "file of path, label and split (csv)"),
    "train_classes": (int, "N", "number of classes that train (glyphs)"),
    "val_classes": (int, "N", "number of training classes that are set aside for validation"),
    "resize": (int, "PIXELS", "length that the shorter side of image files is scaled to (the model's)"),
    "image_size": (int, "PIXELS", "side of the square that is cut from the middle (the model's)"),
    "workers": (int, "N", "processes that read image files (one less than there are cores, but at most 8)"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations, and raises `UserError` instead of printing its usage."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def add_data_options(self) -> None:
        """Add the options --data.NAME, which replace those of a model's run; `data_options` collects them."""
        group = self.add_argument_group("data")
        for name, (kind, metavar, meaning) in _DATA_OPTIONS.items():
            group.add_argument(f"--data.{name}", type=kind, metavar=metavar, help=meaning)


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """The --data options that were given, by field of `DataConfig`."""
    values = {name: getattr(options, f"data.{name}") for name in _DATA_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}
