// The ops of this stem:
//   edge_to_node_fwd_(EdgeToNodeInputs, EdgeToNodeSum)
//   edge_to_node_bwd_(EdgeToNodeInputs, EdgeToNodeGradients)
#pragma once
#include "../edge_to_node.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void edge_to_node_fwd(const Ints& tile_, const Tensor& product, const Tensor& bias, const Tensor& sum) {
  const Call call("gcahng::edge_to_node_fwd_", bias, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(product, dtype, "product");
  const int64_t D = width_of(product), T = tile.rows();
  Device::run(
      EdgeToNodeForward{
          .dtype = dtype,
          .low_type = low_type,
          .tile = tile,
          .product = call.data(product, T * D, low_type, "product"),
          .bias = call.data(bias, D, dtype, "bias"),
          .sum = call.nodes(sum, tile, D, dtype, "sum"),
          .D = D,
      },
      call);
}

template <class Device>
void edge_to_node_bwd(const Ints& tile_, const Tensor& product, const Tensor& bias, const Tensor& ds, const Tensor& dp,
                      const Maybe& db) {
  const Call call("gcahng::edge_to_node_bwd_", bias, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(product, dtype, "product");
  const int64_t D = width_of(product), T = tile.rows();
  Device::run(
      EdgeToNodeBackward{
          .dtype = dtype,
          .low_type = low_type,
          .tile = tile,
          .product = call.data(product, T * D, low_type, "product"),
          .bias = call.data(bias, D, dtype, "bias"),
          .ds = call.nodes(ds, tile, D, dtype, "ds"),
          .dp = call.data(dp, T * D, low_type, "dp"),
          .db = call.data(db, D, dtype, "db"),
          .D = D,
      },
      call);
}

}  // namespace gcahng::binding
