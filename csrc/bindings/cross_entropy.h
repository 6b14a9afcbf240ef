// The op of this stem:
//   cross_entropy_(CrossEntropyInputs, CrossEntropyOutputs)
#pragma once
#include "../cross_entropy.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void cross_entropy(const Tensor& logits, const Tensor& bias, const Tensor& labels, double scale, const Tensor& loss,
                   const Maybe& d) {
  const Call call("gcahng::cross_entropy_", logits, Device::kLimits);
  const DType dtype = call.accumulating(bias, "bias"), low_type = call.product(logits, dtype, "logits");
  const int64_t M = width_of(logits), R = rows_of(logits);
  Device::run(
      CrossEntropyForward{
          .dtype = dtype,
          .low_type = low_type,
          .logits = call.data(logits, R * M, low_type, "logits"),
          .bias = call.data(bias, M, dtype, "bias"),
          .labels = call.indices(labels, R, "labels"),
          .scale = scale,
          .loss = call.data(loss, R, dtype, "loss"),
          .d = call.data(d, R * M, low_type, "d"),
          .R = R,
          .M = M,
      },
      call);
}

}  // namespace gcahng::binding
