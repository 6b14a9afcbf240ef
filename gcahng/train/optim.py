"""The loop's optimiser: its groups, its schedule, and what is frozen when."""

from __future__ import annotations

import math

import torch
from torch import nn

from gcahng.train.config import TrainConfig
from gcahng.train.losses import Objective, proxy_lr


def build_optimizer(config: TrainConfig, model: nn.Module, objective: Objective) -> torch.optim.AdamW:
    """AdamW over the network, and over the loss's proxies with their own rate and no weight decay."""
    groups = [{"params": list(model.parameters()), "base_lr": config.optimizer.lr}]
    if proxies := objective.proxies():
        groups.append({"params": proxies, "base_lr": proxy_lr(config), "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay)


def prepare_step(config: TrainConfig, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Set the learning rates of step `step` (the first is 0), and what of the network trains in it."""
    factor = 1.0
    if config.optimizer.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    for group in optimizer.param_groups:
        group["lr"] = factor * group["base_lr"]
