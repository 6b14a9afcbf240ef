"""The base class of GCAHNGLoss: modules and optimizers, running means, state, and how a batch enters the loss."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.engine import PassOptions, refuse_transforms
from gcahng.engine.ranks import ranks_for
from gcahng.errors import UserError
from gcahng.installed import source_digest
from gcahng.losses.agreement import Agreement
from gcahng.losses.layout import (
    PROBLEMS,
    ClassLayout,
    check_shapes,
    class_layout,
    describe,
    raise_for_problems,
    value_problems,
)
from gcahng.losses.means import RunningMeans
from gcahng.losses.misuse import MISUSES, Trace, Watch, misuses, raise_for_misuse, refuse_vmap, sample
from gcahng.losses.optimizers import (
    CapturableAdamW,
    adamw,
    clipped_step,
    move_state,
    set_rate,
    take_state,
)
from gcahng.losses.options import EngineOptions
from gcahng.losses.sharding import check_whole
from gcahng.losses.state import LossState, pack, prepare, read_extra_state
from gcahng.nn import GraphNetwork
from gcahng.reference.edge_update import Dropout
from gcahng.reference.philox import mixing_draws
from gcahng.reference.training_step import Batch

# Options that the processes of a group must have in common. The seed is the first one's.
_SHARED = ("num_classes", "embedding_dim", "alpha", "beta", "dot_weight", "div_weight", "softmax_factor")
_SHARED += ("edge_dropout", "symmetric", "compat", "check", "num_per_class", "clip_value", "epochs", "steps_per_epoch")
_SHARED += ("impl", "edge_memory")


def _of_engine(name: str, doc: str) -> Any:
    """A property that reads and replaces one of the engine's options."""

    def read(loss: LossModule) -> Any:
        return getattr(loss.engine, name)

    def write(loss: LossModule, value: Any) -> None:
        loss.engine = replace(loss.engine, **{name: value})

    return property(read, write, doc=doc)


