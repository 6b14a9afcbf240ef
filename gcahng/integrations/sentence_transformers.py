"""The loss for the trainer of sentence-transformers: by label, or for pairs of texts.

loss = GCAHNGSentenceLoss(model, num_classes)
args = SentenceTransformerTrainingArguments(..., batch_sampler=BalancedBatches(samples_per_class=4))
trainer = SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=[GeneratorCallback(loss)])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from gcahng.data import BalancedBatchSampler
from gcahng.errors import UserError
from gcahng.integrations.transformers import GeneratorCallback, loss_or_nan
from gcahng.losses.gca_hng import GCAHNGLoss

__all__ = ["BalancedBatches", "GCAHNGSentenceLoss", "GeneratorCallback"]


class GCAHNGSentenceLoss(nn.Module):
    """GCA-HNG on a SentenceTransformer's embeddings.

    The data set has a column `label` with the class of each row, from 0, and one or more columns of text. All texts of
    a row are samples of its class. So a data set of pairs (query, document), whose label is the number of the pair,
    trains with two samples of each class, and `num_classes` is the number of pairs.

    The trainer collects the parameters of its loss for its optimizer. It finds those of the model, and those of the
    base loss if there are any; the graph network and the classifier are stepped by GeneratorCallback.

    Args:
        model: the SentenceTransformer.
        num_classes: classes M; labels lie in 0 … M - 1.
        options: the other arguments of GCAHNGLoss.

    Attributes:
        gca: the GCAHNGLoss.
    """

    def __init__(self, model: SentenceTransformer, num_classes: int, **options: Any) -> None:
        super().__init__()
        self.model = model
        gca = GCAHNGLoss(num_classes, _channels(model), **options)
        self.__dict__["gca"] = gca  # no submodule: the trainer would give its parameters to its optimizer
        if isinstance(gca.base, nn.Module):
            self.base = gca.base
        self._options = options

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None) -> Tensor:
        """The loss of a batch, 0-dim.

        Args:
            sentence_features: for each column of text, the model's inputs.
            labels: class of each row (rows,).

        Raises:
            UserError: there are no labels, or the batch is not what GCAHNGLoss takes.
        """
        columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        if labels is None:
            raise UserError(
                "labels is None; the data set needs a column `label` with the class of each row (for pairs: the number "
                "of the pair)"
            )
        embeddings, classes = torch.cat(columns), labels.reshape(-1).repeat(len(columns))
        return loss_or_nan(self.gca, embeddings, classes, training=self.model.training and torch.is_grad_enabled())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GCAHNGSentenceLoss:
        super()._apply(fn, recurse)
        self.gca._apply(fn)
        return self

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says about the loss."""
        return {"num_classes": self.gca.num_classes} | {name: str(value) for name, value in self._options.items()}

    @property
    def citation(self) -> str:
        """What the model card cites."""
        return """
@article{peng2025globally,
    title={Globally Correlation-Aware Hard Negative Generation},
    author={Peng, Wenjie and Huang, Hongxiang and Chen, Tianshui and Ke, Quhui and Dai, Gang and Huang, Shuangping},
    journal={International Journal of Computer Vision},
    year={2025},
    eprint={2411.13145},
    archivePrefix={arXiv},
}
"""


@dataclass(frozen=True)
class BalancedBatches:
    """The `batch_sampler` of SentenceTransformerTrainingArguments that draws classes of equal size.

    A batch holds per_device_train_batch_size / samples_per_class classes.

    Attributes:
        samples_per_class: rows of each class in a batch. With pairs it is not needed: their two texts are two samples.
    """

    samples_per_class: int

    def __call__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> BalancedBatchSampler:
        """Makes the sampler; the trainer calls this.

        Raises:
            UserError: the batch size is no multiple of samples_per_class, there is no column of labels, or there are
                too few classes.
        """
        views = self.samples_per_class
        if batch_size % views:
            raise UserError(
                f"per_device_train_batch_size is {batch_size}; it must be a multiple of samples_per_class, {views}"
            )
        names = [name for name in valid_label_columns or ["label"] if name in dataset.column_names]
        if not names:
            raise UserError(
                f"the data set has the columns {', '.join(dataset.column_names)}; it must have a column `label` with "
                "the class of each row"
            )
        labels = torch.as_tensor(list(dataset[names[0]]))
        # Whole batches: in several processes it is the trainer that gives each its part.
        return BalancedBatchSampler(labels, batch_size // views, views, seed=seed, num_replicas=1, rank=0)


def _channels(model: SentenceTransformer) -> int:
    """The channels D of a model's embeddings, under the name of its version."""
    of_model = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return of_model()
