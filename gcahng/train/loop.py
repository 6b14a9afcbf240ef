"""Training: `fit` makes a run folder from a config, and `resume` continues one to its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gcahng.config import TrainConfig, config_of_run, config_to_dict
from gcahng.data import DataSplits, load_data
from gcahng.data.workers import leave_if_starting
from gcahng.devices import deterministic, torch_threads
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.files import remove_temporaries, write_text, writing
from gcahng.paths import check_source, check_utf8
from gcahng.processes import Processes, run_processes
from gcahng.runs.checkpoint import FOLDER, check_contents, newest_checkpoint
from gcahng.runs.log import check_wandb
from gcahng.runs.run_folder import check_run_folder, make_run_folder, run_lock
from gcahng.runs.summary import read_summary
from gcahng.runs.versions import versions
from gcahng.train.session import Session, selects_on
from gcahng.train.split_metrics import check_matches
from gcahng.train.terminal import Terminal, terminal_for
from gcahng.train.trainer import Trainer
from gcahng.yaml_files import load_yaml, read_yaml

CONFIG = "config.yaml"


def fit(config: TrainConfig, *, verbose: bool | None = None) -> dict[str, Any]:
    """Train, evaluate and write a run folder; the same as `gcahng train`.

    The folder holds config.yaml (all options, the versions as a comment), metrics.jsonl, tensorboard/, checkpoints/
    (last.pt, previous.pt, best.pt where something chooses it, step-N.pt, and the weights of each as .safetensors),
    curves.png, retrieval.png and, written last, summary.json. A run that has no summary.json, however it ended, is
    finished by `resume`.

    Args:
        config: what to train.
        verbose: whether progress is printed on standard output, with a progress bar if it is a terminal; None: in a
            notebook.

    Returns:
        What summary.json holds: "test" with "recall@1", …, "map@r", "r_precision" of the last checkpoint as fractions
        and "test_best" of the best one, "steps", "seconds" in all, "step_seconds" and "step_cpu_seconds" in training
        steps alone, and more; and "out", the run folder.

    Raises:
        UserError: a value of `config` is wrong, the run folder is not empty, an extra is missing, a loss or a gradient
            is not finite (NonFinite), or a file cannot be written (CannotWrite).
        TrainingInterrupted: SIGINT or SIGTERM came in the main thread.
    """
    leave_if_starting()
    with run_processes() as processes, ExitStack() as open_now:
        processes.same({"the run": "a new one"})
        processes.same(_shared_options(config))
        with processes.together():
            config.check()
            _require_extras(config, processes.first)
            for name, path in (("backbone.weights", config.backbone.weights), ("gca.weights", config.gca.weights)):
                if path is not None:
                    check_source(name, path)
            if config.out is not None and processes.first:
                check_run_folder(config.out)
            device = processes.device(config.device)
        processes.set_timeout(config.timeout)
        processes.check_devices(device)
        config = replace(
            config,
            device=str(device),
            threads=config.threads or torch.get_num_threads(),
            data=config.data.decided(),
        )
        open_now.enter_context(_surroundings(config))
        data, trainer = _begin(config, processes, pretrained=True)
        open_now.callback(trainer.close)
        run = processes.on_first(lambda: make_run_folder(trainer.config))
        processes.on_first(lambda: _hold_new(open_now, run))
        config = trainer.config = replace(trainer.config, out=str(run))
        processes.on_first(lambda: _write_config(run, config))
        terminal = terminal_for(verbose, processes.first)
        open_now.callback(terminal.close)
        with processes.together():
            _announce(terminal, trainer, data, f"writes {run}")
        return Session(trainer, data, terminal, {}, resumed=0).finish()


def resume(
    run: Path | str,
    *,
    device: str | None = None,
    threads: int | None = None,
    root: str | None = None,
    csv: str | None = None,
    workers: int | None = None,
    skip_nonfinite: int | None = None,
    skip_unreadable: bool | None = None,
    timeout: float | None = None,
    verbose: bool | None = None,
) -> dict[str, Any]:
    """Continue a run that stopped before its end; the same as `gcahng train --resume RUN`.

    The run continues from its newest checkpoint that can be read, or from its start if it has none yet. It ends with
    the weights that it would have had without the interruption, bit for bit: on the CPU with the same number of
    threads, on CUDA with `deterministic`. A finished run is not changed.

    Args:
        run: the run folder.
        device: replaces the run's own device; None: the run's own, as for the other options. Another device changes
            the last bits.
        threads: number of threads; another one changes the last bits.
        root: where the data set lies now.
        csv: where its CSV file lies now.
        workers: processes that read images.
        skip_nonfinite: steps in a row that may be left out.
        skip_unreadable: whether unreadable images are replaced.
        timeout: seconds that several processes wait for one of them.
        verbose: whether progress is printed on standard output, with a progress bar if it is a terminal; None: in a
            notebook.

    Returns:
        As `fit`.

    Raises:
        UserError: there is no such run folder, another process trains the run, no checkpoint can be read; and as `fit`.
        TrainingInterrupted: SIGINT or SIGTERM came in the main thread.
    """
    leave_if_starting()
    run = Path(run)
    with run_processes() as processes, ExitStack() as open_now:
        options = {"device": device, "threads": threads, "skip_nonfinite": skip_nonfinite, "timeout": timeout}
        processes.same({"the run": f"that of {run}"})
        processes.same({**options, "data.skip_unreadable": skip_unreadable})
        summary = processes.on_first(lambda: _finished_or_begun(run))
        if summary is not None:
            return summary
        terminal = terminal_for(verbose, processes.first)
        open_now.callback(terminal.close)
        before, state = processes.on_first(lambda: _take_up(run, terminal, open_now))
        with processes.together():
            config = replace(
                before,
                out=str(run),
                device=str(processes.device(before.device if device is None else device)),
                threads=before.threads if threads is None else threads,
                timeout=before.timeout if timeout is None else timeout,
                skip_nonfinite=before.skip_nonfinite if skip_nonfinite is None else skip_nonfinite,
                data=replace(
                    before.data,
                    root=before.data.root if root is None else root,
                    csv=before.data.csv if csv is None else csv,
                    workers=before.data.workers if workers is None else workers,
                    skip_unreadable=before.data.skip_unreadable if skip_unreadable is None else skip_unreadable,
                ),
            )
            config.check()
            _require_extras(config, processes.first)
            _check_places(config)
        processes.set_timeout(config.timeout)
        processes.check_devices(torch.device(config.device))
        for difference in _differences(before, config, state, processes):
            terminal.warning(f"{difference}; the last bits may differ from those of an uninterrupted run")
        open_now.enter_context(_surroundings(config))
        data, trainer = _begin(config, processes, pretrained=not state)
        open_now.callback(trainer.close)
        with processes.together():
            if state:
                trainer.load_state_dict(state)
        if state and state["data_digest"] != data.digest:
            terminal.warning(
                "files of the data set have other sizes than when the checkpoint was written; the run continues with "
                "them"
            )
        with processes.together():
            _announce(terminal, trainer, data, f"continues in {run} after step {trainer.step}")
        resumed = state.get("resumed", 0) + 1
        return Session(trainer, data, terminal, state, resumed).finish()


def finished(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run and "out", its folder; None if the run has not finished.

    Raises:
        UserError: the run's summary.json is damaged.
    """
    summary = read_summary(run)
    return None if summary is None else {**summary, "out": str(run)}


