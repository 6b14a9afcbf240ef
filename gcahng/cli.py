"""The command line, `gcahng COMMAND …`.

A command is a module of `gcahng.commands` and a line in `COMMANDS`. The module has a function
`run(arguments: list[str]) -> int`, which returns the exit status. It is imported when its
command runs, so that other commands start fast.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from gcahng.errors import UserError, UserNote
from gcahng.launch import Launch, launched
from gcahng.paths import shown_path
from gcahng.streams import print_line, standard_streams

_python_format = warnings.formatwarning

COMMANDS = {
    "train": ("gcahng.commands.train", "train an embedding network and write a run folder"),
    "eval": ("gcahng.commands.evaluate", "retrieval metrics of a run or a checkpoint"),
    "report": ("gcahng.commands.report", "one HTML page about a run, with pictures"),
    "study": ("gcahng.commands.study", "a grid of methods, data sets and seeds, and paired tests"),
    "embed": ("gcahng.commands.embed", "embeddings of images, with their paths and labels"),
    "index": ("gcahng.commands.index", "build, extend and inspect a search index of embeddings"),
    "search": ("gcahng.commands.search", "the nearest images of an index, as a table, JSON or a picture"),
    "export": ("gcahng.commands.export", "a trained network as ONNX or as a PyTorch program"),
    "data": ("gcahng.commands.data", "check the files of a data set, or list the data sets"),
    "recipes": ("gcahng.commands.recipes", "the complete options of known training runs, by name"),
    "import-official": ("gcahng.commands.import_official", "a checkpoint of the authors' code as a model of gcahng"),
    "env": ("gcahng.commands.env", "versions, native libraries and the implementations available here"),
    "bench": ("gcahng.commands.bench", "time and peak memory of a training step on this machine"),
    "plan": ("gcahng.commands.plan", "memory and arithmetic of a step by its sizes, and the largest batch that fits"),
}

# Commands of which processes that torchrun started share the work, and those that each of several may run for itself.
TOGETHER = ("train", "eval", "embed", "index")
ALONE = ("data", "recipes", "env", "plan")
# torchrun ends all processes once one has ended in an error. So the process that prints the error must end first, and
# the others wait this many seconds; torchrun on another machine may not notice.
WAIT_FOR_MESSAGE = 10.0

NEEDED = {"torch": "torch>=2.10", "numpy": "numpy"}

# Of the messages of PyTorch, of CUDA and of the C++ library.
_NO_MEMORY = r"can't allocate memory|not enough memory|out of memory|bad_alloc|Storage size calculation overflowed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command and its options; None: those of the process.

    Returns:
        The exit status: the command's; 2 for a user's mistake, for a file that cannot be read or written, and for
        output that cannot be printed; 130 for Ctrl-C; 141 for `gcahng … | head`, whose reader has gone.
    """
    formatting, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        with standard_streams() as streams:
            try:
                status = _run_or_explain(list(sys.argv[1:] if arguments is None else arguments))
            except SystemExit as end:  # argparse after --help
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            return streams.status(status)
    finally:
        warnings.formatwarning = formatting


def _run_or_explain(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except UserError as error:
        print_line(f"error: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        print_line(str(interrupt) or "interrupted")
        return getattr(interrupt, "exit_code", 130)
    except (MemoryError, RuntimeError) as error:
        if (line := _out_of_memory(error)) is None:
            raise
        print_line(f"error: {_where(error)}{line}")
        return 2
    except OSError as error:  # of the file system or the machine, and so no mistake in the code
        if error.strerror is None or isinstance(error, ConnectionError):
            raise
        named = isinstance(error.filename, str | bytes)
        what = f"{shown_path(os.fsdecode(error.filename))} cannot be used: " if named else ""
        print_line(f"error: {_where(error)}{what}{error.strerror}")
        return 2


def _where(error: Exception) -> str:
    """The process that an error is of, where it is one of several; see `UserError.where`."""
    where = getattr(error, "where", "")
    return f"{where}: " if where else ""


def _format_warning(message: Warning | str, category: type[Warning], *where: object, **more: object) -> str:
    if issubclass(category, UserNote):
        return f"gcahng: note: {' '.join(str(message).split())}\n"
    return _python_format(message, category, *where, **more)  # type: ignore[arg-type]


def _out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """A line about an allocation that failed; None if the error is another one.

    PyTorch raises a RuntimeError without a class of its own where memory of the CPU runs out.
    """
    if not isinstance(error, MemoryError) and not re.search(_NO_MEMORY, str(error)):
        return None
    import torch

    from gcahng.bounds import format_bytes
    from gcahng.engine.free_memory import free_memory

    asked = ""
    if wanted := re.search(r"llocate ([0-9.]+) ?([A-Za-z]*)", str(error)):
        amount, unit = wanted.groups()
        amount = format_bytes(int(amount)) if unit == "bytes" else f"{amount} {unit}"
        asked = f" ({amount} were asked for at once)"
    free = free_memory("cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu")
    left = "" if free is None else f"; {format_bytes(free)} are free now"
    return (
        f"memory ran out{asked}{left}; make the batch, the images or the network smaller (gcahng plan says what a "
        "step needs)"
    )


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    name, *rest = arguments
    if name == "--version":
        from gcahng import __version__

        print(f"gcahng {__version__}")
        return 0
    if name not in COMMANDS:
        meant = get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {meant[0]}?" if meant else f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"{name} is not a command{hint}")
    launch = launched() if name not in ALONE else Launch()
    try:
        if launch.count > 1:
            return _run_together(name, rest, launch)
        return import_module(COMMANDS[name][0]).run(rest)
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise UserError(f"{error.name} is not installed; pip install {NEEDED[error.name]!r} brings it") from None


def _run_together(name: str, arguments: list[str], launch: Launch) -> int:
    """Run a command in one of several processes. The one that fails tells, and the others only end.

    Raises:
        UserError: the command works in one process.
    """
    import time

    if name not in TOGETHER:
        if launch.rank == 0:
            raise UserError(
                f"gcahng {name} works in one process, and {launch.count} were started (WORLD_SIZE); start it without "
                "torchrun"
            )
        time.sleep(WAIT_FOR_MESSAGE)
        return 2
    from gcahng.processes import OtherProcessFailed, run_processes

    try:
        with run_processes():
            return import_module(COMMANDS[name][0]).run(arguments)
    except OtherProcessFailed as error:
        # After a signal torchrun waits for all processes, so they wait only until the message is printed.
        time.sleep(1 if isinstance(error.__cause__, KeyboardInterrupt) else WAIT_FOR_MESSAGE)
        return 2


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: gcahng COMMAND [options]",
            "",
            "Hard negatives generated from the complete graph of a batch, for metric learning.",
            "",
            "commands:",
            *lines,
            "",
            "gcahng COMMAND --help lists a command's options; gcahng --version prints the version.",
        ]
    )
