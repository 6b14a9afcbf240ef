"""Refuses a loss whose parameters another library has sharded over processes."""

from __future__ import annotations

import sys

import torch
from torch import nn

from gcahng.errors import UserError

FSDP = "torch.distributed.fsdp"


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
    fsdp = sys.modules[FSDP]
    sharded = any(isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)) for module in loss.modules())
    plain = all(isinstance(parameter, nn.Parameter) for parameter in (loss.classifier.weight, loss.classifier.bias))
    managed = any(type(parameter).__name__ == "DTensor" for parameter in loss.parameters())
    if sharded or managed or not plain:
        raise UserError(
            "FSDP shards the loss's parameters, and the loss steps its weights itself and needs them whole in every "
            'process; shard the network alone, and give the loss process_group="world"'
        )
