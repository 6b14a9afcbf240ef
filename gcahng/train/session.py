"""A session trains a run from the step that it has reached to its summary."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from gcahng.config import TrainConfig
from gcahng.data import DataSplits, UnreadableImage
from gcahng.engine.peers import LostProcess
from gcahng.errors import UserError
from gcahng.evaluation.hardness import NegativesProbe
from gcahng.files import CannotWrite, write_json, writing
from gcahng.models.model_file import save_model
from gcahng.runs.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from gcahng.runs.log import NONFINITE, NoLog, RunLog
from gcahng.runs.run_folder import RunFolderGone, check_run_lock
from gcahng.runs.summary import SUMMARY
from gcahng.runs.versions import versions
from gcahng.train.finite import NonFinite
from gcahng.train.pictures import draw_pictures
from gcahng.train.signals import StopSignals
from gcahng.train.split_metrics import Measured, Split, measure
from gcahng.train.terminal import Terminal
from gcahng.train.throughput import StepTimer
from gcahng.train.trainer import Trainer

_SIGPIPE = 13  # signal.SIGPIPE, which Windows lacks
# What chooses the best checkpoint, by the classes it is measured on.
_CHOOSES = {"val": "map@r", "test": "recall@1"}


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came during training, or the reader of its output has gone; the step was finished and a
    checkpoint written.

    Attributes:
        exit_code: the shell's exit status for the signal: 130, 143, or 141 for the reader.
    """

    of_all = True  # all processes of the run raise it

    def __init__(self, step: int, steps: int, checkpoint: Path, run: Path, exit_code: int, processes: int = 1) -> None:
        why = "what reads the output has gone; " if exit_code == 128 + _SIGPIPE else ""
        super().__init__(
            f"{why}interrupted after step {step} of {steps}; {checkpoint} holds everything; to continue: "
            f"{resume_command(run, processes)} (in Python: gcahng.train.resume({str(run)!r}))"
        )
        self.exit_code = exit_code


def resume_command(run: Path, processes: int = 1) -> str:
    """What a user types to continue a run on one machine.

    Args:
        run: the run folder.
        processes: how many processes train it.
    """
    program = "gcahng" if processes == 1 else f"torchrun --nproc-per-node {processes} -m gcahng"
    return f"{program} train --resume {shlex.quote(str(run))}"


def selects_on(config: TrainConfig, data: DataSplits) -> Split | None:
    """The split that chooses the best checkpoint; None: nothing is chosen.

    Args:
        config: of the run.
        data: the splits.

    Raises:
        UserError: the validation classes are to choose, and there are none.
    """
    if config.select == "val" and data.val is None:
        raise UserError(
            f"select is 'val' and data.val_classes is {config.data.val_classes}; set some training classes aside, or "
            "select 'last'"
        )
    if config.select == "auto":
        return None if data.val is None else "val"
    return None if config.select == "last" else config.select