def _check_places(config: TrainConfig) -> None:
    """See that the data set is where the run says, which may have been continued elsewhere.

    Raises:
        UserError: it is not; the option to give is named.
    """
    for name, place in (("data.root", config.data.root), ("data.csv", config.data.csv)):
        if place is not None and not Path(place).expanduser().exists():
            where = "" if Path(place).expanduser().is_absolute() else f" in {Path.cwd()}"
            raise UserError(f"{name} of the run is {place}, which does not exist{where}; give --{name} with its place")


def _shared_options(config: TrainConfig) -> dict[str, object]:
    """The options that all processes of a run must have in common, by name. Data may lie elsewhere on each machine."""
    values = config_to_dict(config)
    flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
    flat |= {f"{group}.{n}": v for group, inner in values.items() if isinstance(inner, dict) for n, v in inner.items()}
    return {name: value for name, value in flat.items() if name not in ("data.root", "data.csv", "data.workers")}


def _begin(config: TrainConfig, processes: Processes, *, pretrained: bool) -> tuple[DataSplits, Trainer]:
    """The data and a new trainer. The first process of each machine downloads and indexes for the others."""
    with processes.together(patient=True), processes.in_turn():
        data = load_data(config.data)
        check_matches(data)
        selects_on(config, data)
    processes.same({"the digest of the data": data.digest, "images that train": len(data.train)})
    with processes.together(patient=True), processes.in_turn():
        trainer = Trainer(config, data, pretrained=pretrained, processes=processes)
    trainer.start_together()
    return data, trainer


