// The ops of this stem:
//   mlp_in_fwd_(MlpInInputs, MlpInOutputs)
//   mlp_in_bwd_(MlpInInputs, MlpInUpstream, NormRows, MlpInGradients)
#pragma once
#include "../mlp_in.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void mlp_in_fwd(const Tensor& h, const Tensor& bias, const Tensor& g, const Tensor& mean, const Tensor& rstd) {
  const Call call("gcahng::mlp_in_fwd_", bias, Device::kLimits);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(h, dtype, "h");
  const int64_t W = call.channels(h, "h", 4), T = rows_of(h);
  Device::run(
      MlpInForward{
          .dtype = dtype,
          .low_type = low_type,
          .h = call.data(h, T * W, low_type, "h"),
          .bias = call.data(bias, W, dtype, "bias"),
          .g = call.data(g, T * W, low_type, "g"),
          .mean = call.data(mean, T, dtype, "mean"),
          .rstd = call.data(rstd, T, dtype, "rstd"),
          .T = T,
          .W = W,
      },
      call);
}

template <class Device>
void mlp_in_bwd(const Tensor& h, const Tensor& bias, const Tensor& dn, const Tensor& mean, const Tensor& rstd,
                const Tensor& mean_dn, const Tensor& mean_n_dn, const Tensor& g, const Tensor& dh, const Maybe& db) {
  const Call call("gcahng::mlp_in_bwd_", bias, Device::kLimits);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(h, dtype, "h");
  const int64_t W = call.channels(h, "h", 4), T = rows_of(h);
  Device::run(
      MlpInBackward{
          .dtype = dtype,
          .low_type = low_type,
          .h = call.data(h, T * W, low_type, "h"),
          .bias = call.data(bias, W, dtype, "bias"),
          .dn = call.data(dn, T * W, low_type, "dn"),
          .rows = {call.data(mean, T, dtype, "mean"), call.data(rstd, T, dtype, "rstd"),
                   call.data(mean_dn, T, dtype, "mean_dn"), call.data(mean_n_dn, T, dtype, "mean_n_dn")},
          .g = call.data(g, T * W, low_type, "g"),
          .dh = call.data(dh, T * W, low_type, "dh"),
          .db = call.data(db, W, dtype, "db"),
          .T = T,
          .W = W,
      },
      call);
}

}  // namespace gcahng::binding
