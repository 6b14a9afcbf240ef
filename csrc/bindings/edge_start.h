// The ops of this stem:
//   edge_start_fwd_(EdgeStartInputs, EdgesOut)
//   edge_start_bwd_(EdgeStartInputs, EdgeStartGradients)
#pragma once
#include "../edge_start.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void edge_start_fwd(const Ints& tile_, const Tensor& x, const Maybe& full, const Maybe& low) {
  const Call call("gcahng::edge_start_fwd_", x, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(x, "x"), low_type = call.product(low, dtype, "low");
  const int64_t D = width_of(x), T = tile.rows();
  Device::run(
      EdgeStartForward{
          .dtype = dtype,
          .low_type = low_type,
          .tile = tile,
          .x = call.nodes(x, tile, D, dtype, "x"),
          .out = {call.data(full, T * D, dtype, "full"), call.data(low, T * D, low_type, "low")},
          .D = D,
      },
      call);
}

template <class Device>
void edge_start_bwd(const Ints& tile_, const Tensor& x, const Tensor& de, const Tensor& dx) {
  const Call call("gcahng::edge_start_bwd_", de, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(x, "x"), edge_type = call.edges(de, dtype, "de");
  const int64_t D = width_of(de);
  Device::run(
      EdgeStartBackward{
          .dtype = dtype,
          .tile = tile,
          .x = call.nodes(x, tile, D, dtype, "x"),
          .de = call.data(de, tile.rows() * D, edge_type, "de"),
          .dx = call.nodes(dx, tile, D, dtype, "dx"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