def _finished_or_begun(run: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is something to continue."""
    if not run.is_dir() or not ((run / CONFIG).is_file() or (run / FOLDER).is_dir()):
        raise UserError(f"resume is {run}, which is no run folder; it must be one that gcahng train wrote")
    summary = finished(run)
    if summary is None:
        check_utf8("resume", run, "TensorBoard")
    return summary


def _take_up(run: Path, terminal: Terminal, open_now: ExitStack) -> tuple[TrainConfig, dict[str, Any]]:
    """Hold a run folder until `open_now` ends, and read it.

    Returns:
        The run's options, and the state of its newest checkpoint, {} where it has none.
    """
    _hold(open_now, run)
    for folder in (run, run / FOLDER):
        remove_temporaries(folder)
    path, state, damaged = newest_checkpoint(run)
    if path is not None:
        check_contents(path, state)
    for error in damaged:
        terminal.warning(f"{error}; the run continues from {path}, step {state['step']}")
    return config_of_run(state["config"]) if state else _read_config(run / CONFIG), state


def _hold(open_now: ExitStack, run: Path) -> None:
    open_now.enter_context(run_lock(run))


def _hold_new(open_now: ExitStack, run: Path) -> None:
    """Hold a run folder that nobody has begun to fill since it was looked at."""
    _hold(open_now, run)
    check_run_folder(str(run))


def _write_config(run: Path, config: TrainConfig) -> None:
    with writing(run / CONFIG):
        write_text(run / CONFIG, _yaml(config))


@contextmanager
def _surroundings(config: TrainConfig) -> Iterator[None]:
    """A context with a run's threads and algorithms. The caller's random generators stay as they are."""
    device = torch.device(config.device)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads or torch.get_num_threads()))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        if config.deterministic and device.type == "cuda":
            stack.enter_context(deterministic(True))
        yield


def _require_extras(config: TrainConfig, first: bool) -> None:
    require("matplotlib", "rich", "safetensors", "tensorboard", "yaml", extra="train", purpose="training")
    if config.wandb is not None and first:
        check_wandb(config.wandb)


def _announce(terminal: Terminal, trainer: Trainer, data: DataSplits, where: str) -> None:
    config, count = trainer.config, trainer.processes.count
    places = f"{count} processes on {config.device}" if count > 1 else config.device
    terminal.start(
        f"{config.loss_title} on {config.data.name}, {data.train.num_classes} classes; {config.steps} steps of "
        f"{config.data.classes_per_batch} x {config.data.samples_per_class} on {places}; {where}",
        config.steps,
    )
    if selects_on(config, data) == "test":
        terminal.warning(
            "select is 'test', which chooses the best checkpoint on the test classes, as the authors do; its "
            "numbers are too good: select 'val' or 'last' for honest ones"
        )


def _differences(before: TrainConfig, now: TrainConfig, state: dict[str, Any], processes: Processes) -> list[str]:
    """What differs from the session that wrote the checkpoint."""
    differences = []
    for name in ("device", "threads"):
        if (old := getattr(before, name)) != (new := getattr(now, name)):
            differences.append(f"{name} was {old} and is {new}")
    if state and (old := state.get("processes", 1 + len(state.get("rng_of_others", [])))) != processes.count:
        differences.append(f"the number of processes was {old} and is {processes.count}")
    was, now_are = state.get("versions", {}), versions()
    for name in was.keys() & now_are.keys() if state else ():
        if was[name] != now_are[name]:
            differences.append(f"{name} was {was[name]} and is {now_are[name]}")
    return sorted(differences)


def _yaml(config: TrainConfig) -> str:
    import yaml

    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"# Made with {made_with}.\n" + yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _read_config(path: Path) -> TrainConfig:
    try:
        config = config_of_run(load_yaml(read_yaml(path, str(path)), str(path)))
        config.check()
        return config
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a run's options ({error}); the run has no checkpoint yet, so restore the "
            "file, or start a new run with gcahng train"
        ) from error
