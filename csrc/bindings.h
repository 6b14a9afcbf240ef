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

// A contiguous tensor of this shape, of the first one's type and device.
inline Tensor matched(const Tensor& tensor, const Tensor& first, std::initializer_list<int64_t> shape, const char* op,
                      const char* argument) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  for (int64_t axis = 0; fits && axis < tensor.dim(); ++axis) fits = tensor.size(axis) == shape.begin()[axis];
  STD_TORCH_CHECK(fits, op, ": ", argument, " has another shape than the op's other arguments ask for");
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type() && tensor.device() == first.device(), op, ": ", argument,
                  " has another dtype or device than the first argument");
  return torch::stable::contiguous(tensor);
}

// Rows or columns of two matrices that are multiplied channel by channel.
struct PairShape {
  int64_t I, J, D;
};
inline PairShape pair_shape(const Tensor& x_i, const Tensor& x_j, const char* op) {
  STD_TORCH_CHECK(x_i.dim() == 2 && x_j.dim() == 2, op, ": x_i (I, D) and x_j (J, D) are needed");
  return {x_i.size(0), x_j.size(0), x_i.size(1)};
}

}  // namespace gcahng::binding
