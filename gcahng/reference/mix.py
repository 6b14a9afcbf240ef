"""Synthetic hard negatives: real ones pulled towards the anchor, channel by channel, and mixed (paper section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def distance(x: Tensor, y: Tensor) -> Tensor:
    """‖x - y + 1e-6‖₂ over the last dimension. 1e-6 is added to each channel, as torch's pairwise_distance does."""
    return (x - y + 1e-6).norm(dim=-1)


def mix(views: Tensor, coefficients: Tensor, u: Tensor, pull: Tensor, *, anchor_gradient: bool = True) -> Tensor:
    """Generates synthetic negatives.

    In each channel a real negative is pulled towards the anchor, so that r = (d⁺ + (d⁻ - d⁺) θ · pull) / d⁻ of the way
    from the anchor to the negative is left. d⁺ and d⁻ are the anchor's distances to its positive (view k+1 of its
    class) and to the negative. A negative nearer than the positive is left where it is. Then
    t_v = ñ_v + u_{k,v} (t_{v-1} - ñ_v) mixes the K pulled views ñ_v of class c.

    Args:
        views: embeddings (K, C, D), view k of class a.
        coefficients: θ (K, C, K, C, D) of anchor (k, a) and negative (v, c).
        u: mixing draws (K, K-1).
        pull: exp(-α / J̄_m), 0-dim.
        anchor_gradient: whether negatives have a gradient for their anchors and for the anchors' positives. Without it
            they have one for the real negatives alone.

    Returns:
        Negatives N (K, C, C, D), where N[k, a, c] is for anchor view k of class a against class c. The entries a = c
        are no negatives, but are computed.
    """
    num_views = views.shape[0]
    fixed = views if anchor_gradient else views.detach()
    negatives = []
    for k in range(num_views):
        anchor, positive = fixed[k], fixed[(k + 1) % num_views]
        to_positive = distance(anchor, positive)[None, :, None]  # (1, a, 1)
        to_negative = distance(anchor[None, :, None], views[:, None])  # (v, a, c)
        theta = coefficients[k].transpose(0, 1)  # (v, a, c, D)
        gap = (to_negative - to_positive)[..., None]
        share = (to_positive[..., None] + gap * theta * pull) / to_negative[..., None]
        pulled = anchor[None, :, None] + (views[:, None] - anchor[None, :, None]) * share
        easy = (to_positive < to_negative)[..., None]
        pulled = torch.where(easy, pulled, views[:, None])
        mixed = pulled[0]
        for v in range(1, num_views):
            mixed = pulled[v] + u[k, v - 1] * (mixed - pulled[v])
        negatives.append(mixed)
    return torch.stack(negatives)
