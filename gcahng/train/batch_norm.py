"""BatchNorm over a batch that several processes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
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
        out, mean, variance = _Normalize.apply(x, self.weight, self.bias, self.eps, self._ranks)
        self._follow(mean, variance, self._ranks.count * x.numel() // x.shape[1])
        return out.to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        pace = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, pace)
        self.running_var.lerp_(variance * (samples / (samples - 1)), pace)


class _Normalize(torch.autograd.Function):
    """Normalizes by the statistics of all processes, with the fused calls of torch's own BatchNorm on the CPU.

    The forward pass gathers each process's mean and variance (2 C numbers), the backward pass adds up as many sums.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = ranks.gather(torch.stack(torch.batch_norm_update_stats(x, None, None, 0.0))[None]).unbind(1)
        mean = means.mean(0)
        # Between the processes and within them. A difference of large sums would lose what is small.
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.mark_non_differentiable(mean, variance)
        return _scaled(x, mean, variance, weight, bias, eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """x' = w r (y' - mean(y') - x̂ mean(x̂ y')), r = 1 / sqrt(variance + eps), with means over all processes.

        torch's backward pass for constant statistics gives the sums of x̂ y' and y' of this process. The rest is linear
        in y' and in x, and takes a pass over each.
        """
        x, weight, mean, variance = ctx.saved_tensors
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, None, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack((for_weight, for_bias))
        ctx.ranks.add_up(sums)
        of_x, of_ones = sums.mul_(x.shape[1] / (ctx.ranks.count * x.numel()))
        slope = of_x / -(variance + ctx.eps)
        if weight is not None:
            slope *= weight
        own = _scaled(gradient, of_ones, variance, weight, -mean * slope, ctx.eps)
        own.addcmul_(x, slope.view(-1, *[1] * (x.dim() - 2)))
        return own, None if weight is None else for_weight, None if weight is None else for_bias, None, None


def _scaled(
    x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, by channels."""
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


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
