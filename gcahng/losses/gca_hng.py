"""The loss a user calls: GCA-HNG's metric losses, and the generator that it trains beside the user's own model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcahng import dispatch
from gcahng.engine.cuda_graph import GraphCache, capturing
from gcahng.engine.engine import Engine, EngineOptions
from gcahng.engine.precision import compute_dtype
from gcahng.engine.ranks import ranks_for
from gcahng.errors import UserError
from gcahng.losses.layout import ClassLayout, check_shapes, class_layout, describe, raise_for_problems, value_problems
from gcahng.losses.optimizers import (
    CapturableAdamW,
    adamw,
    check_state,
    clipped_step,
    move_state,
    set_gradients,
    set_rate,
)
from gcahng.losses.options import check_options, python_numbers
from gcahng.nn import GraphNetwork
from gcahng.reference import training_step as reference
from gcahng.reference.edge_update import Dropout
from gcahng.reference.npair import npair
from gcahng.reference.philox import mixing_draws
from gcahng.reference.training_step import Batch, GeneratorWeights

CLASSIFIER_FACTOR = 10.0
FIRST_MEAN = 1e6
SMALLEST_LOSS = 1e-6
STEPS_WITHOUT_EPOCH = 2000
FORWARDS_WITHOUT_STEP = 20


class Generated(NamedTuple):
    """negatives (K, A, C, D): for anchor view k of class a, the synthetic sample of class c (the entries a = c are no
    negatives); coefficients (A·K, n, D): θ of every anchor row and every row of the batch, both in the caller's order;
    classes (C,) ascending labels, the order of a and c; index (K, C): the batch's row that is view k of class a.
    A = C, or the number of anchor classes asked for, in the order asked for."""

    negatives: Tensor
    coefficients: Tensor
    classes: Tensor
    index: Tensor


class _Pending(NamedTuple):
    """A training forward that waits for its generator step."""

    z: Tensor
    layout: ClassLayout
    metric_logs: dict[str, Tensor]
    autocast: tuple[bool, torch.dtype]


class GCAHNGLoss(nn.Module):
    """Globally correlation-aware hard negative generation (Peng et al., IJCV 2025, arXiv 2411.13145).

    A graph network over the complete graph of the batch learns a correlation vector θ_ij for every pair of samples;
    with it, real negatives are pulled towards each anchor and mixed. One training step:

        loss = gca(embeddings, labels)      # J_m + (1 - exp(-β / J̄_gen)) J_syn + J_gce
        loss.backward(); optimizer.step()   # the user's own model
        logs = gca.generator_step()         # graph network on those gradients; classifier; graph network on J_gen
        ...
        gca.end_epoch()                     # rolls the running means, steps the schedule

    The loss owns the graph network, a classifier, and an AdamW for each: handing `gca.parameters()` to another
    optimiser is wrong, since every weight would be stepped twice. Gradient accumulation is not supported: each
    forward is one step. Embeddings are taken as they come (the authors do not normalise them in training), in fp32
    (fp16 and bf16 are cast up).

    Arguments
        num_classes: training classes M; labels lie in 0 … M-1.
        embedding_dim: channels D.
        layers: of the graph network.
        heads: of its node attention; a divisor of D.
        alpha: how fast pulling sets in as J̄_m falls, exp(-α / J̄_m).
        beta: how fast J_syn's weight grows as J̄_gen falls.
        dot_weight, div_weight, softmax_factor:
            J_gen = ½ (softmax_factor · CE + dot_weight · J_sim + div_weight · J_div).
        edge_dropout: p of the edges' attention weights.
        symmetric: (i, j) and (j, i) share one dropout draw: each edge is dropped out as before, but the two are no
            longer independent. False draws them apart, as the authors do, at twice the cost.
        base: J_m: "npair", or any module called as base(embeddings, labels) (pytorch-metric-learning's losses fit).
        compat: "fixed", or "official" to zero the similarities that the authors' code zeroes by mistake.
        impl: auto, reference, torch, cpp, cuda or triton. One asked for by name that is not available is an error.
        num_per_class: K; None reads it from the labels on the host (a synchronisation on a GPU).
        check: "raise" looks at values at once; "deferred" lets the next generator_step or end_epoch raise, without a
            synchronisation in between; "off"; "auto": raise for CPU tensors in eager mode, deferred else.
        seed: of dropout and mixing draws; None takes one from torch's generator.
        graph_lr, graph_weight_decay, classifier_lr, classifier_weight_decay: of the two AdamW.
        clip_value: the graph network's gradients are clipped to ± this.
        epochs: the graph network's rate follows a cosine to 0 over them; None keeps it constant.
        steps_per_epoch: end_epoch happens by itself after so many generator steps.
        edge_memory: what the engine keeps of the edges: "store" (one D-vector a layer and pair), "hidden" (their 4D
            hidden pre-activations too), "recompute" (nothing of size n²·D, for more arithmetic), or "auto", by free
            memory.
        edge_dtype: of stored edges (None: the parameters' own); torch.bfloat16 halves them.
        cuda_graph: on CUDA, capture the graph network's passes and replay them: for batches so small that launches
            bound them. Each kind of batch (the last 4) then keeps the memory of its passes. A whole step may be
            captured instead, in a graph of the user's (docs/gpu.md): the optimisers keep their rates on the device.
            With check="deferred" and num_per_class a step then never waits for the device, and end_epoch raises.
        process_group: "world" or a torch.distributed group: its processes hand in the parts of one batch, as large as
            each other, and share the work on its pairs. Every call is then one of all processes, each gets the whole
            batch's loss, and the gradient of its own embeddings is such that DistributedDataParallel's mean over
            processes is that of the whole batch's loss. The loss keeps its weights equal by itself (around it,
            DistributedDataParallel needs find_unused_parameters=True); the first process's state is copied to all
            before the first batch.

    Errors: UserError (a ValueError) naming the argument, for classes of unequal size or single samples, fewer than two
    classes, labels out of range, wrong shapes or dtypes, non-finite values and constant rows.
    """

    @python_numbers
    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        layers: int = 2,
        heads: int = 4,
        alpha: float = 4.0,
        beta: float = 30.0,
        dot_weight: float = 10.0,
        div_weight: float = 10.0,
        softmax_factor: float = 20.0,
        edge_dropout: float = 0.1,
        symmetric: bool = True,
        base: str | Callable[[Tensor, Tensor], Tensor] = "npair",
        compat: str = "fixed",
        impl: str = "auto",
        num_per_class: int | None = None,
        check: str = "auto",
        seed: int | None = None,
        graph_lr: float = 1.5e-4,
        graph_weight_decay: float = 1e-4,
        classifier_lr: float = 1e-3,
        classifier_weight_decay: float = 1e-2,
        clip_value: float = 10.0,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        edge_memory: str = "auto",
        edge_dtype: torch.dtype | None = None,
        cuda_graph: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_options(dict(locals()))
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))

        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.alpha, self.beta = alpha, beta
        self.dot_weight, self.div_weight, self.softmax_factor = dot_weight, div_weight, softmax_factor
        self.edge_dropout, self.symmetric, self.seed = edge_dropout, symmetric, seed
        self.compat, self.impl, self.check = compat, impl, check
        self.edge_memory, self.edge_dtype, self._graphs = edge_memory, edge_dtype, GraphCache() if cuda_graph else None
        self._ranks, self._joined = ranks_for(process_group), False
        self.num_per_class, self.clip_value = num_per_class, clip_value
        self.graph_lr, self.epochs, self.steps_per_epoch = graph_lr, epochs, steps_per_epoch

        self.graph_network = GraphNetwork(embedding_dim, num_classes, layers=layers, heads=heads)
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self.base = base
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64))
        self.register_buffer("_mean_metric", torch.tensor(FIRST_MEAN))
        self.register_buffer("_mean_generator", torch.tensor(FIRST_MEAN))
        self.register_buffer("_metric_sum", torch.tensor(0.0))
        self.register_buffer("_generator_sum", torch.tensor(0.0))
        # On the device, where a captured step counts on; _steps_in_epoch counts the steps that the host has seen.
        self.register_buffer("_counted_steps", torch.zeros((), dtype=torch.int64), persistent=False)
        # Numbers, not bools: averages of weights over a run (AveragedModel, use_buffers=True) take differences of all.
        self.register_buffer("_problems", torch.zeros(4, dtype=torch.int32), persistent=False)
        self._steps_in_epoch = 0
        self._epoch = 0
        self._forwards = 0  # in training mode since the last generator step
        self._warned_of_epoch = False
        self._pending: _Pending | None = None
        # Called before gradients are clipped: with "graph_network" (twice a step) or "classifier", and the gradients.
        self.gradient_hook: Callable[[str, list[Tensor]], None] | None = None
        self.graph_optimizer = adamw(self.graph_network.trainable(), graph_lr, graph_weight_decay, cuda_graph)
        self.classifier_optimizer = adamw(
            self.classifier.parameters(), classifier_lr, classifier_weight_decay, cuda_graph
        )

    # -- the step

    def forward(self, embeddings: Tensor, labels: Tensor, u: Tensor | None = None) -> Tensor:
        """J_m + (1 - exp(-β / J̄_gen)) J_syn + J_gce, 0-dim, for embeddings (n, D) and labels (n,) in any order.

        In training mode this clears the graph network's gradients and remembers the batch for generator_step. u (K,
        K-1) overrides the mixing draws.
        """
        embeddings, labels = self._whole_batch(embeddings, labels)
        layout, z = self._enter(embeddings, labels)
        batch = self._batch(z, layout, u)
        views = batch.by_view()
        with torch.autocast(z.device.type, enabled=False):
            if self.base == "npair":
                metric = npair(views)
            else:
                metric = self.base(embeddings.to(z.dtype), self._in_range(labels.to(z.device, torch.int64)))
                if not isinstance(metric, Tensor) or metric.dim():
                    raise UserError(f"base returned {describe(metric)}; it must return its loss, a 0-dim tensor")
        remember = self.training and torch.is_grad_enabled()
        if remember:
            self.graph_network.zero_grad(set_to_none=True)
            self._pending = None
            if not torch.compiler.is_compiling():
                self._count_forward()
        found = self._passes(batch).metric_pass(self.graph_network, batch)
        if self.training:
            self.draw.add_(1)
        synthetic = (1 - torch.exp(-self.beta / self._mean_generator)) * found.synthetic
        if remember:
            logs = {"J_m": metric.detach(), "J_syn": synthetic.detach(), "J_gce": found.node_entropy.detach()}
            self._pending = _Pending(z.detach(), layout, logs, _autocast_state(z.device))
        return metric + synthetic + found.node_entropy

    def generator_step(self, scaler: torch.amp.GradScaler | None = None, u: Tensor | None = None) -> dict[str, Tensor]:
        """Steps the graph network on the gradients that loss.backward() left, the classifier, and the graph network
        on J_gen.

        Call it once after each training forward and backward, and, with a GradScaler, before scaler.update(); a step
        whose gradients are not finite is then left out, as scaler.step does. u (K, K-1) overrides the mixing draws.
        Returns J_m, J_syn (already weighted), J_gce, J_cls, J_soft, J_sim, J_div and J_gen, detached and 0-dim.
        RuntimeError with no training forward pending, or before its backward.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError(
                "generator_step: no training forward is pending; call gca(embeddings, labels) in training mode first"
            )
        if all(parameter.grad is None for parameter in self.graph_network.parameters()):
            raise RuntimeError(
                "generator_step: call loss.backward() before it; the graph network has no gradients yet, or they were "
                "cleared (by zero_grad of a module that holds the loss), or its parameters are frozen"
            )
        _check_draws(u, pending.layout.views)
        if not (self._graphs is not None and (self.check == "deferred" or capturing())):
            self._raise_deferred()
        self._pending, self._forwards = None, 0
        z, layout = pending.z, pending.layout
        scale = None if scaler is None or not scaler.is_enabled() else scaler.scale(torch.ones((), device=z.device))
        self._step_graph_network(scale)

        enabled, dtype = pending.autocast
        with torch.enable_grad(), torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            self.classifier.zero_grad(set_to_none=True)
            entropy = nn.functional.cross_entropy(self.classifier(z), self._in_range(layout.labels))
            classifier_loss = CLASSIFIER_FACTOR * entropy
        set_gradients(classifier_loss, self.classifier.parameters())
        self._agree_on_gradients(self.classifier.parameters())
        self._show_gradients("classifier", list(self.classifier.parameters()))
        clipped_step(self.classifier_optimizer, list(self.classifier.parameters()), None, self._graphs)
        self.classifier.zero_grad(set_to_none=True)

        with torch.enable_grad(), torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            batch = self._batch(z, layout, u)
            order = layout.appearance if self.compat == "official" else None
            weights = GeneratorWeights(*(0.5 * w for w in (self.softmax_factor, self.dot_weight, self.div_weight)))
            found = self._passes(batch).generator_pass(self.graph_network, self.classifier, batch, order, weights)
            generator = found.total
        self.draw.add_(1)
        set_gradients(generator if scale is None else generator * scale, self.graph_network.parameters())
        self._step_graph_network(scale)

        logs = pending.metric_logs | {
            "J_cls": classifier_loss.detach(),
            "J_soft": self.softmax_factor * found.negative_entropy.detach(),
            "J_sim": found.dissimilarity.detach(),
            "J_div": found.diversity.detach(),
            "J_gen": generator.detach(),
        }
        self._metric_sum.add_(logs["J_m"].clamp_min(SMALLEST_LOSS))
        self._generator_sum.add_(logs["J_gen"].clamp_min(SMALLEST_LOSS))
        self._counted_steps.add_(1)
        self._steps_in_epoch += 1
        if self.steps_per_epoch is not None and self._steps_in_epoch >= self.steps_per_epoch:
            self.end_epoch()
        late = self.steps_per_epoch is None and self._steps_in_epoch > STEPS_WITHOUT_EPOCH
        if late and not self._warned_of_epoch:
            self._warned_of_epoch = True
            warnings.warn(
                f"{self._steps_in_epoch} generator steps without end_epoch(): the running means keep their start "
                "values, so J_syn weighs next to nothing; call gca.end_epoch() after every epoch, or give "
                "steps_per_epoch",
                stacklevel=2,
            )
        return logs

    def end_epoch(self) -> None:
        """Puts the epoch's mean losses in force (an epoch without steps keeps the old ones) and steps the cosine
        schedule."""
        self._raise_deferred()
        count = self._counted_steps
        for mean, total in ((self._mean_metric, self._metric_sum), (self._mean_generator, self._generator_sum)):
            mean.copy_(torch.where(count > 0, total / count, mean))
            total.zero_()
        count.zero_()
        self._steps_in_epoch = 0
        self._epoch += 1
        self._apply_schedule()

    @torch.no_grad()
    def generate(
        self, embeddings: Tensor, labels: Tensor, u: Tensor | None = None, anchors: Tensor | None = None
    ) -> Generated:
        """The synthetic negatives and coefficients of a batch, without gradient and without touching any state.

        In training mode as the next training forward would make them (batch statistics, its dropout and mixing
        draws), in eval mode with running statistics and no dropout. With a process_group the batch is that of all
        processes, one part after the other, and all must call it. anchors: labels of the classes whose samples are
        anchors (None: all); it limits negatives and coefficients.
        """
        embeddings, labels = self._whole_batch(embeddings, labels)
        layout, z = self._enter(embeddings, labels, at_once=True)
        batch = self._batch(z, layout, u)
        places = None
        if anchors is not None:
            anchors = torch.as_tensor(anchors, device=z.device).reshape(-1)
            places = torch.searchsorted(layout.classes, anchors).clamp_max(layout.classes.shape[0] - 1)
            absent = anchors[layout.classes[places] != anchors]
            if absent.numel():
                raise UserError(
                    f"anchors holds class {absent[0].item()}, which is not in labels; it must hold labels of the batch"
                )
        found = self._passes(batch).generate(self.graph_network, batch, places)
        negatives, coefficients = found
        place_of_row = torch.argsort(layout.order)
        coefficients = coefficients[:, place_of_row]
        if places is None:
            coefficients = coefficients[place_of_row]
        else:
            rows = layout.order.view(-1, layout.views)[places].flatten()
            coefficients = coefficients[torch.argsort(rows)]
        return Generated(negatives, coefficients, layout.classes, layout.index)

    def base_parameters(self) -> list[nn.Parameter]:
        """The base loss's own parameters (proxies, for instance), for the user's optimiser; the loss itself never
        steps them."""
        return list(self.base.parameters()) if isinstance(self.base, nn.Module) else []

    # -- running means

    @property
    def mean_metric(self) -> Tensor:
        """J̄_m, the mean of J_m over the previous epoch, 0-dim (1e6 in the first)."""
        return self._mean_metric

    @mean_metric.setter
    def mean_metric(self, value: float | Tensor) -> None:
        self._mean_metric.copy_(torch.as_tensor(value, dtype=torch.float64))

    @property
    def mean_generator(self) -> Tensor:
        """J̄_gen, the mean of J_gen over the previous epoch, 0-dim (1e6 in the first)."""
        return self._mean_generator

    @mean_generator.setter
    def mean_generator(self, value: float | Tensor) -> None:
        self._mean_generator.copy_(torch.as_tensor(value, dtype=torch.float64))

    # -- state

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "version": 1,
            "seed": self.seed,
            "epoch": self._epoch,
            "steps_in_epoch": int(self._counted_steps),
            "graph_optimizer": self.graph_optimizer.state_dict(),
            "classifier_optimizer": self.classifier_optimizer.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != 1:
            raise UserError(
                f"state_dict has extra state of version {state.get('version')!r}; this gcahng reads version 1"
            )
        (given,), (own,) = state["graph_optimizer"]["param_groups"], self.graph_optimizer.param_groups
        if len(given["params"]) != len(own["params"]):
            raise UserError(
                f"state_dict is of a graph network of {len(given['params'])} weights, this one has "
                f"{len(own['params'])} (layers={len(self.graph_network.layers)}); layers must be that of the state_dict"
            )
        check_state(state["graph_optimizer"], self.graph_optimizer)
        check_state(state["classifier_optimizer"], self.classifier_optimizer)
        self.seed = state["seed"]
        self._epoch, self._steps_in_epoch = state["epoch"], state["steps_in_epoch"]
        self._counted_steps.fill_(self._steps_in_epoch)
        # Optimizer.load_state_dict keeps the tensors it is given: without a copy, two losses would share their moments.
        self.graph_optimizer.load_state_dict(copy.deepcopy(state["graph_optimizer"]))
        self.classifier_optimizer.load_state_dict(copy.deepcopy(state["classifier_optimizer"]))
        self._pending = None
        self._problems.zero_()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args: Any) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise UserError("assign is True; it must be False: the optimisers would go on with the old parameters")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GCAHNGLoss:
        before = list(self.parameters())
        super()._apply(fn, recurse)
        # Most moves keep the parameter objects; to_empty, for one, replaces them.
        moved = dict(zip(before, self.parameters(), strict=True))
        for optimizer in (self.graph_optimizer, self.classifier_optimizer):
            move_state(optimizer, moved, fn)
        self._pending = None
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, a batch is this process's own, as without a process_group: one process may `generate` or, in eval
        mode, measure without the others. Not for training steps, which would let the processes' weights drift apart."""
        ranks, self._ranks = self._ranks, None
        try:
            yield
        finally:
            self._ranks = ranks

    # -- parts

    def _whole_batch(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Checks what is handed in → the batch of which it is this process's part, or which it is."""
        self._check_tensors(embeddings, labels)
        if self._ranks is None:
            return embeddings, labels
        if not self._joined:
            self.seed, self._joined = self._ranks.join(self, self.seed), True
        wide, labels = embeddings.to(self.classifier.weight.dtype), labels.to(embeddings.device, torch.int64)
        return self._ranks.whole_batch(wide, labels, self._check_for(embeddings.device) == "raise")

    def _agree_on_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Where the processes' gradients may differ in their rounding, their weights would drift apart."""
        if self._ranks is not None:
            self._ranks.copy_from_first([p.grad for p in parameters if p.grad is not None])

    def _count_forward(self) -> None:
        self._forwards += 1
        if self._forwards == FORWARDS_WITHOUT_STEP:
            warnings.warn(
                f"{self._forwards} forwards in training mode without generator_step(): the graph network does not "
                "train, and J_syn weighs next to nothing; call gca.generator_step() after every loss.backward(), or "
                "gca.eval() before a forward that only measures",
                stacklevel=5,  # through Module.__call__
            )

    def _enter(self, embeddings: Tensor, labels: Tensor, at_once: bool = False) -> tuple[ClassLayout, Tensor]:
        """Puts a batch in canonical order, in the parameters' dtype, and checks its values. at_once: defer no check."""
        layout = class_layout(labels.to(embeddings.device, torch.int64), self.num_per_class)
        z = embeddings.to(self.classifier.weight.dtype)[layout.order]
        check = self._check_for(z.device)
        if check == "raise" or (check == "deferred" and at_once):
            raise_for_problems(value_problems(z, layout, self.num_classes).tolist(), self.num_classes, layout.views)
        elif check == "deferred":
            self._problems.logical_or_(value_problems(z, layout, self.num_classes))
        return layout, z

    def _check_tensors(self, embeddings: Tensor, labels: Tensor) -> None:
        """UserError for what shapes, dtypes and devices alone show to be wrong."""
        check_shapes(embeddings, labels, self.embedding_dim)
        weight = self.classifier.weight
        if weight.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"the loss's parameters are {weight.dtype}; keep them in float32, and use torch.autocast for less"
            )
        if embeddings.device != weight.device:
            raise UserError(f"embeddings is on {embeddings.device}, the loss on {weight.device}; move one with .to()")
        if embeddings.dtype is torch.float64 and weight.dtype is not torch.float64:
            raise UserError(
                "embeddings is float64 and the loss's parameters are float32; call gca.double(), or pass float32"
            )

    def _check_for(self, device: torch.device) -> str:
        """What check stands for now."""
        if self.check != "auto":
            return self.check
        return "deferred" if device.type != "cpu" or torch.compiler.is_compiling() else "raise"

    def _passes(self, batch: Batch) -> Any:
        """What computes the passes of a step: an Engine, or the module gcahng.reference.training_step."""
        device, graphs = batch.z.device, self._graphs
        if graphs is not None and device.type != "cuda":
            raise UserError(f"cuda_graph is True and the embeddings are on {device}; CUDA graphs need a CUDA device")
        compute = compute_dtype(device, batch.z.dtype)
        chosen = dispatch.chosen("loss", self.impl, device, batch.views, self.embedding_dim, compute)
        if chosen != "reference":
            return Engine(chosen, EngineOptions(self.edge_memory, self.edge_dtype, graphs, self._ranks))
        if graphs is not None:
            raise UserError("cuda_graph is True and impl is 'reference'; the engine alone captures its passes")
        return reference

    def _batch(self, z: Tensor, layout: ClassLayout, u: Tensor | None) -> Batch:
        views = layout.views
        draw = self.draw.clone()
        _check_draws(u, views)
        if u is None:
            u = mixing_draws(views, draw=draw, seed=self.seed, dtype=z.dtype)
        dropout = None
        if self.training and self.edge_dropout:
            dropout = Dropout(self.edge_dropout, self.seed, draw, self.symmetric)
        pull = torch.exp(-self.alpha / self._mean_metric)
        u = u.to(device=z.device, dtype=z.dtype)
        return Batch(z, self._in_range(layout.classes), views, pull.to(z.dtype), u, dropout, self.training)

    def _in_range(self, labels: Tensor) -> Tensor:
        """A label out of range is reported by the checks; it must not crash a device before they are read."""
        return labels.clamp(0, self.num_classes - 1)

    def _step_graph_network(self, scale: Tensor | None) -> None:
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
        if self.gradient_hook is not None:
            self.gradient_hook(module, [p.grad for p in parameters if p.grad is not None])

    def _apply_schedule(self) -> None:
        if self.epochs is None:
            return
        progress = min(self._epoch, self.epochs) / self.epochs
        set_rate(self.graph_optimizer, self.graph_lr * 0.5 * (1 + math.cos(math.pi * progress)))

    def _raise_deferred(self) -> None:
        if self.check == "off" or (
            self.check == "auto" and self._problems.device.type == "cpu" and not self._problems.any()
        ):
            return
        problems = self._problems.tolist()
        self._problems.zero_()
        if any(problems):
            self._pending = None
        raise_for_problems(problems, self.num_classes, self.num_per_class)


def _autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _check_draws(u: Tensor | None, views: int) -> None:
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
