"""The loss in the Trainer of transformers, and the callback that steps its generator there.

    loss = GCAHNGLoss(num_classes, embedding_dim)
    trainer = Trainer(model, args, compute_loss_func=EmbeddingLoss(loss), callbacks=[GeneratorCallback(loss)], ...)

The trainer of sentence-transformers takes the same callback; see gcahng.integrations.sentence_transformers.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from transformers import TrainerCallback

from gcahng.errors import UserError
from gcahng.files import atomic_write
from gcahng.integrations.optimizers import check_optimizers
from gcahng.losses.gca_hng import GCAHNGLoss

OUT_OF_THE_MODEL = (
    "the loss must not be a part of the model (compute_loss_func=EmbeddingLoss(loss), or GCAHNGSentenceLoss)"
)

FILE = "gcahng_loss.safetensors"
"""In a checkpoint's folder: the loss's state."""

OUTPUTS = ("embeddings", "sentence_embedding", "pooler_output", "image_embeds", "text_embeds")
"""Where EmbeddingLoss looks for embeddings in a model's outputs, in this order."""


class EmbeddingLoss:
    """The loss as `compute_loss_func` of transformers' Trainer.

    The loss is no part of the model then, so that the trainer's optimizer and the published model do not hold it.

    Args:
        loss: the loss.
        embeddings: where the embeddings (n, D) are in the model's outputs: a name, or a function of the outputs. None
            takes the first of OUTPUTS that is there.
    """

    def __init__(self, loss: GCAHNGLoss, embeddings: str | Callable[[Any], Tensor] | None = None) -> None:
        self.loss, self.embeddings = loss, embeddings

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a batch, 0-dim.

        Args:
            outputs: of the model.
            labels: classes (n,).
            num_items_in_batch: is not used.
        """
        if labels is None:
            raise UserError(
                "labels is None; the data set needs a column `labels` with the class of every sample, and the trainer "
                "TrainingArguments(label_names=['labels'], remove_unused_columns=False) where the model takes no labels"
            )
        return loss_or_nan(self.loss, self._found(outputs), labels, training=torch.is_grad_enabled())

    def _found(self, outputs: Any) -> Tensor:
        if callable(self.embeddings):
            return self.embeddings(outputs)
        names = OUTPUTS if self.embeddings is None else (self.embeddings,)
        for name in names:
            value = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
            if value is not None:
                return value
        there = ", ".join(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise UserError(
            f"the model's outputs ({there}) hold none of {', '.join(names)}; embeddings must name the (n, D) output, "
            "or be a function of the outputs"
        )


def loss_or_nan(loss: GCAHNGLoss, embeddings: Tensor, labels: Tensor, training: bool) -> Tensor:
    """The loss of a batch. In evaluation it is NaN for a batch that the loss does not take.

    A trainer evaluates on batches in the order of the data set, which need not hold classes of equal size.

    Args:
        loss: the loss, which is put into training or evaluation mode.
        embeddings: (n, D).
        labels: classes (n,).
        training: whether this is a training step.
    """
    loss.to(embeddings.device).train(training)
    if training:
        return loss(embeddings, labels)
    try:
        return loss(embeddings, labels)
    except UserError as error:
        warnings.warn(f"the evaluation loss is NaN, since the loss does not take these batches: {error}", stacklevel=3)
        return embeddings.new_full((), torch.nan)


class GeneratorCallback(TrainerCallback):
    """Steps the generator of GCA-HNG in a trainer, and saves and restores the loss with the trainer's checkpoints.

    It steps the generator after each backward, ends the epochs of the loss with those of the trainer, puts J_m, J_gen
    and the other terms into the trainer's log, and writes the state of the loss into each checkpoint's folder. A run
    that continues from a checkpoint restores it.

    Args:
        loss: the loss, or a module that holds it as `gca`.
        resume_from: the folder of the checkpoint that is continued, if it does not lie in the trainer's output_dir.

    Raises:
        UserError: (from trainer.train) an argument of the trainer does not fit, the optimizer holds the loss's
            parameters or lacks those of its base, there is another such callback, or there is no state of the loss for
            the checkpoint.
    """

    def __init__(self, loss: GCAHNGLoss | nn.Module, resume_from: str | Path | None = None) -> None:
        gca = getattr(loss, "gca", loss)
        if not isinstance(gca, GCAHNGLoss):
            raise UserError(f"loss is a {type(loss).__name__}; it must be a GCAHNGLoss or hold one as `gca`")
        self.gca, self.resume_from = gca, resume_from
        self.logs: dict[str, float] = {}
        self._latest: dict[str, Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        check_arguments(args)
        if vars(state).setdefault("_steps_a_generator", self) is not self:  # one state for all callbacks of a run
            raise UserError(
                "the trainer has two GeneratorCallbacks; it must have one, for one loss: their states would overwrite "
                "each other in checkpoints"
            )
        check_optimizers(self.gca, [known["optimizer"]], OUT_OF_THE_MODEL)
        self.gca.to(args.device)
        if state.global_step:
            folder = self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"
            restore(self.gca, Path(folder), fingerprint(known["model"].parameters()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self._latest = self.gca.generator_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if self.gca.steps_per_epoch is None:
            self.gca.end_epoch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **known: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        self.logs = {name: value.item() for name, value in self._latest.items()}
        logs.update(self.logs)
        if state.log_history:
            state.log_history[-1].update(self.logs)

    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save(self.gca, folder, fingerprint(known["model"].parameters()))


# -- checks


def check_arguments(args: Any) -> None:
    """Refuses arguments of a trainer under which the loss would train wrongly.

    Args:
        args: TrainingArguments.

    Raises:
        UserError: names the argument, and what it must be.
    """
    if args.gradient_accumulation_steps != 1:
        raise UserError(
            f"gradient_accumulation_steps is {args.gradient_accumulation_steps}; it must be 1: each batch is a graph "
            "of its own, and a larger per_device_train_batch_size is another training (gcahng plan says what fits)"
        )
    if args.fp16:
        raise UserError("fp16 is True; it must be False (bf16=True works): the generator does not see the scaler")
    for name in ("deepspeed", "fsdp"):
        if getattr(args, name, None):
            raise UserError(f"{name} is set; the generator step supports one process and DistributedDataParallel alone")
    if args.world_size > 1 and args.average_tokens_across_devices:
        raise UserError(
            "average_tokens_across_devices is True; with several processes it must be False: it would multiply the "
            "loss by their number"
        )


# -- checkpoints


@torch.no_grad()
def fingerprint(parameters: Iterable[Tensor]) -> str:
    """What tells a model's weights from others: the sum of each parameter's bytes, as they are, hashed."""
    sums = [
        p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64) if p.dim() else p.sum() for p in parameters
    ]
    return hashlib.blake2b(repr([s.item() for s in sums]).encode(), digest_size=16).hexdigest()


def save(gca: GCAHNGLoss, folder: Path, model: str) -> None:
    """Writes the state of the loss into a checkpoint's folder.

    Args:
        gca: the loss.
        folder: the folder.
        model: fingerprint of the model that the checkpoint holds.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in gca.state_dict().items()}
    atomic_write(folder / FILE, lambda file: file.write(serialize(tensors, metadata={"model": model})))


def restore(gca: GCAHNGLoss, folder: Path, model: str) -> None:
    """Loads the state of the loss from a checkpoint's folder.

    Args:
        gca: the loss.
        folder: the folder.
        model: fingerprint of the model that continues.

    Raises:
        UserError: there is none, it is damaged, or it belongs to another model.
    """
    path = folder / FILE
    cure = "GeneratorCallback(loss, resume_from=FOLDER) must name the folder of the checkpoint that is continued"
    if not path.is_file():
        raise UserError(f"{folder} holds no state of the loss ({FILE}); {cure}, or continue from an earlier checkpoint")
    try:
        with safe_open(path, "pt") as file:
            belongs_to = (file.metadata() or {}).get("model")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); continue from an earlier checkpoint") from error
    if belongs_to != model:
        raise UserError(f"{path} belongs to other weights of the model than those that continue; {cure}")
    gca.load_state_dict(tensors)
