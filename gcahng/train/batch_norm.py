"""BatchNorm over a batch that several processes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gcahng.engine.ranks import Ranks
from gcahng.errors import UserError

_SHAREABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SharedBatchNorm(_BatchNorm):
    """What nn.SyncBatchNorm, which needs GPUs, is for the CPU.

    In training it normalizes by mean and variance over the parts of all processes, which are equally large.

    Args:
        arguments: of a BatchNorm.
        ranks: the processes.
    """

    def __init__(self, *arguments: Any, ranks: Ranks) -> None:
        super().__init__(*arguments)
        self._ranks = ranks

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions

    def forward(self, input: Tensor) -> Tensor:
        """(n / count, C, …), the part of this process → the same shape."""
        if not self.training:
            return super().forward(input)
        x = input.to(self.running_mean.dtype) if self.running_mean is not None else input
        others = [0, *range(2, x.ndim)]
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean = self._mean(x.mean(others))
        centered = x - mean.view(shape)
        variance = self._mean(centered.square().mean(others))
        self._follow(mean.detach(), variance.detach(), self._ranks.count * x.numel() // x.shape[1])
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        normalized = centered * scale.view(shape)
        if self.bias is not None:
            normalized = normalized + self.bias.view(shape)
        return normalized.to(input.dtype)

    def _mean(self, own: Tensor) -> Tensor:
        return _Sum.apply(own, self._ranks) / self._ranks.count

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        pace = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, pace)
        self.running_var.lerp_(variance * (samples / (samples - 1)), pace)


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of all their gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        total = own.clone()
        ranks.add_up(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        ctx.ranks.add_up(total)
        return total, None


def share_batch_norm(model: nn.Module, ranks: Ranks, name: str) -> None:
    """Replace each BatchNorm of a model that is in training mode by a shared one, with the same parameters and buffers.

    Args:
        model: in training mode, on its device.
        ranks: the processes.
        name: of the network, for the error.

    Raises:
        UserError: a BatchNorm is of a class that has no shared form.
    """
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if not isinstance(child, _BatchNorm) or not child.training:
                continue
            if type(child) not in _SHAREABLE:
                raise UserError(
                    f"backbone.name is {name}, whose {type(child).__name__} cannot be shared among processes; set "
                    "backbone.freeze_bn to true, or train in one process"
                )
            setattr(module, child_name, _shared(child, ranks))


def _shared(norm: _BatchNorm, ranks: Ranks) -> _BatchNorm:
    arguments = norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    if any(tensor.is_cuda for tensor in (*norm.parameters(), *norm.buffers())):
        shared: _BatchNorm = nn.SyncBatchNorm(*arguments, process_group=ranks.group)
    else:
        shared = SharedBatchNorm(*arguments, ranks=ranks)
    shared.weight, shared.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(shared, name, buffer)
    return shared.train(norm.training)