class Session:
    """Trains from a trainer's step to the end of its run, with checkpoints.

    Args:
        trainer: new, or with a checkpoint's state; its config's `out` is the run folder.
        data: the splits.
        terminal: prints the progress.
        state: of the checkpoint; {} at the start of a run.
        resumed: how many times the run was resumed.

    Each of several processes has a session, and all take the same steps; only the first one writes and prints.
    """

    def __init__(
        self, trainer: Trainer, data: DataSplits, terminal: Terminal, state: dict[str, Any], resumed: int
    ) -> None:
        self.config, self.trainer, self.data, self.terminal = trainer.config, trainer, data, terminal
        self.processes, self.signals = trainer.processes, StopSignals()
        self.processes.set_way_back(self._way_back)
        self._probe = NegativesProbe(self.config, data.train, trainer.device)
        assert self.config.out is not None
        self.run = Path(self.config.out)
        self.selects_on = selects_on(self.config, data)
        self.measured: list[Split] = [] if data.val is None else ["val"]
        if data.val is None or self.selects_on == "test":
            self.measured.append("test")
        self.best: dict[str, Any] = state.get("best", {})
        self.latest: dict[str, dict[str, float]] = state.get("latest", {})
        self.resumed = resumed
        self._saved = trainer.step if state else None
        self._stopped_by = 0
        self._started = time.monotonic()
        seconds = state.get("seconds", {"all": 0.0, "step": 0.0, "step_cpu": 0.0})
        self._seconds_before = seconds["all"]
        self.step_timer = StepTimer(trainer, seconds["step"], seconds["step_cpu"])
        self._log_state = state.get("log")
        if state and self.selects_on is not None:
            self._adopt_best()

    def finish(self) -> dict[str, Any]:
        """Train to the end, measure on the test classes, draw, and write summary.json.

        Returns:
            What summary.json holds, and "out", the run folder.

        Raises:
            TrainingInterrupted, NonFinite, CannotWrite, UnreadableImage: with the command that continues the run.
            RunFolderGone: somebody removed or moved the run folder.
        """
        try:
            with self.signals:
                with self._log() as log:
                    if self._log_state is not None:
                        log.load_state_dict(self._log_state)
                    self._train(log)
                return self._conclude()
        except RunFolderGone as error:
            raise self._gone(error) from None
        except CannotWrite as error:
            try:
                check_run_lock(self.run)
            except RunFolderGone as gone:
                raise self._gone(gone) from error
            raise _placed_as(error, CannotWrite(f"{error.text}; {self._way_back()} once that is repaired")) from error
        except BrokenPipeError as error:  # `gcahng train | head`
            raise CannotWrite(f"what reads the run's output has gone ({error.strerror}); {self._way_back()}") from error
        except UnreadableImage as error:
            raise _placed_as(error, UnreadableImage(error.path, f"{error.reason}; {self._way_back()}")) from error

    def _log(self) -> RunLog:
        first = self.processes.first
        with self.processes.together():
            return (RunLog if first else NoLog)(self.run, self.config, self.trainer.step, self.trainer.device)

    def _train(self, log: RunLog) -> None:
        config, trainer = self.config, self.trainer
        while trainer.step < config.steps:
            try:
                losses = self.step_timer.train_step()
                evaluates = trainer.step % config.eval_every == 0 or trainer.step == config.steps
                writes = evaluates or trainer.step % config.log_every == 0
                if writes:  # so that nothing of a spoiled network is written or searched
                    trainer.settle()
            except NonFinite as error:
                self._stop_for(error, log)
            if losses:
                log.add(losses)
            if writes or not losses:
                with self.processes.together():
                    self._write_step(log, losses, writes)
            if evaluates:
                self._evaluate(log)
            stays = config.keep_every is not None and trainer.step % config.keep_every == 0
            stops = self._stop_wanted()
            if evaluates or stays or stops:
                self._save(log, stays=stays)
            if stops:
                self._interrupt()

    def _stop_wanted(self) -> bool:
        """Whether a signal has come, to any process, or the reader of the output has gone."""
        # After the last step the run is as good as done, so it ends whether somebody reads or not.
        unread = self.trainer.step < self.config.steps and self.terminal.nobody_reads()
        own = self.signals.received or (_SIGPIPE if unread else 0)
        self._stopped_by = self.processes.largest(own)
        return self._stopped_by > 0

    def _write_step(self, log: RunLog, losses: Mapping[str, Tensor], writes: bool) -> None:
        step, left_out = self.trainer.step, self.trainer.last_left_out
        if not losses and left_out is not None:
            log.nonfinite(left_out.step, left_out.values, left_out.images)
            self.terminal.status(f"left out: {left_out}")
        if not writes:
            return
        with self.step_timer.timing():  # here a GPU is waited for
            means = log.train(step)
        log.write(step, "system", self.step_timer.interval())
        self.terminal.losses(step, means)

    def _evaluate(self, log: RunLog) -> None:
        step = self.trainer.step
        for split in self.measured:
            self.latest[split] = metrics = self._measure(split).metrics
            with self.processes.together():
                log.write(step, split, metrics)
                self.terminal.evaluation(step, split, metrics)
        self.processes.on_first(lambda: self._measure_negatives(log))
        if self.selects_on is None:
            return
        metrics, name = self.latest[self.selects_on], _CHOOSES[self.selects_on]
        if not self.best or metrics[name] > self.best[self.selects_on][name]:
            self.best = {"step": step, self.selects_on: metrics}

    def _measure_negatives(self, log: RunLog) -> None:
        if negatives := self._probe.measure(self.trainer.model, self.trainer.objective):
            log.write(self.trainer.step, "negatives", negatives)

    def _measure(self, split: Split) -> Measured:
        trainer = self.trainer
        return measure(trainer.model, self.data, split, self.config, trainer.device, self.processes)

    def _save(self, log: RunLog, *, stays: bool) -> None:
        """Write last.pt after everything else. A run continues from it, and writes again what it wrote after it.

        Args:
            log: reaches the disk first.
            stays: whether a checkpoint of this step is written that is never replaced.
        """
        try:
            state = self.trainer.state_dict()
        except NonFinite as error:
            self._stop_for(error, log)
        self.processes.on_first(lambda: self._write_all(log, state, stays=stays))
        self._saved = self.trainer.step

    def _write_all(self, log: RunLog, state: dict[str, Any], *, stays: bool) -> None:
        log.flush()
        state |= {
            "best": self.best,
            "latest": self.latest,
            "log": log.state_dict(),
            "seconds": {
                "all": self._seconds(),
                "step": self.step_timer.seconds,
                "step_cpu": self.step_timer.cpu_seconds,
            },
            "resumed": self.resumed,
        }
        if self.best.get("step") == self.trainer.step:
            self._write("best", state)
        if stays:
            self._write(f"step-{self.trainer.step}", state)
        self._write("last", state, previous=checkpoint_path(self.run, "previous"))

    def _write(self, which: str, state: dict[str, Any], previous: Path | None = None) -> None:
        path = checkpoint_path(self.run, which)
        with writing(path.parent):
            path.parent.mkdir(exist_ok=True)
        weights = path.with_suffix(".safetensors")
        with writing(weights):
            save_model(weights, state["model"], self.config, step=state["step"], data_digest=state["data_digest"])
        save_checkpoint(path, state, previous=previous)

    def _interrupt(self) -> NoReturn:
        last = checkpoint_path(self.run, "last")
        raise TrainingInterrupted(
            self.trainer.step, self.config.steps, last, self.run, 128 + self._stopped_by, self.processes.count
        )

    def _stop_for(self, error: NonFinite, log: RunLog) -> NoReturn:
        log.nonfinite(error.step, error.values, error.images)
        in_row = max(self.config.skip_nonfinite, 2)
        raise error.with_advice(
            f"all are in {self.run / NONFINITE}; {self._way_back()} and repeats these steps, or leaves them out with "
            f"--skip_nonfinite {in_row + 1}; or start again with a smaller optimizer.lr or optimizer.clip_value"
        ) from None

    def _way_back(self) -> str:
        command = resume_command(self.run, self.processes.count)
        if self._saved is None:
            return f"there is no checkpoint yet; {command} starts again"
        return f"the last good checkpoint is of step {self._saved}; {command} continues from it"

    def _gone(self, error: RunFolderGone) -> RunFolderGone:
        way = "it had no checkpoint yet"
        if self._saved is not None:
            way = f"if it was moved, gcahng train --resume with its new place continues from step {self._saved}"
        return RunFolderGone(f"{error}; the run ends after step {self.trainer.step}; {way}")

    def _adopt_best(self) -> None:
        """Take over the best checkpoint, which may be of a later step than the one that the run continues from."""
        path = checkpoint_path(self.run, "best")
        instead = f"the best checkpoint is chosen again from step {self.trainer.step} on"
        self.best = self._of_best(lambda: load_checkpoint(path)["best"] if path.is_file() or self.best else {}, instead)

    def _of_best(self, read: Callable[[], dict[str, Any]], instead: str) -> dict[str, Any]:
        """What the first process reads of the best checkpoint; {}, with a warning, if it is damaged or gone."""
        try:
            return self.processes.on_first(read)
        except UserError as error:
            if isinstance(error, LostProcess):  # it ends the job
                raise
            self.terminal.warning(f"{error}; {instead}")
            return {}

    def _conclude(self) -> dict[str, Any]:
        config, trainer = self.config, self.trainer
        with self.processes.together():
            self.terminal.status("evaluating on the test classes")
        test, embeddings = self._measure("test")
        self.processes.on_first(lambda: draw_pictures(self.run, self.data, embeddings, config))
        of_best = test
        if self.best and self.best["step"] != trainer.step:
            of_best = self._measure_best()
        unreadable = trainer.unreadable()
        if self._stop_wanted():
            self._interrupt()
        summary = {
            "test": test,
            "test_best": of_best if self.best else None,
            "val": self.latest.get("val", {}),
            "best": self.best,
            "selected_on": self.selects_on,
            "steps": trainer.step,
            "left_out": trainer.left_out,
            "unreadable": unreadable,
            "resumed": self.resumed,
            "seconds": round(self._seconds(), 2),
            "step_seconds": round(self.step_timer.seconds, 3),
            "step_cpu_seconds": round(self.step_timer.cpu_seconds, 3),
            "loss": config.loss_title,
            "seed": config.seed,
            "data_digest": self.data.digest,
            "device": config.device,
            "threads": config.threads,
            "processes": self.processes.count,
            "versions": versions(),
        }
        return self.processes.on_first(lambda: self._write_summary(summary))

    def _measure_best(self) -> dict[str, float]:
        """The metrics of the best checkpoint on the test classes; where it is gone, nothing is the best."""
        path = checkpoint_path(self.run, "best")
        state = self._of_best(lambda: load_checkpoint(path)["model"], "the last checkpoint is the result")
        if state:
            self.trainer.model.load_state_dict(state)
            return self._measure("test").metrics
        self.best = {}
        return {}

    def _write_summary(self, summary: dict[str, Any]) -> dict[str, Any]:
        check_run_lock(self.run)
        with writing(self.run / SUMMARY):
            write_json(self.run / SUMMARY, summary)
        return {**summary, "out": str(self.run)}

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started


def _placed_as(error: UserError, more: UserError) -> UserError:
    """An error that says more than another, of the same process."""
    more.where = error.where
    return more
