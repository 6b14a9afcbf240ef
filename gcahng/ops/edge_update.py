"""edge_update: one dense update of the edges between all pairs of n nodes. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gcahng import dispatch
from gcahng.engine.edge_update import UpdateSettings, UpdateTensors, choose_edge_memory, run_edge_update
from gcahng.engine.engine import refuse_transforms
from gcahng.engine.masks import EdgeDropout
from gcahng.engine.plan import MODES
from gcahng.engine.precision import compute_dtype, name_of
from gcahng.errors import UserError
from gcahng.ops.half_band import from_half_band, half_band_nodes, to_half_band
from gcahng.reference import edge_update as reference
from gcahng.reference.edge_update import EdgeUpdateWeights


def edge_update(
    edges: Tensor,
    nodes: Tensor,
    weights: EdgeUpdateWeights,
    *,
    symmetric: bool = True,
    dropout: EdgeDropout | None = None,
    impl: str = "auto",
    edge_memory: str = "auto",
) -> Tensor:
    """Lets every edge attend to its two nodes, and sends it through an MLP (paper section 3.2).

    Each edge e_ij is one query over two tokens, the rows i and j of `nodes`, single head, scale 1/√D:

        a_ij = ω_ij V(s_i) + (1 − ω_ij) V(s_j),   ω_ij = sigmoid((Q(e_ij)·K(s_i) − Q(e_ij)·K(s_j)) / √D)
        e¹   = N(a + e)
        new  = N(MLP(e¹) + e¹),   MLP = Linear_{D→4D}, GELU, LayerNorm_{4D}, Linear_{4D→D}

    with N = LayerNorm(GELU(·)), one set of parameters used twice. Neither a tensor (n, n, 4D) nor a key, value or query
    of an edge is ever held.

    Args:
        edges: (n, n, D), or (n (n + 1) / 2, D) in half-band storage (gcahng.ops.half_band), which is symmetric. float32
            or float64. Under bfloat16 autocast products are in bfloat16.
        nodes: (n, D), the tokens, of the edges' dtype.
        weights: the parameters, or a tuple of them in the order of EdgeUpdateWeights.
        symmetric: whether e_ij = e_ji. Half of the pairs are then computed, and where two directions differ their mean
            is taken.
        dropout: dropout of the attention weights, or None. With symmetric=True both directions of an edge share one
            draw.
        impl: auto, reference, torch, cpp, cuda or triton (see gcahng.dispatch).
        edge_memory: what is saved of the edges for the backward. "store" saves one D-vector per pair. "hidden" saves
            the 4D hidden vector too. "recompute" saves nothing. "auto" decides by free memory, and is "store" under
            torch.compile.

    Returns:
        The updated edges, in the form of the edges that entered. They are differentiable once, in edges, nodes and
        weights; impl="reference" is differentiable any number of times.

    Raises:
        UserError: a shape, dtype or device is wrong, or the implementation is not available.
    """
    weights = _named(weights)
    n = _check(edges, nodes, weights, symmetric)
    if dropout is not None:
        _check_dropout(dropout, edges.device)
    if edge_memory not in ("auto", *MODES):
        raise UserError(f"edge_memory is {edge_memory!r}; it must be one of auto, {', '.join(MODES)}")
    compute = compute_dtype(edges.device, edges.dtype)
    implementation = dispatch.chosen("edge_update", impl, edges.device, None, nodes.shape[1], compute)
    if implementation == "reference":
        return _reference(edges, nodes, weights, symmetric, dropout)
    if not torch.compiler.is_compiling():
        refuse_transforms("edge_update", edges, nodes, *weights)
    # As in the engine, products stay in float32 under float16 autocast.
    with torch.autocast(edges.device.type, enabled=compute is torch.bfloat16):
        u, c, v = _tokens(nodes, weights)
    draw = torch.zeros((), dtype=torch.int64, device=edges.device) if dropout is None else dropout.draw
    tensors = UpdateTensors(edges.contiguous(), u, c, v, draw, [w.contiguous() for w in weights[6:]])
    record = torch.is_grad_enabled() and any(x.requires_grad for x in (edges, nodes, *weights))
    if edge_memory == "auto":  # the shapes of what is saved depend on it, so that a compiled call cannot decide later
        compiling = torch.compiler.is_compiling()
        edge_memory = "store" if compiling else choose_edge_memory(n, nodes.shape[1], symmetric, edges, compute)
    p, seed = (0.0, 0) if dropout is None else (dropout.p, dropout.seed)
    settings = UpdateSettings(p, seed, symmetric, name_of(compute), implementation, edge_memory, record)
    return run_edge_update(tensors, settings)


def _tokens(nodes: Tensor, w: EdgeUpdateWeights) -> tuple[Tensor, Tensor, Tensor]:
    """U (n, D), c (n, 1) and V (n, D) of nodes (n, D): with their keys k, an edge's logit q·k_i is e·U_i + c_i."""
    key = F.linear(nodes, w.key_weight, w.key_bias)
    value = F.linear(nodes, w.value_weight, w.value_bias)
    u, c = key @ w.query_weight, (key * w.query_bias).sum(dim=1, keepdim=True)
    return u.to(nodes.dtype), c.to(nodes.dtype), value.to(nodes.dtype)


