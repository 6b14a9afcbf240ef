// What the CUDA bindings share: torch's stream, and launches on it. Partial sums live in scratch of torch's allocator.
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"

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

struct Cuda {
  static constexpr Limits kLimits{/*half=*/true, /*channels=*/1024};

  // Launches on the tensors' device.
  template <class Args>
  static void launch(const Call& call, const Args& args, int (*launcher)(const Args&, void* stream)) {
    const DeviceGuard guard(call.like.get_device_index());
    check(call, launcher(args, current_stream(call.like)));
  }

  // As above, with as many values of scratch as `values` says.
  template <class Args>
  static void launch(const Call& call, const Args& args, int (*launcher)(const Args&, void* scratch, void* stream),
                     int64_t (*values)(const Args&), DType scratch_type) {
    const DeviceGuard guard(call.like.get_device_index());
    const int64_t count = values(args);
    Scratch scratch(call, scratch_type, count);
    check(call, launcher(args, scratch.take(count), current_stream(call.like)));
  }

 private:
  static void check(const Call& call, int error) {
    STD_TORCH_CHECK(error == cudaSuccess, call.op, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  }
};

}  // namespace gcahng::binding
