// What the CUDA bindings share: torch's stream, errors, and what all tensors of an op must agree on.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "bindings.h"

namespace gcahng::binding {

using torch::stable::accelerator::DeviceGuard;

// torch's current stream, from the libtorch_cuda that is loaded: the stable ABI hands streams out only since
// torch 2.13, and linking libtorch_cuda would keep this library from loading beside another one.
inline void* current_stream(const Tensor& tensor) {
  using Getter = int32_t (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "gcahng: this torch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(tensor.get_device_index(), &stream) == 0, "gcahng: no current CUDA stream");
  return stream;
}

inline void check(int error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

// The accumulating type.
inline DType type_of(const Tensor& tensor, const char* op) {
  const DType dtype = dtype_of(tensor, op, true);
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, op,
                  ": float32 or float64 is needed for all but products");
  return dtype;
}

// The products' type, beside the accumulating one: that itself or, for float32, a narrower one.
inline DType low_type_of(const Tensor& tensor, DType dtype, const char* op) {
  const DType low = dtype_of(tensor, op, true);
  STD_TORCH_CHECK(low == dtype || (dtype == DType::f32 && low != DType::f64), op,
                  ": products are in the accumulating type or, for float32, in bfloat16 or float16");
  return low;
}
inline DType low_type_of(const std::optional<Tensor>& tensor, DType dtype, const char* op) {
  return tensor.has_value() ? low_type_of(*tensor, dtype, op) : dtype;
}

inline bool on_device_of(const Tensor& first, const Tensor& tensor) { return tensor.device() == first.device(); }
inline bool on_device_of(const Tensor& first, const std::optional<Tensor>& tensor) {
  return !tensor.has_value() || on_device_of(first, *tensor);
}
// Makes the tensors' device the current one; an error where they do not share one.
template <class... Rest>
DeviceGuard guarded(const char* op, const Tensor& first, const Rest&... rest) {
  STD_TORCH_CHECK((on_device_of(first, rest) && ...), op, ": all tensors must be on one device");
  return DeviceGuard(first.get_device_index());
}

}  // namespace gcahng::binding