def _reference(
    edges: Tensor, nodes: Tensor, weights: EdgeUpdateWeights, symmetric: bool, dropout: EdgeDropout | None
) -> Tensor:
    """The op as gcahng.reference has it."""
    masks = None if dropout is None else reference.Dropout(dropout.p, dropout.seed, dropout.draw, symmetric)
    if edges.dim() == 2:
        return to_half_band(reference.edge_update(weights, from_half_band(edges), nodes, masks))
    if symmetric:
        edges = (edges + edges.transpose(0, 1)) / 2
    return reference.edge_update(weights, edges, nodes, masks).to(edges.dtype)


def _named(weights: EdgeUpdateWeights) -> EdgeUpdateWeights:
    """Names the parameters where they are a plain tuple."""
    wanted = len(EdgeUpdateWeights._fields)
    if not isinstance(weights, (tuple, list)):
        raise UserError(f"weights is a {type(weights).__name__}; it must be an EdgeUpdateWeights")
    if len(weights) != wanted:
        raise UserError(f"weights has {len(weights)} tensors; it must have {wanted}, as EdgeUpdateWeights lists them")
    return EdgeUpdateWeights(*weights)


def _check_dropout(dropout: EdgeDropout, device: torch.device) -> None:
    """Checks the dropout of an edge update, whose edges are on this device."""
    if not isinstance(dropout, EdgeDropout):
        raise UserError(f"dropout is a {type(dropout).__name__}; it must be None or an EdgeDropout")
    p, seed, draw = dropout
    if not isinstance(p, (int, float)) or not 0 <= p < 1:
        raise UserError(f"dropout.p is {p!r}; it must be at least 0 and under 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise UserError(f"dropout.seed is {seed!r}; it must be a whole number in 0 … 2**63 - 1")
    if not isinstance(draw, Tensor):
        raise UserError(f"dropout.draw is a {type(draw).__name__}; it must be a 0-dim int64 tensor")
    if draw.dim() or draw.dtype is not torch.int64 or draw.device != device:
        raise UserError(
            f"dropout.draw is {name_of(draw.dtype)} of shape {tuple(draw.shape)} on {draw.device}; it must be a 0-dim "
            f"int64 tensor on {device}, as the edges are"
        )


def _check(edges: Tensor, nodes: Tensor, weights: EdgeUpdateWeights, symmetric: bool) -> int:
    """Checks that the arguments of edge_update fit together, and returns n."""
    if not isinstance(symmetric, bool):
        raise UserError(f"symmetric is {symmetric!r}; it must be True or False")
    for name, x in (("edges", edges), ("nodes", nodes), *zip(weights._fields, weights, strict=True)):
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is a {type(x).__name__}; it must be a tensor")
        if x.dtype not in (torch.float32, torch.float64) or x.layout is not torch.strided:
            kind = name_of(x.dtype) if x.layout is torch.strided else f"a {name_of(x.layout)} tensor"
            raise UserError(f"{name} is {kind}; it must be float32 or float64 (use torch.autocast for less), dense")
        if x.dtype != edges.dtype or x.device != edges.device:
            raise UserError(
                f"{name} is {name_of(x.dtype)} on {x.device}; it must be as edges, {name_of(edges.dtype)} on "
                f"{edges.device}"
            )
    if nodes.dim() != 2 or not nodes.numel():
        raise UserError(f"nodes has shape {tuple(nodes.shape)}; it must be (nodes, channels), at least one of each")
    n, dim = nodes.shape
    if edges.dim() == 2:
        if half_band_nodes(edges.shape[0]) != n or edges.shape[1] != dim:
            raise UserError(
                f"edges has shape {tuple(edges.shape)}; with nodes of shape ({n}, {dim}) it must be "
                f"({n * (n + 1) // 2}, {dim}) in half-band storage, or ({n}, {n}, {dim})"
            )
        if not symmetric:
            raise UserError("symmetric is False and edges are in half-band storage; they must be (n, n, D)")
    elif tuple(edges.shape) != (n, n, dim):
        raise UserError(
            f"edges has shape {tuple(edges.shape)}; with nodes of shape ({n}, {dim}) it must be ({n}, {n}, {dim})"
        )
    wide = {"mlp_in_weight": (4 * dim, dim), "mlp_out_weight": (dim, 4 * dim)}
    wide |= dict.fromkeys(("mlp_in_bias", "mlp_norm_weight", "mlp_norm_bias"), (4 * dim,))
    wide |= dict.fromkeys(("query_weight", "key_weight", "value_weight"), (dim, dim))
    for name, x in zip(weights._fields, weights, strict=True):
        wanted = wide.get(name, (dim,))
        if tuple(x.shape) != wanted:
            raise UserError(f"weights.{name} has shape {tuple(x.shape)}; with {dim} channels it must be {wanted}")
    return n
