"""Checkpoints: a versioned schema of tensors and plain values, read with weights_only=True."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gcahng.errors import UserError
from gcahng.train.files import atomic_write

# What a checkpoint of this schema holds:
#   schema int, versions dict[str, str], config dict, data_digest str, step int;
#   model, loss, optimizer, batches: state dicts; rng {"torch": Tensor, "cuda": Tensor | None};
#   best {"step": int, "val": dict[str, float]}: of the best checkpoint so far, empty before the first.
SCHEMA = 1
FOLDER = "checkpoints"


def checkpoint_path(run: Path, which: str) -> Path:
    """Where a run folder keeps its checkpoint `which`, "last" or "best"."""
    return run / FOLDER / f"{which}.pt"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` and the schema's number, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, lambda file: torch.save({"schema": SCHEMA, **state}, file))


def find_checkpoint(run_or_checkpoint: Path, which: str = "last") -> Path:
    """A checkpoint file: the path itself, or the checkpoint `which` of a run folder.

    Raises:
        UserError: there is none.
    """
    if run_or_checkpoint.is_file():
        return run_or_checkpoint
    if not run_or_checkpoint.is_dir():
        raise UserError(f"{run_or_checkpoint} does not exist; name a run folder or a checkpoint file")
    path = checkpoint_path(run_or_checkpoint, which)
    if not path.is_file():
        raise UserError(f"{run_or_checkpoint} holds no {FOLDER}/{which}.pt; name a folder that gcahng train wrote")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: unreadable, truncated, no checkpoint of gcahng, or of another schema.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # torch.load raises what its file formats raise: zip, pickle and EOF errors among them
        raise UserError(f"{path} is no checkpoint or is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or "schema" not in state:
        raise UserError(f"{path} is no checkpoint that gcahng train wrote; it has no schema number")
    if state["schema"] != SCHEMA:
        raise UserError(f"{path} has checkpoint schema {state['schema']}; this version of gcahng reads schema {SCHEMA}")
    return state
