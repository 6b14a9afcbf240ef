"""metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gcahng.errors import UserError


class RunLog:
    """Writes a run's losses and metrics, as lines of metrics.jsonl and as TensorBoard events.

    A line is {"step": …, "kind": "train", "loss": …, "J_m": …, …}, each the mean over the steps since the line before,
    or {"step": …, "kind": "val", "recall@1": …, "map@r": …, …}, or {"step": …, "kind": "negatives", …} with what
    `gcahng.train.hardness.negatives_record` gives.
    """

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._file = open(run / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  # closed by __exit__
        self._events = SummaryWriter(str(run / "tensorboard"))
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._events.close()

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses of one step, 0-dim tensors, without reading them from the device."""
        for name, value in losses.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1

    def train(self, step: int) -> dict[str, float]:
        """Write and return the means of the losses added since the last call.

        Raises:
            UserError: one is not finite.
        """
        values = (torch.stack(list(self._sums.values())) / self._steps).tolist()
        means = dict(zip(self._sums, values, strict=True))
        self._sums, self._steps = {}, 0
        for name, value in means.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at or shortly before step {step}; a smaller optimizer.lr or "
                    "optimizer.clip_value, or precision=fp32, may help"
                )
        self._write(step, "train", means)
        return means

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics on the validation classes."""
        self._write(step, "val", metrics)
        self._events.flush()

    def negatives(self, step: int, values: Mapping[str, Any]) -> None:
        """Write what is known of the generated negatives, unless that is nothing."""
        if values:
            self._write(step, "negatives", values)

    def _write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if not isinstance(value, list):  # a histogram is for the report
                self._events.add_scalar(f"{kind}/{name}", value, step)
