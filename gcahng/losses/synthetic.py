"""How GCAHNGLoss pairs the synthetic negatives with a loss, and what that loss weighs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gcahng.bounds import check_number, shown_value
from gcahng.errors import UserError
from gcahng.losses.layout import describe
from gcahng.reference.synthetic import Synthetic

PAIRINGS = ("npair", "base", "cosine")
_PACKAGE = "pytorch_metric_learning"

# Losses of pytorch-metric-learning that are a mean of what each sample gives by itself, beside regularizers of their
# class vectors.
_ADDITIVE = ("ArcFaceLoss", "SubCenterArcFaceLoss", "CosFaceLoss", "NormalizedSoftmaxLoss", "SoftTripleLoss")


@dataclass(frozen=True)
class SyntheticOptions:
    """How J_syn is formed and weighted. The defaults are the paper's.

    Attributes:
        synthetic: what the synthetic negatives are compared with. "npair": dot products with their anchor, against
            that with the positive, and an L2 term, as in the paper. "cosine": the same in cosines over a temperature,
            which fits base losses that normalize. "base": the base loss itself. One of pairs or triplets
            (pytorch-metric-learning's without class vectors) gets each anchor with its real positives and its synthetic
            negatives; every other is called as base(negatives, classes). With base="npair" it is "npair".
        anchor_gradient: whether J_syn moves anchors and their positives. False holds them fixed, so that J_syn moves
            the real negatives alone.
        synthetic_temperature: of the cosines.
        synthetic_weight: what J_syn is multiplied with; None is the paper's 1 - exp(-β / J̄_gen).
        synthetic_warmup: over so many first steps that weight grows from 0.
    """

    synthetic: str = "npair"
    anchor_gradient: bool = True
    synthetic_temperature: float = 0.1
    synthetic_weight: float | None = None
    synthetic_warmup: int = 0

    def check(self) -> None:
        """Checks the values.

        Raises:
            UserError: one of them is not what it must be.
        """
        if self.synthetic not in PAIRINGS:
            raise UserError(f"synthetic is {shown_value(self.synthetic)}; it must be one of {', '.join(PAIRINGS)}")
        if not isinstance(self.anchor_gradient, bool):
            raise UserError(f"anchor_gradient is {shown_value(self.anchor_gradient)}; it must be True or False")
        check_number("synthetic_temperature", self.synthetic_temperature)
        check_number("synthetic_weight", self.synthetic_weight, none="None")
        check_number("synthetic_warmup", self.synthetic_warmup)

    def with_base(self, base: str | Callable[..., Tensor]) -> Synthetic:
        """What the passes are told.

        Args:
            base: of GCAHNGLoss.

        Raises:
            UserError: the base cannot take synthetic negatives.
        """
        on_base = None if self.synthetic != "base" or base == "npair" else BaseOnNegatives(base)
        pairing = "npair" if self.synthetic == "base" and on_base is None else self.synthetic
        return Synthetic(pairing, self.anchor_gradient, float(self.synthetic_temperature), on_base)

    def weight(self, mean_generator: Tensor, beta: float, step: Tensor) -> Tensor | float:
        """What J_syn is multiplied with in a step.

        Args:
            mean_generator: J̄_gen, 0-dim.
            beta: β.
            step: steps before this one, 0-dim.
        """
        weight = self.synthetic_weight
        if weight is None:
            weight = 1 - torch.exp(-beta / mean_generator)
        if not self.synthetic_warmup:
            return weight
        return weight * (step.to(mean_generator.dtype) / self.synthetic_warmup).clamp(max=1)


class BaseOnNegatives:
    """A base loss of synthetic negatives (see gcahng.reference.synthetic.OnNegatives).

    Args:
        base: called as base(embeddings, labels).

    Raises:
        UserError: it keeps embeddings of earlier batches, among which synthetic ones must not come.

    Attributes:
        of_pairs: whether it is a loss of pytorch-metric-learning on pairs or triplets.
        additive: whether it is the mean of what each negative gives by itself.
    """

    def __init__(self, base: Callable[..., Tensor]) -> None:
        self._base = base
        parts = base.modules() if isinstance(base, nn.Module) else [base]
        if any(_is_one_of(part, "CrossBatchMemory") for part in parts):
            raise UserError(
                'synthetic is "base" and base has a CrossBatchMemory, which would keep synthetic negatives as samples; '
                'synthetic must be "npair" or "cosine"'
            )
        self.of_pairs = _is_one_of(base, "BaseMetricLossFunction") and _takes_references(base)
        self.additive = (
            type(base).__name__ in _ADDITIVE
            and type(base).__module__.startswith(_PACKAGE)  # a class derived from it may be anything
            and type(base.reducer).__name__ == "MeanReducer"  # type: ignore[attr-defined]
        )

    def __call__(self, negatives: Tensor, classes: Tensor, node: Tensor, z: Tensor, labels: Tensor) -> Tensor:
        """Forms the loss; see OnNegatives."""
        if self.of_pairs:
            rows = torch.arange(len(z), device=z.device)
            same = (labels[:, None] == labels) & (rows[:, None] != rows)
            anchor, positive = same.nonzero(as_tuple=True)
            pairs = (anchor, positive, node, len(z) + torch.arange(len(node), device=z.device))
            others, of_others = torch.cat([z, negatives]), torch.cat([labels, classes])
            loss = self._base(z, labels, pairs, others, of_others)
        else:
            loss = self._base(negatives, classes)
        if not isinstance(loss, Tensor) or loss.dim():
            raise UserError(f"base returned {describe(loss)}; it must return its loss, a 0-dim tensor")
        return loss

    def trained(self) -> list[Tensor]:
        """The parameters of the loss that want a gradient."""
        return [p for p in self._base.parameters() if p.requires_grad] if isinstance(self._base, nn.Module) else []


def _takes_references(base: Any) -> bool:
    """Whether a loss of pytorch-metric-learning compares a batch with other samples, not with vectors of its own."""
    methods = [vars(cls)["compute_loss"] for cls in type(base).__mro__ if "compute_loss" in vars(cls)]
    # A derived class's own method may call that of the loss.
    codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
    return not any("ref_not_supported" in code.co_names for code in codes if code is not None)


def _is_one_of(base: Any, *names: str) -> bool:
    """Whether it is an instance of a class of pytorch-metric-learning's losses, or of one derived from it."""
    if _PACKAGE not in sys.modules:
        return False
    return any(cls.__name__ in names and cls.__module__.startswith(_PACKAGE) for cls in type(base).__mro__)
