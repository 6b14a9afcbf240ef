"""A layer of the node side: attention, node MLP and the tokens of the edges' gate, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng.engine.nodes import NodeContext, NormGelu
from gcahng.engine.schedule import Band, bands_of
from gcahng.engine.shared_attention import Queries
from gcahng.engine.stages.common import Edges


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


class _Heads(NamedTuple):
    """Views of memory (n + 1, 3D) for queries, keys and values. The first row is the sink: a key and value of zeros.

    Those by heads are leaves of autograd.

    Attributes:
        rows: those of the nodes (n, 3D).
        query: those of this process, all n or some of them (1, H, n, D/H).
        key: with the sink (1, H, n + 1, D/H).
        value: with the sink (1, H, n + 1, D/H).
    """

    rows: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def _heads_of(memory: Tensor, heads: int, own: Queries) -> _Heads:
    query, key, value = memory.view(1, len(memory), 3, heads, -1).permute(2, 0, 3, 1, 4)
    memory[0].zero_()  # it lies at the beginning whatever n is, and nothing else writes there
    leaves = (x.detach().requires_grad_() for x in (query[:, :, 1 + own.first : 1 + own.end], key, value))
    return _Heads(memory[1:], *leaves)


def _by_head(x: Tensor, heads: int, own: Queries) -> Tensor:
    """A view of the rows of x (n, D) that are this process's, by head: (1, H, n, D/H) if all are."""
    return x.view(1, len(x), heads, -1).transpose(1, 2)[:, :, own.first : own.end]


