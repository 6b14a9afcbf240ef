"""gcahng train"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from gcahng.bounds import shown_value
from gcahng.commands.arguments import Parser, SourcePath, SourceText, truth
from gcahng.commands.train_help import asked_for, help_text
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.machine import keep_freed_memory
from gcahng.paths import check_source

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from gcahng.config import TrainConfig


# The options that may change when a run is resumed, beside --device, and their names in gcahng.train.resume.
_RESUME_OPTIONS = {
    "--threads": ("threads", int, "threads of PyTorch on the CPU"),
    "--data.root": ("root", Path, "folder of the data set's files"),
    "--data.csv": ("csv", Path, "file of path, label and split"),
    "--data.workers": ("workers", int, "processes that read image files"),
    "--data.skip_unreadable": (
        "skip_unreadable",
        truth,
        "true: another image replaces a damaged one",
    ),
    "--timeout": ("timeout", float, "seconds that several processes wait for one of them"),
    "--skip_nonfinite": ("skip_nonfinite", int, "how many steps in a row are left out where something is not finite"),
}


def run(arguments: list[str]) -> int:
    """Train an embedding network, evaluate it on classes it never saw, and write a run folder.

    Without options it trains GCA-HNG on glyphs. Options may come from a YAML file or a recipe (--config), and later
    options override them. --resume RUN continues a run that stopped before its end.
    """
    from gcahng.processes import OtherProcessFailed, run_processes
    from gcahng.train import NonFinite, TrainingInterrupted

    keep_freed_memory()
    with run_processes() as processes:
        speaks = processes.first
        with processes.together(patient=True):
            train = _resumed(arguments, speaks) if _wants_resume(arguments) else _started(arguments)
        try:
            summary = train()
        except (NonFinite, TrainingInterrupted) as error:  # which all processes raise
            if speaks:
                raise
            cause = KeyboardInterrupt() if isinstance(error, KeyboardInterrupt) else None
            raise OtherProcessFailed("process 0 tells") from cause
    if speaks:
        _print_summary(summary)
    return 0


def _started(arguments: list[str]) -> Callable[[], dict[str, Any]]:
    config = parse(arguments)
    from gcahng.train import fit

    return lambda: fit(config, verbose=True)


def _resumed(arguments: list[str], speaks: bool) -> Callable[[], dict[str, Any]]:
    parser = Parser(prog="gcahng train --resume", description="Continue a run that stopped before its end.")
    parser.add_argument("--resume", action=SourcePath, metavar="RUN", required=True, help="the run folder")
    parser.add_device(None, "the run's own")
    for option, (name, kind, text) in _RESUME_OPTIONS.items():
        if kind in (int, float):
            parser.add_number(option, f"{text} (the run's own)", dest=name, metavar="N")
        else:
            how: dict[str, Any] = (
                {"action": SourceText, "metavar": "DIR" if name == "root" else "FILE"}
                if kind is Path
                else {"type": kind}
            )
            parser.add_argument(option, dest=name, help=f"{text} (the run's own)", **how)
    options, others = parser.parse_known_args(arguments)
    if others:
        raise UserError(
            f"{others[0]} cannot be given with --resume: a run continues with its own options, except "
            f"--device, {', '.join(_RESUME_OPTIONS)}"
        )
    from gcahng.train import resume
    from gcahng.train.loop import finished

    values = vars(options)
    folder = values.pop("resume")
    if speaks and finished(folder) is not None:
        print(f"{folder} has finished; there is nothing to resume")
    return lambda: resume(folder, **values, verbose=True)


def _wants_resume(arguments: list[str]) -> bool:
    return any(argument == "--resume" or argument.startswith("--resume=") for argument in arguments)


def _print_summary(summary: dict[str, Any]) -> None:
    from gcahng.runs.metrics_table import metrics_table, width_of_output

    out, best = Path(summary["out"]), summary["best"]
    rows = {"test (percent)": summary["test"]}
    if best and best["step"] != summary["steps"]:
        rows[f"test, best checkpoint (step {best['step']})"] = summary["test_best"]
    print()
    print(metrics_table(rows, width_of_output()))
    print()
    if summary["left_out"]:
        print(f"{summary['left_out']} steps were not finite and were left out; see {out}/nonfinite.jsonl")
    if summary["unreadable"]:
        print(f"{summary['unreadable']} times another image replaced one that cannot be read")
    print(f"{summary['steps']} steps, {summary['seconds']:.0f} s; wrote")
    for name in ("summary.json", "config.yaml", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
        if (out / name).exists():
            print(f"  {out}/{name}")
    for name in ("curves.png", "retrieval.png", "tensorboard"):
        print(f"  {out}/{name}")


def parse(arguments: list[str]) -> TrainConfig:
    """The config that command line arguments describe; `--help`, `--help-all` and `--print_config` print and exit.

    Raises:
        UserError: an option is unknown or a value has the wrong type, on the command line or in a YAML file.
    """
    require("jsonargparse", extra="train", purpose="gcahng train reads its options")
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from gcahng.config import TrainConfig, config_from_dict
    from gcahng.yaml_files import check_aliases

    for argument in arguments:
        name, is_option, value = argument.partition("=")
        check_aliases(value if is_option and name.startswith("--") else argument, "an argument")
    parser = ArgumentParser(prog="gcahng train", description=run.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of these options, or the name of a recipe")
    parser.add_class_arguments(TrainConfig)
    if what := asked_for(arguments):
        print(help_text(parser, what), end="")
        raise SystemExit(0)
    try:
        values = parser.parse_args(_with_configs(arguments)).as_dict()
    except ArgumentError as error:
        raise UserError(_one_line(str(error), parser)) from None
    del values["config"]
    return config_from_dict(values)


def _with_configs(arguments: list[str]) -> list[str]:
    """The arguments, where the text of the file stands in the place of its name after --config."""
    replaced = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--config" and i + 1 < len(arguments):
            replaced[i + 1] = _config_text(arguments[i + 1])
        elif argument.startswith("--config="):
            replaced[i] = f"--config={_config_text(argument.removeprefix('--config='))}"
    return replaced


def _config_text(name: str) -> str:
    """The text of a YAML file, or of a recipe where no such file can be meant."""
    from gcahng.yaml_files import load_yaml, read_yaml

    path, what = Path(name), f"config {name}"
    if not name:
        raise UserError("config is ''; it must be a YAML file of options, or the name of a recipe")
    check_source("config", path)
    if not path.exists():
        if path.name != name or path.suffix in (".yaml", ".yml", ".json"):
            raise UserError(f"config is {name}, which does not exist; it must be a YAML file, or the name of a recipe")
        from gcahng.recipes import find

        path = find(name)
    text = read_yaml(path, what)
    if not isinstance(values := load_yaml(text, what), dict | NoneType):
        raise UserError(f"config must be a YAML file of options; it holds: {shown_value(values)}")
    return f"# {name!r}\n{text}" if values else "{}"  # a comment comes first, so that it is taken for no path


def _one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message in one line, with the option that may have been meant."""
    if unknown := re.match(r"[Uu]nrecognized arguments: (\S+?)(=.*)?(\s|$)", message):
        option = unknown[1]
        meant = get_close_matches(option, [name for a in parser._actions for name in a.option_strings], n=1, cutoff=0.5)
        return f"{option} is not an option{f'; did you mean {meant[0]}?' if meant else ''}; see gcahng train --help"
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    message = re.sub(
        r"Expected a typing\.Literal\[([^\]]+)\]",
        lambda match: f"Expected one of {match[1].replace(chr(39), '')}",
        message,
    )
    message = re.sub(  # an option that may be null; the order of its types is that in which Python first saw them
        r"Does not validate against any of the Union subtypes\s+"
        r"Subtypes: \[(?:NoneType, )?(\w+)(?:, NoneType)?\].*Given value: (.*)",
        r"Expected a \1 or null. Got value: \2",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r"\ba int\b", "an int", message)
    message = re.sub(r"^Unexpected config:", "config must be a YAML file of options; it holds:", message)
    return f"{' '.join(message.split())}; see gcahng train --help"
