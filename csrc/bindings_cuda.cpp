// The CUDA implementations of the ops that gcahng/ops/_schemas.py declares.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "bindings.h"
#include "edge_start.h"

namespace {

using namespace gcahng;
using namespace gcahng::binding;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream, from the libtorch_cuda that is loaded: the stable ABI hands streams out only since
// torch 2.13, and linking libtorch_cuda would keep this library from loading beside another one.
void* current_stream(const Tensor& tensor) {
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

void check(int error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}

Tensor edge_start_fwd(const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_fwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, true);
  const DeviceGuard guard(x_i.get_device_index());
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  Tensor e = torch::stable::new_empty(x_i, {I, J, D});
  check(cuda::launch_edge_start_forward(dtype, a.const_data_ptr(), b.const_data_ptr(), e.mutable_data_ptr(), I, J, D,
                                        current_stream(x_i)),
        op);
  return e;
}

std::tuple<Tensor, Tensor> edge_start_bwd(const Tensor& grad_e, const Tensor& x_i, const Tensor& x_j) {
  constexpr const char* op = "gcahng::edge_start_bwd";
  const auto [I, J, D] = pair_shape(x_i, x_j, op);
  const DType dtype = dtype_of(x_i, op, true);
  const DeviceGuard guard(x_i.get_device_index());
  const Tensor a = matched(x_i, x_i, {I, D}, op, "x_i"), b = matched(x_j, x_i, {J, D}, op, "x_j");
  const Tensor g = matched(grad_e, x_i, {I, J, D}, op, "grad_e");
  Tensor dx_i = torch::stable::new_empty(x_i, {I, D}), dx_j = torch::stable::new_empty(x_i, {J, D});
  check(
      cuda::launch_edge_start_backward(dtype, g.const_data_ptr(), a.const_data_ptr(), b.const_data_ptr(),
                                       dx_i.mutable_data_ptr(), dx_j.mutable_data_ptr(), I, J, D, current_stream(x_i)),
      op);
  return {dx_i, dx_j};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("edge_start_fwd", TORCH_BOX(&edge_start_fwd));
  m.impl("edge_start_bwd", TORCH_BOX(&edge_start_bwd));
}
