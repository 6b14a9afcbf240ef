"""Whether a case computes what the reference computes: no ratio is printed for one that does not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gcahng.bench.cases import PRECISIONS, Case, Problem

# With the weights held, both phases see the same network in every implementation: Adam's first step divides a gradient by
# its own size, so that a weight whose gradient is mere rounding would move by a full learning rate, either way.
_HELD = {"graph_lr": 0.0, "graph_weight_decay": 0.0, "classifier_lr": 0.0, "classifier_weight_decay": 0.0}


def outputs(case: Case) -> dict[str, Tensor]:
    """What one step puts out: "losses" (the loss and all logs), the embeddings' gradient "dz", and by module the gradients
    of graph network and classifier. Those of both phases together, as the optimisers' first moments have them:
    (1 - β₁)(β₁ g₁ + g₂). A module's weight and bias are one tensor: the bias is the weight of a constant input."""
    problem = Problem(case, **_HELD)
    logs = problem.step()
    found = {"losses": torch.stack([value.double() for value in logs.values()]), "dz": problem.embeddings.grad.double()}
    gca = problem.gca
    names = {parameter: name for name, parameter in gca.named_parameters()}
    for optimizer in (gca.graph_optimizer, gca.classifier_optimizer):
        for parameter, state in optimizer.state.items():
            module = names[parameter].rpartition(".")[0]
            gradient = state["exp_avg"].double().flatten()
            found[module] = torch.cat((found[module], gradient)) if module in found else gradient
    return found


def relative_errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """max |actual - truth| / max |truth| of each tensor; of the losses the largest of their own relative errors. NaN counts
    as infinite, a tensor of another shape too."""
    errors = {}
    for name, want in truth.items():
        have = actual[name]
        scale = want.abs() if name == "losses" else want.abs().max()
        error = ((have - want).abs() / scale).max().item() if have.shape == want.shape else float("inf")
        errors[name] = float("inf") if error != error else error
    return errors


class Gate:
    """Holds cases of one size to the reference in fp64.

    Rounding errors are random, so that no tensor's own error in one run of the reference bounds it in another; what the
    tensors of one kind share is how far a precision carries through the step. A case passes if every error is at most twice
    the largest one of the reference at the case's precision, losses and gradients apart, plus one rounding.
    """

    def __init__(self, size: Case) -> None:
        self._size = replace(size, impl="reference")
        self._truth = outputs(replace(self._size, precision="fp64"))
        self._allowed: dict[str, tuple[float, float]] = {}

    def allowed(self, precision: str) -> tuple[float, float]:
        """The relative errors that losses and gradients may have."""
        if precision not in self._allowed:
            errors = relative_errors(outputs(replace(self._size, precision=precision)), self._truth)
            rounding = torch.finfo(PRECISIONS[precision]).eps / 2
            losses = errors.pop("losses")
            self._allowed[precision] = (2 * losses + rounding, 2 * max(errors.values()) + rounding)
        return self._allowed[precision]

    def problem(self, case: Case) -> str | None:
        """None for a case that agrees, else what does not, in one line."""
        return self.compare(outputs(case), case.precision)

    def compare(self, actual: dict[str, Tensor], precision: str) -> str | None:
        """As problem, for the outputs of a case of this precision."""
        if actual.keys() != self._truth.keys():
            return f"it has other outputs: {', '.join(sorted(actual.keys() ^ self._truth.keys()))}"
        losses, gradients = self.allowed(precision)
        for name, error in relative_errors(actual, self._truth).items():
            allowed = losses if name == "losses" else gradients
            if error > allowed:
                return f"{name} is off by {error:.2g} of its size, allowed {allowed:.2g}"
        return None
