// The ops of this stem:
//   mlp_out_fwd_(MlpOutInputs, MlpOutOutputs)
//   mlp_out_bwd_(MlpOutReplay, MlpOutGradients)
#pragma once
#include "../mlp_out.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void mlp_out_fwd(const Tensor& product, const Tensor& e1, const Tensor& mean, const Tensor& rstd, const Tensor& w,
                 const Tensor& d, const Tensor& gamma, const Tensor& beta, const Tensor& s, const Maybe& full,
                 const Maybe& low) {
  const Call call("gcahng::mlp_out_fwd_", e1, Device::kLimits);
  const DType dtype = call.accumulating(gamma, "gamma"), low_type = call.product(product, dtype, "product"),
              edge_type = call.edges(e1, dtype, "e1");
  const int64_t D = call.channels(e1, "e1"), T = rows_of(e1);
  Device::run(
      MlpOutForward{
          .dtype = dtype,
          .low_type = low_type,
          .product = call.data(product, T * D, low_type, "product"),
          .e1 = call.data(e1, T * D, edge_type, "e1"),
          .moments = {call.data(mean, T, dtype, "mean"), call.data(rstd, T, dtype, "rstd")},
          .fold = {call.data(w, D, dtype, "w"), call.data(d, D, dtype, "d")},
          .norm = {call.data(gamma, D, dtype, "gamma"), call.data(beta, D, dtype, "beta")},
          .s = call.data(s, T * D, edge_type, "s"),
          .out = {call.data(full, T * D, dtype, "full"), call.data(low, T * D, low_type, "low")},
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

template <class Device>
void mlp_out_bwd(const Tensor& s, const Tensor& e1, const Tensor& dy, const Tensor& mean, const Tensor& rstd,
                 const Tensor& w, const Tensor& d, const Tensor& gamma, const Tensor& ds, const Tensor& low,
                 const Tensor& scaled, const Tensor& mean_dn, const Tensor& mean_n_dn, const Maybe& sums) {
  const Call call("gcahng::mlp_out_bwd_", e1, Device::kLimits);
  const DType dtype = call.accumulating(gamma, "gamma"), low_type = call.product(low, dtype, "low"),
              edge_type = call.edges(e1, dtype, "e1");
  const int64_t D = call.channels(e1, "e1"), T = rows_of(e1);
  Device::run(
      MlpOutBackward{
          .dtype = dtype,
          .low_type = low_type,
          .s = call.data(s, T * D, edge_type, "s"),
          .e1 = call.data(e1, T * D, edge_type, "e1"),
          .dy = call.data(dy, T * D, edge_type, "dy"),
          .moments = {call.data(mean, T, dtype, "mean"), call.data(rstd, T, dtype, "rstd")},
          .fold = {call.data(w, D, dtype, "w"), call.data(d, D, dtype, "d")},
          .gamma = call.data(gamma, D, dtype, "gamma"),
          .ds = call.data(ds, T * D, edge_type, "ds"),
          .low = call.data(low, T * D, low_type, "low"),
          .scaled = call.data(scaled, T * D, low_type, "scaled"),
          .mean_dn = call.data(mean_dn, T, dtype, "mean_dn"),
          .mean_n_dn = call.data(mean_n_dn, T, dtype, "mean_n_dn"),
          .sums = call.data(sums, 4 * D, dtype, "sums"),
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
