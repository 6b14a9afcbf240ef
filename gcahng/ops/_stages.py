"""The engine's fused stages as ops: they write into tensors that the engine owns.

As the other ops they exist in two namespaces (see gcahng/ops/_schemas.py): `gcahng` (csrc/bindings_stages.cpp) and
`gcahng_triton`, whose launchers are named beside each schema.

tile is (A, K, O, first class, first offset, mirrored, C) of gcahng.engine.schedule; dropout is (seed, layer,
threshold, tied).
"""

from __future__ import annotations

from gcahng.ops._schemas import define

_GATE = "int[] tile, int[] dropout, float scale, Tensor draw, Tensor u, Tensor c, Tensor v, Tensor gamma"
_MIX = "int[] tile, Tensor z, Tensor d_plus, Tensor kappa, Tensor pull"
STAGES = {
    "norm_gelu_": ("norm_gelu.forward", "(Tensor t, Tensor gamma, Tensor beta, Tensor(a!)? y, Tensor(b!)? low) -> ()"),
    "edge_start_fwd_": ("edge_start.forward", "(int[] tile, Tensor x, Tensor(a!)? e, Tensor(b!)? low) -> ()"),
    "edge_start_bwd_": ("edge_start.backward", "(int[] tile, Tensor x, Tensor de, Tensor(a!) dx) -> ()"),
    "gate_fwd_": (
        "gate.forward",
        f"({_GATE}, Tensor beta, Tensor e, Tensor(a!) e1, Tensor(b!)? low, Tensor(c!) p, Tensor(d!) q) -> ()",
    ),
    "gate_bwd_": (
        "gate.backward",
        f"({_GATE}, Tensor e, Tensor de1, Tensor p, Tensor q, Tensor(a!)? de, Tensor(b!)? du, Tensor(c!)? dc, "
        "Tensor(d!)? dv, Tensor(e!)? dgamma, Tensor(f!)? dbeta) -> ()",
    ),
    "mlp_in_fwd_": ("mlp_in.forward", "(Tensor h, Tensor b, Tensor(a!) g, Tensor(b!) mean, Tensor(c!) rstd) -> ()"),
    "mlp_in_bwd_": (
        "mlp_in.backward",
        "(Tensor h, Tensor b, Tensor dn, Tensor mean, Tensor rstd, Tensor m1, Tensor m2, Tensor(a!) g, "
        "Tensor(b!) dh, Tensor(c!)? db) -> ()",
    ),
    "mlp_out_fwd_": (
        "mlp_out.forward",
        "(Tensor out, Tensor e1, Tensor mean, Tensor rstd, Tensor w, Tensor d, Tensor gamma, Tensor beta, "
        "Tensor(a!) s, Tensor(b!)? y, Tensor(c!)? low) -> ()",
    ),
    "mlp_out_bwd_": (
        "mlp_out.backward",
        "(Tensor s, Tensor e1, Tensor dy, Tensor mean, Tensor rstd, Tensor w, Tensor d, Tensor gamma, "
        "Tensor(a!) ds, Tensor(b!) low, Tensor(c!) scaled, Tensor(d!) m1, Tensor(e!) m2, Tensor(f!)? sums) -> ()",
    ),
    "edge_to_node_fwd_": ("edge_to_node.forward", "(int[] tile, Tensor p, Tensor b, Tensor(a!) sum) -> ()"),
    "edge_to_node_bwd_": (
        "edge_to_node.backward",
        "(int[] tile, Tensor p, Tensor b, Tensor ds, Tensor(a!) dp, Tensor(b!)? db) -> ()",
    ),
    "mix_fwd_": (
        "mix.forward",
        f"({_MIX}, Tensor theta, Tensor(a!)? negatives, Tensor(b!)? logits, Tensor(c!)? squares) -> ()",
    ),
    "mix_bwd_theta_": ("mix.backward_theta", f"({_MIX}, Tensor dn, Tensor(a!) dtheta) -> ()"),
    "mix_bwd_z_": (
        "mix.backward_z",
        f"({_MIX}, Tensor theta, Tensor dlogits, float square, Tensor(a!) dz, Tensor(b!) d_d_plus) -> ()",
    ),
    "cross_entropy_": (
        "cross_entropy.forward",
        "(Tensor logits, Tensor bias, Tensor labels, float scale, Tensor(a!) loss, Tensor(b!)? d) -> ()",
    ),
    "similarity_": (
        "similarity.forward",
        "(Tensor anchors, Tensor node, Tensor negatives, Tensor counted, float scale, Tensor(a!) loss, "
        "Tensor(b!)? dn) -> ()",
    ),
    "diversity_fwd_": (
        "diversity.forward",
        "(int[] tile, Tensor theta, Tensor(a!) sum, Tensor(b!) square) -> ()",
    ),
    "diversity_bwd_": (
        "diversity.backward",
        "(int[] tile, Tensor theta, Tensor mean, Tensor scale, Tensor(a!) dtheta) -> ()",
    ),
    "head_moments_": ("head.moments", "(int[] tile, Tensor e, Tensor(a!) sums) -> ()"),
    "head_fwd_": ("head.forward", "(Tensor p, Tensor b, Tensor(a!) theta) -> ()"),
    "head_bwd_": ("head.backward", "(Tensor theta, Tensor dtheta, Tensor(a!) dpre, Tensor(b!)? sum) -> ()"),
    "head_sums_": ("head.sums", "(Tensor dy, Tensor e, Tensor(a!) wide, Tensor(b!) sums) -> ()"),
    "head_norm_": (
        "head.norm",
        "(int[] tile, Tensor dy, Tensor e, Tensor scale, Tensor a, Tensor b, Tensor(a!) de) -> ()",
    ),
}

for _name, (_launcher, _schema) in STAGES.items():
    define(_name, _schema, lambda *_: None, _launcher)
