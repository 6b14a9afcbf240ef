"""The training step, and everything that the next step depends on."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcahng.config import TrainConfig, config_to_dict
from gcahng.data import DataSplits, build_batches
from gcahng.dispatch import choose
from gcahng.errors import UserError
from gcahng.models.backbones import build_backbone
from gcahng.processes import ALONE, Processes
from gcahng.runs.versions import versions
from gcahng.train.batch_norm import share_batch_norm
from gcahng.train.finite import FiniteWatch, NonFinite, largest
from gcahng.train.losses import build_objective
from gcahng.train.optim import build_optimizer, load_optimizer, prepare_step

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# In the order in which they arise in a step, so that the first one that is not finite is the cause.
_EMBEDDING, _GRADIENT = "the largest embedding", "the network's gradient"
_CAUSES_FIRST = (
    _EMBEDDING,
    "J_m",
    "J_syn",
    "J_gce",
    "loss",
    _GRADIENT,
    "the graph network's gradient of the loss",
    "J_cls",
    "the classifier's gradient of J_cls",
)


class Trainer:
    """A run in progress: network, loss, optimizer, batches, and the step they have reached.

    Fresh weights come from torch's global generator, which the constructor seeds; `gcahng.train.fit` restores the
    caller's generator. A trainer that loads another's `state_dict` continues with the same bits (on the CPU with the
    same number of threads).

    Args:
        config: with `device` resolved.
        data: the splits; training needs `train` only.
        pretrained: whether to start from the pretrained weights that the config asks for; False where a state is loaded
            afterwards.
        processes: that share each batch. All of them make the same calls, and their networks and losses stay equal.
            BatchNorm statistics, graph and loss are those of the whole batch, and gradients are averaged.

    Attributes:
        config: the config, whose epochs are counted in steps.
        step: how many steps have been made, including those that were left out.
        left_out: how many steps were left out because something was not finite.
        last_left_out: the error of the last of them.
        wait_seconds: time that was spent waiting for batches.
    """

    def __init__(
        self, config: TrainConfig, data: DataSplits, *, pretrained: bool = True, processes: Processes = ALONE
    ) -> None:
        self.data_digest, self._data_listing, self.processes = data.digest, data.listing, processes
        self.device = torch.device(config.device)
        if config.loss == "gca_hng" and config.gca.impl != "auto":
            choose(config.gca.impl, self.device)  # raises UserError now, and not in the first step
        torch.manual_seed(config.seed)
        part = _part_of_batch(config, processes)
        self.batches = build_batches(config.data, data.train, seed=config.seed, device=self.device, part=part)
        self.config = config = config.with_epochs(self.batches.batches_per_epoch)
        self.model = build_backbone(config.backbone, None if pretrained else False).to(self.device)
        if (ranks := processes.ranks) is not None:
            share_batch_norm(self.model, ranks, config.backbone.name)
        self.model.speed_up(channels_last=config.channels_last, compile=config.compile)
        self.objective = build_objective(config, data.train.num_classes, pretrained, ranks).to(self.device)
        self.optimizer = build_optimizer(config, self.model, self.objective)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = self.left_out = self._left_out_in_row = 0
        self.last_left_out: NonFinite | None = None
        self.wait_seconds = 0.0
        # A scaler, or leaving steps out, needs to know the values before the step is made.
        deferred = self.device.type == "cuda" and not config.skip_nonfinite and not self.scaler.is_enabled()
        self._watch = FiniteWatch(deferred)

    def start_together(self) -> None:
        """Give all processes the weights of the first one; called once all trainers exist."""
        if (ranks := self.processes.ranks) is not None:
            for part in (self.model, self.objective):
                ranks.copy_from_first(t.detach() for t in (*part.parameters(), *part.buffers()))

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimizer step on the next batch.

        Returns:
            The losses, detached and 0-dim; {} where the step was left out (config.skip_nonfinite), which changes
            nothing but the batches and the count of steps.

        Raises:
            NonFinite: a loss or a gradient is not finite. On CUDA without skip_nonfinite it may be that of the step
                before. The weights are spoiled then, but `state_dict` never returns them.
        """
        before = self._snapshot() if self.config.skip_nonfinite else None
        prepare_step(self.config, self.step, self.model, self.optimizer)
        start = time.monotonic()
        with self.processes.together():
            images, labels = self.batches.batch(self.step)
        self.wait_seconds += time.monotonic() - start
        logs: dict[str, Tensor] = {}
        try:
            logs = self._learn(images, labels)
            self._left_out_in_row = 0
        except NonFinite as error:
            if before is None or self._left_out_in_row >= self.config.skip_nonfinite:
                raise
            self._restore(before)
            self.last_left_out = error
            self.left_out += 1
            self._left_out_in_row += 1
        self.step += 1
        if self.step % self.config.steps_per_epoch == 0:
            self.objective.end_epoch()
        return logs

    def settle(self) -> None:
        """See that all steps so far were finite, where that is otherwise seen one step later.

        Raises:
            NonFinite: see `train_step`.
        """
        self._watch.settle()

    def _learn(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        precision, place = self.config.precision, self.device.type
        if self.processes.rank:
            # Dropout in the network differs between the parts of a batch, and no checkpoint has to hold its state.
            torch.manual_seed(_seed_of(self.config.seed, self.step, self.processes.rank))
        with torch.autocast(place, _AUTOCAST[precision], enabled=precision != "fp32"):
            embeddings = self.model(images)
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        try:
            with torch.autocast(place, torch.bfloat16, enabled=precision == "bf16"):
                loss = self.objective(embeddings, labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            stepped = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradients: list[Tensor] = [p.grad for p in stepped]  # type: ignore[misc]
            self.processes.average(gradients)
            # Before the optimizer's step, so that an error here leaves the network unchanged.
            logs = {"loss": loss.detach(), **self.objective.finish_step(self.scaler)}
        except UserError:  # GCA-HNG refuses embeddings that are not finite, but knows neither step nor images
            self._watch.settle()
            if not bool((largest_embedding := self._largest(embeddings)).isfinite()):
                self._look({_EMBEDDING: largest_embedding})
                self._watch.settle()
            raise
        values = {_EMBEDDING: self._largest(embeddings), **logs, **self.objective.largest_gradients()}
        if self.scaler.is_enabled():
            self._look(values)
            self._scaled_step(stepped, gradients)
            return logs
        self._look(values | {_GRADIENT: largest(gradients)})
        nn.utils.clip_grad_value_(stepped, self.config.optimizer.clip_value)
        self.optimizer.step()
        return logs

    def _largest(self, embeddings: Tensor) -> Tensor:
        """The largest absolute entry of the whole batch's embeddings, 0-dim; NaN if an entry is NaN."""
        return self.processes.each(embeddings.detach().abs().amax()).amax()

    def _scaled_step(self, stepped: list[nn.Parameter], gradients: list[Tensor]) -> None:
        """Make a step of fp16. The scaler itself leaves out gradients that overflow under a scale above 1."""
        before = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        gradient = largest(gradients)
        nn.utils.clip_grad_value_(stepped, self.config.optimizer.clip_value)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if before <= 1:
            self._look({_GRADIENT: gradient})

    def _look(self, values: Mapping[str, Tensor]) -> None:
        ordered = {name: values[name] for name in (*_CAUSES_FIRST, *values) if name in values}
        self._watch.look(self.step + 1, ordered, self.batches.names)

    def _snapshot(self) -> _Snapshot:
        """What a step changes before it is known to be finite: the network's buffers and all of the loss."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        return _Snapshot(buffers, copy.deepcopy(self.objective.state_dict()))

    def _restore(self, before: _Snapshot) -> None:
        for buffer, value in zip(self.model.buffers(), before.buffers, strict=True):
            buffer.copy_(value)
        self.objective.load_state_dict(before.objective)
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of training: tensors and plain values, the same in every process and for any number.

        Raises:
            NonFinite: see `train_step`.
        """
        self._watch.settle()
        own = self._own_state()
        batches = own["batches"] | {"skipped": torch.tensor(self.unreadable())}
        return {
            "versions": versions(),
            "config": config_to_dict(self.config),
            "data_digest": self.data_digest,
            "data_listing": self._data_listing,
            **own,
            "batches": batches,
            "processes": self.processes.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another trainer.

        Files may have other sizes than they had, because one may have been restored.

        Raises:
            UserError: the state belongs to other data, does not fit, or is malformed. Nothing is changed then.
        """
        same_files = self._data_listing is not None and state.get("data_listing") == self._data_listing
        if state["data_digest"] != self.data_digest and not same_files:
            of_files = "files were added, removed or renamed, or labels changed; restore the data set as it was"
            of_glyphs = "the options of data, or the version of matplotlib or its fonts differ"
            raise UserError(
                f"the checkpoint was trained on data {state['data_digest']} and these are {self.data_digest}: "
                f"{of_glyphs if self._data_listing is None else of_files}"
            )
        before = copy.deepcopy(self._own_state())
        try:
            # The first process continues to count for all.
            skipped = {} if self.processes.first else {"skipped": torch.tensor(0)}
            self._take(state | {"batches": state["batches"] | skipped})
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            self._take(before)
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            raise UserError(
                f"the checkpoint does not fit this run or is malformed ({' '.join(what.split())})"
            ) from error

    def _own_state(self) -> dict[str, Any]:
        """What this process has of the state that training depends on."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "step": self.step,
            "left_out": {"all": self.left_out, "in_row": self._left_out_in_row},
            "model": self.model.state_dict(),
            "loss": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batches": self.batches.state_dict() | {"skipped": torch.tensor(self.batches.skipped)},
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def _take(self, state: dict[str, Any]) -> None:
        counts = {"step": state["step"], **{f"left_out {name}": state["left_out"][name] for name in ("all", "in_row")}}
        for name, count in counts.items():
            if type(count) is not int or count < 0:
                raise UserError(f"its {name} is {count!r}; it must be a whole number of at least 0")
        self.objective.load_state_dict(state["loss"])
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["rng"]["torch"])
        if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        self.step = state["step"]
        self.left_out, self._left_out_in_row = state["left_out"]["all"], state["left_out"]["in_row"]

    def unreadable(self) -> int:
        """How many times another image has replaced a file that cannot be read."""
        return sum(self.processes.all_of(self.batches.skipped))

    def close(self) -> None:
        """End the processes that read files."""
        self.batches.close()


def _seed_of(seed: int, step: int, rank: int) -> int:
    """The seed of one process in one step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest(), "little")


def _part_of_batch(config: TrainConfig, processes: Processes) -> slice:
    samples = config.data.classes_per_batch * config.data.samples_per_class
    if samples % processes.count:
        raise UserError(
            f"data.classes_per_batch is {config.data.classes_per_batch} and data.samples_per_class "
            f"{config.data.samples_per_class}; their product must be a multiple of the {processes.count} processes"
        )
    return processes.part(samples)


class _Snapshot(NamedTuple):
    buffers: list[Tensor]
    objective: dict[str, Any]
