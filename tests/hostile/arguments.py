"""Command lines whose options have values that nobody should give, or that are put together wrongly."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from hostile.case import FINE, Case, Fault, Ran, no_temporaries
from hostile.guards import Enough, no_armies, stop_after_steps
from hostile.values import TEXT, hostile_path, number_text
from hostile.world import KINDS, SMALL

# What may be there after a refusal: indices of data sets, and rows that the next `embed` goes on with.
_MAY_STAY = (".gcahng-", ".part", ".lock")
# Options that only say how long a measurement takes: large values are slow, and right.
_LONG = ("--reps", "--steps", "--batch", "--views", "--dim", "--layers", "--classes")

# Commands and their weights. `export` and `report` take seconds where they succeed.
_COMMANDS = {
    "plan": 4,
    "eval": 5,
    "embed": 5,
    "index build": 5,
    "index add": 4,
    "index info": 1,
    "search": 5,
    "data verify": 4,
    "train": 9,
    "train --resume": 3,
    "export": 1,
    "report": 1,
    "import-official": 2,
    "bench step": 1,
    "others": 1,
}


def case(case: Case) -> str:
    """A good command line with a few changes."""
    no_armies()
    stop_after_steps()
    chance = case.chance
    name = chance.choices(list(_COMMANDS), list(_COMMANDS.values()))[0]
    head, good = _good(case, name)
    arguments = list(good)
    odd = case.folder / "odd"
    odd.mkdir()
    for _ in range(chance.choice((1, 1, 1, 1, 2, 3))):
        _change(chance, name, arguments, odd)
    before = _files(case.folder)
    try:
        ran = case.command(*head, *arguments)
    except Fault as fault:
        if isinstance(fault.__cause__, Enough):
            return FINE
        raise
    no_temporaries(case.folder)
    odd_names = any(not word.isprintable() for word in arguments)  # which are printed otherwise than they are
    _check_files(case, ran, before, odd_names)
    return ran.verdict


def _good(case: Case, name: str) -> tuple[list[str], list[str]]:
    """The words of a command, and arguments with which it succeeds."""
    out = str(case.folder / "out")
    if name == "plan":
        return ["plan"], ["--batch", "12", "--dim", "16", "--rate", "10", "--memory-limit", "1GB"]
    if name == "bench step":
        sizes = ["--batch", "6", "--views", "3", "--dim", "8", "--layers", "1", "--reps", "1", "--no-peak"]
        return ["bench", "step"], [*sizes, "--precision", "fp32", "--memory", "store"]
    if name == "data verify":
        kind = case.chance.choice(("folder", "csv", "cub200", "sop", "inshop", "cars196"))
        root = case.copy(kind)
        return ["data", "verify"], [
            kind,
            "--root",
            str(root),
            *(["--csv", str(root / "list.csv")] if kind == "csv" else []),
        ]
    if name == "train":
        return ["train"], [*options_of_small(case.copy("folder")), "--out", out]
    if name == "train --resume":
        return ["train"], ["--resume", str(case.copy("half"))]
    if name == "import-official":
        return ["import-official"], [
            str(case.world / "states" / "official.pt"),
            out + ".safetensors",
            "--backbone",
            "resnet50",
        ]
    if name == "others":
        return [], [
            case.chance.choice(("recipes", "data", "index", "--version", "--help", "trian", "train --help", ""))
        ]
    if name in ("eval", "export", "report", "embed"):
        run = str(case.copy("run"))
        if name == "eval" and case.chance.random() < 0.5:
            return ["eval"], ["--embeddings", str(case.copy("vectors") / "x.safetensors"), "--recall_at", "1", "5"]
        if name == "embed":
            sources = case.chance.choice(([], [str(case.copy("folder") / "test")]))
            return ["embed"], [run, *sources, "--out", out + ".npy", "--data.workers", "0"]
        more = {"eval": ["--data.workers", "0"], "export": [out + ".pt2"], "report": ["--map", "pca", "--queries", "1"]}
        return [name], [run, *more[name]]
    vectors = case.copy("vectors")
    index = str(vectors / f"{case.chance.choice(KINDS)}.index")
    if name == "index build":
        return ["index", "build"], [str(vectors / "x.npy"), "--out", out + ".index", "--kind", "flat"]
    if name == "index add":
        return ["index", "add"], [index, str(vectors / "q.safetensors"), "--allow_duplicates"]
    if name == "index info":
        return ["index", "info"], [index]
    return ["search"], [index, str(vectors / "q.safetensors"), "--k", "3", "--json"]


def options_of_small(root: Path) -> list[str]:
    """The command line of the small run on a tree."""
    options = []
    for name, value in SMALL.items():
        if isinstance(value, dict):
            options += [text for field, own in value.items() for text in (f"--{name}.{field}", str(own))]
        else:
            options += [f"--{name}", str(value)]
    return [*options, "--data.root", str(root)]


def _change(chance: random.Random, name: str, arguments: list[str], odd: Path) -> None:
    known = dict(options_of(name))
    kind = chance.choices(
        ("option", "value", "drop", "positional", "unknown", "twice", "equals", "shuffle"),
        (9, 6, 0.5, 1, 0.5, 0.5, 0.5, 0.2),
    )[0]
    if kind == "option" and known:
        option = chance.choice(list(known))
        values = _values(chance, option, known[option], odd)
        if chance.random() < 0.2:
            arguments.append(f"{option}={values[0] if values else ''}")
        else:
            arguments += [option, *values]
    elif kind == "value" and arguments:
        at = chance.randrange(len(arguments))
        if arguments[at].startswith("--") and at + 1 < len(arguments):
            at += 1
        option = arguments[at - 1] if at else ""
        own = known.get(option, "path")
        arguments[at : at + 1] = _values(chance, option, own, odd)
    elif kind == "drop" and arguments:
        del arguments[chance.randrange(len(arguments))]
    elif kind == "positional":
        arguments.insert(chance.randint(0, len(arguments)), str(hostile_path(chance, odd)))
    elif kind == "unknown":
        arguments.append(
            chance.choice(("--no-such-option", "-x", "--Json", "--dat.root", "--recal_at=1", "--", "-", "---", "--="))
        )
    elif kind == "twice" and arguments:
        arguments += arguments[-2:]
    elif kind == "equals":
        arguments += [f"{chance.choice(list(known) or ['--x'])}={chance.choice(TEXT)}"]
    elif kind == "shuffle":
        chance.shuffle(arguments)


def _values(chance: random.Random, option: str, kind: Any, odd: Path) -> list[str]:
    """Values of an option, most often hostile ones of its own kind."""
    if kind == "flag":
        return []
    if isinstance(kind, tuple):  # choices
        return [chance.choice((*kind, *map(str, kind), chance.choice(TEXT)))]
    if chance.random() < 0.1:
        kind = chance.choice(("number", "path", "text"))
    if kind == "number":
        if option in _LONG and option in ("--reps", "--steps"):
            return [chance.choice(("0", "-1", "1", "x"))]
        return [number_text(chance) for _ in range(chance.choice((1, 1, 1, 1, 1, 2)))]
    if kind == "path":
        return [str(hostile_path(chance, odd))]
    return [
        chance.choice(
            (chance.choice(TEXT), number_text(chance), str(hostile_path(chance, odd)), "cuda:99", "meta", "auto")
        )
    ]


@cache
def options_of(name: str) -> list[tuple[str, Any]]:
    """The options of a command with the kind of their values, as the command's own parser has them."""
    if name == "train":
        from gcahng.config import TrainConfig

        return [("--config", "path"), *_fields(TrainConfig, "--")]
    arguments = {"train --resume": ["train", "--resume", "x"], "data verify": ["data", "verify", "csv"], "others": []}
    parsers: list[argparse.ArgumentParser] = []

    class Seen(BaseException):
        pass

    def see(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        parsers.append(self)
        raise Seen

    from gcahng.cli import main
    from gcahng.commands.arguments import Parser

    words = arguments.get(name, name.split())
    if not words:
        return []
    methods = ("parse_args", "parse_intermixed_args", "parse_known_args")
    before = {method: Parser.__dict__.get(method) for method in methods}
    for method in methods:
        setattr(Parser, method, see)
    try:
        main(words)
    except Seen:
        pass
    finally:
        for method, old in before.items():
            delattr(Parser, method) if old is None else setattr(Parser, method, old)
    return [found for parser in parsers for found in _actions(parser, words)]


def _actions(parser: argparse.ArgumentParser, words: list[str]) -> Iterator[tuple[str, Any]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from _actions(action.choices[words[-1] if words[-1] in action.choices else "verify"], words)
        elif action.option_strings and "--help" not in action.option_strings:
            kind: Any = "text"
            if action.nargs == 0:
                kind = "flag"
            elif action.choices:
                kind = tuple(map(str, action.choices))
            elif action.type is Path:
                kind = "path"
            elif action.type is not None and action.type is not str:
                kind = "number"
            elif any(part in action.option_strings[0] for part in ("root", "csv")):
                kind = "path"
            yield action.option_strings[0], kind


def _fields(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """The options of a dataclass."""
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif field.name in ("out", "root", "csv", "weights"):
            yield f"{prefix}{field.name}", "path"
        elif field.name != "compile":  # which takes a compiler and minutes
            text = str(hint)
            kind = (
                "number"
                if "int" in text or "float" in text
                else tuple(a for a in getattr(hint, "__args__", ()) if isinstance(a, str)) or "text"
            )
            yield f"{prefix}{field.name}", kind


def _files(folder: Path) -> set[str]:
    """The paths below a folder, in which no link is followed."""
    import os

    return {os.path.join(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names)}


def _check_files(case: Case, ran: Ran, before: set[str], odd_names: bool) -> None:
    """What a command says that it wrote is there; what it refused is not begun."""
    new = _files(case.folder) - before
    home = str(case.folder / "home")
    if ran.status == 2 and not any(path.endswith("/metrics.jsonl") for path in new):  # a run that began can go on
        left = [path for path in new if not path.startswith(home) and not any(part in path for part in _MAY_STAY)]
        if left:
            raise Fault(
                "half-written", f"refused ({ran.err.strip()[:200]}), and {', '.join(sorted(left)[:3])} is there"
            )
    for line in ran.out.splitlines() if ran.status == 0 else ():
        if line.startswith("written  ") and not odd_names:
            path = Path(line.removeprefix("written").strip().split(", from ")[0])
            if not path.exists():
                raise Fault("half-written", f"{line}: it is not there")
