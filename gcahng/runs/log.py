"""What a run logs: metrics.jsonl, TensorBoard events and, where it is asked for, Weights & Biases."""

from __future__ import annotations

import inspect
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gcahng.config import TrainConfig, config_to_dict
from gcahng.errors import UserError, UserNote
from gcahng.extras import require
from gcahng.files import atomic_write, regular_file, sync, write_text, writing
from gcahng.runs.records import parse_line, parse_record
from gcahng.runs.run_folder import check_run_lock

METRICS, NONFINITE = "metrics.jsonl", "nonfinite.jsonl"
_WANDB_CURE = "run `wandb login`, or set WANDB_API_KEY, or set WANDB_MODE=offline and send it later with `wandb sync`"


class RunLog:
    """Writes a run's losses and metrics, as lines of metrics.jsonl and as TensorBoard events.

    A line is one of

    - {"step": …, "kind": "train", "loss": …, "J_m": …, …}: means over the steps since the line before,
    - {"step": …, "kind": "system", "images_per_second": …, …},
    - {"step": …, "kind": "negatives", …}, see `gcahng.evaluation.hardness`,
    - {"step": …, "kind": "val" or "test", "recall@1": …, "map@r": …, …}.

    Steps that were not finite are lines of nonfinite.jsonl.

    The constructor removes what the run wrote after the checkpoint that it continues from.

    Args:
        run: the run folder.
        config: the options of the run.
        step: of the checkpoint; 0: the run begins.
        device: of the losses.

    Raises:
        CannotWrite: the disk is full or the folder is read-only; every method that writes raises it too.
        RunFolderGone: of methods that write: the run folder that this process holds is no longer there.
    """

    def __init__(self, run: Path, config: TrainConfig, step: int, device: torch.device) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run, self._device = run, device
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        with writing(run / METRICS):
            for name in (METRICS, NONFINITE):
                _cut(run / name, step)
            self._file = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115  # closed by __exit__
        with writing(run / "tensorboard"):
            purge = {"purge_step": step + 1} if (run / "tensorboard").exists() else {}
            self._events = SummaryWriter(str(run / "tensorboard"), **purge)
        self._wandb = None if config.wandb is None else _wandb_run(run, config)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))
        # The error that ended the run is what the user should see, not one of closing the files.
        with writing(self._run / METRICS) if kind is None else suppress(OSError):
            self._file.close()
            self._events.close()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of one step (0-dim tensors) without reading them from the device."""
        for name, value in losses.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def train(self, step: int) -> dict[str, float]:
        """Write and return the means of the losses added since the last call; {} where all steps were left out."""
        means: dict[str, float] = {}
        if self._steps:
            values = (torch.stack(list(self._sums.values())) / self._steps).tolist()
            means = dict(zip(self._sums, values, strict=True))
            self.write(step, "train", means)
        self._sums, self._steps = {}, 0
        return means

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write a line.

        Args:
            step: of the run.
            kind: what the values are: train, system, negatives, val or test.
            values: by name; lists, such as histograms, go to metrics.jsonl only.
        """
        check_run_lock(self._run)
        scalars = {name: value for name, value in values.items() if not isinstance(value, list)}
        with writing(self._run / METRICS):
            self._reopen_if_replaced()
            self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self._file.flush()
        with writing(self._run / "tensorboard"):
            for name, value in scalars.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in scalars.items()}, step=step)

    def _reopen_if_replaced(self) -> None:
        """Go on in the file that is there now, for example after an editor has written a new one in its place."""
        path = self._run / METRICS
        try:
            if os.path.samestat(os.stat(path), os.fstat(self._file.fileno())):
                return
        except FileNotFoundError:
            warnings.warn(
                f"{path} was removed; the run goes on in a new one, without the lines so far", UserNote, stacklevel=4
            )
        self._file.close()
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by __exit__

    def nonfinite(self, step: int, values: Mapping[str, float], images: list[str]) -> None:
        """Write a line of nonfinite.jsonl.

        Args:
            step: that was not finite.
            values: those that are not finite, by name.
            images: the names of the images of its batch.
        """
        texts = {name: str(value) for name, value in values.items()}
        with writing(self._run / NONFINITE), open(self._run / NONFINITE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "values": texts, "images": images}) + "\n")

    def flush(self) -> None:
        """Bring all lines to the disk, so that no checkpoint is ahead of them."""
        check_run_lock(self._run)
        with writing(self._run / METRICS):
            sync(self._file, self._run / METRICS)
        with writing(self._run / "tensorboard"):
            self._events.flush()

    def state_dict(self) -> dict[str, Any]:
        """The losses that are in no line yet."""
        return {"sums": dict(self._sums), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums = {name: value.to(self._device) for name, value in state["sums"].items()}
        self._steps = state["steps"]


class NoLog(RunLog):
    """The log of a process that leaves writing to another."""

    def __init__(self, run: Path, config: TrainConfig, step: int, device: torch.device) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def add(self, losses: Mapping[str, Tensor]) -> None: ...
    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None: ...
    def nonfinite(self, step: int, values: Mapping[str, float], images: list[str]) -> None: ...
    def flush(self) -> None: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def train(self, step: int) -> dict[str, float]:
        return {}


def _cut(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a torn end, as a kill or a power failure leaves one.

    All lines up to `step` were on the disk before the checkpoint of `step` was written. So if one of them follows a
    broken line, the file was damaged in another way, and nothing is removed.

    Raises:
        UserError: it was.
    """
    if not path.exists():
        return
    lines = regular_file(path).read_bytes().splitlines(keepends=True)
    parse = parse_record if path.name == METRICS else parse_line
    records = [parse(line) if line.endswith(b"\n") else None for line in lines]
    belongs = [record is not None and record["step"] <= step for record in records]
    kept = belongs.index(False) if False in belongs else len(lines)
    if any(belongs[kept:]):
        raise UserError(f"{path} line {kept + 1} is damaged; restore the file or remove that line, and resume again")
    if len(content := b"".join(lines[:kept])) != path.stat().st_size:
        atomic_write(path, lambda file: file.write(content))


def check_wandb(project: str) -> None:
    """See that Weights & Biases can be used, before a run is begun for it.

    Args:
        project: where the run goes.

    Raises:
        UserError: it is not installed, or has no key and is to send what it gets at once.
    """
    require("wandb", extra="wandb", purpose=f"wandb is {project!r}: losses are sent to Weights & Biases")
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    # Older versions ask on a terminal, where no key is stored; newer ones would say more if they might ask.
    options = {"prompt": False, "verify": False}
    known = inspect.signature(wandb.login).parameters
    try:
        ready = wandb.login(**{name: value for name, value in options.items() if name in known})
    except wandb.Error as error:
        raise UserError(f"wandb is {project!r}, and Weights & Biases refuses it: {error}; {_WANDB_CURE}") from None
    if not ready:
        raise UserError(f"wandb is {project!r}, and Weights & Biases has no key here; {_WANDB_CURE}")


def _wandb_run(run: Path, config: TrainConfig) -> Any:
    """A run of Weights & Biases, the same one when training is resumed. Of a step sent twice it shows the first."""
    import wandb

    identity = run / "wandb-id"
    if not identity.exists():
        with writing(identity):
            write_text(identity, uuid.uuid4().hex)
    return wandb.init(
        project=config.wandb,
        id=identity.read_text(),
        name=run.name,
        dir=str(run),
        config=config_to_dict(config),
        resume="allow",
    )
