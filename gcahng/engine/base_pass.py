"""Phase 1 of a training step where the base loss itself is J_syn: a function for autograd, which is run eagerly.

The base is the user's module, so that it is differentiated by autograd, on the negatives as leaves. What it gives for
them goes on through the mix by hand, as in the other pairings.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcahng.engine.differentiable_once import differentiable_once
from gcahng.engine.free_memory import free_memory
from gcahng.engine.graph import GraphPass
from gcahng.engine.metric_pass import form_losses
from gcahng.engine.operands import MetricOutputs, PassInputs, Settings, Wanted
from gcahng.engine.prepare import workspace_for
from gcahng.engine.stages.mix import Mixing, MixUpstream
from gcahng.engine.stages.mix_index import batch_mixes, by_tile
from gcahng.engine.synthetic import MixGradients
from gcahng.engine.weights import metric_names, parameter_names
from gcahng.errors import UserError
from gcahng.reference.synthetic import OnNegatives

COPIES_AT_ONCE = 4
"""Of all negatives: they, their gradient, and what a base keeps of them for its backward."""


class _OnBase:
    """Forms J_syn by the base; see gcahng.engine.synthetic.FormSynthetic.

    Args:
        base: the loss.
        classes: labels of the batch's classes (C,).
        want_base: whether the gradients of the base's parameters are wanted.

    Attributes:
        gradients: of the base's trained parameters, which are added up; an empty list if they are not wanted.
    """

    def __init__(self, base: OnNegatives, classes: Tensor, want_base: bool) -> None:
        self.base, self.classes, self.want_base = base, classes, want_base
        self.gradients = [torch.zeros_like(p) for p in base.trained()] if want_base else []

    def __call__(self, graph: GraphPass, mixing: Mixing, s: Settings, want_z: bool) -> tuple[Tensor, Tensor | None]:
        self._want_z, self._anchors = want_z, s.anchor_gradient
        self._z = graph.z.detach()
        self._labels = self.classes.repeat_interleave(s.views)
        self._dz = torch.zeros_like(graph.z) if want_z else None
        form = self._in_parts if self.base.additive else self._at_once
        return form(graph, mixing)

    def _in_parts(self, graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor | None]:
        """Of a base that takes a tile's negatives at a time."""
        schedule, mixes = graph.schedule, batch_mixes(graph.stages.context)
        lists = [by_tile(schedule, x) for x in (mixes.others, self.classes[mixes.negative], mixes.node)]
        count = schedule.views * schedule.classes * (schedule.classes - 1)
        gradients = MixGradients(graph, mixing, self._anchors)
        loss = graph.z.new_zeros(())
        for tile in schedule.tiles:
            theta = graph.last_coefficients(tile)
            others, *of_negatives = (x[tile] for x in lists)
            negatives = graph.stages.mix.negatives(mixing, tile, theta)
            part, d = self._form(negatives[others], *(x[others] for x in of_negatives), int(others.sum()) / count)
            loss += part
            if d is not None:
                dn = torch.zeros_like(negatives).index_put_((others,), d)
                gradients.add(tile, MixUpstream(theta, None, 0.0, dn))
        graph.buffer, graph.s[-1] = graph.s[-1], None
        return loss, None if self._dz is None else self._dz.add_(gradients.total())

    def _at_once(self, graph: GraphPass, mixing: Mixing) -> tuple[Tensor, Tensor | None]:
        """Of a base that needs all negatives."""
        schedule, mixes = graph.schedule, batch_mixes(graph.stages.context)
        self._check_memory(graph, int(mixes.others.sum()))
        negatives = graph.z.new_empty(len(mixes.place), graph.dim)
        of_tile = by_tile(schedule, negatives)
        for tile in schedule.tiles:
            theta = graph.last_coefficients(tile)
            of_tile[tile].copy_(graph.stages.mix.negatives(mixing, tile, theta))
        theta, graph.s[-1] = graph.s[-1], None
        others = mixes.others
        loss, d = self._form(negatives[others], self.classes[mixes.negative[others]], mixes.node[others], 1.0)
        if d is not None:
            gradients = MixGradients(graph, mixing, self._anchors)
            dn = by_tile(schedule, negatives.zero_().index_put_((others,), d))
            for tile in schedule.tiles:
                known = theta is not None
                coefficients = graph.full(theta[tile]) if known else graph.coefficients(graph.edge(graph.layers, tile))
                gradients.add(tile, MixUpstream(coefficients, None, 0.0, dn[tile]))
            self._dz.add_(gradients.total())
        graph.buffer = theta
        return loss, self._dz

    def _form(self, negatives: Tensor, classes: Tensor, node: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
        """The loss of some negatives times a weight, and their gradient; those of z and of the base are added up."""
        if not len(negatives):
            return negatives.new_zeros(()), negatives if self._want_z else None
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(self._want_z) for x in (negatives, self._z)]
            rows = leaves[1] if self._anchors else leaves[1].detach()
            loss = weight * self.base(leaves[0], classes, node, rows, self._labels)
            sought = [*(leaves if self._want_z else []), *(self.base.trained() if self.want_base else [])]
            found = [None] * len(sought)
            if sought and loss.requires_grad:
                found = torch.autograd.grad(loss, sought, allow_unused=True)
        d = None
        if self._want_z:
            d, dz, *found = found
            d = torch.zeros_like(negatives) if d is None else d
            if dz is not None:
                self._dz.add_(dz)
        for total, part in zip(self.gradients, found, strict=True):
            if part is not None:
                total.add_(part)
        return loss.detach(), d

    def _check_memory(self, graph: GraphPass, count: int) -> None:
        nodes = graph.schedule.nodes
        compared = nodes * (nodes + count) if self.base.of_pairs else 0  # a matrix, where each anchor's part counts
        needed = COPIES_AT_ONCE * (count * graph.dim + compared) * graph.z.element_size()
        free = free_memory(graph.z.device)
        if free is not None and needed > free:
            raise UserError(
                f'synthetic is "base", and this base takes all {count:,} synthetic negatives of a batch at once, about '
                f'{needed:,} bytes, and {free:,} are free; the batch must be smaller, or synthetic "npair" or "cosine"'
            )


