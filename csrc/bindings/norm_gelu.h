// The op of this stem:
//   norm_gelu_(NormGeluInputs, EdgesOut)
#pragma once
#include "../norm_gelu.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void norm_gelu(const Tensor& t, const Tensor& gamma, const Tensor& beta, const Maybe& full, const Maybe& low) {
  const Call call("gcahng::norm_gelu_", t, Device::kLimits);
  const DType dtype = call.accumulating(gamma, "gamma"), low_type = call.product(low, dtype, "low"),
              edge_type = call.edges(t, dtype, "t");
  const int64_t D = call.channels(t, "t"), T = rows_of(t);
  Device::run(
      NormGeluForward{
          .dtype = dtype,
          .low_type = low_type,
          .t = call.data(t, T * D, edge_type, "t"),
          .norm = {call.data(gamma, D, dtype, "gamma"), call.data(beta, D, dtype, "beta")},
          .out = {call.data(full, T * D, dtype, "full"), call.data(low, T * D, low_type, "low")},
          .T = T,
          .D = D,
          .edge_type = edge_type,
      },
      call);
}

}  // namespace gcahng::binding
