"""The losses that `gcahng train` offers, behind one interface: forward, finish_step, end_epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gcahng.config import TrainConfig
from gcahng.devices import resolve_device
from gcahng.engine.fits import check_step
from gcahng.engine.ranks import Ranks
from gcahng.engine.step_size import StepSize
from gcahng.errors import UserError
from gcahng.extras import require
from gcahng.losses import GCAHNGLoss, npair_loss
from gcahng.losses.official import load_official_state_dict
from gcahng.losses.proxy_synthesis import ProxySynthesisLoss
from gcahng.models.pretrained import read_tensors
from gcahng.train.finite import largest

PROXY_LR_FACTORS = {
    "proxy_anchor": 100.0,
    "soft_triple": 100.0,
    "norm_softmax": 100.0,
    "proxy_synthesis": 100.0,
    "arcface": 10.0,
}


class Objective(nn.Module):
    """A loss in the training loop: loss = objective(z, labels); loss.backward(); finish_step(); optimizer.step()."""

    def finish_step(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
        """Do what the loss does by itself after the backward, such as a step of its own optimizers.

        Args:
            scaler: what scaled the loss, before its update.

        Returns:
            The losses of the step, detached and 0-dim.
        """
        raise NotImplementedError

    def largest_gradients(self) -> dict[str, Tensor]:
        """The largest absolute gradient, before clipping, of each module that `finish_step` stepped, 0-dim."""
        return {}

    def end_epoch(self) -> None:
        """Called at the end of an epoch."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which one of the processes that share batches may use the loss without the others."""
        yield

    def proxies(self) -> list[nn.Parameter]:
        """The loss's parameters that the loop's optimizer steps."""
        raise NotImplementedError


