"""Counter-based random numbers: the same on every device, backend, tiling and rank.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the seed, the
counter is (i, j, stream, draw); so a dropout mask depends on the edge, the layer and the pass, and on nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIXING_STREAM = 1 << 31
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words (int64 tensors in [0, 2³²)) for every counter.

    counter: four int64 tensors that broadcast together, each in [0, 2³²). seed: 64 bits, the low word is the first key.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, so both halves of the unsigned product come out right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """A 32-bit word below this drops its token."""
    return round(p * 2**32)


def edge_masks(i: Tensor, j: Tensor, *, layer: int, draw: Tensor, seed: int, p: float, symmetric: bool) -> Tensor:
    """Which attention weights the edges (i, j) keep: bool (..., 2), the token of i, then that of j, for int64 tensors
    i and j that broadcast together.

    Word 0 masks the token of i, word 1 that of j. With symmetric=True both directions of an edge share the draw of
    (min, max), word 0 for the smaller index; i = j uses both words. Indices count in canonical order (classes by
    ascending label, views by their order in the batch). draw: 0-dim int64 tensor, the number of the training graph
    pass.
    """
    stream = torch.full_like(draw, layer)
    first, second = (torch.minimum(i, j), torch.maximum(i, j)) if symmetric else (i, j)
    word0, word1, _, _ = philox_4x32((first, second, stream, draw), seed)
    keep = torch.stack((word0, word1), dim=-1) >= dropout_threshold(p)
    if symmetric:
        keep = torch.where((i <= j)[..., None], keep, keep.flip(-1))
    return keep


def edge_dropout_masks(n: int, *, layer: int, draw: Tensor, seed: int, p: float, symmetric: bool) -> Tensor:
    """edge_masks of all pairs of n nodes: bool (n, n, 2), [i, j, 0] for the token of i, [i, j, 1] for that of j."""
    index = torch.arange(n, device=draw.device)
    return edge_masks(index[:, None], index[None, :], layer=layer, draw=draw, seed=seed, p=p, symmetric=symmetric)


def mixing_draws(views: int, *, draw: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """u_{k,v} ~ U(0, 1) for v = 1..K-1: (K, K-1). 24-bit values, exact in fp32."""
    k = torch.arange(views, device=draw.device)[:, None]
    v = torch.arange(1, views, device=draw.device)[None, :]
    zero = torch.zeros_like(k)
    word0, _, _, _ = philox_4x32((zero, zero, MIXING_STREAM + k * views + v, draw), seed)
    return (word0 >> 8).to(dtype) * 2.0**-24
