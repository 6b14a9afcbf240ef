"""The loss that a user calls: GCA-HNG's metric losses, and the generator that it trains beside the user's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gcahng import dispatch
from gcahng.engine.cuda_graph import capturing
from gcahng.engine.weights import fixed_in_metric_pass, metric_names
from gcahng.errors import UserError
from gcahng.losses.base import Base, IndicesTuple, base_loss, check_base, check_mined
from gcahng.losses.generated import Generated
from gcahng.losses.layout import ClassLayout
from gcahng.losses.misuse import Trace, refuse_gathering, sample
from gcahng.losses.module import LossModule, check_draws
from gcahng.losses.optimizers import check_holds, clipped_step, set_gradients
from gcahng.losses.options import RATES, EngineOptions, check_options, plain_numbers, split_knobs
from gcahng.nn import GraphNetwork
from gcahng.reference.npair import npair
from gcahng.reference.training_step import GeneratorWeights

CLASSIFIER_FACTOR = 10.0
SMALLEST_LOSS = 1e-6
WITHOUT_GRADIENTS = (
    "generator_step: call loss.backward() before it; the graph network has no gradients yet, or they were cleared (by "
    "zero_grad of a module that holds the loss or of an optimizer that holds its parameters), or its parameters are "
    "frozen"
)


class _Pending(NamedTuple):
    """A training forward that waits for its generator step.

    Attributes:
        z: embeddings (n, D) in canonical order, detached.
        layout: the canonical order.
        metric_logs: J_m, J_syn and J_gce, detached.
        autocast: whether autocast was enabled in the forward, and its dtype.
        trace: by which the generator step notices misuse.
    """

    z: Tensor
    layout: ClassLayout
    metric_logs: dict[str, Tensor]
    autocast: tuple[bool, torch.dtype]
    trace: Trace


class GCAHNGLoss(LossModule):
    """Globally correlation-aware hard negative generation (Peng et al., IJCV 2025, arXiv 2411.13145).

    A graph network over the complete graph of the batch learns a correlation vector θ_ij for every pair of samples;
    with it, real negatives are pulled towards each anchor and mixed. One training step:

        loss = gca(embeddings, labels)      # J_m + (1 - exp(-β / J̄_gen)) J_syn + J_gce
        loss.backward(); optimizer.step()   # the user's own model
        logs = gca.generator_step()         # graph network on those gradients; classifier; graph network on J_gen
        ...
        gca.end_epoch()                     # rolls the running means, steps the schedule

    The loss owns the graph network, a classifier, and an AdamW for each. Do not hand `gca.parameters()` to another
    optimizer: every weight would be stepped twice. Gradient accumulation is not supported: each forward is one step.
    docs/loss.md lists such mistakes, of which most are noticed.
    Embeddings are taken as they come (the authors do not normalize them in training), in float32; float16 and bfloat16
    are cast up.

    Args:
        num_classes: training classes M; labels lie in 0 … M - 1.
        embedding_dim: channels D.
        layers: layers L of the graph network.
        heads: heads of its node attention; a divisor of D.
        alpha: how fast pulling sets in as J̄_m falls: negatives are pulled by exp(-α / J̄_m).
        beta: how fast J_syn's weight grows as J̄_gen falls.
        dot_weight: weight of J_sim in J_gen = ½ (softmax_factor · CE + dot_weight · J_sim + div_weight · J_div).
        div_weight: weight of J_div in J_gen.
        softmax_factor: weight of the cross entropy in J_gen.
        edge_dropout: chance p that dropout drops an attention weight of an edge.
        symmetric: whether (i, j) and (j, i) share one dropout draw. Each edge is dropped out as before, but the two are
            no longer independent. False draws them apart, as the authors do, at twice the cost.
        base: the loss J_m: "npair", or any module that is called as base(embeddings, labels). The losses of
            pytorch-metric-learning fit.
        miner: a miner of pytorch-metric-learning, or any that is called as miner(embeddings, labels). What it returns
            is the base's third argument.
        compat: "fixed", or "official" to zero the similarities that the authors' code zeroes by mistake.
        num_per_class: samples of a class, K. None reads it from the labels on the host, which on a GPU is a
            synchronization.
        check: when values are checked. "raise" checks them at once. "deferred" lets the next generator_step or
            end_epoch raise, without a synchronization in between. "off" checks nothing. "auto" is "raise" for CPU
            tensors in eager mode, else "deferred".
        seed: of dropout and mixing draws; None takes one from torch's generator.
        graph_lr: learning rate of the graph network's AdamW.
        graph_weight_decay: its weight decay.
        classifier_lr: learning rate of the classifier's AdamW.
        classifier_weight_decay: its weight decay.
        clip_value: the graph network's gradients are clipped to ± this value.
        epochs: the graph network's learning rate follows a cosine to 0 over so many epochs; with None it stays
            constant.
        steps_per_epoch: end_epoch is called after so many generator steps; None leaves it to the caller.
        engine: how passes are run. Its fields may be keywords instead: impl, edge_memory, edge_dtype, cuda_graph and
            process_group. So may those of gcahng.nn.GraphAblation (coefficients and message_passing), and of
            gcahng.losses.SyntheticOptions (synthetic, anchor_gradient, synthetic_temperature, synthetic_weight and
            synthetic_warmup).

    Raises:
        UserError: (a ValueError) an argument is wrong, and the message names it: an option that is not what it must be;
            classes of unequal size or of single samples; fewer than two classes; labels out of range; wrong shapes or
            dtypes; values that are not finite; rows whose channels are all equal.
    """

    @plain_numbers
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
        base: str | Base = "npair",
        miner: Callable[..., IndicesTuple] | None = None,
        compat: str = "fixed",
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
        engine: EngineOptions | None = None,
        **knobs: Any,
    ) -> None:
        # There are this many parameters because each is an option of the method, of which a user sets a few.
        super().__init__()
        options = dict(locals())
        engine, ablation, pairing = split_knobs(engine, knobs)
        pairing.check()
        check_options(options | vars(engine) | vars(pairing))
        check_base(base, miner)
        if engine.process_group not in (None, "alone"):
            refuse_gathering(base, miner)
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))

        self.num_classes, self.embedding_dim = num_classes, embedding_dim
        self.alpha, self.beta = alpha, beta
        self.dot_weight, self.div_weight, self.softmax_factor = dot_weight, div_weight, softmax_factor
        self.edge_dropout, self.symmetric, self.seed = edge_dropout, symmetric, seed
        self.compat, self.check = compat, check
        self.num_per_class, self.clip_value = num_per_class, clip_value
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch

        self.graph_network = GraphNetwork(embedding_dim, num_classes, layers=layers, heads=heads, ablation=ablation)
        self.classifier = nn.Linear(embedding_dim, num_classes)
        self.base, self.miner, self.pairing = base, miner, pairing
        pairing.with_base(base)  # which refuses bases
        self._set_up(engine, {name: options[name] for name in RATES})

    # -- the step

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        u: Tensor | None = None,
        *,
        indices_tuple: IndicesTuple | None = None,
    ) -> Tensor:
        """Computes the loss for the user's model.

        In training mode this clears the graph network's gradients and remembers the batch for generator_step.

        Args:
            embeddings: (n, D), in any order.
            labels: whole numbers (n,); every class has K samples.
            u: mixing draws (K, K - 1) in the place of the loss's own.
            indices_tuple: pairs or triplets of the batch's rows, as the miners of pytorch-metric-learning return them,
                for the base loss.

        Returns:
            J_m + w J_syn + J_gce, 0-dim, with w = 1 - exp(-β / J̄_gen) unless synthetic_weight or synthetic_warmup says
            otherwise.
        """
        check_mined(self.base, indices_tuple, shared=self._ranks is not None)
        embeddings, labels = self._whole_batch(embeddings, labels)
        layout, z = self._enter(embeddings, labels)
        batch = self._batch(z, layout, u)
        views = batch.by_view()
        with torch.autocast(z.device.type, enabled=False):
            if self.base == "npair":
                metric = npair(views)
            else:
                rows, targets = embeddings.to(z.dtype), self._in_range(labels.to(z.device, torch.int64))
                with self._watch.around_base(len(rows), self._ranks is not None):
                    metric = base_loss(self.base, self.miner, rows, targets, indices_tuple)
        remember = self.training and torch.is_grad_enabled()
        if remember:
            self.graph_network.zero_grad(set_to_none=True)
            if not (torch.compiler.is_compiling() or self._only_takes_statistics()):
                self._watch.forward(self._trace_without_step(), self.engine.process_group)
            self._pending = None
        passes = dispatch.passes(self.impl, batch, self._pass_options)
        losses = passes.metric_pass(self.graph_network, batch, self.pairing.with_base(self.base))
        # A step makes two draws, one in each phase.
        synthetic = self.pairing.weight(self.mean_generator, self.beta, self.draw // 2) * losses.synthetic
        if self.training:
            self.draw.add_(1)
        if remember:
            logs = {"J_m": metric.detach(), "J_syn": synthetic.detach(), "J_gce": losses.node_entropy.detach()}
            trace = Trace(sample(self.graph_network, self.classifier))
            trace.follow(losses.node_entropy)
            self._pending = _Pending(z.detach(), layout, logs, _autocast_state(z.device), trace)
        return metric + synthetic + losses.node_entropy

    @property
    def awaits_step(self) -> bool:
        """Whether a training forward and its backward wait for generator_step."""
        pending = self._pending
        return pending is not None and not (pending.trace.upstream is None and self._has_no_gradients())

    def generator_step(self, scaler: torch.amp.GradScaler | None = None, u: Tensor | None = None) -> dict[str, Tensor]:
        """Steps the graph network on the gradients that loss.backward() left, the classifier, and the graph network
        on J_gen.

        Call it once after each training forward and backward.

        Args:
            scaler: the GradScaler that scaled the loss, if there is one. Call this before scaler.update(). A step whose
                gradients are not finite is then skipped, as scaler.step does.
            u: mixing draws (K, K - 1) in the place of the loss's own.

        Returns:
            J_m, J_syn (as weighted), J_gce, J_cls, J_soft, J_sim, J_div and J_gen, detached and 0-dim.

        Raises:
            RuntimeError: no training forward is pending, or its backward has not run.
            UserError: something else has stepped the graph network or replaced the loss's parameters, the loss's
                gradient was scaled by another scaler than this one, or a deferred check found something wrong with the
                batch.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError(
                "generator_step: no training forward is pending; call gca(embeddings, labels) in training mode first"
            )
        z, layout, trace = pending.z, pending.layout, pending.trace
        check_holds(self.graph_optimizer, self.graph_network)
        check_holds(self.classifier_optimizer, self.classifier)
        without_gradients = self._has_no_gradients()
        if without_gradients and trace.upstream is None:
            raise RuntimeError(WITHOUT_GRADIENTS)
        check_draws(u, layout.views)
        scale = None if scaler is None or not scaler.is_enabled() else scaler.scale(torch.ones((), device=z.device))
        self._note_misuse(trace, scale)
        if not (self._graphs is not None and (self.check == "deferred" or capturing())):
            self._raise_deferred()
        if without_gradients and not self._generator_alone_trains():
            raise RuntimeError(WITHOUT_GRADIENTS)
        self._pending, self._watch.forwards = None, 0
        self._step_graph_network(scale)

        enabled, dtype = pending.autocast
        with torch.enable_grad(), torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            self.classifier.zero_grad(set_to_none=True)
            entropy = nn.functional.cross_entropy(self.classifier(z), self._in_range(layout.labels))
            classifier_loss = CLASSIFIER_FACTOR * entropy
        set_gradients(classifier_loss, self.classifier.parameters())
        self._agree_on_gradients(self.classifier.parameters())
        self._show_gradients("classifier", list(self.classifier.parameters()))
        if stepped := [p for p in self.classifier.parameters() if p.grad is not None]:
            clipped_step(self.classifier_optimizer, stepped, None, self._graphs)
        self.classifier.zero_grad(set_to_none=True)

        with torch.enable_grad(), torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            batch = self._batch(z, layout, u)
            order = layout.appearance if self.compat == "official" else None
            weights = GeneratorWeights(*(0.5 * w for w in (self.softmax_factor, self.dot_weight, self.div_weight)))
            passes = dispatch.passes(self.impl, batch, self._pass_options)
            losses = passes.generator_pass(self.graph_network, self.classifier, batch, order, weights)
            generator = losses.total
        self.draw.add_(1)
        set_gradients(generator if scale is None else generator * scale, self.graph_network.parameters())
        self._step_graph_network(scale)
        self._note_weights()

        logs = pending.metric_logs | {
            "J_cls": classifier_loss.detach(),
            "J_soft": self.softmax_factor * losses.negative_entropy.detach(),
            "J_sim": losses.dissimilarity.detach(),
            "J_div": losses.diversity.detach(),
            "J_gen": generator.detach(),
        }
        self._count_losses(logs["J_m"].clamp_min(SMALLEST_LOSS), logs["J_gen"].clamp_min(SMALLEST_LOSS))
        self._steps_in_epoch += 1
        if self.steps_per_epoch is not None and self._steps_in_epoch >= self.steps_per_epoch:
            self.end_epoch()
        self._watch.step(self._steps_in_epoch, self.steps_per_epoch)
        return logs

    def end_epoch(self) -> None:
        """Takes over the epoch's mean losses, and steps the cosine schedule.

        After an epoch without steps the old means stay.

        Raises:
            UserError: a deferred check found something wrong with a batch.
        """
        self._raise_deferred()
        self._roll_means()
        self._steps_in_epoch = 0
        self._epoch += 1
        self._apply_schedule()

    @torch.no_grad()
    def generate(
        self, embeddings: Tensor, labels: Tensor, u: Tensor | None = None, anchors: Tensor | None = None
    ) -> Generated:
        """The synthetic negatives and coefficients of a batch, without gradient and without touching any state.

        In training mode they are as the next training forward would make them (batch statistics, its dropout and mixing
        draws), in eval mode with running statistics and without dropout. With a process_group the batch is that of all
        processes, one part after the other, and all must call it.

        Args:
            embeddings: as in the forward.
            labels: as in the forward.
            u: as in the forward.
            anchors: labels of the classes whose samples are anchors, to which negatives and coefficients are limited;
                None for all classes.

        Raises:
            UserError: `anchors` holds a class that is not in `labels`, or as in the forward.
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
        passes = dispatch.passes(self.impl, batch, self._pass_options)
        negatives, coefficients = passes.generate(self.graph_network, batch, places)
        place_of_row = torch.argsort(layout.order)
        coefficients = coefficients[:, place_of_row]
        if places is None:
            coefficients = coefficients[place_of_row]
        else:
            rows = layout.order.view(-1, layout.views)[places].flatten()
            coefficients = coefficients[torch.argsort(rows)]
        return Generated(negatives, coefficients, layout.classes, layout.index)

    def base_parameters(self) -> list[nn.Parameter]:
        """The base loss's own parameters, such as proxies, for the user's optimizer. The loss never steps them."""
        return list(self.base.parameters()) if isinstance(self.base, nn.Module) else []

    def _trace_without_step(self) -> Trace | None:
        """The trace of the forward before, if the graph network trains and no generator step has followed."""
        trains = any(p.requires_grad for group in self.graph_optimizer.param_groups for p in group["params"])
        return self._pending.trace if self._pending is not None and trains else None

    def _generator_alone_trains(self) -> bool:
        """Whether all weights are frozen that have gradients in the caller's backward, and others are not."""
        of_caller = {*metric_names(len(self.graph_network.layers))} - fixed_in_metric_pass(self.graph_network)
        trained = {name for name, parameter in self.graph_network.named_parameters() if parameter.requires_grad}
        return bool(trained) and not trained & of_caller


def _autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    """Whether autocast is enabled on a device, and its dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
