"""argparse as the command line uses it: a mistake is a `UserError` of one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gcahng.bounds import BOUNDS, check_device, check_number
from gcahng.errors import UserError
from gcahng.paths import check_source, check_target


class SourcePath(argparse.Action):
    """Stores the path of a file or a folder to read, or several, after checking it."""

    check = staticmethod(check_source)
    kind: type[Path | str] = Path

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        name = str((*self.option_strings, self.metavar)[0])
        if name.startswith("--data."):  # a run's option, which gcahng train and Python write without dashes
            name = name.removeprefix("--")
        if values is not self.const:  # what stands for an option without a path, or for no positional argument
            for text in values if isinstance(values, list) else [values]:
                self.check(name, text)
            values = [*map(self.kind, values)] if isinstance(values, list) else self.kind(values)
        setattr(namespace, self.dest, values)


class SourceText(SourcePath):
    """As `SourcePath`, where a path is passed on as text."""

    kind = str


class TargetPath(SourcePath):
    """Stores the path of a file to write, after checking it."""

    check = staticmethod(check_target)


def truth(text: str) -> bool:
    """The type of an option that is true or false."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


# The fields of `gcahng.train.DataConfig` that say which images are used and how they are read.
_DATA_OPTIONS: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "name": (str, "SET", "the data set, if not the model's: glyphs, cub200, cars196, sop, inshop, folder or csv"),
    "root": (Path, "DIR", "folder of the data set's files"),
    "csv": (Path, "FILE", "file of path, label and split (csv)"),
    "train_classes": (int, "N", "number of classes that train (glyphs)"),
    "val_classes": (int, "N", "number of training classes that are set aside for validation"),
    "merge_lookalikes": (truth, "TRUE|FALSE", "characters that a face draws alike are one class (glyphs; the model's)"),
    "exif_rotate": (
        truth,
        "TRUE|FALSE",
        "rotate image files as their EXIF orientation says (the model's; true for files that are named here)",
    ),
    "resize": (int, "PIXELS", "length that the shorter side of image files is scaled to (the model's)"),
    "image_size": (int, "PIXELS", "side of the square that is cut from the middle (the model's)"),
    "workers": (int, "N", "processes that read image files (one less than there are cores, but at most 8)"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations, and raises `UserError` instead of printing its usage.

    `--help` lists the options that matter first, and `--help-all` those that `leave_to_help_all` names as well.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]
        self._later: list[tuple[argparse.Action, str | None]] = []
        self._groups_left: list[str] = []
        self._help_all = self.add_argument(
            "--help-all", action=_HelpAll, nargs=0, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
        )

    def leave_to_help_all(self, group: Any) -> None:
        """Leave the options of a group, all of which have been added, out of `--help`."""
        for action in group._group_actions:
            self._later.append((action, action.help))
            action.help = argparse.SUPPRESS
        self._groups_left.append(group.title)
        self._help_all.help = f"show all options, those of these groups too: {', '.join(self._groups_left)}"

    def show_all(self) -> None:
        """Let `--help` list every option."""
        for action, text in self._later:
            action.help = text
        self._help_all.help = argparse.SUPPRESS

    def add_number(self, option: str, help: str, *, key: str | None = None, group: Any = None, **how: Any) -> None:
        """Add an option that takes a number, or several, which must be in their range in `gcahng.bounds`.

        Args:
            option: the option, such as --data.workers.
            help: what it means.
            key: finds the range, where it is not the option's name.
            group: of the options of this parser; None: none.
            how: as for `add_argument`.
        """
        key = key or option.removeprefix("--").rpartition(".")[2].replace("-", "_")
        kind = int if BOUNDS[key].whole else float
        number = type("Number", (_Number,), {"key": key})
        (group or self).add_argument(option, type=kind, action=number, help=help, **how)

    def add_device(self, default: str | None = "auto", meaning: str = "auto") -> None:
        """Add the option --device.

        Args:
            default: its value where it is not given.
            meaning: the default in words.
        """
        self.add_argument("--device", action=_Device, default=default, help=f"auto, cpu, cuda or cuda:N ({meaning})")

    def add_timeout(self) -> None:
        """Add the option --timeout."""
        self.add_number(
            "--timeout", "seconds that several processes wait for one of them (600)", default=600.0, metavar="S"
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def add_data_options(self) -> None:
        """Add the options --data.NAME, which replace those of a model's run; `data_options` collects them."""
        group = self.add_argument_group("data")
        for name, (kind, metavar, meaning) in _DATA_OPTIONS.items():
            if kind is int:
                self.add_number(f"--data.{name}", meaning, group=group, metavar=metavar)
            else:
                how: dict[str, Any] = {"action": SourceText} if kind is Path else {"type": kind}
                group.add_argument(f"--data.{name}", metavar=metavar, help=meaning, **how)
        self.leave_to_help_all(group)


class _HelpAll(argparse.Action):
    """Prints the help with all options, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.show_all()
        parser.print_help()
        parser.exit()


class _Number(argparse.Action):
    """Stores a number, or several, after checking them.

    Attributes:
        key: finds their range in `gcahng.bounds`.
    """

    key: str

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        # The name of a run's option, which gcahng train and Python write without dashes.
        name = self.option_strings[0].removeprefix("--")
        for value in values if isinstance(values, Sequence) else (values,):
            check_number(name, value, key=self.key)
        setattr(namespace, self.dest, values)


class _Device(argparse.Action):
    """Stores the name of a device after checking it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        check_device(values)
        setattr(namespace, self.dest, values)


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """The --data options that were given, by field of `DataConfig`."""
    values = {name: getattr(options, f"data.{name}") for name in _DATA_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}
