"""The training step and everything that its next step depends on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gcahng.data import BalancedBatchSampler, DataSplits, InMemoryBatches
from gcahng.errors import UserError
from gcahng.train.backbones import build_backbone
from gcahng.train.config import TrainConfig, config_to_dict
from gcahng.train.losses import build_objective
from gcahng.train.optim import build_optimizer, prepare_step
from gcahng.train.versions import versions


class Trainer:
    """A run in progress: network, loss, optimiser, batches, and the step they have reached.

    Fresh weights come from torch's global generator, which the constructor seeds; `gcahng.train.fit` keeps the caller's
    generator out of it. A trainer that loads another's `state_dict` goes on with the same bits (on the CPU with the
    same number of threads).

    Args:
        config: with `device` resolved.
        data: the splits; training needs `train` only.
    """

    def __init__(self, config: TrainConfig, data: DataSplits) -> None:
        self.config, self.data_digest = config, data.digest
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        sampler = BalancedBatchSampler(
            data.train.labels, config.data.classes_per_batch, config.data.samples_per_class, config.seed
        )
        self.batches = InMemoryBatches(
            data.train, sampler, max_shift=config.data.max_shift, seed=config.seed, device=self.device
        )
        self.model = build_backbone(config.backbone).to(self.device)
        self.model.speed_up(channels_last=config.channels_last, compile=config.compile)
        self.objective = build_objective(config, data.train.num_classes).to(self.device)
        self.optimizer = build_optimizer(config, self.model, self.objective)
        self._stepped = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.step = 0

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step on the next batch; its losses, detached and 0-dim, no synchronisation with the device."""
        config = self.config
        prepare_step(config, self.step, self.model, self.optimizer)
        images, labels = self.batches.batch(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            embeddings = self.model(images).float()
            loss = self.objective(embeddings, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_value_(self._stepped, config.optimizer.clip_value)
        self.optimizer.step()
        logs = {"loss": loss.detach(), **self.objective.finish_step()}
        self.step += 1
        if self.step % config.steps_per_epoch == 0:
            self.objective.end_epoch()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, but for its schema number: tensors and plain values."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "versions": versions(),
            "config": config_to_dict(self.config),
            "data_digest": self.data_digest,
            "step": self.step,
            "model": self.model.state_dict(),
            "loss": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the trainer that gave `state` stood.

        Raises:
            UserError: the state belongs to other data.
        """
        if state["data_digest"] != self.data_digest:
            raise UserError(
                f"the checkpoint was trained on data {state['data_digest']} and these are {self.data_digest}: other "
                "options of data, or another version of matplotlib or its fonts"
            )
        self.model.load_state_dict(state["model"])
        self.objective.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step = state["step"]
