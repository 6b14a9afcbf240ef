"""Checkpoints: tensors and plain values in a versioned schema, read with weights_only=True."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gcahng.errors import UserError
from gcahng.files import atomic_write, regular_file, writing

# What a checkpoint of this schema holds:
#   schema int, versions dict[str, str], config dict, data_digest str, data_listing str | None, step int;
#   model, loss (with the graph network's and the classifier's optimizers, running means and draws), optimizer, scaler,
#   batches: state dicts; rng {"torch": Tensor, "cuda": Tensor | None};
#   processes int: how many trained; a run continues with any number. Older ones have rng_of_others in its place;
#   left_out {"all": int, "in_row": int}: steps left out because something was not finite;
#   best {"step": int, KIND: dict[str, float]}: of the best checkpoint so far, empty before the first; KIND is what
#     chose it, "val" or "test"; latest {KIND: dict[str, float]}: the last evaluation;
#   log {"sums": dict[str, Tensor], "steps": int}: losses that are not in metrics.jsonl yet;
#   seconds {"all": float, "step": float, "step_cpu": float}: time so far, over all sessions; resumed int: sessions
#     before this one.
# The steps of a schedule follow from `step`, those of the augmentation too.
SCHEMA = 2
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("config", "left_out", "model", "loss", "optimizer", "scaler", "batches", "rng"), dict),
    **dict.fromkeys(("versions", "best", "latest", "log", "seconds"), dict),
    "data_digest": str,
    "data_listing": (str, type(None)),
    "rng_of_others": list,
    "processes": int,
    "step": int,
    "resumed": int,
}
# What older checkpoints of this schema may lack.
_LATER = {"versions", "data_listing", "rng_of_others", "processes", "best", "latest", "log", "seconds", "resumed"}
FOLDER = "checkpoints"


class DamagedCheckpoint(UserError):
    """A file should be a checkpoint and cannot be read as one."""


def checkpoint_path(run: Path, which: str) -> Path:
    """The path of a run's checkpoint; `which` is "last", "previous", "best" or "step-N"."""
    return run / FOLDER / f"{which}.pt"


def save_checkpoint(path: Path, state: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        path: the file.
        state: what the checkpoint holds; the schema's number is added.
        previous: what a file that is at `path` already is renamed to; None: it is replaced.

    Raises:
        CannotWrite: the disk is full or the folder is read-only; the file that was at `path` is still whole.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save({"schema": SCHEMA, **state}, file)
        except RuntimeError as error:  # torch's zip writer puts its own error in the place of the file's
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    with writing(path):
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, write, previous=previous)


def find_checkpoint(run_or_checkpoint: Path, which: str = "last") -> Path:
    """The path of a checkpoint.

    Args:
        run_or_checkpoint: a run folder, or a checkpoint itself.
        which: the checkpoint of a run folder, "last" or "best".

    Raises:
        UserError: there is no such checkpoint.
    """
    if run_or_checkpoint.is_file():
        return run_or_checkpoint
    if not run_or_checkpoint.is_dir():
        raise UserError(f"{run_or_checkpoint} does not exist; name a run folder or a checkpoint file")
    path = checkpoint_path(run_or_checkpoint, which)
    if not path.is_file() and which == "last":  # killed between two renames
        path = checkpoint_path(run_or_checkpoint, "previous")
    if not path.is_file():
        hint = " (a run that selects nothing has none)" if which == "best" else ""
        raise UserError(
            f"{run_or_checkpoint} holds no {FOLDER}/{which}.pt{hint}; name a folder that gcahng train wrote"
        )
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        DamagedCheckpoint: the file is truncated, altered (its checksums tell), or no checkpoint of gcahng.
        UserError: the file cannot be read, or has another schema.
    """
    try:
        file = open(regular_file(path), "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        with file:
            with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums
                altered = archive.testzip()
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises what its file formats raise: zip, pickle and EOF errors among them
        raise DamagedCheckpoint(f"{path} is no checkpoint or is damaged ({type(error).__name__})") from error
    if altered is not None:
        raise DamagedCheckpoint(f"{path} is no checkpoint or is damaged (the checksum of {altered} is wrong)")
    if not isinstance(state, dict) or "schema" not in state:
        raise DamagedCheckpoint(f"{path} is no checkpoint that gcahng train wrote; it has no schema number")
    if state["schema"] != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {state['schema']}; this version of gcahng reads schema {SCHEMA}")
    return state


def check_contents(path: Path, state: dict[str, Any]) -> None:
    """Check that a checkpoint holds what a run continues from. Whether that fits a run is for the run to say.

    Args:
        path: the file, for errors.
        state: what `load_checkpoint` returned.

    Raises:
        UserError: something is missing or of another type.
    """
    for name, kind in _FIELDS.items():
        if name not in state and name in _LATER:
            continue
        value = state.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{path} has {name} of type {type(value).__name__}; it must be a checkpoint that gcahng train wrote"
            )
    seconds, log, best = state.get("seconds"), state.get("log"), state.get("best")
    whole = (
        (seconds is None or all(isinstance(seconds.get(name), (int, float)) for name in ("all", "step", "step_cpu")))
        and (log is None or (isinstance(log.get("sums"), dict) and isinstance(log.get("steps"), int)))
        and (not best or isinstance(best.get("step"), int))
        and all(isinstance(state["left_out"].get(name), int) for name in ("all", "in_row"))
    )
    if not whole or state["step"] < 0:
        raise UserError(
            f"{path} has step, seconds, log, best or left_out that cannot be so; it must be a checkpoint that gcahng "
            "train wrote"
        )


def newest_checkpoint(run: Path) -> tuple[Path | None, dict[str, Any], list[DamagedCheckpoint]]:
    """The newest checkpoint of a run that can be read.

    A damaged last.pt is renamed, so that the next checkpoint does not put it in the place of the one before.

    Returns:
        The path and the state, None and {} where the run has no checkpoint yet; and an error for each newer checkpoint,
        which is damaged.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    last, previous = (checkpoint_path(run, which) for which in ("last", "previous"))
    # The best one, and those that are never replaced.
    others = [path for path in (run / FOLDER).glob("*.pt") if path not in (last, previous)]
    damaged: list[DamagedCheckpoint] = []
    for paths in ([last], [previous], others):
        path, state = _newest_readable(paths, damaged)
        if path is None:
            continue
        if damaged and last.exists():
            with writing(last):
                os.replace(last, last.with_name("last.damaged"))
        return path, state, damaged
    if damaged:
        raise UserError(
            f"no checkpoint of {run} can be read ({'; '.join(map(str, damaged))}); start a new run with "
            f"gcahng train --config {run / 'config.yaml'} --out FOLDER"
        )
    return None, {}, damaged


def _newest_readable(paths: list[Path], damaged: list[DamagedCheckpoint]) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint of the latest step. Times of files say nothing: a clock may have been put back.

    Args:
        paths: of checkpoints, which need not exist.
        damaged: gets an error for each that cannot be read.

    Returns:
        The path and the state; None and {} where there is none.
    """
    newest: Path | None = None
    state: dict[str, Any] = {}
    for path in sorted(paths, key=_step_in_name, reverse=True):
        if not path.is_file() or _step_in_name(path) <= state.get("step", -1):
            continue
        try:
            candidate = load_checkpoint(path)
        except DamagedCheckpoint as error:
            damaged.append(error)
            continue
        if newest is None or candidate["step"] > state["step"]:
            newest, state = path, candidate
    return newest, state


def _step_in_name(path: Path) -> float:
    """N of step-N.pt; infinite where only the file itself says it."""
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else math.inf
