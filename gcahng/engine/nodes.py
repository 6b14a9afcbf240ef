"""The node side of the graph network, whose tensors are n × D: what its parts work with, its input and its class head.

Its layers are in gcahng.engine.node_layer. The backward of each part is written out, in as few calls of torch as it
takes: for a small batch their number decides how long a step takes. docs/math has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gcahng.engine import products
from gcahng.engine.schedule import bands_of
from gcahng.engine.shared_attention import Queries
from gcahng.engine.stages import Stages
from gcahng.engine.stages.common import Edges, StageContext
from gcahng.engine.weights import LowWeights, NormWeights

NORM_USES = ("attention", "before", "behind")
"""The uses of a node layer's LayerNorm: behind the attention, before the MLP and behind it."""


@dataclass
class NodeContext:
    """What all parts of the node side work with.

    Attributes:
        named: parameters by name.
        low: operands of products by name.
        heads: heads H of the attention.
        attend: added to the attention's logits, in the dtype of products (see attend_mask).
        queries: those of this process.
        record: whether a backward will follow.
        stages: the edges' stages, of which the norms serve nodes, too.
        sums: what the norms' backwards add to; None until the backward begins.
        biases: where gradients of biases are noted.
    """

    named: dict[str, Tensor]
    low: LowWeights
    heads: int
    attend: Tensor
    queries: Queries
    record: bool
    stages: Stages
    sums: NormSums | None = None
    biases: Biases = field(default_factory=lambda: Biases())

    @property
    def memory(self) -> StageContext:
        """Memory, and the dtypes."""
        return self.stages.context

    def operand(self, x: Tensor, slot: str) -> Tensor:
        """x (n, W) in the dtype of products: x itself, or a copy in `scratch` memory of this name."""
        if x.dtype is self.memory.compute:
            return x
        return self.memory.scratch(slot, *x.shape).copy_(x)

    def full(self, x: Tensor) -> Tensor:
        """x in the accumulating dtype."""
        dtype = self.memory.like.dtype
        return x if x.dtype is dtype else x.to(dtype)

    def operands(self, named: dict[str, Tensor]) -> list[Tensor]:
        """`operand` of several tensors, by slot."""
        if self.memory.same:
            return list(named.values())
        copies = [self.memory.scratch(slot, *x.shape) for slot, x in named.items()]
        torch._foreach_copy_(copies, list(named.values()))
        return copies

    def linear(self, name: str, x: Tensor, slot: str | None = None) -> Tensor:
        """The linear map of this name, in the dtype of products; in `scratch` memory if that is named."""
        bias, weight = self.low[f"{name}.bias"], self.low[f"{name}.weight"]
        out = None if slot is None else self.memory.scratch(slot, len(x), len(weight))
        return torch.addmm(bias, x, self.memory.transposed(weight), out=out)

    def linear_into(self, into: Tensor, name: str, x: Tensor) -> None:
        """Writes the linear map of this name to memory of the accumulating dtype."""
        weight = self.memory.transposed(self.low[f"{name}.weight"])
        products.affine(into, self.low[f"{name}.bias"], x, weight)

    def gelu_backward(self, d: Tensor, x: Tensor, slot: str) -> Tensor:
        """The gradient of x through GELU, in `scratch` memory of this name."""
        return torch.ops.aten.gelu_backward.grad_input(d, x, grad_input=self.memory.scratch(slot, *x.shape))

    def weight_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        """dyᵀ x (O, I), from the gradient dy (n, O) of a linear map and its input x (n, I); see `new_product`."""
        flipped = None if self.memory.workspace is None else self.memory.workspace.transposed(dy)
        return self.new_product(dy.T if flipped is None else flipped, x)

    def new_product(self, a: Tensor, b: Tensor) -> Tensor:
        """The product a b (R, W) of matrices in the dtype of products, in the accumulating dtype."""
        return products.new_product(a, b, self.memory.like.dtype)

    def file_linear(self, name: str, low: Tensor, dy: Tensor, x: Tensor, into: dict[str, Tensor]) -> None:
        """Files the gradients of a linear map's weight and bias.

        Args:
            name: the map's name.
            low: gradient of its output (n, O), in the dtype of products.
            dy: the same before it was rounded, or low itself.
            x: its input (n, I), in the dtype of products.
            into: gradients by the parameters' names. That of the bias is there once `biases` files it.
        """
        into[f"{name}.weight"] = self.weight_gradient(low, x)
        self.biases.add(name, dy)


