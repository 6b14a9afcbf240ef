"""Whether a case computes what the reference computes: no ratio is printed for one that does not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gcahng.bench.cases import Case, Problem

# With the weights held, both phases see the same network in every implementation: Adam's first step divides a
# gradient by its own size, so that a weight whose gradient is mere rounding would move by a full learning rate.
_HELD = {"graph_lr": 0.0, "graph_weight_decay": 0.0, "classifier_lr": 0.0, "classifier_weight_decay": 0.0}


def outputs(case: Case) -> dict[str, Tensor]:
    """What one step puts out: "losses" (the loss and all logs), the embeddings' gradient "dz", and by module the
    gradients of graph network and classifier. Those of both phases together, as the optimizers' first moments have
    them: (1 - β₁)(β₁ g₁ + g₂). A module's weight and bias are one tensor: the bias is the weight of a constant
    input."""
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
    """max |actual - truth| / max |truth| of each tensor; of the losses the largest of their own relative errors. NaN
    counts as infinite, a tensor of another shape too."""
    errors = {}
    for name, want in truth.items():
        have = actual[name]
        scale = want.abs() if name == "losses" else want.abs().max()
        error = ((have - want).abs() / scale).max().item() if have.shape == want.shape else float("inf")
        errors[name] = float("inf") if error != error else error
    return errors


class Agreement:
    """Holds cases of one size to the reference in fp64.

    Each error may be at most twice that of the reference at the case's precision, plus a rounding of the products'
    dtype. What is small in number is taken together, since one run's rounding errors do not bound another's: all
    losses (with four roundings of the dtype that losses are formed in for the arithmetic behind their sums), and all
    modules' gradients.
    """

    def __init__(self, size: Case) -> None:
        self._size = replace(size, impl="reference", compiled=False, cuda_graph=False)
        self._truth = outputs(replace(self._size, precision="fp64"))
        self._allowed: dict[str, dict[str, float]] = {}

    def allowed(self, precision: str) -> dict[str, float]:
        """The relative error that each output may have."""
        if precision == "fp64":
            # Rounding errors are as many as in fp32 and smaller; the truth, of this precision itself, has its own, so
            # that three times the reference's error is allowed in place of twice.
            ratio = 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            return {name: error * ratio for name, error in self.allowed("fp32").items()}
        if precision not in self._allowed:
            case = replace(self._size, precision=precision)
            errors, rounding = relative_errors(outputs(case), self._truth), case.rounding
            last = 4 * torch.finfo(torch.float32).eps
            modules = max(error for name, error in errors.items() if name not in ("losses", "dz"))
            self._allowed[precision] = dict.fromkeys(errors, 2 * modules + rounding) | {
                "losses": 2 * errors["losses"] + rounding + last,
                "dz": 2 * errors["dz"] + rounding,
            }
        return self._allowed[precision]

    def problem(self, case: Case) -> str | None:
        """None for a case that agrees, else what does not, in one line."""
        return self.compare(outputs(case), case.precision)

    def compare(self, actual: dict[str, Tensor], precision: str) -> str | None:
        """As problem, for the outputs of a case of this precision."""
        if actual.keys() != self._truth.keys():
            return f"it has other outputs: {', '.join(sorted(actual.keys() ^ self._truth.keys()))}"
        allowed = self.allowed(precision)
        for name, error in relative_errors(actual, self._truth).items():
            if error > allowed[name]:
                return f"{name} is off by {error:.2g} of its size, allowed {allowed[name]:.2g}"
        return None
