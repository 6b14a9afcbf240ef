// The op of this stem:
//   similarity_(SimilarityInputs, SimilarityOutputs)
#pragma once
#include "../similarity.h"
#include "common.h"

namespace gcahng::binding {

template <class Device>
void similarity(const Tensor& anchors, const Tensor& node, const Tensor& negatives, const Tensor& counted, double scale,
                const Tensor& loss, const Maybe& dn) {
  const Call call("gcahng::similarity_", negatives, Device::kLimits);
  const DType dtype = call.accumulating(negatives, "negatives");
  const int64_t D = width_of(negatives), N = rows_of(negatives);
  STD_TORCH_CHECK(width_of(anchors) == D, call.op, ": anchors has ", width_of(anchors),
                  " channels; it must have the negatives' ", D);
  Device::run(
      SimilarityForward{
          .dtype = dtype,
          .anchors = call.data(anchors, anchors.numel(), dtype, "anchors"),
          .node = call.indices(node, N, "node"),
          .negatives = call.data(negatives, N * D, dtype, "negatives"),
          .counted = call.flags(counted, N, "counted"),
          .scale = scale,
          .loss = call.data(loss, N, dtype, "loss"),
          .dn = call.data(dn, N * D, dtype, "dn"),
          .N = N,
          .D = D,
      },
      call);
}

}  // namespace gcahng::binding
