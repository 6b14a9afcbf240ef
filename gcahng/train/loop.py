"""Training from a config to a run folder."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gcahng._extras import require
from gcahng.data import DataSplits, load_data
from gcahng.train.checkpoint import checkpoint_path, save_checkpoint
from gcahng.train.config import TrainConfig, config_to_dict
from gcahng.train.devices import resolve_device, torch_threads
from gcahng.train.evaluate import embed, evaluate, metrics_of
from gcahng.train.files import check_run_folder, make_run_folder, write_json, write_text
from gcahng.train.hardness import NegativesProbe
from gcahng.train.log import RunLog
from gcahng.train.report import Reporter, reporter
from gcahng.train.trainer import Trainer
from gcahng.train.versions import versions


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came during training: the step was finished and the last checkpoint written.

    `exit_code` is the shell's for the signal, 130 or 143.
    """

    def __init__(self, step: int, steps: int, checkpoint: Path, exit_code: int) -> None:
        super().__init__(f"interrupted after step {step} of {steps}; the last checkpoint is {checkpoint}")
        self.exit_code = exit_code


def fit(config: TrainConfig, *, verbose: bool = False) -> dict[str, Any]:
    """Train, evaluate and write a run folder; the same as `gcahng train`.

    The folder holds config.yaml (all options, the versions as a comment), metrics.jsonl, tensorboard/,
    checkpoints/last.pt and best.pt (by MAP@R on the validation classes), curves.png, retrieval.png and, written last,
    summary.json.

    Args:
        config: what to train.
        verbose: report on standard output, with a progress bar if it is a terminal.

    Returns:
        What summary.json holds: "test" with "recall@1", …, "map@r", "r_precision" of the last checkpoint as fractions,
        "steps", "seconds" in all, "step_seconds" and "step_cpu_seconds" in training steps alone, and more; and "out",
        the run folder.

    Raises:
        UserError: a value of `config` that cannot be, a run folder that is not empty, a missing extra, or a loss that
            is not finite.
        TrainingInterrupted: on SIGINT and SIGTERM in the main thread.
    """
    started = time.monotonic()
    config.check()
    require("matplotlib", "rich", "tensorboard", "yaml", extra="train", purpose="training")
    if config.out is not None:
        check_run_folder(config.out)
    device = resolve_device(config.device)
    config = replace(config, device=str(device), threads=config.threads or torch.get_num_threads())
    with torch_threads(config.threads), torch.random.fork_rng([device] if device.type == "cuda" else []):
        return _fit(config, reporter(verbose), started)


def _fit(config: TrainConfig, report: Reporter, started: float) -> dict[str, Any]:
    data = load_data(config.data)
    trainer = Trainer(config, data)
    run = make_run_folder(config)
    config = trainer.config = replace(config, out=str(run))
    write_text(run / "config.yaml", _yaml(config))
    report.start(
        f"{config.loss_title} on {config.data.name}, {data.train.num_classes} classes; {config.steps} steps of "
        f"{config.data.classes_per_batch} x {config.data.samples_per_class} on {config.device}; writes {run}",
        config.steps,
    )
    clock = _StepClock(trainer)
    try:
        best, val = _train(trainer, clock, data, run, report)
        report.status("evaluating on the test classes")
        embeddings = embed(trainer.model, data.test, trainer.device)
        test = metrics_of(embeddings, data.test)
        _draw(run, data, embeddings, config.seed)
    finally:
        report.close()
    summary = {
        "test": test,
        "val": val,
        "best": best,
        "steps": trainer.step,
        "seconds": round(time.monotonic() - started, 2),
        "step_seconds": round(clock.seconds, 3),
        "step_cpu_seconds": round(clock.cpu_seconds, 3),
        "loss": config.loss_title,
        "seed": config.seed,
        "data_digest": data.digest,
        "device": config.device,
        "threads": config.threads,
        "versions": versions(),
    }
    write_json(run / "summary.json", summary)
    return {**summary, "out": str(run)}


class _StepClock:
    """Time in training steps alone, without set-up, evaluation and checkpoints: on the wall, and that of the process's
    threads, which other processes do not lengthen."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.seconds = self.cpu_seconds = 0.0

    def train_step(self) -> dict[str, Tensor]:
        """trainer.train_step(), timed; work that a GPU still has to do is counted in a later step."""
        wall, cpu = time.monotonic(), time.process_time()
        logs = self._trainer.train_step()
        self.seconds += time.monotonic() - wall
        self.cpu_seconds += time.process_time() - cpu
        return logs


def _train(
    trainer: Trainer, clock: _StepClock, data: DataSplits, run: Path, report: Reporter
) -> tuple[dict[str, Any], dict[str, float]]:
    """Step to the end, with checkpoints; returns step and metrics of the best one, and the last validation metrics."""
    config = trainer.config
    best: dict[str, Any] = {}
    probe = NegativesProbe(config, data.train, trainer.device)
    with RunLog(run) as log, _StopSignals() as signals:
        while trainer.step < config.steps:
            log.add(clock.train_step())
            is_last = trainer.step == config.steps
            evaluates = trainer.step % config.eval_every == 0 or is_last
            # Before any checkpoint: a loss that is not finite stops here, and the last good one stays.
            if trainer.step % config.log_every == 0 or evaluates or signals.received is not None:
                report.losses(trainer.step, log.train(trainer.step))
            if evaluates:
                metrics = evaluate(trainer.model, data.val, trainer.device)
                log.validation(trainer.step, metrics)
                log.negatives(trainer.step, probe.measure(trainer.model, trainer.objective))
                report.validation(trainer.step, metrics)
                if not best or metrics["map@r"] > best["val"]["map@r"]:
                    best = {"step": trainer.step, "val": metrics}
                    save_checkpoint(checkpoint_path(run, "best"), {**trainer.state_dict(), "best": best})
                save_checkpoint(checkpoint_path(run, "last"), {**trainer.state_dict(), "best": best})
            if signals.received is not None and not is_last:
                save_checkpoint(checkpoint_path(run, "last"), {**trainer.state_dict(), "best": best})
                raise TrainingInterrupted(
                    trainer.step, config.steps, checkpoint_path(run, "last"), 128 + signals.received
                )
    return best, metrics


def _draw(run: Path, data: DataSplits, embeddings: Tensor, seed: int) -> None:
    from gcahng.train.plots import plot_curves, plot_retrieval_grid

    plot_curves(run / "metrics.jsonl", run / "curves.png")
    plot_retrieval_grid(
        data.test.images.float() / 255,
        data.test.labels,
        embeddings.cpu(),
        run / "retrieval.png",
        seed=seed,
        class_names=data.test.class_names,
    )


def _yaml(config: TrainConfig) -> str:
    import yaml

    made_with = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"# Made with {made_with}.\n" + yaml.safe_dump(config_to_dict(config), sort_keys=False)


class _StopSignals:
    """While it lasts, the first SIGINT or SIGTERM is only noted, so that the step can end; the second acts as usual.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.__exit__()
