"""The loss in Lightning: a callback that steps its generator.

class Model(LightningModule):
    def __init__(self):
        self.gca = GCAHNGLoss(num_classes, embedding_dim)       # a submodule: checkpoints hold it
    def training_step(self, batch, _):
        return self.gca(self.network(batch[0]), batch[1])
    def configure_optimizers(self):
        return AdamW(self.network.parameters())                 # not self.parameters()

Trainer(callbacks=[GeneratorCallback()]).fit(Model(), loader)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from gcahng.errors import UserError
from gcahng.integrations.optimizers import check_optimizers
from gcahng.losses.gca_hng import GCAHNGLoss

# The same library under the names of its two packages. The one that is installed is taken, `lightning` first.
if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
else:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

CURE = "configure_optimizers must give it the network's parameters (and loss.base_parameters()), not self.parameters()"


class GeneratorCallback(Callback):
    """Steps the generator of GCA-HNG after each backward, and ends the loss's epochs with those of the trainer.

    It works in automatic and in manual optimization, and logs J_m, J_gen and the other terms. The loss must be a
    submodule of the LightningModule: then its state is in every checkpoint, and on its device.

    Args:
        loss: the loss; None finds the only GCAHNGLoss of the LightningModule.
        log: whether the terms are logged, as "gca/J_m" and so on.

    Raises:
        UserError: (from trainer.fit) there is no such loss or several, an option of the trainer does not fit, or an
            optimizer holds the loss's parameters.
    """

    def __init__(self, loss: GCAHNGLoss | None = None, log: bool = True) -> None:
        self.loss, self.log = loss, log

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be 1: each batch is a graph of "
                "its own"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise UserError(
                f"the strategy is {type(trainer.strategy).__name__}, which shards the loss with the module; it "
                "must be a single device or DDP (in a loop of your own, fully_shard the network alone)"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loss = self._of(pl_module)  # only now: the module may make it in its own `setup`
        check_optimizers(self.loss, trainer.optimizers, CURE)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (pl_module.automatic_optimization or self.loss.awaits_step):
            return  # the backward was that of another loss
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        logs = self.loss.generator_step(scaler)
        if self.log:
            pl_module.log_dict({f"gca/{name}": value for name, value in logs.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.loss.steps_per_epoch is None:
            self.loss.end_epoch()

    def _of(self, pl_module: LightningModule) -> GCAHNGLoss:
        """The loss, which must be a part of the module."""
        losses = [module for module in pl_module.modules() if isinstance(module, GCAHNGLoss)]
        if self.loss is None and len(losses) == 1:
            return losses[0]
        if self.loss is None:
            raise UserError(
                f"{type(pl_module).__name__} has {len(losses)} submodules that are a GCAHNGLoss; it must have one, or "
                "GeneratorCallback(loss) must name it"
            )
        if not any(module is self.loss for module in losses):
            raise UserError(
                f"the loss of GeneratorCallback is no submodule of {type(pl_module).__name__}; it must be one, so that "
                "checkpoints hold it and it moves to the device"
            )
        return self.loss