class PlainObjective(Objective):
    """A loss without a generator; each of the processes that share a batch computes the whole loss."""

    def __init__(self, base: Callable[[Tensor, Tensor], Tensor], ranks: Ranks | None = None) -> None:
        super().__init__()
        self.base, self._ranks = base, ranks
        self._loss: Tensor | None = None

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        if self._ranks is not None:
            embeddings, labels = self._ranks.whole_batch(embeddings, labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            loss = self.base(embeddings, labels)
        self._loss = loss.detach()
        return loss

    def finish_step(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
        assert self._loss is not None
        return {"J_m": self._loss}

    def proxies(self) -> list[nn.Parameter]:
        return list(self.parameters())


class GcaObjective(Objective):
    """GCA-HNG: the loss owns its generator and the generator's optimizers."""

    def __init__(self, gca: GCAHNGLoss) -> None:
        super().__init__()
        self.gca = gca
        self._largest: dict[str, Tensor] = {}
        self._classifier_stepped = False
        gca.gradient_hook = self._note_gradients

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.gca(embeddings, labels)

    def finish_step(self, scaler: torch.amp.GradScaler | None = None) -> dict[str, Tensor]:
        self._largest, self._classifier_stepped = {}, False
        return self.gca.generator_step(scaler)

    def largest_gradients(self) -> dict[str, Tensor]:
        return self._largest

    def _note_gradients(self, module: str, gradients: list[Tensor]) -> None:
        if module == "classifier":
            name = "the classifier's gradient of J_cls"
        else:
            term = "J_gen" if self._classifier_stepped else "the loss"
            name = f"the graph network's gradient of {term}"
        self._classifier_stepped |= module == "classifier"
        self._largest[name] = largest(gradients)

    def end_epoch(self) -> None:
        self.gca.end_epoch()

    def alone(self) -> AbstractContextManager[None]:
        return self.gca.alone()

    def proxies(self) -> list[nn.Parameter]:
        return self.gca.base_parameters()


def build_objective(
    config: TrainConfig, num_classes: int, pretrained: bool = True, ranks: Ranks | None = None
) -> Objective:
    """The loss that `config` names, for labels 0 … num_classes - 1, with fresh weights from torch's generator.

    Args:
        config: of the run.
        num_classes: of the training set.
        pretrained: whether it starts from gca.weights; False where weights are loaded afterwards.
        ranks: the processes that share each batch.

    Raises:
        UserError: pytorch-metric-learning is needed and missing, GCA-HNG refuses one of its arguments, or gca.weights
            does not fit.
    """
    views, dim = config.data.samples_per_class, config.backbone.embedding_dim
    if config.loss == "npair":
        return PlainObjective(partial(npair_loss, num_per_class=views), ranks)
    if config.loss in ("norm_softmax", "proxy_synthesis"):
        synthesis = config.loss == "proxy_synthesis"
        return PlainObjective(ProxySynthesisLoss(num_classes, dim, seed=config.seed, synthesis=synthesis), ranks)
    if config.loss != "gca_hng":
        return PlainObjective(_pml_loss(config.loss, num_classes, dim), ranks)
    gca = config.gca
    _check_step(config, num_classes, 1 if ranks is None else ranks.count)
    loss = GCAHNGLoss(
        num_classes,
        dim,
        layers=gca.layers,
        heads=gca.heads,
        coefficients=gca.coefficients,
        message_passing=gca.message_passing,
        synthetic=gca.synthetic,
        anchor_gradient=gca.anchor_gradient,
        synthetic_temperature=gca.synthetic_temperature,
        synthetic_weight=gca.synthetic_weight,
        synthetic_warmup=gca.synthetic_warmup,
        alpha=gca.alpha,
        beta=gca.beta,
        dot_weight=gca.dot_weight,
        div_weight=gca.div_weight,
        softmax_factor=gca.softmax_factor,
        edge_dropout=gca.edge_dropout,
        symmetric=gca.symmetric,
        base="npair" if gca.base == "npair" else _pml_loss(gca.base, num_classes, dim),
        compat=gca.compat,
        impl=gca.impl,
        num_per_class=views,
        check=gca.check,
        seed=config.seed,
        graph_lr=gca.graph_lr,
        graph_weight_decay=gca.graph_weight_decay,
        classifier_lr=gca.classifier_lr,
        classifier_weight_decay=gca.classifier_weight_decay,
        clip_value=gca.clip_value,
        epochs=-(-config.steps // config.steps_per_epoch),
        process_group=None if ranks is None else ranks.group,
    )
    if gca.weights is not None and pretrained:
        _load_weights(loss, gca.weights)
    return GcaObjective(loss)


def _check_step(config: TrainConfig, num_classes: int, processes: int) -> None:
    """Raise UserError if a step needs more memory than there is, before the loss is made."""
    views = config.data.samples_per_class
    device = resolve_device(config.device)
    size = StepSize(
        batch=config.data.classes_per_batch * views,
        dim=config.backbone.embedding_dim,
        layers=config.gca.layers,
        views=views,
        classes=num_classes,
        compute=torch.bfloat16 if config.precision == "bf16" else torch.float32,
        symmetric=config.gca.symmetric,
        device=device.type,
        ranks=processes,
    )
    check_step(size, device)


def _load_weights(loss: GCAHNGLoss, path: str) -> None:
    try:
        load_official_state_dict(loss, read_tensors(path))
    except UserError as error:
        raise UserError(f"gca.weights is {path}; {error}") from error


def proxy_lr(config: TrainConfig) -> float:
    """The learning rate of the class vectors of the loss in use; optimizer.lr for a loss that has none."""
    if config.optimizer.proxy_lr is not None:
        return config.optimizer.proxy_lr
    name = config.gca.base if config.loss == "gca_hng" else config.loss
    return PROXY_LR_FACTORS.get(name, 1.0) * config.optimizer.lr


def _pml_loss(name: str, num_classes: int, embedding_dim: int) -> nn.Module:
    """A loss of pytorch-metric-learning with its own defaults; all of them normalize the embeddings themselves."""
    require("pytorch_metric_learning", extra="train", purpose=f"the loss {name} is pytorch-metric-learning's")
    from pytorch_metric_learning import losses

    if name == "supcon":
        return losses.SupConLoss()
    if name == "multi_similarity":
        return losses.MultiSimilarityLoss()
    cls = {
        "proxy_anchor": losses.ProxyAnchorLoss,
        "arcface": losses.ArcFaceLoss,
        "soft_triple": losses.SoftTripleLoss,
    }[name]
    return cls(num_classes=num_classes, embedding_size=embedding_dim)
