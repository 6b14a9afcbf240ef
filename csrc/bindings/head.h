// The ops of this stem:
//   head_moments_(HeadMoments)
//   head_fwd_(HeadForward)
//   head_bwd_(HeadBackward)
//   head_sums_(HeadSums)
//   head_norm_(HeadNorm)
#pragma once
#include "../head.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void head_moments(const Ints& tile_, const Tensor& e, const Tensor& sums) {
  const Call call("gcahng::head_moments_", e, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating_edges(e, "e"), edge_type = call.edges(e, dtype, "e");
  const int64_t D = width_of(e);
  Device::run(
      HeadMoments{
          .dtype = dtype,
          .tile = tile,
          .e = call.data(e, tile.rows() * D, edge_type, "e"),
          .sums = call.data(sums, 2 * D, DType::f64, "sums"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void head_fwd(const Tensor& product, const Tensor& bias, const Tensor& theta) {
  const Call call("gcahng::head_fwd_", bias, Device::kLimits);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(product, dtype, "product"),
              edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(product), T = rows_of(product);
  Device::run(
      HeadForward{
          .dtype = dtype,
          .low_type = low_type,
          .product = call.data(product, T * D, low_type, "product"),
          .bias = call.data(bias, D, dtype, "bias"),
          .theta = call.data(theta, T * D, edge_type, "theta"),
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void head_bwd(const Tensor& theta, const Tensor& dtheta, const Tensor& dpre, const Maybe& sum) {
  const Call call("gcahng::head_bwd_", theta, Device::kLimits);
  const DType dtype = call.accumulating_edges(theta, "theta"), low_type = call.product(dpre, dtype, "dpre"),
              edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(theta), T = rows_of(theta);
  Device::run(
      HeadBackward{
          .dtype = dtype,
          .low_type = low_type,
          .theta = call.data(theta, T * D, edge_type, "theta"),
          .dtheta = call.data(dtheta, T * D, edge_type, "dtheta"),
          .dpre = call.data(dpre, T * D, low_type, "dpre"),
          .sum = call.data(sum, D, dtype, "sum"),
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void head_sums(const Tensor& dy, const Tensor& e, const Tensor& wide, const Tensor& sums) {
  const Call call("gcahng::head_sums_", e, Device::kLimits);
  const DType dtype = call.accumulating(sums, "sums"), low_type = call.product(dy, dtype, "dy"),
              edge_type = call.edges(e, dtype, "e");
  const int64_t D = width_of(e), T = rows_of(e);
  Device::run(
      HeadSums{
          .dtype = dtype,
          .low_type = low_type,
          .dy = call.data(dy, T * D, low_type, "dy"),
          .e = call.data(e, T * D, edge_type, "e"),
          .wide = call.data(wide, T * D, edge_type, "wide"),
          .sums = call.data(sums, 2 * D, dtype, "sums"),
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void head_norm(const Ints& tile_, const Tensor& dy, const Tensor& e, const Tensor& scale, const Tensor& a,
               const Tensor& b, const Tensor& de) {
  const Call call("gcahng::head_norm_", e, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(scale, "scale"), edge_type = call.edges(e, dtype, "e");
  const int64_t D = width_of(e), T = tile.rows();
  Device::run(
      HeadNorm{
          .dtype = dtype,
          .tile = tile,
          .dy = call.data(dy, T * D, edge_type, "dy"),
          .e = call.data(e, T * D, edge_type, "e"),
          .scale = call.data(scale, D, dtype, "scale"),
          .a = call.data(a, D, dtype, "a"),
          .b = call.data(b, D, dtype, "b"),
          .de = call.data(de, T * D, edge_type, "de"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
