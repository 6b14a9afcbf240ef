"""Coefficient head: BatchNorm over all n² edges, a linear map and a sigmoid, θ = sigmoid(ê Wᵀ + b) (docs/math/head.md).

BatchNorm is a barrier each way: its statistics come before the head, its two gradient sums before the edges' gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gcahng.engine.schedule import Schedule, Tile
from gcahng.engine.schema import TileNumbers, Written, declare
from gcahng.engine.stages.common import Edges, Stage, StageContext
from gcahng.engine.weights import EdgeWeights, LowWeights


class HeadWeights(NamedTuple):
    """The head's parameters, prepared: θ = sigmoid(ê Wᵀ + b) of normalized edges ê = (e − mean)/σ.

    BatchNorm's γ and β are folded in: W = W_fc diag(γ) and b = b_fc + W_fc β.

    Attributes:
        weight: W (D, D), in the dtype of products.
        bias: b (D,).
        weight_fc: W_fc (D, D), in the dtype of products; the backward needs it.
        gamma: γ of the BatchNorm (D,).
        beta: β of the BatchNorm (D,).
        mean: the mean that edges are normalized by (D,).
        rstd: 1/σ that edges are normalized by (D,).
        scale: γ/σ (D,).
    """

    weight: Tensor
    bias: Tensor
    weight_fc: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor
    scale: Tensor

    def normalized(self, w: EdgeWeights) -> EdgeWeights:
        """The last layer's weights with its closing norm changed, so that normalized edges leave it.

        Products in bf16 should round normalized edges: e itself may lie far from 0 in comparison with its spread.
        """
        return w._replace(gamma=w.gamma * self.rstd, beta=(w.beta - self.mean) * self.rstd)


class EdgeNorm(NamedTuple):
    """The edge BatchNorm.

    Attributes:
        mean: running mean (D,).
        variance: running variance (D,).
        count: number of batches, 0-dim int64.
        bias: frozen bias β (D,).
        momentum: what a batch weighs in the running statistics.
        eps: ε.
        update: whether the running statistics follow those of the batch.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor
    bias: Tensor
    momentum: float
    eps: float
    update: bool


def head_weights(
    named: dict[str, Tensor],
    norm: EdgeNorm,
    moments: Tensor | None,
    edges: int,
    context: StageContext,
    low: LowWeights,
) -> HeadWeights:
    """Prepares the head.

    Args:
        named: the graph network's parameters by name.
        norm: the edge BatchNorm, whose running statistics are updated in place.
        moments: means of e and e² over the n² ordered pairs, (2, D) float64. Edges are normalized by them, and the
            running statistics follow if norm.update (the variance unbiased, as in torch). With None, edges are
            normalized by the running statistics.
        edges: n².
        context: memory, and the dtypes.
        low: the parameters as operands of products.
    """
    gamma, fc = named["edge_batch_norm.weight"], named["coefficient_head.weight"]
    if moments is None:
        mean, variance = norm.mean.to(fc.dtype), norm.variance
    else:
        wide, square = moments.unbind()
        mean, variance = wide.to(fc.dtype), torch.addcmul(square, wide, wide, value=-1).clamp_min_(0)
        if norm.update:
            norm.count.add_(1)
            unbiased = variance * (edges / (edges - 1))
            batch = [mean.to(norm.mean.dtype), unbiased.to(norm.variance.dtype)]
            torch._foreach_lerp_([norm.mean, norm.variance], batch, norm.momentum)
    rstd = torch.rsqrt(variance + norm.eps).to(fc.dtype)
    bias = torch.addmv(named["coefficient_head.bias"], fc, norm.bias)
    weight = context.scratch("head weight", *fc.shape)
    torch.mul(fc, gamma, out=weight)
    return HeadWeights(weight, bias, low["coefficient_head.weight"], gamma, norm.bias, mean, rstd, gamma * rstd)