def _gradients_of(memory: Tensor, heads: int, own: Queries) -> tuple[Tensor, ...]:
    """Memory (n, 3D) for gradients of queries, keys and values; views of the three by head, of the queries those of
    this process; views of them as (n, D)."""
    query, *others = memory.view(1, len(memory), 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    return (memory, query[:, :, own.first : own.end], *others, *memory.chunk(3, dim=1))


class Attention:
    """f₁ = N(f + attention to the nodes of other classes). The sink is a key and value of zeros.

    Args:
        ctx: what all parts work with.
        layer: the layer's number.
        f: node features (n, D), in the accumulating dtype and in that of products.

    Attributes:
        f1: (n, D).
    """

    def __init__(self, ctx: NodeContext, layer: int, f: Edges) -> None:
        self._ctx, self._at = ctx, f"layers.{layer}.node"
        (n, dim), memory, heads = f.full.shape, ctx.memory, ctx.heads
        weight, bias = ctx.low.stacked[layer]
        slot, own = f"qkv {layer} of {dim}", ctx.queries
        sizes = (heads, own.first, own.end)
        parts = memory.views(slot, n + 1, 3 * dim, lambda x: _heads_of(x, heads, own), sizes)
        torch.addmm(bias, f.low, memory.transposed(weight), out=parts.rows)
        leaves = (parts.query, parts.key, parts.value)
        with recording(ctx.record):
            out = F.scaled_dot_product_attention(*leaves, attn_mask=ctx.attend)
        attended = own.whole(out.transpose(1, 2).reshape(-1, dim))
        self._norm = NormGelu(ctx, layer, "attention", f.full + ctx.linear(f"{self._at}.output", attended))
        self.f1 = self._norm.full
        self._saved = (f.low, leaves, out, attended, weight) if ctx.record else None

    def backward(self, d: Tensor, into: dict[str, Tensor]) -> Tensor:
        """Files the gradients of the parameters.

        Args:
            d: gradient of f₁ (n, D).
            into: gradients by the parameters' names.

        Returns:
            The gradient of f (n, D).
        """
        ctx, at, (low, leaves, out, attended, weight) = self._ctx, self._at, self._saved
        memory, heads, own, (n, dim) = ctx.memory, ctx.heads, ctx.queries, d.shape
        sizes = (heads, own.first, own.end)
        self._saved = None
        dy, dy_low = self._norm.backward(d, memory.wide("d node", n, dim))
        into[f"{at}.output.weight"] = ctx.weight_gradient(dy_low, attended)
        d_attended, d_own = memory.views("d attended", n, dim, lambda x: (x, _by_head(x, heads, own)), sizes)
        torch.mm(dy_low, ctx.low[f"{at}.output.weight"], out=d_attended)
        with recording(True):
            dq, dk, dv = torch.autograd.grad(out, leaves, d_own)
        gradients = memory.views("d qkv", n, 3 * dim, lambda x: _gradients_of(x, heads, own), sizes)
        d_all, *of_heads = gradients[:4]
        torch._foreach_copy_(of_heads, [dq, dk[:, :, 1:], dv[:, :, 1:]])
        own.complete(d_all, memory.like.dtype)
        of_weights = torch.split_with_sizes_copy(ctx.weight_gradient(d_all, low), [dim] * 3)
        for part, of_weight, flat in zip(("query", "key", "value"), of_weights, gradients[4:], strict=True):
            into[f"{at}.{part}.weight"] = of_weight
            ctx.biases.add(f"{at}.{part}", flat)
        ctx.biases.file(into)
        memory.product(dy, d_all, weight, add=True)
        return dy


class Update:
    """A layer's node features f, and the gate inputs of its tokens: U (n, D), c (n, 1) and V (n, D).

    With keys k = K(s) of the tokens s = GELU(node_to_edge(f)), an edge's logit q·k_i is e·U_i + c_i, where U = k W_q
    and c = k b_q. So the query is folded into the keys.

    Args:
        ctx: what all parts work with.
        layer: the layer's number.
        f1: what Attention computed (n, D).
        edge_sum: S (n, D), the sum over each node's edges.

    Attributes:
        f: (n, D), in the accumulating dtype and in that of products.
        tokens: U, c and V as bands.
    """

    def __init__(self, ctx: NodeContext, layer: int, f1: Tensor, edge_sum: Tensor) -> None:
        node, edge = f"layers.{layer}.node", f"layers.{layer}.edge"
        self._ctx, self._node, self._edge = ctx, node, edge
        self._before = NormGelu(ctx, layer, "before", f1 + edge_sum)
        f2, f2_low = self._before.full, self._before.low
        a = ctx.linear(f"{node}.mlp_in", f2_low)
        hidden = F.gelu(a)
        self._behind = NormGelu(ctx, layer, "behind", f2 + ctx.linear(f"{node}.mlp_out", hidden))
        self.f = Edges(self._behind.full, self._behind.low)
        t = ctx.linear(f"{edge}.node_to_edge", self.f.low)
        token = F.gelu(t)
        key = ctx.linear(f"{edge}.key", token, f"key {layer}")
        self.tokens = self._tokens(layer, key, token)
        self._saved = (f2_low, a, hidden, self.f.low, t, token, key) if ctx.record else None

    def _tokens(self, layer: int, key: Tensor, token: Tensor) -> tuple[Band, Band, Band]:
        """U, c and V as bands, from keys and tokens (n, D)."""
        ctx, edge, dim = self._ctx, self._edge, key.shape[1]
        memory = ctx.memory
        u, c, v = (memory.wrapped(f"token {name} {layer}", w) for name, w in (("u", dim), ("c", 1), ("v", dim)))
        memory.product(u.head, key, ctx.low[f"{edge}.query.weight"], add=False)
        torch.sum(key * ctx.named[f"{edge}.query.bias"], dim=1, keepdim=True, out=c.head)
        ctx.linear_into(v.head, f"{edge}.value", token)
        return bands_of(memory.schedule, u, c, v)

    def backward(
        self, df: Tensor | None, tokens: Sequence[Tensor] | None, out: Tensor, into: dict[str, Tensor]
    ) -> Tensor:
        """Files the gradients of the parameters.

        Args:
            df: gradient of f (n, D), which is overwritten; None if there is none.
            tokens: those of U (n, D), c (n, 1) and V (n, D); None if there are none.
            out: memory for the result (n, D).
            into: gradients by the parameters' names. Those of the biases are there once Attention's are filed.

        Returns:
            The gradient of f₁, which is that of S too (n, D).
        """
        ctx, node, (f2_low, a, hidden, *_) = self._ctx, self._node, self._saved
        if tokens is not None:
            df = self._tokens_backward(df, tokens, into)
        dy, dy_low = self._behind.backward(df, df)
        into[f"{node}.mlp_out.weight"] = ctx.weight_gradient(dy_low, hidden)
        da = ctx.gelu_backward(torch.mm(dy_low, ctx.low[f"{node}.mlp_out.weight"]), a, "da low")
        into[f"{node}.mlp_in.weight"] = ctx.weight_gradient(da, f2_low)
        into[f"{node}.mlp_in.bias"] = da.sum(dim=0, dtype=dy.dtype)  # apart: it is as wide as four others
        ctx.memory.product(dy, da, ctx.low[f"{node}.mlp_in.weight"], add=True)
        self._saved = None
        return self._before.backward(dy, out)[0]

    def _tokens_backward(self, df: Tensor | None, tokens: Sequence[Tensor], into: dict[str, Tensor]) -> Tensor:
        """The part of `backward` that goes through the tokens: the gradient of f (n, D)."""
        ctx, edge, (*_, f_low, t, token, key), (du, dc, dv) = self._ctx, self._edge, self._saved, tokens
        memory, query = ctx.memory, ctx.low[f"{edge}.query.weight"]
        du_low, dv_low = ctx.operands({"du low": du, "dv low": dv})
        d_key = dc * ctx.named[f"{edge}.query.bias"]
        memory.product(d_key, du_low, memory.transposed(query), add=True)
        key_low = ctx.operand(d_key, "d key low")
        into[f"{edge}.query.weight"] = ctx.weight_gradient(key, du_low)
        into[f"{edge}.query.bias"] = (dc * key).sum(dim=0)
        ctx.file_linear(f"{edge}.key", key_low, d_key, token, into)
        ctx.file_linear(f"{edge}.value", dv_low, dv, token, into)
        d_token = torch.mm(key_low, ctx.low[f"{edge}.key.weight"])
        d_token.addmm_(dv_low, ctx.low[f"{edge}.value.weight"])
        dt = ctx.gelu_backward(d_token, t, "dt low")
        ctx.file_linear(f"{edge}.node_to_edge", dt, dt, f_low, into)
        add, df = df is not None, torch.empty_like(dv) if df is None else df
        memory.product(df, dt, ctx.low[f"{edge}.node_to_edge.weight"], add)
        return df
