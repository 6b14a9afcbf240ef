"""J_div: how far the coefficients of a node differ from their mean (paper section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def diversity(coefficients: Tensor) -> Tensor:
    """J_div = 0.01 (1 - sqrt(Σ_ij ‖θ_ij - mean_j θ_ij‖² / n²)) for coefficients θ (n, n, D), 0-dim."""
    n = coefficients.shape[0]
    variance = (coefficients - coefficients.mean(dim=1, keepdim=True)).square().sum() / n**2
    return 0.01 * (1 - torch.sqrt(variance))