class HeadGradients:
    """Sums over all edges from which the head's gradients follow. pre is the sigmoid's argument.

    Args:
        dim: channels D.
        like: a tensor of the dtype and on the device of the sums.

    Attributes:
        pre_e: Σ dpre ⊗ ê (D, D).
        pre: Σ dpre (D,).
        sums: BatchNorm's Σ dy and Σ dy ∘ ê (2, D).
    """

    def __init__(self, dim: int, like: Tensor) -> None:
        self.pre_e = like.new_zeros(dim, dim)
        self.pre = like.new_zeros(dim)
        self.sums = like.new_zeros(2, dim)
        self._means: tuple[Tensor, ...] | None = None

    def close(self, edges: int) -> None:
        """Divides BatchNorm's two sums, which are complete, by the number of edges n², once for all tiles."""
        self._means = (self.sums / edges).unbind()

    def means(self, edges: int) -> tuple[Tensor, ...]:
        """BatchNorm's two sums divided by the number of edges n², (D,) each."""
        return (self.sums / edges).unbind() if self._means is None else self._means

    def parts(self) -> tuple[Tensor, ...]:
        """The sums, as tensors that a process adds up with others."""
        return self.pre_e, self.pre, self.sums

    def named(self, w: HeadWeights) -> dict[str, Tensor]:
        """The parameters' gradients by name."""
        return {
            "coefficient_head.weight": (self.pre_e * w.gamma).addcmul_(self.pre[:, None], w.beta),
            "coefficient_head.bias": self.pre,
            "edge_batch_norm.weight": self.sums[1].clone(),
        }


# -- as ops


class HeadMoments(NamedTuple):
    """The op that adds up BatchNorm's moments.

    Attributes:
        tile: where the edges lie.
        e: edges (T, D).
        sums: Σ e and Σ e² over the ordered pairs that the tile stands for, (2, D) float64, which are added to.
    """

    tile: TileNumbers
    e: Tensor
    sums: Written


class HeadForward(NamedTuple):
    """The op that forms θ.

    Attributes:
        product: ê Wᵀ (T, D), in the dtype of products.
        bias: b (D,).
        theta: θ = sigmoid(product + bias) (T, D), which is written.
    """

    product: Tensor
    bias: Tensor
    theta: Written


class HeadBackward(NamedTuple):
    """The op that differentiates the sigmoid.

    Attributes:
        theta: θ (T, D).
        dtheta: gradient of θ (T, D).
        dpre: gradient of the sigmoid's argument (T, D) in the dtype of products, which is written.
        sum: Σ dpre (D,), which is added to; None if it is not wanted.
    """

    theta: Tensor
    dtheta: Tensor
    dpre: Written
    sum: Written | None


class HeadSums(NamedTuple):
    """The op that adds up BatchNorm's gradient sums.

    Attributes:
        dy: gradient of BatchNorm's output (T, D), in the dtype of products.
        e: edges (T, D).
        wide: dy (T, D) in the dtype of e, which is written.
        sums: Σ dy and Σ dy ∘ e (2, D), which are added to.
    """

    dy: Tensor
    e: Tensor
    wide: Written
    sums: Written


class HeadNorm(NamedTuple):
    """The op that differentiates the BatchNorm: de = scale (dy − weight (a + b e)).

    The weight of a mirrored edge is 2, that of another 1.

    Attributes:
        tile: where the edges lie.
        dy: gradient of BatchNorm's output (T, D).
        e: edges (T, D).
        scale: (D,).
        a: (D,).
        b: (D,).
        de: gradient of the edges (T, D), which is written; it may be the memory of dy.
    """

    tile: TileNumbers
    dy: Tensor
    e: Tensor
    scale: Tensor
    a: Tensor
    b: Tensor
    de: Written


declare("head_moments_", "head.moments", HeadMoments)
declare("head_fwd_", "head.forward", HeadForward)
declare("head_bwd_", "head.backward", HeadBackward)
declare("head_sums_", "head.sums", HeadSums)
declare("head_norm_", "head.norm", HeadNorm)


# -- implementations


def weighted_sum(schedule: Schedule, tile: Tile, x: Tensor) -> Tensor:
    """Sums x (T, W) over the ordered pairs that a tile stands for.

    Returns:
        The sums (W,).
    """
    total = x.sum(dim=0)
    if tile.mirrored >= tile.offsets:
        return total
    if tile.mirrored == 0:
        return 2 * total
    own = x.view(*schedule.shape(tile), x.shape[-1])[:, :, 0].sum(dim=(0, 1, 2))
    return 2 * total - own


