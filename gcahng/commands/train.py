"""gcahng train"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

from gcahng._extras import require
from gcahng.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from gcahng.train.config import TrainConfig


def run(arguments: list[str]) -> int:
    """Train an embedding network, evaluate it on classes it never saw, and write a run folder.

    Without options: GCA-HNG on glyphs. Options may come from a YAML file (--config), which later options override.
    """
    config = parse(arguments)
    from gcahng.train import fit
    from gcahng.train.report import metrics_table

    summary = fit(config, verbose=True)
    out = summary["out"]
    print()
    print(metrics_table({"test (per cent)": summary["test"]}))
    print()
    print(f"{summary['steps']} steps, {summary['seconds']:.0f} s; wrote")
    for name in ("summary.json", "config.yaml", "metrics.jsonl", "checkpoints/last.pt", "checkpoints/best.pt"):
        print(f"  {out}/{name}")
    for name in ("curves.png", "retrieval.png", "tensorboard"):
        print(f"  {out}/{name}")
    return 0


def parse(arguments: list[str]) -> TrainConfig:
    """The config that command line arguments describe; `--help` and `--print_config` print and exit.

    Raises:
        UserError: an unknown option, or a value of the wrong type, on the command line or in a YAML file.
    """
    require("jsonargparse", extra="train", purpose="gcahng train reads its options")
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    from gcahng.train.config import TrainConfig, config_from_dict

    parser = ArgumentParser(prog="gcahng train", description=run.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(TrainConfig)
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise UserError(_one_line(str(error), parser)) from None
    del values["config"]
    return config_from_dict(values)


def _one_line(message: str, parser: ArgumentParser) -> str:
    """jsonargparse's message, shorter, with what may have been meant."""
    if unknown := re.match(r"[Uu]nrecognized arguments: (\S+?)(=.*)?(\s|$)", message):
        option = unknown[1]
        meant = get_close_matches(option, [name for a in parser._actions for name in a.option_strings], n=1, cutoff=0.5)
        return f"{option} is no option{f'; did you mean {meant[0]}?' if meant else ''}; see gcahng train --help"
    message = re.sub(r'Parser key "([^"]+)":', r"\1:", message)
    message = re.sub(r"<class '(\w+)'>", r"\1", message)
    return f"{' '.join(message.split())}; see gcahng train --help"
