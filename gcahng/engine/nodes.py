"""What is n x D: attention, node MLP, tokens, node head. Differentiated by autograd, in segments between the sums
over edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def recording(enabled: bool) -> Iterator[None]:
    """Autograd on (or off), also inside an operator's kernel, where torch takes the autograd keys out of dispatch."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    if enabled:
        exclude = exclude - torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.set_grad_enabled(enabled):
        yield


class Segment:
    """A piece of the node side, recorded for its own backward: leaves in, tensors out."""

    def __init__(self, named: dict[str, Tensor], inputs: Sequence[Tensor], record: bool) -> None:
        self._record = record
        self.inputs = [x.detach().requires_grad_(record) for x in inputs]
        self._leaves = {name: p.detach().requires_grad_(record) for name, p in named.items()}
        self.outputs: tuple[Tensor, ...] = ()

    def __getitem__(self, name: str) -> Tensor:
        return self._leaves[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._leaves[f"{name}.weight"], self._leaves[f"{name}.bias"])

    def norm_gelu(self, name: str, x: Tensor) -> Tensor:
        """N(x) = LayerNorm(GELU(x))"""
        return F.layer_norm(F.gelu(x), x.shape[-1:], self._leaves[f"{name}.weight"], self._leaves[f"{name}.bias"])

    def backward(self, gradients: Sequence[Tensor | None], into: dict[str, Tensor]) -> list[Tensor | None]:
        """Gradients of the outputs (None: no gradient) → of the inputs; those of the parameters are added to `into`."""
        pairs = [(o, g.to(o.dtype)) for o, g in zip(self.outputs, gradients, strict=True) if g is not None]
        leaves = [*self.inputs, *self._leaves.values()]
        with recording(True):
            found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        for name, gradient in zip(self._leaves, found[len(self.inputs) :], strict=True):
            if gradient is not None:
                into[name] = into[name] + gradient if name in into else gradient
        return list(found[: len(self.inputs)])


def _under(named: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: p for name, p in named.items() if name.startswith(prefixes)}


@contextmanager
def _computing(record: bool, compute: torch.dtype, device: torch.device) -> Iterator[None]:
    low = compute in (torch.bfloat16, torch.float16)
    with recording(record), torch.autocast(device.type, dtype=compute if low else torch.bfloat16, enabled=low):
        yield


class NodeContext(NamedTuple):
    """named: parameters by name; heads H; compute: dtype of products; attend (n, n + 1) bool: the sink, then other
    classes' nodes."""

    named: dict[str, Tensor]
    heads: int
    compute: torch.dtype
    attend: Tensor
    record: bool


def attend_mask(classes: int, views: int, device: torch.device) -> Tensor:
    """(n, n + 1): every node sees the sink (column 0) and the nodes of other classes."""
    label = torch.arange(classes, device=device).repeat_interleave(views)
    mask = torch.ones(label.shape[0], label.shape[0] + 1, dtype=torch.bool, device=device)
    torch.ne(label[:, None], label[None, :], out=mask[:, 1:])
    return mask


def start(ctx: NodeContext, z: Tensor) -> Segment:
    """z (n, D) → node features f (n, D) and normalized rows x̂ (n, D)."""
    segment = Segment(_under(ctx.named, "node_input."), [z], ctx.record)
    (z,) = segment.inputs
    with _computing(ctx.record, ctx.compute, z.device):
        f = segment.linear("node_input", z).to(z.dtype)
        centered = z - z.mean(dim=1, keepdim=True)
        segment.outputs = (f, centered / centered.norm(dim=1, keepdim=True))
    return segment


def attention(ctx: NodeContext, layer: int, f: Tensor) -> Segment:
    """f (n, D) → f₁ = N(f + attention to the nodes of other classes); the sink is a key and value of zeros."""
    at = f"layers.{layer}.node"
    parts = (f"{at}.{part}." for part in ("query", "key", "value", "output", "norm"))
    segment = Segment(_under(ctx.named, *parts), [f], ctx.record)
    (f,) = segment.inputs
    n, dim = f.shape
    with _computing(ctx.record, ctx.compute, f.device):
        q, k, v = (
            segment.linear(f"{at}.{part}", f).view(n, ctx.heads, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=ctx.attend)[0]
        attended = segment.linear(f"{at}.output", attended.transpose(0, 1).reshape(n, dim))
        segment.outputs = (segment.norm_gelu(f"{at}.norm", f + attended),)
    return segment


def update(ctx: NodeContext, layer: int, f1: Tensor, edge_sum: Tensor) -> Segment:
    """f₁ and the sum over edges S (n, D) → f (n, D), and the tokens' gate inputs U (n, D), c (n, 1), V (n, D).

    With keys k = K(s) of the tokens s = GELU(node_to_edge(f)), an edge's logit q·k_i is e·U_i + c_i, where U = k W_q
    and c = k b_q: the query is folded into the keys.
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
    """f (n, D) → class logits (n, M), through the node BatchNorm (its running statistics follow)."""
    segment = Segment(_under(ctx.named, "node_batch_norm.", "class_head."), [f], ctx.record)
    (f,) = segment.inputs
    with _computing(ctx.record, ctx.compute, f.device):
        segment.outputs = (segment.linear("class_head", norm(f, segment["node_batch_norm.weight"])),)
    return segment


class NodeNorm(NamedTuple):
    """The node BatchNorm: running mean, running variance, count (None: not to be updated), frozen bias."""

    mean: Tensor | None
    variance: Tensor | None
    count: Tensor | None
    bias: Tensor
    training: bool
    momentum: float
    eps: float

    def __call__(self, f: Tensor, weight: Tensor) -> Tensor:
        if self.training and self.count is not None:
            self.count.add_(1)
        return F.batch_norm(f, self.mean, self.variance, weight, self.bias, self.training, self.momentum, self.eps)