class Head(Stage):
    """The head in plain torch. Its edges are normalized (see HeadWeights), except in `add_moments`."""

    def moments(self) -> Tensor:
        """Zeros (2, D) in float64, for `add_moments`."""
        return torch.zeros(2, self.dim, dtype=torch.float64, device=self.context.like.device)

    def add_moments(self, tile: Tile, e: Edges, into: Tensor) -> None:
        """Adds Σ e and Σ e² over the ordered pairs that a tile stands for to `into` (2, D)."""
        # In float64, since variances are differences of these sums and edges may lie far from 0.
        wide = e.full.double()
        into[0] += weighted_sum(self.schedule, tile, wide)
        into[1] += weighted_sum(self.schedule, tile, wide.square())

    def forward(self, w: HeadWeights, e: Edges, out: Tensor | None = None) -> Tensor:
        """Computes θ (T, D) of normalized edges, in `out` if that is not None."""
        pre = torch.mm(e.low, w.weight.T).to(w.bias.dtype)
        theta = torch.sigmoid(pre.add_(w.bias), out=out)
        return theta if out is not None else self.context.rounded(theta)

    def backward(
        self,
        w: HeadWeights,
        e: Edges,
        theta: Tensor,
        dtheta: Tensor,
        into: HeadGradients | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Differentiates θ.

        Args:
            w: as in the forward.
            e: as in the forward.
            theta: what the forward returned (T, D).
            dtheta: its gradient (T, D), both directions of an edge added up.
            into: sums over edges, which are added to; None if they are not wanted.
            out: memory (T, D) that the result may be written to.

        Returns:
            dy, the gradient of BatchNorm's output (T, D).
        """
        full = self.context.full
        theta = full(theta)
        dpre = full(dtheta) * (theta * (1 - theta))
        low = dpre.to(self.context.compute)
        dy = full(torch.mm(low, w.weight_fc))
        if into is not None:
            into.pre_e += torch.mm(low.T, e.low)
            into.pre += dpre.sum(dim=0)
            into.sums[0] += dy.sum(dim=0)
            into.sums[1] += (dy * full(e.full)).sum(dim=0)
        return self.context.rounded(dy)

    def norm_backward(self, tile: Tile, w: HeadWeights, e: Edges, dy: Tensor, sums: HeadGradients | None) -> Tensor:
        """Differentiates the BatchNorm.

        Args:
            tile: where the edges lie.
            w: as in the forward.
            e: as in the forward.
            dy: gradient of BatchNorm's output (T, D), which may be overwritten.
            sums: BatchNorm's complete gradient sums; None if the running statistics served, through which there is no
                gradient.

        Returns:
            The gradient of the edges (T, D), both directions added up.
        """
        full = self.context.full
        if sums is None:
            return self.context.rounded(full(dy) * w.scale)
        edges = self.schedule.nodes**2
        through = (sums.sums[0] + full(e.full) * sums.sums[1]) / edges
        if tile.mirrored < tile.offsets:
            self.context.grid(tile, through)[:, :, tile.mirrored :].mul_(2)
        return self.context.rounded((full(dy) - through).mul_(w.scale))


class FusedHead(Head):
    """The products are the math library's; what is row-wise are fused ops."""

    def add_moments(self, tile: Tile, e: Edges, into: Tensor) -> None:
        self.ops.head_moments_(HeadMoments(self.context.numbers(tile), e.full, into))

    def forward(self, w: HeadWeights, e: Edges, out: Tensor | None = None) -> Tensor:
        rows, dim = e.full.shape
        product = torch.mm(e.low, self.transposed(w.weight), out=self.context.scratch("head p", rows, dim))
        theta = self.context.edge_scratch("head theta", rows) if out is None else out
        self.ops.head_fwd_(HeadForward(product, w.bias, theta))
        return theta

    def backward(
        self,
        w: HeadWeights,
        e: Edges,
        theta: Tensor,
        dtheta: Tensor,
        into: HeadGradients | None,
        out: Tensor | None = None,
    ) -> Tensor:
        rows, dim = theta.shape
        dpre = self.context.scratch("head p", rows, dim)
        self.ops.head_bwd_(HeadBackward(theta, dtheta, dpre, None if into is None else into.pre))
        dy = torch.mm(dpre, w.weight_fc, out=self.context.scratch("head dy", rows, dim))
        if into is None:
            return dy if dy.dtype is theta.dtype else dy.to(theta.dtype)
        self.context.add_product(into.pre_e, self.transposed(dpre), e.low)
        wide = self.context.edge_scratch("head theta", rows) if out is None else out
        self.ops.head_sums_(HeadSums(dy, e.full, wide, into.sums))
        return wide

    def norm_backward(self, tile: Tile, w: HeadWeights, e: Edges, dy: Tensor, sums: HeadGradients | None) -> Tensor:
        if sums is None:
            return self.context.rounded(dy * w.scale)
        a, b = sums.means(self.schedule.nodes**2)
        self.ops.head_norm_(HeadNorm(self.context.numbers(tile), dy, e.full, w.scale, a, b, dy))
        return dy
