"""What a pass allocates and multiplies, seen from torch's dispatcher."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gcahng.bench.cases import Problem
from gcahng.engine import prepare
from gcahng.engine.engine import Engine, PassOptions
from gcahng.engine.generator_pass import GeneratorTask, generator_pass
from gcahng.engine.metric_pass import metric_pass
from gcahng.engine.operands import PassInputs, Wanted
from gcahng.engine.weights import buffer_list, parameter_list
from gcahng.reference.edge_update import Dropout
from gcahng.reference.philox import mixing_draws
from gcahng.reference.training_step import Batch, GeneratorWeights

_PRODUCTS = {
    torch.ops.aten.mm.default: (0, 1),
    torch.ops.aten.mm.out: (0, 1),
    torch.ops.aten.bmm.default: (0, 1),
    torch.ops.aten.addmm.default: (1, 2),
    torch.ops.aten.addmm.out: (1, 2),
    torch.ops.aten.addmm_.default: (1, 2),
}


class Observed(TorchDispatchMode):
    """live, peak: bytes of the tensors made inside and still there; products: (rows, inner, columns) of every matrix
    product."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.products: list[tuple[int, int, int]] = []
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            a, b = (args[place] for place in _PRODUCTS[func])
            batch = a.shape[0] if a.dim() == 3 else 1
            self.products.append((batch * a.shape[-2], a.shape[-1], b.shape[-1]))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen and self._seen[key]() is not None:
            return

        def gone(_: weakref.ref) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def observe(problem: Problem) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Phases 1 and 3 of a training step, run twice, in a workspace that starts empty → each phase's peak in the
    second run, and the products of one run. problem.case.impl is torch or cpp."""
    gca, case = problem.gca, problem.case
    network = gca.graph_network
    u = mixing_draws(case.views, draw=gca.draw, seed=gca.seed, dtype=problem.dtype)
    pull = torch.exp(-gca.alpha / gca.mean_metric).to(problem.dtype)
    dropout = Dropout(gca.edge_dropout, gca.seed, gca.draw, case.symmetric)
    classes = problem.labels[:: case.views]
    batch = Batch(problem.embeddings.detach(), classes, case.views, pull, u, dropout, True)
    with problem.autocast():
        settings = Engine(case.implementation, PassOptions(case.memory, case.edge_dtype))._settings(network, batch)
    inputs = PassInputs(batch.z, classes, pull, u, gca.draw, parameter_list(network), buffer_list(network))
    head = (gca.classifier.weight.detach(), gca.classifier.bias.detach())
    prepare._workspace.clear()
    gc.collect()

    def phase(number: int) -> int:
        observed.peak = observed.live
        if number == 1:
            metric_pass(inputs, settings, Wanted(True, True))
        else:
            task = GeneratorTask(*head, None, GeneratorWeights(10.0, 5.0, 5.0), record=True)
            generator_pass(inputs, settings, task)
        return observed.peak

    with torch.no_grad(), Observed() as observed:
        phase(1), phase(3)
        gc.collect()
        observed.products.clear()
        peaks = [phase(1), phase(3)]
    return peaks, observed.products
