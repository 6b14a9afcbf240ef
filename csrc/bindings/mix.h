// The ops of this stem:
//   mix_fwd_(MixInputs, MixOutputs)
//   mix_bwd_theta_(MixInputs, MixThetaGradient)
//   mix_bwd_z_(MixInputs, MixUpstream, MixNodeGradients)
#pragma once
#include "../mix.h"
#include "common.h"

namespace gcahng::binding {

inline MixInputs mix_inputs(const Call& call, const Tile& tile, const Tensor& z, const Tensor& d_plus,
                            const Tensor& kappa, const Tensor& pull) {
  const DType dtype = call.accumulating(z, "z");
  return {call.nodes(z, tile, width_of(z), dtype, "z"), call.nodes(d_plus, tile, 1, dtype, "d_plus"),
          call.data(kappa, tile.K * tile.K, dtype, "kappa"), call.data(pull, 1, dtype, "pull")};
}

template <class Device>
void mix_fwd(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
             const Tensor& theta, const Maybe& negatives, const Maybe& logits, const Maybe& squares) {
  const Call call("gcahng::mix_fwd_", z, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(z, "z"), edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(z), mixes = mixes_of(tile);
  STD_TORCH_CHECK(logits.has_value() == squares.has_value(), call.op,
                  ": one of logits and squares is given; it must be both or none");
  Device::run(
      MixForward{
          .dtype = dtype,
          .tile = tile,
          .inputs = mix_inputs(call, tile, z, d_plus, kappa, pull),
          .theta = call.data(theta, tile.rows() * D, edge_type, "theta"),
          .negatives = call.data(negatives, mixes * D, dtype, "negatives"),
          .logits = call.data(logits, mixes, dtype, "logits"),
          .squares = call.data(squares, mixes, dtype, "squares"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void mix_bwd_theta(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
                   const Tensor& dn, const Tensor& dtheta) {
  const Call call("gcahng::mix_bwd_theta_", z, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(z, "z"), edge_type = call.edges(dtheta, dtype, "dtheta");
  const int64_t D = width_of(z);
  Device::run(
      MixBackwardTheta{
          .dtype = dtype,
          .tile = tile,
          .inputs = mix_inputs(call, tile, z, d_plus, kappa, pull),
          .dn = call.data(dn, mixes_of(tile) * D, dtype, "dn"),
          .dtheta = call.data(dtheta, tile.rows() * D, edge_type, "dtheta"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void mix_bwd_z(const Ints& tile_, const Tensor& z, const Tensor& d_plus, const Tensor& kappa, const Tensor& pull,
               const Tensor& theta, const Maybe& dlogits, double square, const Maybe& dn, const Tensor& dz,
               const Tensor& dd_plus) {
  const Call call("gcahng::mix_bwd_z_", z, Device::kLimits);
  const Tile tile = call.tile(tile_);
  const DType dtype = call.accumulating(z, "z"), edge_type = call.edges(theta, dtype, "theta");
  const int64_t D = width_of(z), mixes = mixes_of(tile);
  STD_TORCH_CHECK(dlogits.has_value() != dn.has_value(), call.op, ": ",
                  dn.has_value() ? "both dlogits and dn are" : "neither dlogits nor dn is",
                  " given; it must be one of them");
  Device::run(
      MixBackwardZ{
          .dtype = dtype,
          .tile = tile,
          .inputs = mix_inputs(call, tile, z, d_plus, kappa, pull),
          .theta = call.data(theta, tile.rows() * D, edge_type, "theta"),
          .dlogits = call.data(dlogits, mixes, dtype, "dlogits"),
          .square = square,
          .dn = call.data(dn, mixes * D, dtype, "dn"),
          .dz = call.nodes(dz, tile, D, dtype, "dz"),
          .dd_plus = call.nodes(dd_plus, tile, 1, dtype, "dd_plus"),
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
