"""The engine's C++ stages as ops: they write into tensors that the engine owns. csrc/bindings_stages.cpp implements
them.

tile is (A, K, O, first class, first offset, mirrored, C) of gcahng.engine.schedule; dropout is (seed, layer,
threshold, tied).
"""

from __future__ import annotations

import torch

from gcahng.ops._schemas import NATIVE, library

_GATE = "int[] tile, int[] dropout, float scale, Tensor draw, Tensor u, Tensor c, Tensor v, Tensor gamma"
_MIX = "int[] tile, Tensor z, Tensor d_plus, Tensor kappa, float pull"
_SCHEMAS = (
    "norm_gelu_(Tensor t, Tensor gamma, Tensor beta, Tensor(a!)? y, Tensor(b!)? low) -> ()",
    "edge_start_tile_(int[] tile, Tensor x, Tensor(a!)? e, Tensor(b!)? low) -> ()",
    f"gate_fwd_({_GATE}, Tensor beta, Tensor e, Tensor(a!) e1, Tensor(b!)? low, Tensor(c!) p, Tensor(d!) q) -> ()",
    f"gate_bwd_({_GATE}, Tensor e, Tensor de1, Tensor p, Tensor q, Tensor(a!)? de, Tensor(b!)? du, Tensor(c!)? dc, "
    "Tensor(d!)? dv, Tensor(e!)? dgamma, Tensor(f!)? dbeta) -> ()",
    "hidden_fwd_(Tensor h, Tensor b, Tensor(a!) g, Tensor(b!) mean, Tensor(c!) rstd) -> ()",
    "hidden_bwd_(Tensor h, Tensor b, Tensor dn, Tensor mean, Tensor rstd, Tensor m1, Tensor m2, Tensor(a!) g, "
    "Tensor(b!) dh, Tensor(c!)? db) -> ()",
    "close_fwd_(Tensor out, Tensor e1, Tensor mean, Tensor rstd, Tensor w, Tensor d, Tensor gamma, Tensor beta, "
    "Tensor(a!) s, Tensor(b!)? y, Tensor(c!)? low) -> ()",
    "close_bwd_(Tensor s, Tensor e1, Tensor dy, Tensor mean, Tensor rstd, Tensor w, Tensor d, Tensor gamma, "
    "Tensor(a!) ds, Tensor(b!) low, Tensor(c!) scaled, Tensor(d!) m1, Tensor(e!) m2, Tensor(f!)? sums) -> ()",
    "edge_to_node_fwd_(int[] tile, Tensor p, Tensor b, Tensor(a!) sum) -> ()",
    "edge_to_node_bwd_(int[] tile, Tensor p, Tensor b, Tensor ds, Tensor(a!) dp, Tensor(b!)? db) -> ()",
    f"mix_fwd_({_MIX}, Tensor theta, Tensor(a!)? negatives, Tensor(b!)? logits, Tensor(c!)? squares) -> ()",
    f"mix_bwd_theta_({_MIX}, Tensor dn, Tensor(a!) dtheta) -> ()",
    f"mix_bwd_z_({_MIX}, Tensor theta, Tensor dlogits, float square, Tensor(a!) dz, Tensor(b!) d_d_plus) -> ()",
    "head_moments_(int[] tile, Tensor e, Tensor(a!) sums) -> ()",
    "head_fwd_(Tensor p, Tensor b, Tensor(a!) theta) -> ()",
    "head_bwd_(Tensor theta, Tensor dtheta, Tensor(a!) dpre, Tensor(b!)? sum) -> ()",
    "head_sums_(Tensor dy, Tensor e, Tensor(a!) wide, Tensor(b!) sums) -> ()",
    "head_norm_(int[] tile, Tensor dy, Tensor e, Tensor scale, Tensor a, Tensor b, Tensor(a!) de) -> ()",
)

for _schema in _SCHEMAS:
    library(NATIVE).define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"gcahng::{_schema.split('(')[0]}", lambda *_: None, lib=library(NATIVE))
