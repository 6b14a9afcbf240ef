"""Refuses sizes that do not fit into memory before anything of such a size is made."""

from __future__ import annotations

import torch

from gcahng.bounds import format_bytes
from gcahng.engine import plan
from gcahng.engine.free_memory import free_memory
from gcahng.engine.step_size import StepSize
from gcahng.errors import UserError

# Below this many bytes nothing is asked of the system.
_SMALL = 2**28


def check_fits(what: str, needed: int, device: torch.device | str | None = None) -> None:
    """See that there is room for what is about to be made.

    Args:
        what: names what needs it, and its sizes.
        needed: bytes.
        device: where it is made; None: torch's default device.

    Raises:
        UserError: more is needed than is free.
    """
    if needed < _SMALL:
        return
    device = torch.get_default_device() if device is None else torch.device(device)
    free = free_memory(device)
    if free is not None and needed > free:
        raise UserError(
            f"{what} needs {format_bytes(needed)} of memory, and {format_bytes(free)} are free on {device}; it must be "
            "smaller"
        )


def check_weights(dim: int, layers: int, classes: int) -> None:
    """See that there is room for the weights of a graph network and a classifier on torch's default device.

    Args:
        dim: channels D.
        layers: layers L.
        classes: training classes M.

    Raises:
        UserError: there is none. The message says what they and the state of training need.
    """
    state = plan.state_bytes(StepSize(batch=4, dim=dim, layers=layers, views=2, classes=classes))
    check_fits(
        f"the loss with embedding_dim {dim:,}, layers {layers:,} and num_classes {classes:,} (its state in training "
        f"has {format_bytes(state)})",
        state // 4,
    )


def check_step(size: StepSize, device: torch.device | str, memory: str = "recompute") -> None:
    """See that there is room for a training step.

    Args:
        size: of the step.
        device: that it runs on.
        memory: store, hidden or recompute, which needs least.

    Raises:
        UserError: `gcahng plan` foresees that it needs more than is free.
    """
    check_fits(
        f"a step with a batch of {size.batch:,} in classes of {size.views:,}, embedding_dim {size.dim:,}, layers "
        f"{size.layers:,} and {size.classes:,} classes (as gcahng plan counts, with edge_memory {memory!r})",
        plan.state_bytes(size) + plan.expected_bytes(size, memory),
        device,
    )
