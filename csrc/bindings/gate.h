// The ops of this stem:
//   gate_fwd_(GateInputs, GateOutputs)
//   gate_bwd_(GateInputs, GateUpstream, GateGradients)
#pragma once
#include "../gate.h"
#include "common.h"

namespace gcahng::binding {

inline Dropout dropout_of(const Call& call, const Ints& numbers, double scale, const Tensor& draw) {
  STD_TORCH_CHECK(numbers.size() == 4, call.op, ": dropout has ", numbers.size(),
                  " numbers; it must be (seed, layer, threshold, tied)");
  return {
      .seed = static_cast<uint64_t>(numbers[0]),
      .layer = static_cast<uint32_t>(numbers[1]),
      .threshold = static_cast<uint32_t>(numbers[2]),
      .tied = numbers[3] != 0,
      .scale = scale,
      .draw = call.indices(draw, 1, "draw"),
  };
}

template <class Device>
void gate_fwd(const Ints& tile_, const Ints& dropout, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& beta, const Tensor& e,
              const Tensor& e1, const Maybe& low, const Tensor& weight_i, const Tensor& weight_j) {
  const Call call("gcahng::gate_fwd_", e, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(gamma, "gamma"), edge_type = call.edges(e, dtype, "e");
  // Narrow edges have no copy beside them: e1 itself is written in the products' type.
  const DType low_type = edge_type == dtype ? call.product(low, dtype, "low") : edge_type;
  const int64_t D = call.channels(e, "e"), T = tile.rows();
  Device::run(
      GateForward{
          .dtype = dtype,
          .low_type = low_type,
          .tile = tile,
          .dropout = dropout_of(call, dropout, scale, draw),
          .tokens = {call.nodes(u, tile, D, dtype, "u"), call.nodes(c, tile, 1, dtype, "c"),
                     call.nodes(v, tile, D, dtype, "v")},
          .norm = {call.data(gamma, D, dtype, "gamma"), call.data(beta, D, dtype, "beta")},
          .e = call.data(e, T * D, edge_type, "e"),
          .out = edges_out(dtype, edge_type, call.data(e1, T * D, edge_type, "e1"),
                           call.data(low, T * D, low_type, "low")),
          .weight_i = call.data(weight_i, T, dtype, "weight_i"),
          .weight_j = call.data(weight_j, T, dtype, "weight_j"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void gate_bwd(const Ints& tile_, const Ints& dropout, double scale, const Tensor& draw, const Tensor& u,
              const Tensor& c, const Tensor& v, const Tensor& gamma, const Tensor& beta, const Tensor& e,
              const Tensor& de1, const Tensor& weight_i, const Tensor& weight_j, const Maybe& de, const Maybe& du,
              const Maybe& dc, const Maybe& dv, const Maybe& dgamma, const Maybe& dbeta) {
  const Call call("gcahng::gate_bwd_", e, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(gamma, "gamma"), edge_type = call.edges(e, dtype, "e");
  const int64_t D = call.channels(e, "e"), T = tile.rows();
  const int given = du.has_value() + dc.has_value() + dv.has_value() + dgamma.has_value() + dbeta.has_value();
  STD_TORCH_CHECK(given == 0 || given == 5, call.op, ": ", given,
                  " of du, dc, dv, dgamma and dbeta are given; it must be all of them or none");
  Device::run(
      GateBackward{
          .dtype = dtype,
          .tile = tile,
          .dropout = dropout_of(call, dropout, scale, draw),
          .tokens = {call.nodes(u, tile, D, dtype, "u"), call.nodes(c, tile, 1, dtype, "c"),
                     call.nodes(v, tile, D, dtype, "v")},
          .norm = {call.data(gamma, D, dtype, "gamma"), call.data(beta, D, dtype, "beta")},
          .e = call.data(e, T * D, edge_type, "e"),
          .de1 = call.data(de1, T * D, edge_type, "de1"),
          .weight_i = call.data(weight_i, T, dtype, "weight_i"),
          .weight_j = call.data(weight_j, T, dtype, "weight_j"),
          .de = call.data(de, T * D, edge_type, "de"),
          .sums = {call.nodes(du, tile, D, dtype, "du"), call.nodes(dc, tile, 1, dtype, "dc"),
                   call.nodes(dv, tile, D, dtype, "dv"), call.data(dgamma, D, dtype, "dgamma"),
                   call.data(dbeta, D, dtype, "dbeta")},
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
