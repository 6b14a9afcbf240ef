// What both bindings share: checks of stable-ABI tensors and their translation to raw pointers.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/dtype.h"

namespace gcahng::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* op, bool half) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      if (half) return DType::f16;
      break;
    default:
      break;
  }
  STD_TORCH_CHECK(
      false, op,
      half ? ": float32, float64, bfloat16 or float16 is needed" : ": float32, float64 or bfloat16 is needed");
}

}  // namespace gcahng::binding