class Biases:
    """Gradients of biases: sums over the rows of tensors at nodes, which are formed for several of them by one call."""

    def __init__(self) -> None:
        self._waiting: dict[str, Tensor] = {}

    def add(self, name: str, dy: Tensor) -> None:
        """Notes the gradient dy (n, O) of a linear map's output, which must stay as it is until `file`."""
        self._waiting[name] = dy

    def file(self, into: dict[str, Tensor]) -> None:
        """Files the gradients of what was noted, by the parameters' names and in the dtype of its weight's."""
        names, parts = list(self._waiting), list(self._waiting.values())
        self._waiting = {}
        dtype = into[f"{names[0]}.weight"].dtype
        sums = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).sum(dim=0, dtype=dtype)
        found = [sums] if len(parts) == 1 else torch.split_with_sizes_copy(sums, [x.shape[1] for x in parts])
        into |= {f"{name}.bias": x for name, x in zip(names, found, strict=True)}


class NormSums:
    """Sums that the norms' backwards add to, for all layers: gradients of γ and β, and of the bias before the norm.

    Args:
        layers: layers L.
        like: node features (n, D).
    """

    def __init__(self, layers: int, like: Tensor) -> None:
        self._layers = layers
        self._all = like.new_zeros(layers * len(NORM_USES), 4, like.shape[1])  # rows as those of mlp_out_sums
        self._parts = self._all.unbind()

    def of(self, layer: int, use: str) -> Tensor:
        """The sums (4, D) of one of a layer's NORM_USES."""
        return self._parts[layer * len(NORM_USES) + NORM_USES.index(use)]

    def file(self, into: dict[str, Tensor]) -> None:
        """Files the gradients of the norms and of the biases before them by the parameters' names."""
        names = []
        for layer in range(self._layers):
            at = f"layers.{layer}.node"
            names += [f"{at}.norm.weight", f"{at}.norm.bias", f"{at}.output.bias", f"{at}.mlp_out.bias"]
        every = self._all.view(self._layers, len(NORM_USES), 4, -1)
        found = torch.cat((every[:, :, :2].sum(dim=1), every[:, ::2, 2]), dim=1)
        into |= zip(names, torch.unbind_copy(found.view(len(names), -1)), strict=True)


