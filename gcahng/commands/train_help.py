"""What gcahng train --help prints: the options that matter first, a group of options, or all."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gcahng.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# --resume has a parser of its own, and stands here for its help.
FIRST = (
    "config",
    "resume",
    "loss",
    "gca.base",
    "steps",
    "data.name",
    "data.root",
    "backbone.name",
    "device",
    "out",
)
GROUPS = ("run", "data", "backbone", "gca", "optimizer")
_NOT_OPTIONS = ("help", "config", "print_config", "resume")


def asked_for(arguments: Sequence[str]) -> str | None:
    """What help arguments ask for: "first", "all" or one of `GROUPS`; None: none.

    Raises:
        UserError: what follows --help is no group.
    """
    for place, argument in enumerate(arguments):
        name, is_joined, group = argument.partition("=")
        if argument == "--help-all":
            return "all"
        if name in ("-h", "--help"):
            if not is_joined:
                group = next(iter(arguments[place + 1 :]), "-")
            if group.startswith("-"):
                return "first"
            if group not in GROUPS:
                raise UserError(f"--help is {group!r}; it must be {', '.join(GROUPS)}, or stand alone")
            return group
    return None


def help_text(parser: ArgumentParser, what: str) -> str:
    """The help of gcahng train. The parser can be used for nothing else afterwards.

    Args:
        parser: with all options but --resume.
        what: as `asked_for` returns it.
    """
    parser.usage = "gcahng train [--config FILE] [--OPTION VALUE ...]\n       gcahng train --resume RUN"
    parser.epilog = (
        f"--help GROUP lists all options of a group, which is {', '.join(GROUPS[:-1])} or {GROUPS[-1]}; --help-all "
        "lists those of all groups, and --resume RUN --help what may change when a run goes on."
    )
    text = "a run folder, whose run stopped before its end and goes on"
    parser.add_argument("--resume", metavar="RUN", default=SUPPRESS, help=text)
    for action in parser._actions:
        if not _is_listed(action.dest, what):
            action.help = SUPPRESS
    return parser.format_help()


def _is_listed(name: str, what: str) -> bool:
    """Whether the help that was asked for lists an option."""
    if what == "all":
        return True
    if what == "first":
        return name in FIRST
    group, dot, _ = name.partition(".")
    if what == "run":
        return not dot and name not in (*_NOT_OPTIONS, *GROUPS)
    return bool(dot) and group == what
