"""The coefficient head on a tile's edges: BatchNorm over all n² of them, a linear map, a sigmoid, and what J_div makes
of the result; BatchNorm and J_div are barriers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Band, NodeSum, Schedule, Tile
from gcahng.engine.stages import Edges
from gcahng.engine.weights import EdgeWeights


def weighted_sum(schedule: Schedule, tile: Tile, x: Tensor) -> Tensor:
    """Σ over the ordered pairs a tile stands for, of x (T, W) → (W,)."""
    total = x.sum(dim=0)
    if tile.mirrored >= tile.offsets:
        return total
    if tile.mirrored == 0:
        return 2 * total
    own = x.view(*schedule.shape(tile), x.shape[-1])[:, :, 0].sum(dim=(0, 1, 2))
    return 2 * total - own


class HeadWeights(NamedTuple):
    """θ = sigmoid(ê Wᵀ + b) of normalised edges ê = (e - mean)/σ, with BatchNorm's γ and β folded in: W = W_fc diag(γ),
    b = b_fc + W_fc β.

    mean, rstd = 1/σ (D,): the statistics in force; scale = γ/σ; weight_fc (D, D) in the compute dtype, for the
    backward.
    """

    weight: Tensor
    bias: Tensor
    weight_fc: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor

    def normalised(self, w: EdgeWeights) -> EdgeWeights:
        """The last layer's weights, its closing norm changed so that normalised edges leave it. They are what products
        in bf16 should round: e itself may lie far from 0 for its spread."""
        return w._replace(gamma=w.gamma * self.rstd, beta=(w.beta - self.mean) * self.rstd)


def head_weights(
    named: dict[str, Tensor],
    norm: list[Tensor],
    moments: Tensor | None,
    edges: int,
    compute: torch.dtype,
    momentum: float,
    eps: float,
    update: bool,
) -> HeadWeights:
    """norm: running mean, running variance, count and bias of the edge BatchNorm. moments (2, D) float64: means of e
    and e² over the n² ordered pairs, whose statistics serve, and the running ones follow if update (unbiased, as
    torch's BatchNorm); None: the running statistics serve."""
    running_mean, running_variance, count, beta = norm
    gamma, fc = named["edge_batch_norm.weight"], named["coefficient_head.weight"]
    if moments is None:
        mean, variance = running_mean, running_variance
    else:
        mean = moments[0]
        variance = (moments[1] - mean * mean).clamp_min(0)
        if update:
            count.add_(1)
            unbiased = variance * (edges / (edges - 1))
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_variance.lerp_(unbiased.to(running_variance.dtype), momentum)
    rstd = torch.rsqrt(variance + eps).to(fc.dtype)
    mean = mean.to(fc.dtype)
    bias = named["coefficient_head.bias"] + fc @ beta
    return HeadWeights((fc * gamma).to(compute), bias, fc.to(compute), gamma, beta, mean, rstd, gamma * rstd)


class HeadGradients:
    """Sums over all edges: Σ dpre ⊗ ê, Σ dpre, and BatchNorm's Σ dy and Σ dy ∘ ê (2, D)."""

    def __init__(self, dim: int, like: Tensor) -> None:
        self.pre_e = like.new_zeros(dim, dim)
        self.pre = like.new_zeros(dim)
        self.sums = like.new_zeros(2, dim)

    def parts(self) -> tuple[Tensor, ...]:
        """What is summed."""
        return self.pre_e, self.pre, self.sums

    def named(self, w: HeadWeights) -> dict[str, Tensor]:
        return {
            "coefficient_head.weight": self.pre_e * w.gamma + self.pre[:, None] * w.beta,
            "coefficient_head.bias": self.pre,
            "edge_batch_norm.weight": self.sums[1].clone(),
        }


class DiversitySums:
    """Of x = θ - ½ over the ordered pairs of all edges: sum, Σ_j x_ij at every node i; square, Σ x² at the anchors of
    edges, so that its total is Σ_ij x²."""

    def __init__(self, schedule: Schedule, dim: int, like: Tensor) -> None:
        self.sum = NodeSum(schedule, dim, like=like)
        self.square = NodeSum(schedule, dim, like=like)


class TorchHead:
    """The head's stages in plain torch. Edges are normalised (see HeadWeights) but for add_moments."""

    def __init__(self, schedule: Schedule, compute: torch.dtype) -> None:
        self.schedule, self.compute = schedule, compute

    def moments(self, dim: int, like: Tensor) -> Tensor:
        """(2, D) float64 zeros, for add_moments."""
        return torch.zeros(2, dim, dtype=torch.float64, device=like.device)

    def add_moments(self, tile: Tile, e: Edges, into: Tensor) -> None:
        """Adds Σ e and Σ e² over the ordered pairs that a tile stands for."""
        # In float64: variances are differences of these sums, and edges may lie far from 0 for their spread.
        wide = e.full.double()
        into[0] += weighted_sum(self.schedule, tile, wide)
        into[1] += weighted_sum(self.schedule, tile, wide.square())

    def head(self, w: HeadWeights, e: Edges, out: Tensor | None = None) -> Tensor:
        """ê (T, D) → θ (T, D)."""
        pre = torch.mm(e.low, w.weight.T).to(w.bias.dtype)
        return torch.sigmoid(pre.add_(w.bias), out=out)

    def head_backward(
        self, w: HeadWeights, e: Edges, theta: Tensor, dtheta: Tensor, into: HeadGradients | None
    ) -> Tensor:
        """dθ (T, D), both directions of an edge together → dy, the gradient of BatchNorm's output (T, D)."""
        dpre = dtheta * (theta * (1 - theta))
        low = dpre.to(self.compute)
        dy = torch.mm(low, w.weight_fc).to(e.full.dtype)
        if into is not None:
            into.pre_e += torch.mm(low.T, e.low)
            into.pre += dpre.sum(dim=0)
            into.sums[0] += dy.sum(dim=0)
            into.sums[1] += (dy * e.full).sum(dim=0)
        return dy

    def norm_backward(self, tile: Tile, w: HeadWeights, e: Edges, dy: Tensor, sums: HeadGradients | None) -> Tensor:
        """dy → de (T, D), both directions of an edge together. sums None: running statistics, no terms through them."""
        if sums is None:
            return dy * w.scale
        edges = self.schedule.nodes**2
        through = (sums.sums[0] + e.full * sums.sums[1]) / edges
        if tile.mirrored < tile.offsets:
            grid = through.view(*self.schedule.shape(tile), through.shape[-1])
            grid[:, :, tile.mirrored :].mul_(2)
        return (dy - through).mul_(w.scale)

    def add_diversity(self, tile: Tile, theta: Tensor, into: DiversitySums) -> None:
        """Adds a tile's part of J_div's sums. θ (T, D) may be lost."""
        grid = theta.sub_(0.5).view(*self.schedule.shape(tile), theta.shape[-1])
        square = grid.square()
        squares = square.sum(dim=(2, 3))
        into.sum.add_rows(tile, grid.sum(dim=(2, 3)))
        if tile.mirrored < tile.offsets:
            into.sum.add_columns(tile, grid[:, :, tile.mirrored :].sum(dim=1), skip=tile.mirrored)
            squares += square[:, :, tile.mirrored :].sum(dim=(2, 3))
        into.square.add_rows(tile, squares)

    def diversity_backward(self, tile: Tile, theta: Tensor, mean: Band, scale: Tensor, into: Tensor) -> None:
        """Adds scale (0-dim) times the gradient of ½ Σ_ij (θ_ij - m_i)², both directions of an edge, to into (T, D).
        mean: the nodes' row means m; their own share of the gradient is zero."""
        shape = (*self.schedule.shape(tile), theta.shape[-1])
        grid, out = theta.view(shape), into.view(shape)
        out += (grid - mean.rows(tile)[:, :, None, None]) * scale
        if tile.mirrored < tile.offsets:
            skip = tile.mirrored
            out[:, :, skip:] += (grid[:, :, skip:] - mean.columns(tile)[:, None, skip:]) * scale