class LossModule(RunningMeans):
    """What every call of the loss works with. The training step itself is in GCAHNGLoss."""

    graph_network: GraphNetwork
    classifier: nn.Linear
    graph_optimizer: torch.optim.AdamW
    classifier_optimizer: torch.optim.AdamW

    def _set_up(self, engine: EngineOptions, learning: dict[str, float]) -> None:
        """Makes everything that the method's own options do not decide. The modules exist already.

        Args:
            engine: how passes are run.
            learning: graph_lr, graph_weight_decay, classifier_lr and classifier_weight_decay.
        """
        # Before `engine`, so that pickling a loss with a process group meets the ranks first, which say why it fails.
        self._ranks, self._joined = ranks_for(engine.process_group), False
        self._agreement = Agreement()
        self.engine = engine
        self._graphs = GraphCache() if engine.cuda_graph else None
        self._start_counting()
        # Numbers, not bools: averages of weights over a run (AveragedModel, use_buffers=True) take differences of all.
        self.register_buffer(
            "_problems", torch.zeros(len(PROBLEMS) + len(MISUSES), dtype=torch.int32), persistent=False
        )
        self._steps_in_epoch = 0
        self._epoch = 0
        self._pending: Any = None  # a training forward that waits for its generator step
        self._watch = Watch()
        # Called before gradients are clipped: with "graph_network" (twice a step) or "classifier", and the gradients.
        self.gradient_hook: Callable[[str, list[Tensor]], None] | None = None
        self.graph_lr = learning["graph_lr"]
        self.graph_optimizer = adamw(
            self.graph_network.trainable(), self.graph_lr, learning["graph_weight_decay"], engine.cuda_graph
        )
        rates = (learning["classifier_lr"], learning["classifier_weight_decay"])
        self.classifier_optimizer = adamw(self.classifier.parameters(), *rates, engine.cuda_graph)

    # The engine's options as attributes, which a user may set between steps.
    impl = _of_engine("impl", "The implementation that was asked for.")
    edge_memory = _of_engine("edge_memory", "What the engine was asked to save of the edges.")
    edge_dtype = _of_engine("edge_dtype", "The dtype that was asked for stored edges.")

    # -- state

    def get_extra_state(self) -> Tensor:
        """What the state dict holds beside parameters and buffers (bytes,): optimizers, epoch and seed."""
        return pack(self.seed, self._epoch, (self.graph_optimizer, self.classifier_optimizer))

    def set_extra_state(self, state: Tensor | dict[str, Any] | LossState) -> None:
        """Takes over what get_extra_state returned, in this version or in version 1.

        Raises:
            UserError: it is malformed, of another version, or of a loss with other sizes. Nothing is changed then.
        """
        optimizers = (self.graph_optimizer, self.classifier_optimizer)
        state = read_extra_state(state, optimizers, len(self.graph_network.layers))
        self.seed, self._epoch = state.seed, state.epoch
        for optimizer, given in zip(optimizers, state.optimizers, strict=True):
            take_state(optimizer, given)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool, *lists: list[str]
    ) -> None:
        """Checks the loss's whole part of a state dict, its submodules' too, before torch copies any of it."""
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, OrderedDict()
        try:
            for hook in hooks.values():  # they may rename, so they come before the checks, and not again after them
                hook(state_dict, prefix, local_metadata, strict, *lists)
            found = prepare(self, state_dict, prefix, strict, "version" in local_metadata)
            if found and local_metadata.get("assign_to_params_buffers"):
                raise UserError("assign is True; it must be False: the optimizers would go on with the old parameters")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        finally:
            self._load_state_dict_pre_hooks = hooks
        if found:
            self._steps_in_epoch = int(self._counted_steps) if not self._counted_steps.is_meta else 0
            self._pending = None
            self._problems.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossModule:
        before, counters = list(self.parameters()), dict(self.named_buffers(recurse=False))
        moves = False

        def apply(tensor: Tensor) -> Tensor:
            nonlocal moves
            applied = fn(tensor)
            moves |= applied is not tensor
            return applied

        super()._apply(apply, recurse)
        self._keep_counters(counters)
        # Most moves change the parameter objects in place, but to_empty, for one, replaces them.
        moved = dict(zip(before, self.parameters(), strict=True))
        for optimizer in (self.graph_optimizer, self.classifier_optimizer):
            move_state(optimizer, moved, fn)
        if moves:  # a loop may call .to() before each batch, with nothing to move
            self._pending = None
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within the context, a batch is this process's own, as without a process_group.

        So one process may `generate` or, in eval mode, measure without the others. It is not for training steps, which
        would let the processes' weights drift apart.
        """
        ranks, self._ranks = self._ranks, None
        try:
            yield
        finally:
            self._ranks = ranks

    # -- how a batch enters

    def _whole_batch(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Checks a batch, and gathers the other processes' parts if there are any."""
        self._check_tensors(embeddings, labels)
        if self._ranks is None:
            return embeddings, labels
        if not self._joined:
            self._ranks.meet(self._facts())
            self.seed, self._joined = self._ranks.join(self, self.seed), True
        state = (*self._weights(), *self.graph_network.buffers(), *self.buffers(recurse=False))
        self._agreement.on_weights(self._ranks, state, (self.graph_optimizer, self.classifier_optimizer))
        wide, labels = embeddings.to(self.classifier.weight.dtype), labels.to(embeddings.device, torch.int64)
        return self._ranks.whole_batch(wide, labels)

    def _facts(self) -> dict[str, object]:
        """What must be the same in all processes that share a batch, by name."""
        network = self.graph_network
        options = {name: getattr(self, name) for name in _SHARED}
        for kind, optimizer in (("graph", self.graph_optimizer), ("classifier", self.classifier_optimizer)):
            options |= {f"{kind}_{name}": optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}
        options |= {
            "layers": len(network.layers),
            "heads": network.heads,
            **vars(network.ablation),
            **vars(self.pairing),
        }
        options["base"] = self.base if isinstance(self.base, str) else type(self.base).__name__
        options |= {"dtype": str(self.classifier.weight.dtype), "edge_dtype": str(self.edge_dtype)}
        options |= {"device": self.classifier.weight.device.type, "training": self.training}
        return {**options, "the version of torch": torch.__version__, "the digest of gcahng's code": source_digest()}

    def _enter(self, embeddings: Tensor, labels: Tensor, at_once: bool = False) -> tuple[ClassLayout, Tensor]:
        """Puts a batch into canonical order and the parameters' dtype, and checks its values.

        `at_once` defers no check.
        """
        layout = class_layout(labels.to(embeddings.device, torch.int64), self.num_per_class)
        z = embeddings.to(self.classifier.weight.dtype)[layout.order]
        check = self._check_for(z.device)
        if check == "raise" or (check == "deferred" and at_once):
            raise_for_problems(value_problems(z, layout, self.num_classes).tolist(), self.num_classes, layout.views)
        elif check == "deferred":
            self._problems[: len(PROBLEMS)].logical_or_(value_problems(z, layout, self.num_classes))
        return layout, z

    def _check_tensors(self, embeddings: Tensor, labels: Tensor) -> None:
        """Checks what shapes, dtypes and devices alone show."""
        weight = self.classifier.weight
        if self.impl != "reference":
            if not torch.compiler.is_compiling():
                refuse_transforms("the engine")
        elif self.training or self.check != "off" or self.num_per_class is None:
            unless = "in eval mode it can be mapped, with num_per_class and check='off'"
            refuse_vmap("the loss", (embeddings, labels, weight, self.graph_network.class_head.weight), unless)
        check_shapes(embeddings, labels, self.embedding_dim)
        check_whole(self)
        if weight.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the loss's parameters are {weight.dtype}; they must be float32 or float64 (for lower precision use "
                "torch.autocast)"
            )
        if embeddings.device != weight.device:
            raise UserError(
                f"embeddings is on {embeddings.device}; it must be on the loss's device, {weight.device} (move one of "
                "them with .to())"
            )
        if embeddings.dtype is torch.float64 and weight.dtype is not torch.float64:
            raise UserError(
                "embeddings is float64 and the loss's parameters are float32; call gca.double(), or pass float32"
            )

    def _check_for(self, device: torch.device) -> str:
        """What the option `check` means for tensors on this device."""
        if self.check != "auto":
            return self.check
        return "deferred" if device.type != "cpu" or torch.compiler.is_compiling() else "raise"

    def _raise_deferred(self) -> None:
        """Raises for what deferred checks have found."""
        trace, self._watch.trace = self._watch.trace, None
        if self.check == "off" or (
            self.check == "auto" and self._problems.device.type == "cpu" and not self._problems.any()
        ):
            return
        problems = self._problems.tolist()
        self._problems.zero_()
        if any(problems):
            self._pending = None
        raise_for_problems(problems[: len(PROBLEMS)], self.num_classes, self.num_per_class)
        raise_for_misuse(problems[len(PROBLEMS) :], trace)

    def _note_misuse(self, trace: Trace, scale: Tensor | None) -> None:
        """Notes what a training loop does wrong, for _raise_deferred.

        Args:
            trace: of the training forward.
            scale: the GradScaler's scale, 0-dim; None without one.
        """
        self._watch.trace = trace
        if self.check != "off":
            found = misuses(trace, sample(self.graph_network, self.classifier), scale)
            self._problems[len(PROBLEMS) :].logical_or_(found)

    def _batch(self, z: Tensor, layout: ClassLayout, u: Tensor | None) -> Batch:
        """Everything that the passes need of a batch."""
        views = layout.views
        draw = self.draw.clone()
        check_draws(u, views)
        if u is None:
            u = mixing_draws(views, draw=draw, seed=self.seed, dtype=z.dtype)
        dropout = None
        if self.training and self.edge_dropout:
            dropout = Dropout(self.edge_dropout, self.seed, draw, self.symmetric)
        pull = torch.exp(-self.alpha / self.mean_metric)
        u = u.to(device=z.device, dtype=z.dtype)
        return Batch(z, self._in_range(layout.classes), views, pull.to(z.dtype), u, dropout, self.training)

    def _in_range(self, labels: Tensor) -> Tensor:
        """Clamps labels. The checks report one out of range, and it must not crash a device before they are read."""
        return labels.clamp(0, self.num_classes - 1)

    @property
    def _pass_options(self) -> PassOptions:
        """How the engine runs a pass."""
        return PassOptions(self.edge_memory, self.edge_dtype, self._graphs, self._ranks)

    # -- gradients and rates

    def _has_no_gradients(self) -> bool:
        return all(parameter.grad is None for parameter in self.graph_network.parameters())

    def _agree_on_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives all processes the same gradients, if they round differently: their weights would drift apart."""
        if self._ranks is not None:
            self._agreement.on_gradients(self._ranks, parameters)

    def _note_weights(self) -> None:
        """Notes the weights that a step has left, which the processes compare before they are used again."""
        if self._ranks is not None:
            self._agreement.note(self._weights())

    def _weights(self) -> list[nn.Parameter]:
        """The weights that the loss steps."""
        return [*self.graph_network.parameters(), *self.classifier.parameters()]

    def _step_graph_network(self, scale: Tensor | None) -> None:
        """Steps the graph network on its gradients, which a GradScaler may have scaled, and clears them."""
        parameters = [p for p in self.graph_network.parameters() if p.grad is not None]
        self._agree_on_gradients(parameters)
        if not parameters:  # all that this phase would train is frozen
            return
        if scale is not None:
            for parameter in parameters:
                parameter.grad.div_(scale)
            finite = torch.stack([parameter.grad.isfinite().all() for parameter in parameters]).all()
            if isinstance(self.graph_optimizer, CapturableAdamW):
                nn.utils.clip_grad_value_(parameters, self.clip_value)
                self.graph_optimizer.step_unless(finite.logical_not().to(torch.float32))
            elif bool(finite):
                self._show_gradients("graph_network", parameters)
                clipped_step(self.graph_optimizer, parameters, self.clip_value, None)
        else:
            self._show_gradients("graph_network", parameters)
            clipped_step(self.graph_optimizer, parameters, self.clip_value, self._graphs)
        self.graph_network.zero_grad(set_to_none=True)

    def _show_gradients(self, module: str, parameters: list[nn.Parameter]) -> None:
        """Calls the gradient hook."""
        if self.gradient_hook is not None:
            self.gradient_hook(module, [p.grad for p in parameters if p.grad is not None])

    def _only_takes_statistics(self) -> bool:
        """Whether a pass only gives BatchNorm new statistics, as stochastic weight averaging does at its end.

        It sets the momentum to None for that and backpropagates nothing.
        """
        return self.graph_network.edge_batch_norm.momentum is None

    def _apply_schedule(self) -> None:
        """Sets the graph network's learning rate for the epoch."""
        if self.epochs is None:
            return
        progress = min(self._epoch, self.epochs) / self.epochs
        set_rate(self.graph_optimizer, self.graph_lr * 0.5 * (1 + math.cos(math.pi * progress)))


def check_draws(u: Tensor | None, views: int) -> None:
    """Checks mixing draws that a user passes.

    Args:
        u: must be None or (K, K - 1).
        views: samples of a class, K.

    Raises:
        UserError: it is not.
    """
    if u is None:
        return
    if not isinstance(u, Tensor):
        raise UserError(
            f"u is {describe(u)}; it must be None or a tensor of mixing draws (pairs that a miner found go to base)"
        )
    if tuple(u.shape) != (views, views - 1):
        raise UserError(
            f"u has shape {tuple(u.shape)}; with K = {views} samples a class it must be ({views}, {views - 1})"
        )
