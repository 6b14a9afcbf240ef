// The ops of this stem:
//   diversity_fwd_(DiversityInputs, DiversityOutputs)
//   diversity_bwd_(DiversityInputs, DiversityGradient)
#pragma once
#include "../diversity.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void diversity_fwd(const Ints& tile_, const Tensor& theta, const Tensor& sum, const Tensor& square) {
  const Call call("gcahng::diversity_fwd_", theta, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(sum, "sum"), edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(theta);
  Device::run(
      DiversityForward{
          .dtype = dtype,
          .tile = tile,
          .theta = call.data(theta, tile.rows() * D, edge_type, "theta"),
          .sum = call.nodes(sum, tile, D, dtype, "sum"),
          .square = call.nodes(square, tile, D, dtype, "square"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void diversity_bwd(const Ints& tile_, const Tensor& theta, const Tensor& mean, const Tensor& scale,
                   const Tensor& dtheta) {
  const Call call("gcahng::diversity_bwd_", theta, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(mean, "mean"), edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(theta), T = tile.rows();
  Device::run(
      DiversityBackward{
          .dtype = dtype,
          .tile = tile,
          .theta = call.data(theta, T * D, edge_type, "theta"),
          .mean = call.nodes(mean, tile, D, dtype, "mean"),
          .scale = call.data(scale, 1, dtype, "scale"),
          .dtheta = call.data(dtheta, T * D, edge_type, "dtheta"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