class NormGelu:
    """N(y) = LayerNorm(GELU(y)) of node tensors, with its backward.

    Args:
        ctx: what all parts work with.
        layer: the layer's number.
        use: which of NORM_USES it is.
        y: (n, D).

    Attributes:
        full: N(y) (n, D) in the accumulating dtype.
        low: the same in the dtype of products.
    """

    def __init__(self, ctx: NodeContext, layer: int, use: str, y: Tensor) -> None:
        at = f"layers.{layer}.node.norm"
        self._norm = NormWeights(ctx.named[f"{at}.weight"], ctx.named[f"{at}.bias"])
        self.full, self.low = ctx.stages.norm_gelu.of_nodes(self._norm, y, f"{use} {layer}")
        self._ctx, self._at, self._y = ctx, (layer, use), y if ctx.record else None

    def backward(self, d: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the gradients of γ and β, and the sum of that of y, to the context's sums.

        Args:
            d: gradient of the result (n, D).
            out: memory for the gradient of y (n, D), which may be d.

        Returns:
            The gradient of y, in the accumulating dtype and in that of products.
        """
        sums, y = self._ctx.sums.of(*self._at), self._y
        self._y = None
        return self._ctx.stages.edge_update.mlp_out.norm_backward(self._norm, y, d, sums, out)


def attend_mask(context: StageContext, own: Queries) -> Tensor:
    """What is added to the attention's logits of a process's queries, (n, n + 1) if it has all: 0 for the sink
    (column 0) and for the nodes of other classes, −∞ for those of the same class. It is made once for each kind of
    batch.

    Rows lie a multiple of 16 values apart, as CUDA's attention kernels want them; others they would copy.
    """
    schedule, device, dtype = context.schedule, context.like.device, context.compute

    def make() -> tuple[Tensor]:
        label = torch.arange(schedule.classes, device=device).repeat_interleave(schedule.views)
        n, asking = len(label), label[own.first : own.end]
        mask = torch.zeros(len(asking), -(-(n + 1) // 16) * 16, dtype=dtype, device=device)[:, : n + 1]
        mask[:, 1:].masked_fill_(asking[:, None] == label[None, :], -torch.inf)
        return (mask,)

    key = ("attend", schedule.classes, schedule.views, own.first, own.end, dtype, device)
    return context.constant(key, make)[0]


class Start:
    """The first node features f and the normalized rows x̂ of embeddings z.

    Args:
        ctx: what all parts work with.
        z: embeddings (n, D).

    Attributes:
        f: first node features (n, D), in the accumulating dtype and in that of products.
        x: normalized rows x̂ (n, D) as a band.
    """

    def __init__(self, ctx: NodeContext, z: Tensor) -> None:
        self._ctx, low = ctx, ctx.operand(z, "z low")
        f = ctx.linear("node_input", low)
        self.f = Edges(ctx.full(f), f)
        centered = z - z.mean(dim=1, keepdim=True)
        norm = centered.norm(dim=1, keepdim=True)
        x = ctx.memory.wrapped("x", z.shape[1])
        torch.div(centered, norm, out=x.head)
        (self.x,) = bands_of(ctx.memory.schedule, x)
        self._low, self._norm, self._x = low, norm, x.head

    def backward(self, df: Tensor, dx: Tensor | None, want_z: bool, into: dict[str, Tensor]) -> Tensor | None:
        """Files the gradients of the input's parameters.

        Args:
            df: gradient of f (n, D).
            dx: gradient of x̂ (n, D), or None.
            want_z: whether dz is wanted.
            into: gradients by the parameters' names.

        Returns:
            dz (n, D), or None.
        """
        ctx = self._ctx
        low = ctx.operand(df, "d low")
        ctx.file_linear("node_input", low, df, self._low, into)
        ctx.biases.file(into)
        if not want_z:
            return None
        dz = torch.empty_like(df)
        if dx is None:
            ctx.memory.product(dz, low, ctx.low["node_input.weight"], add=False)
            return dz
        along = (dx * self._x).sum(dim=1, keepdim=True)
        torch.addcmul(dx, along, self._x, value=-1, out=dz).div_(self._norm)
        dz.sub_(dz.mean(dim=1, keepdim=True))
        ctx.memory.product(dz, low, ctx.low["node_input.weight"], add=True)
        return dz


@dataclass(frozen=True)
class NodeNorm:
    """The node BatchNorm.

    Attributes:
        mean: running mean (D,); None if it is neither used nor updated.
        variance: running variance (D,), or None as for `mean`.
        count: number of batches, 0-dim int64; None if the running statistics are not updated.
        bias: frozen bias (D,).
        training: whether batch statistics are used.
        momentum: what a batch weighs in the running statistics.
        eps: ε.
    """

    mean: Tensor | None
    variance: Tensor | None
    count: Tensor | None
    bias: Tensor
    training: bool
    momentum: float
    eps: float

    def __call__(self, f: Tensor, weight: Tensor) -> Sequence[Tensor]:
        """Normalizes f (n, D), and updates the running statistics in training.

        Returns:
            The result (n, D), and the mean and 1/σ of the batch.
        """
        if self.training and self.count is not None:
            self.count.add_(1)
        return torch.native_batch_norm(
            f, weight, self.bias, self.mean, self.variance, self.training, self.momentum, self.eps
        )

    def backward(self, d: Tensor, f: Tensor, weight: Tensor, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The gradients of f (n, D) and of the weight (D,), from that of the result; batch: the mean and 1/σ."""
        statistics = (self.mean, self.variance, *batch)
        df, d_weight, _ = torch.ops.aten.native_batch_norm_backward(
            d, f, weight, *statistics, self.training, self.eps, [True, True, False]
        )
        return df, d_weight


class Head:
    """The class logits of node features, through the node BatchNorm.

    Args:
        ctx: what all parts work with.
        f: node features (n, D).
        norm: the BatchNorm.

    Attributes:
        logits: (n, M), in the dtype of products.
    """

    def __init__(self, ctx: NodeContext, f: Tensor, norm: NodeNorm) -> None:
        normalized, *batch = norm(f, ctx.named["node_batch_norm.weight"])
        low = ctx.operand(normalized, "head low")
        compute = ctx.memory.compute
        weight, bias = (ctx.named[f"class_head.{kind}"] for kind in ("weight", "bias"))
        if weight.dtype is not compute:
            weight, bias = weight.to(compute), bias.to(compute)
        self.logits = torch.addmm(bias, low, weight.T)
        self._ctx, self._norm = ctx, norm
        self._saved = (f, batch, low, weight) if ctx.record else None

    def backward(self, d: Tensor, into: dict[str, Tensor]) -> Tensor:
        """Files the gradients of the head's parameters.

        Args:
            d: gradient of the logits (n, M).
            into: gradients by the parameters' names.

        Returns:
            The gradient of f (n, D).
        """
        ctx, (f, batch, normalized, weight) = self._ctx, self._saved
        low = ctx.operand(d, "d logits low")
        ctx.file_linear("class_head", low, d, normalized, into)
        ctx.biases.file(into)
        dy = ctx.full(torch.mm(low, weight))
        norm_weight = ctx.named["node_batch_norm.weight"]
        df, into["node_batch_norm.weight"] = self._norm.backward(dy, f, norm_weight, batch)
        return df
