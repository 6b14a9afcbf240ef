"""Checks whether a case computes what the reference computes. No ratio is printed for a case that does not."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gcahng.bench.cases import Case, Problem

# With fixed weights, both phases see the same network in every implementation. Otherwise Adam's first step, which
# divides a gradient by its own size, would move a weight whose gradient is only rounding by a full learning rate.
_FIXED_WEIGHTS = {"graph_lr": 0.0, "graph_weight_decay": 0.0, "classifier_lr": 0.0, "classifier_weight_decay": 0.0}


def outputs(case: Case) -> dict[str, Tensor]:
    """Run one step and collect its results.

    Returns:
        "losses" (the loss and all logs), "dz" (the gradient of the embeddings), and the gradient of each module of the
        graph network and the classifier. The latter is the sum over both phases that Adam keeps as its first moment,
        (1 - β₁)(β₁ g₁ + g₂). The weight and the bias of a module are in one tensor, because a bias is the weight of a
        constant input.
    """
    problem = Problem(case, **_FIXED_WEIGHTS)
    logs = problem.step()
    losses = torch.stack([value.double() for value in logs.values()])
    results = {"losses": losses, "dz": problem.embeddings.grad.double()}
    gca = problem.gca
    names = {parameter: name for name, parameter in gca.named_parameters()}
    for optimizer in (gca.graph_optimizer, gca.classifier_optimizer):
        for parameter, state in optimizer.state.items():
            if not state["step"]:  # it has no gradient in this step
                continue
            module = names[parameter].rpartition(".")[0]
            gradient = state["exp_avg"].double().flatten()
            results[module] = torch.cat((results[module], gradient)) if module in results else gradient
    return results


def relative_errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, max |actual - truth| / max |truth|.

    For the losses, it is the largest of their own relative errors. NaN and another shape count as infinite.

    Args:
        actual: results of `outputs`.
        truth: the exact results.
    """
    errors = {}
    for name, expected in truth.items():
        value = actual[name]
        scale = expected.abs() if name == "losses" else expected.abs().max()
        error = ((value - expected).abs() / scale).max().item() if value.shape == expected.shape else math.inf
        errors[name] = math.inf if math.isnan(error) else error
    return errors


class Agreement:
    """Compares cases of one size with the reference in fp64.

    Each error may be at most twice that of the reference at the case's precision, plus a rounding of the products'
    dtype. What is small in number is taken together, since one run's rounding errors do not bound another's: all
    losses (with four roundings of the dtype that losses are formed in for the arithmetic behind their sums), and all
    modules' gradients. The embeddings' gradient is alone, and may be off by four times the reference's error: of two
    runs that are equally exact, one is three times as far off as the other on one batch in a hundred.
    """

    def __init__(self, size: Case) -> None:
        self._size = replace(size, impl="reference", compiled=False, cuda_graph=False)
        self._truth = outputs(replace(self._size, precision="fp64"))
        self._allowed: dict[str, dict[str, float]] = {}

    def allowed(self, precision: str) -> dict[str, float]:
        """The relative error that each output may have at this precision."""
        if precision == "fp64":
            # Rounding errors are as many as in fp32 and smaller. But what is scaled is the error of one run, and the
            # truth, of this precision itself, has errors of its own: four times as much is allowed as in fp32.
            ratio = 4 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            return {name: error * ratio for name, error in self.allowed("fp32").items()}
        if precision not in self._allowed:
            case = replace(self._size, precision=precision)
            errors, rounding = relative_errors(outputs(case), self._truth), case.rounding
            last = 4 * torch.finfo(torch.float32).eps
            modules = max(error for name, error in errors.items() if name not in ("losses", "dz"))
            self._allowed[precision] = dict.fromkeys(errors, 2 * modules + rounding) | {
                "losses": 2 * errors["losses"] + rounding + last,
                "dz": 4 * errors["dz"] + rounding,
            }
        return self._allowed[precision]

    def problem(self, case: Case) -> str | None:
        """Why a case does not agree, in one line; None if it does."""
        return self.compare(outputs(case), case.precision)

    def compare(self, actual: dict[str, Tensor], precision: str) -> str | None:
        """The same as `problem`, for `outputs` of a case at this precision."""
        if actual.keys() != self._truth.keys():
            return f"its outputs differ in {', '.join(sorted(actual.keys() ^ self._truth.keys()))}"
        allowed = self.allowed(precision)
        for name, error in relative_errors(actual, self._truth).items():
            if error > allowed[name]:
                return f"{name} is off by {error:.2g} of its size, allowed {allowed[name]:.2g}"
        return None
