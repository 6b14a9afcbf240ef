"""What a study is, as a YAML file describes it: a grid of methods, data sets and seeds, and what is compared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gcahng.bounds import BOUNDS, shown_value
from gcahng.config import TrainConfig, config_from_dict
from gcahng.data.load import DATA_SETS
from gcahng.errors import UserError
from gcahng.yaml_files import load_yaml, read_yaml

KEYS = ("base", "methods", "data", "seeds", "metrics", "evaluate", "checkpoint")
EVALUATE = ("validation", "test")
CHECKPOINTS = ("best", "last")
METRICS = ("map@r", "recall@1", "r_precision")
GLYPHS_RECALL_AT = (1, 2, 4, 8)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# The grid decides these.
_NOT_OPTIONS = ("seed", "out")


@dataclass(frozen=True)
class Method:
    """A row of the results.

    Attributes:
        name: in the study.
        options: of `gcahng train`, as nested dicts, which come after those of the study and of the data set.
        baseline: the method that it is compared with; None: it is compared with none.
    """

    name: str
    options: dict[str, Any]
    baseline: str | None


@dataclass(frozen=True)
class Run:
    """A cell of the grid.

    Attributes:
        data: the name of the data set in the study.
        method: the name of the method.
        seed: of the run.
        config: the whole configuration, without the run folder.
    """

    data: str
    method: str
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.data}-{self.method}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """A grid of runs, and how their results are compared.

    Attributes:
        name: the name of its file, without the ending.
        methods: by name, in the order of the file.
        data: the names of the data sets, in the order of the file.
        seeds: with which each method is trained on each data set.
        metrics: that are compared.
        evaluate: the classes that the metrics are of, "validation" or "test".
        checkpoint: which one is measured, "best" by the validation classes, or "last".
        runs: the whole grid, the seeds one after the other.
    """

    name: str
    methods: dict[str, Method]
    data: tuple[str, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    evaluate: str
    checkpoint: str
    runs: tuple[Run, ...]


def read_study(path: Path) -> Study:
    """Read a study and check every run of it.

    Args:
        path: the YAML file.

    Raises:
        UserError: the file cannot be read, or one of its keys is wrong; names the key.
    """
    name = f"study {path}"
    values = load_yaml(read_yaml(path, name), name)
    _mapping(name, values)
    if unknown := [key for key in values if key not in KEYS]:
        raise UserError(f"{name} has {shown_value(unknown[0])}; its keys must be of {', '.join(KEYS)}")
    base = _options("base", values.get("base", {}))
    data = {key: _options(f"data.{key}", given) for key, given in _named("data", values.get("data")).items()}
    methods = _methods(values.get("methods"))
    seeds = _seeds(values.get("seeds"))
    evaluate = _choice("evaluate", values.get("evaluate", "validation"), EVALUATE)
    checkpoint = _choice("checkpoint", values.get("checkpoint", "best"), CHECKPOINTS)
    runs = []
    for seed in seeds:
        for set_name, set_options in data.items():
            for method in methods.values():
                where = f"methods.{method.name} on data.{set_name}"
                options = _merged(_merged({"threads": 1}, base), _merged(set_options, method.options))
                runs.append(Run(set_name, method.name, seed, _config(where, {**options, "seed": seed})))
    study = Study(
        path.stem, methods, tuple(data), seeds, _metrics(values.get("metrics")), evaluate, checkpoint, tuple(runs)
    )
    for run in runs:
        _check_run(study, run)
    return study


def _mapping(name: str, values: Any) -> None:
    if not isinstance(values, dict) or not values:
        raise UserError(f"{name} is {shown_value(values)}; it must hold names with their values")


def _named(key: str, values: Any) -> dict[str, Any]:
    _mapping(key, values)
    for name in values:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{key} has the name {shown_value(name)}; a name must begin with a letter or a digit and have no other "
                "characters than letters, digits and ._+-"
            )
    return values


def _methods(values: Any) -> dict[str, Method]:
    methods = {}
    for name, given in _named("methods", values).items():
        given = {} if given is None else given
        baseline = given.get("baseline") if isinstance(given, dict) else None
        own = {key: value for key, value in given.items() if key != "baseline"} if isinstance(given, dict) else given
        methods[name] = Method(name, _options(f"methods.{name}", own), baseline)
    for method in methods.values():
        if method.baseline is not None and (method.baseline not in methods or method.baseline == method.name):
            others = ", ".join(name for name in methods if name != method.name) or "another method"
            raise UserError(
                f"methods.{method.name}.baseline is {shown_value(method.baseline)}; it must be one of {others}"
            )
    return methods


def _seeds(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"seeds is {shown_value(values)}; it must be a list of whole numbers, such as [0, 1, 2]")
    for place, seed in enumerate(values):
        if not BOUNDS["seed"].holds(seed):
            raise UserError(f"seeds[{place}] is {shown_value(seed)}; it must be {BOUNDS['seed']}")
        if seed in values[:place]:
            raise UserError(f"seeds[{place}] is {seed}, which is there twice; each seed must be there once")
    return tuple(values)


def _metrics(values: Any) -> tuple[str, ...]:
    values = list(METRICS) if values is None else values
    if not isinstance(values, list) or not values or len({str(value) for value in values}) < len(values):
        raise UserError(f"metrics is {shown_value(values)}; it must be a list of different metrics, such as [map@r]")
    for place, metric in enumerate(values):
        if not isinstance(metric, str) or not re.fullmatch(r"map@r|r_precision|recall@[1-9][0-9]{0,8}", metric):
            raise UserError(
                f"metrics[{place}] is {shown_value(metric)}; it must be map@r, r_precision or recall@K (recall@1)"
            )
    return tuple(values)


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UserError(f"{key} is {shown_value(value)}; it must be {' or '.join(choices)}")
    return value


def _options(key: str, values: Any) -> dict[str, Any]:
    """Options as nested dicts; `gca.base: supcon` is the same as `gca: {base: supcon}`.

    Args:
        key: of the file, for messages.
        values: as the file has them.

    Raises:
        UserError: there is no such option, or the grid decides it.
    """
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{key} is {shown_value(values)}; it must hold options of gcahng train")
    nested: dict[str, Any] = {}
    for name, value in _flat(values):
        if name in _NOT_OPTIONS:
            raise UserError(f"{key}.{name} cannot be given; the study decides it")
        group, _, option = name.rpartition(".")
        place = nested.setdefault(group, {}) if group else nested
        if option in place:
            raise UserError(f"{key}.{name} is given twice, once with a dot and once in its group; keep one")
        place[option] = value
    _config(key, nested)
    return nested


def _flat(values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    groups = [field.name for field in fields(TrainConfig) if is_dataclass(get_type_hints(TrainConfig)[field.name])]
    for name, value in values.items():
        if name in groups and isinstance(value, dict):
            yield from ((f"{name}.{option}", inner) for option, inner in value.items())
        else:
            yield str(name), value


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Nested options, of which the second ones count where both have them."""
    return first | {
        name: _merged(first.get(name, {}), value) if isinstance(value, dict) else value
        for name, value in second.items()
    }


