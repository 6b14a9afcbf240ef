"""The loss's running means and counters, in a form that survives the averaging of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FIRST_MEAN = 1e6
# A mean is kept as mean · weight beside its weight: 1 once an epoch has ended. Averages over a run (AveragedModel with
# use_buffers=True, Lightning's WeightAveraging) average both, and their ratio is then the mean over the epochs that
# have ended. The first epoch's stand-in weighs next to nothing among them.
_FIRST_WEIGHT = 2.0**-60
_MEANS = ("_mean_metric", "_mean_generator")
_SUMS = ("_metric_sum", "_generator_sum")
_STEPS = "_counted_steps"


class RunningMeans(nn.Module):
    """What the loss counts: draws, the losses of this epoch, and the means of the one before."""

    draw: Tensor
    _counted_steps: Tensor

    def _start_counting(self) -> None:
        """Makes the buffers."""
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64))
        for mean in _MEANS:
            self.register_buffer(mean, torch.tensor(FIRST_MEAN * _FIRST_WEIGHT))
            self.register_buffer(f"{mean}_weight", torch.tensor(_FIRST_WEIGHT))
        for total in _SUMS:
            self.register_buffer(total, torch.tensor(0.0))
        # On the device, where a captured step counts too, and a float, as the sums that it belongs to.
        self.register_buffer(_STEPS, torch.tensor(0.0))

    @property
    def mean_metric(self) -> Tensor:
        """J̄_m, the mean of J_m over the previous epoch, 0-dim (1e6 in the first)."""
        return self._mean_metric / self._mean_metric_weight

    @mean_metric.setter
    def mean_metric(self, value: float | Tensor) -> None:
        self._set_mean("_mean_metric", value)

    @property
    def mean_generator(self) -> Tensor:
        """J̄_gen, the mean of J_gen over the previous epoch, 0-dim (1e6 in the first)."""
        return self._mean_generator / self._mean_generator_weight

    @mean_generator.setter
    def mean_generator(self, value: float | Tensor) -> None:
        self._set_mean("_mean_generator", value)

    def _set_mean(self, name: str, value: float | Tensor) -> None:
        getattr(self, name).copy_(_float64(value))
        getattr(self, f"{name}_weight").fill_(1.0)

    def _count_losses(self, metric: Tensor, generator: Tensor) -> None:
        """Counts a step.

        Args:
            metric: J_m, 0-dim.
            generator: J_gen, 0-dim.
        """
        self._metric_sum.add_(metric)
        self._generator_sum.add_(generator)
        self._counted_steps.add_(1)

    def _roll_means(self) -> None:
        """Puts the epoch's means in force. After an epoch without steps the old ones stay."""
        count = self._counted_steps
        for name, total in zip(_MEANS, _SUMS, strict=True):
            mean, weight, total = getattr(self, name), getattr(self, f"{name}_weight"), getattr(self, total)
            mean.copy_(torch.where(count > 0, total / count, mean))
            weight.copy_(torch.where(count > 0, 1.0, weight))
            total.zero_()
        count.zero_()

    def _keep_counters(self, before: Mapping[str, Tensor]) -> None:
        """Undoes what a move to another dtype has done to counters, which low precision does not hold.

        Args:
            before: the buffers before the move.
        """
        for name, old in before.items():
            now = getattr(self, name)
            if old.is_meta and not now.is_meta:  # to_empty: what is there now is no number
                now.fill_(_first_value(name))
            elif now.dtype not in ((torch.float32, torch.float64) if old.is_floating_point() else (old.dtype,)):
                setattr(self, name, old.to(now.device))


def _first_value(name: str) -> float:
    if name in _MEANS:
        return FIRST_MEAN * _FIRST_WEIGHT
    return _FIRST_WEIGHT if name.endswith("_weight") else 0.0


def upgrade_means(state: dict[str, Any], extra: Any) -> None:
    """Brings the means and counters of a state dict of version 1 into today's form, in place.

    There a mean had no weight, and the steps of the epoch were part of the extra state.

    Args:
        state: the loss's state dict.
        extra: its extra state, if it has one.
    """
    for name in _MEANS:
        mean, weight = state.get(name), state.get(f"{name}_weight")
        weighted = f"{name}_weight" in state
        if not _is_scalar(mean) or (weighted and not (_is_scalar(weight) and weight.item() == 0)):
            continue
        # A weight of 0 is that of a first epoch in a state dict that was rounded to float16.
        first = weighted or mean.item() == FIRST_MEAN
        state[name] = torch.full_like(mean, FIRST_MEAN * _FIRST_WEIGHT, dtype=torch.float64) if first else mean
        state[f"{name}_weight"] = torch.full_like(mean, _FIRST_WEIGHT if first else 1.0, dtype=torch.float64)
    sums = [state[name] for name in _SUMS if name in state]
    if _STEPS in state or len(sums) < len(_SUMS) or not all(map(_is_scalar, sums)):
        return
    steps = extra.get("steps_in_epoch") if isinstance(extra, Mapping) else None
    if type(steps) is int and 0 <= steps < 2**53:
        state[_STEPS] = torch.full_like(sums[0], steps, dtype=torch.float64)
    elif extra is None:  # sums of an unknown number of steps: the epoch starts anew
        state |= {name: torch.zeros_like(state[name]) for name in (*_SUMS, _STEPS) if name in state}
        state[_STEPS] = torch.zeros_like(sums[0])


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point() and not value.is_meta


def _float64(value: float | Tensor) -> Tensor:
    """A number as a float64 tensor on the host, whatever torch's default device; a tensor stays where it is."""
    return (
        value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")
    )
