"""The node side of the graph network, whose tensors are n × D: attention, node MLP, tokens and node head.

Autograd differentiates it, in segments that lie between the sums over edges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Switches autograd on or off within the context.

    It works inside an operator's kernel too, where torch takes the autograd keys out of dispatch.
    """
    exclude = torch._C._dispatch_tls_local_exclude_set()
    if enabled:
        exclude = exclude - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.set_grad_enabled(enabled):
        yield


class Segment:
    """A piece of the node side that is recorded for a backward of its own.

    Args:
        named: the parameters that it uses, by name.
        inputs: the tensors that it takes.
        record: whether a backward will follow.

    Attributes:
        inputs: the inputs as leaves of autograd.
        outputs: what the segment computed.
    """

    def __init__(self, named: dict[str, Tensor], inputs: Sequence[Tensor], record: bool) -> None:
        self._record = record
        self.inputs = [x.detach().requires_grad_(record) for x in inputs]
        self._leaves = {name: p.detach().requires_grad_(record) for name, p in named.items()}
        self.outputs: tuple[Tensor, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self._leaves[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """The linear map of this name."""
        return F.linear(x, self._leaves[f"{name}.weight"], self._leaves[f"{name}.bias"])

    def norm_gelu(self, name: str, x: Tensor) -> Tensor:
        """N(x) = LayerNorm(GELU(x)), with the LayerNorm of this name."""
        return F.layer_norm(F.gelu(x), x.shape[-1:], self._leaves[f"{name}.weight"], self._leaves[f"{name}.bias"])

    def backward(self, gradients: Sequence[Tensor | None], into: dict[str, Tensor]) -> list[Tensor | None]:
        """Runs the segment's backward.

        Args:
            gradients: of the outputs; None for an output without a gradient.
            into: the parameters' gradients by name, to which this segment's are added.

        Returns:
            The gradients of the inputs.
        """
        pairs = [(o, g.to(o.dtype)) for o, g in zip(self.outputs, gradients, strict=True) if g is not None]
        leaves = [*self.inputs, *self._leaves.values()]
        with recording(True):
            of_leaves = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        for name, gradient in zip(self._leaves, of_leaves[len(self.inputs) :], strict=True):
            if gradient is not None:
                into[name] = into[name] + gradient if name in into else gradient
        return list(of_leaves[: len(self.inputs)])


def _under(named: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The parameters whose names begin with one of these prefixes."""
    return {name: p for name, p in named.items() if name.startswith(prefixes)}


@contextmanager
def _computing(record: bool, compute: torch.dtype, device: torch.device) -> Iterator[None]:
    """Within, autograd records if asked to, and products are in the compute dtype."""
    low = compute in (torch.bfloat16, torch.float16)
    with recording(record), torch.autocast(device.type, dtype=compute if low else torch.bfloat16, enabled=low):
        yield


class NodeContext(NamedTuple):
    """What all segments of a pass work with.

    Attributes:
        named: parameters by name.
        heads: heads H of the attention.
        compute: dtype of products.
        attend: the keys that each node sees, (n, n + 1) bool (see attend_mask).
        record: whether a backward will follow.
    """

    named: dict[str, Tensor]
    heads: int
    compute: torch.dtype
    attend: Tensor
    record: bool


def attend_mask(classes: int, views: int, device: torch.device) -> Tensor:
    """The keys that each node sees, (n, n + 1) bool: the sink (column 0) and the nodes of other classes."""
    label = torch.arange(classes, device=device).repeat_interleave(views)
    mask = torch.ones(label.shape[0], label.shape[0] + 1, dtype=torch.bool, device=device)
    torch.ne(label[:, None], label[None, :], out=mask[:, 1:])
    return mask


def start(ctx: NodeContext, z: Tensor) -> Segment:
    """Computes the first node features f (n, D) and the normalized rows x̂ (n, D) from embeddings z (n, D)."""
    segment = Segment(_under(ctx.named, "node_input."), [z], ctx.record)
    (z,) = segment.inputs
    with _computing(ctx.record, ctx.compute, z.device):
        f = segment.linear("node_input", z).to(z.dtype)
        centered = z - z.mean(dim=1, keepdim=True)
        segment.outputs = (f, centered / centered.norm(dim=1, keepdim=True))
    return segment


def attention(ctx: NodeContext, layer: int, f: Tensor) -> Segment:
    """Computes f₁ = N(f + attention to the nodes of other classes) (n, D). The sink is a key and value of zeros."""
    prefix = f"layers.{layer}.node"
    parts = (f"{prefix}.{part}." for part in ("query", "key", "value", "output", "norm"))
    segment = Segment(_under(ctx.named, *parts), [f], ctx.record)
    (f,) = segment.inputs
    n, dim = f.shape
    with _computing(ctx.record, ctx.compute, f.device):
        q, k, v = (
            segment.linear(f"{prefix}.{part}", f).view(n, ctx.heads, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=ctx.attend)[0]
        attended = segment.linear(f"{prefix}.output", attended.transpose(0, 1).reshape(n, dim))
        segment.outputs = (segment.norm_gelu(f"{prefix}.norm", f + attended),)
    return segment


def update(ctx: NodeContext, layer: int, f1: Tensor, edge_sum: Tensor) -> Segment:
    """Computes a layer's node features f (n, D), and the gate inputs of its tokens: U (n, D), c (n, 1) and V (n, D).

    With keys k = K(s) of the tokens s = GELU(node_to_edge(f)), an edge's logit q·k_i is e·U_i + c_i, where U = k W_q
    and c = k b_q. So the query is folded into the keys.

    Args:
        ctx: what all segments work with.
        layer: the layer's number.
        f1: what `attention` computed (n, D).
        edge_sum: S (n, D), the sum over each node's edges.
    """
    node, edge = f"layers.{layer}.node", f"layers.{layer}.edge"
    parts = [f"{node}.{part}." for part in ("mlp_in", "mlp_out", "norm")]
    parts += [f"{edge}.{part}." for part in ("query", "key", "value", "node_to_edge")]
    segment = Segment(_under(ctx.named, *parts), [f1, edge_sum], ctx.record)
    f1, edge_sum = segment.inputs
    with _computing(ctx.record, ctx.compute, f1.device):
        f2 = segment.norm_gelu(f"{node}.norm", f1 + edge_sum)
        hidden = F.gelu(segment.linear(f"{node}.mlp_in", f2))
        f = segment.norm_gelu(f"{node}.norm", f2 + segment.linear(f"{node}.mlp_out", hidden))
        token = F.gelu(segment.linear(f"{edge}.node_to_edge", f))
        key, value = segment.linear(f"{edge}.key", token), segment.linear(f"{edge}.value", token)
        u = key @ segment[f"{edge}.query.weight"]
        c = (key * segment[f"{edge}.query.bias"]).sum(dim=1, keepdim=True)
        segment.outputs = tuple(x.to(f1.dtype) for x in (f, u, c, value))
    return segment


def head(ctx: NodeContext, f: Tensor, norm: NodeNorm) -> Segment:
    """Computes the class logits (n, M) of node features f (n, D), through the node BatchNorm."""
    segment = Segment(_under(ctx.named, "node_batch_norm.", "class_head."), [f], ctx.record)
    (f,) = segment.inputs
    with _computing(ctx.record, ctx.compute, f.device):
        segment.outputs = (segment.linear("class_head", norm(f, segment["node_batch_norm.weight"])),)
    return segment


class NodeNorm(NamedTuple):
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

    def __call__(self, f: Tensor, weight: Tensor) -> Tensor:
        """Normalizes f (n, D), and updates the running statistics in training."""
        if self.training and self.count is not None:
            self.count.add_(1)
        return F.batch_norm(f, self.mean, self.variance, weight, self.bias, self.training, self.momentum, self.eps)
