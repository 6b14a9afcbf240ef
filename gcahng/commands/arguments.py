"""argparse with the command line's manners: a mistake is a `UserError`, one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from gcahng.errors import UserError

# The options of `gcahng.train.DataConfig` that say which images are looked at and how they are read.
_DATA_OPTIONS: dict[str, tuple[type, str, str]] = {
    "name": (str, "SET", "another data set than the model's: glyphs, cub200, cars196, sop, inshop, folder, csv"),
    "root": (str, "DIR", "folder of its files"),
    "csv": (str, "FILE", "its file of path, label and split"),
    "train_classes": (int, "N", "classes that train (glyphs)"),
    "val_classes": (int, "N", "classes that are set aside"),
    "resize": (int, "PIXELS", "the shorter side of image files is scaled to this (the model's)"),
    "image_size": (int, "PIXELS", "side of the square cut from the middle (the model's)"),
    "workers": (int, "N", "processes that read image files (one less than there are cores, at most 8)"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations that raises `UserError` instead of printing its usage."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def add_data_options(self) -> None:
        """--data.NAME options that override those of a model's run; `data_options` collects them."""
        group = self.add_argument_group("data")
        for name, (kind, metavar, meaning) in _DATA_OPTIONS.items():
            group.add_argument(f"--data.{name}", type=kind, metavar=metavar, help=meaning)


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """The --data options that were given, by their names in `DataConfig`."""
    values = {name: getattr(options, f"data.{name}") for name in _DATA_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}
