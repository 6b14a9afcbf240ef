"""Which implementation computes the passes of the loss."""

from __future__ import annotations

from types import ModuleType

import torch

from gcahng.errors import UserError


def passes_for(impl: str, device: torch.device) -> ModuleType:
    """The module with metric_pass, generator_pass and generate for this implementation."""
    if impl in ("auto", "reference"):
        from gcahng.reference import passes

        return passes
    raise UserError(f"impl={impl!r} is not there for the loss on {device.type} yet; impl='reference' (or 'auto') is")