def _config(where: str, options: dict[str, Any]) -> TrainConfig:
    """The configuration of options, checked; `where` stands before messages."""
    try:
        return _numbers(config_from_dict(options))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _numbers(config: Any) -> Any:
    """The same, with numbers that YAML takes for text: 1e-4 has no point, and so is none in YAML 1.1."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            _numbers(value)
        elif float in (hint, *get_args(hint)) and isinstance(value, str):
            try:
                setattr(config, name, float(value))
            except ValueError:
                continue  # check() says what is wrong
    return config


def _check_run(study: Study, run: Run) -> None:
    """See that a run can be trained and gives what is compared, as far as its configuration tells.

    Raises:
        UserError: it cannot, or it does not.
    """
    where, config = f"methods.{run.method} on data.{run.data}", run.config
    try:
        config.check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if config.select == "test":
        raise UserError(f"{where}: select is 'test'; it must be auto, val or last: test classes choose nothing here")
    chooses = study.evaluate == "validation" or study.checkpoint == "best"
    if chooses and config.data.val_classes == 0:
        raise UserError(
            f"{where}: data.val_classes is 0; there must be validation classes, or evaluate must be test and "
            "checkpoint last"
        )
    if study.checkpoint == "best" and config.select == "last":
        raise UserError(f"{where}: select is 'last' and checkpoint is best; checkpoint must be last, or select val")
    name = config.data.name
    ranks = DATA_SETS[name].recall_at if name in DATA_SETS else GLYPHS_RECALL_AT
    for place, metric in enumerate(study.metrics):
        if metric.startswith("recall@") and int(metric.removeprefix("recall@")) not in ranks:
            measured = ", ".join(f"recall@{rank}" for rank in ranks)
            raise UserError(f"metrics[{place}] is {metric}; on data.{run.data} it must be one of {measured}")
