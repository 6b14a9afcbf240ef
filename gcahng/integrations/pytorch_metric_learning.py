"""The loss with the calling convention of pytorch-metric-learning, and hooks for its trainers.

    from gcahng.integrations.pytorch_metric_learning import GCAHNGMetricLoss, trainer_hooks

    loss = GCAHNGMetricLoss(num_classes, embedding_dim, base=MultiSimilarityLoss(), miner=MultiSimilarityMiner())
    trainer = MetricLossOnly(models, optimizers, batch_size, {"metric_loss": loss}, ..., **trainer_hooks(loss))

Nothing here imports pytorch-metric-learning: versions 2 and 3 call losses alike. Trainers exist in version 2 only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gcahng.errors import UserError
from gcahng.losses.base import IndicesTuple
from gcahng.losses.gca_hng import GCAHNGLoss

Hook = Callable[[Any], Any]


class GCAHNGMetricLoss(GCAHNGLoss):
    """GCAHNGLoss, called as pytorch-metric-learning calls its losses.

    It fits into MultipleLosses, trainers and loops that are written for those losses. It takes the arguments of
    GCAHNGLoss, and everything else of it is unchanged: after each backward, call `generator_step`.
    """

    def forward(  # type: ignore[override]
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        u: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss for the user's model; see GCAHNGLoss.forward.

        Args:
            embeddings: (n, D).
            labels: whole numbers (n,); every class has K samples.
            indices_tuple: what a miner found, for the base loss.
            ref_emb: must be None.
            ref_labels: must be None.
            u: mixing draws (K, K - 1) in the place of the loss's own.

        Raises:
            UserError: there are no labels, or there is a reference set.
        """
        if labels is None:
            raise UserError("labels is None; GCA-HNG needs the class of every row of the batch")
        if ref_emb is not None or ref_labels is not None:
            raise UserError(
                "ref_emb is given; it must be None: GCA-HNG works on the complete graph of one batch, so that "
                "CrossBatchMemory and other reference sets do not fit around it (they fit as its base)"
            )
        return super().forward(embeddings, labels, u, indices_tuple=indices_tuple)


def trainer_hooks(
    loss: GCAHNGLoss,
    end_of_iteration: Hook | None = None,
    end_of_epoch: Hook | None = None,
    log: Callable[[dict[str, Tensor]], None] | None = None,
) -> dict[str, Hook]:
    """The hooks that step the generator in a trainer of pytorch-metric-learning 2.

    Args:
        loss: the loss, also where the trainer holds it within MultipleLosses.
        end_of_iteration: a hook of your own, which runs after the generator step.
        end_of_epoch: a hook of your own, which runs after `loss.end_epoch`. The trainer stops if it returns False.
        log: is called with what each generator step returns.

    Returns:
        The trainer's arguments end_of_iteration_hook and end_of_epoch_hook.
    """

    def iteration(trainer: Any) -> Any:
        logs = loss.generator_step()
        if log is not None:
            log(logs)
        return end_of_iteration(trainer) if end_of_iteration is not None else None

    def epoch(trainer: Any) -> Any:
        if loss.steps_per_epoch is None:
            loss.end_epoch()
        return end_of_epoch(trainer) if end_of_epoch is not None else None

    return {"end_of_iteration_hook": iteration, "end_of_epoch_hook": epoch}
