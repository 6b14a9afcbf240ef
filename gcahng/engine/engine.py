"""The engine as an implementation of the loss. GCAHNGLoss calls it."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gcahng.engine.base_pass import run_base_pass
from gcahng.engine.coefficients import coefficients
from gcahng.engine.cuda_graph import GraphCache
from gcahng.engine.generator_pass import GeneratorPass, GeneratorTask
from gcahng.engine.metric_pass import run_metric_pass
from gcahng.engine.operands import PassInputs, Settings, Wanted
from gcahng.engine.precision import compute_dtype, name_of, note_bf16
from gcahng.engine.prepare import graph_pass
from gcahng.engine.ranks import Ranks
from gcahng.engine.weights import buffer_list, fixed_in_generator_pass, fixed_in_metric_pass, parameter_list
from gcahng.errors import UserError
from gcahng.reference.head import momentum
from gcahng.reference.similarity import official_own_entries
from gcahng.reference.synthetic import PAPER, Synthetic
from gcahng.reference.training_step import Batch, GeneratorLosses, GeneratorWeights, MetricLosses, generated

if TYPE_CHECKING:
    from gcahng.nn import GraphNetwork


class PassOptions(NamedTuple):
    """How the engine runs a pass. No option changes what is computed, beyond rounding.

    Attributes:
        edge_memory: auto, store, hidden or recompute; see gcahng.EngineOptions.
        edge_dtype: dtype of stored edges; None is the embeddings' own.
        graphs: the cache of captured passes; None if passes are not captured.
        ranks: the processes that share each batch's pairs; None if this process has them all.
    """

    edge_memory: str = "auto"
    edge_dtype: torch.dtype | None = None
    graphs: GraphCache | None = None
    ranks: Ranks | None = None


class Engine:
    """The passes of a training step over tiles of edges.

    Args:
        implementation: that of the stages, as gcahng.dispatch names it.
        options: how passes are run.
    """

    def __init__(self, implementation: str, options: PassOptions = PassOptions()) -> None:  # noqa: B008  immutable
        self.implementation, self.options = implementation, options

    def metric_pass(self, network: GraphNetwork, batch: Batch, synthetic: Synthetic = PAPER) -> MetricLosses:
        """Does what gcahng.reference.training_step.metric_pass does."""
        s = self._settings(network, batch)
        s = s._replace(
            pairing=synthetic.pairing,
            anchor_gradient=synthetic.anchor_gradient,
            temperature=synthetic.temperature,
        )
        inputs = _inputs(network, batch, batch.z, fixed_in_metric_pass(network))
        if not torch.compiler.is_compiling():
            refuse_transforms("the engine", batch.z, *inputs.parameters)
        if synthetic.base is not None:
            if torch.compiler.is_compiling():
                raise UserError(
                    'synthetic is "base", which torch.compile does not take; it must be "npair" or "cosine", or the '
                    "loss be called outside of what is compiled"
                )
            out = run_base_pass(inputs, s, synthetic.base)
        else:
            record = torch.is_grad_enabled()
            want_z = record and batch.z.requires_grad
            want_parameters = record and any(p.requires_grad for p in inputs.parameters)
            out = run_metric_pass(inputs, s, Wanted(want_z, want_parameters))
        if s.training:
            _store_statistics(network, out.statistics)
        return MetricLosses(out.synthetic, out.entropy)

    def generator_pass(
        self,
        network: GraphNetwork,
        classifier: nn.Linear,
        batch: Batch,
        official_order: Tensor | None,
        weights: GeneratorWeights,
    ) -> GeneratorLosses:
        """Does what gcahng.reference.training_step.generator_pass does."""
        s = self._settings(network, batch)
        inputs = _inputs(network, batch, batch.z.detach(), fixed_in_generator_pass(network))
        zeroed = None if official_order is None else official_own_entries(batch.views, official_order)
        fixed = (classifier.weight.detach().contiguous(), classifier.bias.detach().contiguous())
        task = GeneratorTask(*fixed, zeroed, weights, record=True)
        total, *out = GeneratorPass.apply(inputs._replace(parameters=[]), s, task, *inputs.parameters)
        if s.training:
            _store_statistics(network, out[3:])
        return GeneratorLosses(total, *out[:3])

    @torch.no_grad()
    def generate(self, network: GraphNetwork, batch: Batch, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Does what gcahng.reference.training_step.generate does."""
        s = self._settings(network, batch)  # before autocast is switched off: it decides the dtype of products
        graph = graph_pass(_inputs(network, batch, batch.z), s)
        with torch.autocast(batch.z.device.type, enabled=False):
            return generated(batch, coefficients(graph), anchors)

    def _settings(self, network: GraphNetwork, batch: Batch) -> Settings:
        """Everything that a pass needs beside tensors."""
        dropout, norm, options = batch.dropout, network.edge_batch_norm, self.options
        dtype = batch.z.dtype
        if options.edge_dtype is torch.bfloat16:
            note_bf16(batch.z.device)
        return Settings(
            layers=len(network.layers),
            heads=network.heads,
            views=batch.views,
            p=0.0 if dropout is None else dropout.p,
            seed=0 if dropout is None else dropout.seed,
            symmetric=True if dropout is None else dropout.symmetric,
            training=batch.training,
            momentum=momentum(norm),
            eps=norm.eps,
            compute=name_of(compute_dtype(batch.z.device, dtype)),
            implementation=self.implementation,
            edge_memory=options.edge_memory,
            edge_dtype=name_of(options.edge_dtype or dtype),
            graphs=0 if options.graphs is None else options.graphs.number,
            ranks=0 if options.ranks is None else options.ranks.number,
        )


def refuse_transforms(what: str, *tensors: Tensor) -> None:
    """Refuses derivatives that would silently be lost.

    Args:
        what: the op's name, for the error.
        tensors: its differentiable inputs.

    Raises:
        UserError: a transform of torch.func is active, or one of the tensors has a forward-mode derivative.
    """
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if transformed or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise UserError(
            f"{what} supports backward-mode derivatives only, outside torch.func; impl='reference' supports all of "
            "them in eval mode, and a loop does what torch.vmap would"
        )


def _inputs(network: GraphNetwork, batch: Batch, z: Tensor, fixed: Set[str] = frozenset()) -> PassInputs:
    """The tensors of a pass on embeddings z (n, D); `fixed` names the parameters that get no gradient."""
    draw = torch.zeros((), dtype=torch.int64, device=z.device) if batch.dropout is None else batch.dropout.draw
    parameters = parameter_list(network, fixed)
    return PassInputs(z, batch.classes, batch.pull, batch.u, draw, parameters, buffer_list(network))


def _store_statistics(network: GraphNetwork, statistics: list[Tensor]) -> None:
    """Copies the running statistics that a pass returned into the network's BatchNorms."""
    with torch.no_grad():
        for number, norm in enumerate((network.edge_batch_norm, network.node_batch_norm)):
            mean, variance, count = statistics[3 * number : 3 * number + 3]
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.num_batches_tracked.copy_(count)