class _Task(NamedTuple):
    """What a pass does: the loss of the negatives, which gradients are wanted, and whether those of the base are."""

    base: OnNegatives
    wanted: Wanted
    want_base: bool


class BasePass(torch.autograd.Function):
    """J_syn, J_gce and the running statistics, as a function of z, the network's and the base's parameters."""

    @staticmethod
    def forward(ctx: Any, inputs: PassInputs, s: Settings, task: _Task, z: Tensor, *parameters: Tensor) -> Any:
        """Runs phase 1.

        Args:
            ctx: of autograd.
            inputs: the pass's tensors, without z and parameters: autograd needs those as arguments of their own.
            s: everything else.
            task: the loss of the negatives, and what is wanted.
            z: embeddings (n, D).
            parameters: the graph network's (see parameter_list), then what base.trained() lists.
        """
        count = len(parameter_names(s.layers))
        inputs = inputs._replace(z=z, parameters=list(parameters[:count]))
        form = _OnBase(task.base, inputs.classes, task.want_base)
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            out = form_losses(inputs, s, task.wanted, workspace_for(z.device), form)
        # Not the losses, which hold this in turn.
        ctx.dz, ctx.of_network, ctx.of_base = (out.dz_synthetic, out.dz_entropy), out.gradients, form.gradients
        ctx.layers, ctx.base_count = s.layers, len(parameters) - count
        ctx.save_for_backward(z, *parameters)
        ctx.mark_non_differentiable(*out.statistics)
        return out.synthetic, out.entropy, *out.statistics

    @staticmethod
    def backward(ctx: Any, d_synthetic: Tensor, d_entropy: Tensor, *_: Any) -> Any:
        """Scales the gradients of the two losses."""
        count = len(ctx.of_network)
        tensors = (*ctx.dz, d_synthetic, d_entropy, *ctx.of_network, *ctx.of_base)
        # What the gradients depend on is looked at only where they are to be differentiated.
        depends_on = ctx.saved_tensors if torch.is_grad_enabled() else ()
        dz, *scaled = differentiable_once("the engine", _Scale(count, len(tensors)), *tensors, *depends_on)
        named = dict(zip(metric_names(ctx.layers) if count else [], scaled[:count], strict=True))
        network = [named.get(name) for name in parameter_names(ctx.layers)]
        base = scaled[count:] or [None] * ctx.base_count
        return None, None, None, dz if ctx.needs_input_grad[3] else None, *network, *base


class _Scale:
    """Multiplies gradients with the upstream gradients of J_syn and J_gce.

    Args:
        count: how many are the graph network's.
        used: how many of the tensors that it is called with are used.
    """

    def __init__(self, count: int, used: int) -> None:
        self._count, self._used = count, used

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        of_synthetic, of_entropy, d_synthetic, d_entropy, *gradients = tensors[: self._used]
        network, base = gradients[: self._count], gradients[self._count :]
        dz = of_synthetic * d_synthetic + of_entropy * d_entropy
        return dz, *(x * d_entropy for x in network), *(x * d_synthetic for x in base)


def run_base_pass(inputs: PassInputs, s: Settings, base: OnNegatives) -> MetricOutputs:
    """Runs phase 1 with J_syn by the base loss.

    Args:
        inputs: the pass's tensors.
        s: everything else.
        base: the loss.

    Returns:
        Losses and statistics; their gradients are autograd's.
    """
    record, trained = torch.is_grad_enabled(), base.trained()  # asked here: a Function's forward records nothing
    wanted = Wanted(record and inputs.z.requires_grad, record and any(p.requires_grad for p in inputs.parameters))
    task = _Task(base, wanted, record and bool(trained))
    moving = inputs._replace(z=inputs.z.detach(), parameters=[])
    synthetic, entropy, *statistics = BasePass.apply(moving, s, task, inputs.z, *inputs.parameters, *trained)
    return MetricOutputs(synthetic, entropy, statistics, inputs.z.new_empty(0), inputs.z.new_empty(0), [])
