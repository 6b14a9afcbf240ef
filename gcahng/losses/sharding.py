"""Refuses a loss whose parameters another library has sharded over processes."""

from __future__ import annotations

import sys
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from gcahng.errors import UserError

FSDP = "torch.distributed.fsdp"


class _Seen(NamedTuple):
    """What a loss looked like when it was found whole. Sharding changes some of it.

    References are weak, since a module may hold the loss.

    Attributes:
        weights: those of the classifier and of the network's class head.
        modules: the modules of the loss, and the class of each.
    """

    weights: list[ref[Tensor]]
    modules: list[tuple[ref[nn.Module], type]]

    def still_holds(self, loss: nn.Module) -> bool:
        """Whether nothing has changed. It takes a few microseconds, since every batch asks."""
        same = all(seen() is weight for seen, weight in zip(self.weights, _weights(loss), strict=True))
        return same and all(type(module()) is kind for module, kind in self.modules)


def _weights(loss: nn.Module) -> tuple[Tensor, Tensor]:
    return loss.classifier.weight, loss.graph_network.class_head.weight


_whole: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


def check_whole(loss: nn.Module) -> None:
    """Checks that each parameter of the loss is whole, and its own.

    `fully_shard` (FSDP2) gives a module's class another base, and FullyShardedDataParallel (FSDP1) puts views of one
    flat parameter in the place of the parameters.

    Args:
        loss: the loss.

    Raises:
        UserError: FSDP has sharded it.
    """
    if torch.compiler.is_compiling() or FSDP not in sys.modules:
        return
    if (seen := _whole.get(loss)) is not None and seen.still_holds(loss):
        return
    fsdp = sys.modules[FSDP]
    sharded = any(isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in loss.modules())
    plain = all(isinstance(parameter, nn.Parameter) for parameter in (loss.classifier.weight, loss.classifier.bias))
    managed = any(type(parameter).__name__ == "DTensor" for parameter in loss.parameters())
    if sharded or managed or not plain:
        raise UserError(
            "FSDP shards the loss's parameters, and the loss steps its weights itself and needs them whole in every "
            'process; shard the network alone, and give the loss process_group="world"'
        )
    parts = [(ref(module), type(module)) for module in loss.modules()]
    _whole[loss] = _Seen([ref(weight) for weight in _weights(loss)], parts)
