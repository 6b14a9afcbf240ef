"""The loop's optimizer: its groups, its schedule and its warm-up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gcahng.config import TrainConfig
from gcahng.errors import UserError
from gcahng.losses.optimizers import check_state, read_group
from gcahng.models.backbones import Backbone
from gcahng.train.losses import Objective, proxy_lr


def build_optimizer(config: TrainConfig, model: Backbone, objective: Objective) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of the network, and over the loss's proxies with a learning rate of their own
    and no weight decay.

    Args:
        config: of the run.
        model: the network.
        objective: the loss.
    """
    groups = [{"params": model.trainable(), "base_lr": config.optimizer.lr}]
    if proxies := objective.proxies():
        groups.append({"params": proxies, "base_lr": proxy_lr(config), "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)


def load_optimizer(optimizer: torch.optim.AdamW, state: Mapping[str, Any]) -> None:
    """Continue with the state of another optimizer, which is checked first.

    Args:
        optimizer: that of `build_optimizer`.
        state: a state dict of such an optimizer.

    Raises:
        UserError: it does not fit, or one cannot go on with it.
        KeyError, TypeError, ValueError, RuntimeError: it is malformed.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    counts = [[len(group["params"]) for group in groups] for groups in (saved, own)]
    if counts[0] != counts[1]:
        raise UserError(f"its optimizer has groups of {counts[0]} weights; they must have {counts[1]}")
    for given, group in zip(saved, own, strict=True):
        cure = "the network must be that of the checkpoint"
        check_state(read_group(given, state["state"], group["params"]), group["params"], cure)
        if not 0 <= float(given["base_lr"]) < math.inf:
            raise UserError(f"its optimizer has base_lr {given['base_lr']}; it must be a finite number of at least 0")
    optimizer.load_state_dict(dict(state))


def lr_factor(config: TrainConfig, step: int) -> float:
    """The factor by which the schedule multiplies every learning rate.

    cosine: ½ (1 + cos(π step / steps)), which changes at every step. step: γ^⌊epoch / step_epochs⌋ with
    epoch = ⌊step / steps_per_epoch⌋, where the epochs of warm-up count.

    Args:
        config: of the run.
        step: counted from 0.
    """
    if config.optimizer.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / config.steps))
    if config.optimizer.schedule == "step":
        epoch = step // config.steps_per_epoch
        return config.optimizer.step_gamma ** (epoch // config.optimizer.step_epochs)
    return 1.0


def prepare_step(config: TrainConfig, step: int, model: Backbone, optimizer: torch.optim.Optimizer) -> None:
    """Set the learning rates of a step, and whether the network's body trains in it.

    During warm-up the body is left out of the graph. Its parameters get no gradient, so that AdamW changes neither them
    nor their moments, and applies no weight decay. Its BatchNorm2d still follow the batches unless they are frozen.

    Args:
        config: of the run.
        step: counted from 0.
        model: the network.
        optimizer: that of `build_optimizer`.
    """
    factor = lr_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
    model.train_body(step >= config.optimizer.warmup_epochs * config.steps_per_epoch)
