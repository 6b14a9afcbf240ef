#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/norm_gelu.cu"

using gcahng::DType;

extern "C" const char* emulate_norm_gelu_forward(int seed, int dtype, int low_type, int64_t T, const void* t,
                                                 const void* gamma, const void* beta, void* y, void* low, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_norm_gelu_forward(static_cast<DType>(dtype), static_cast<DType>(low_type), t, gamma,
                                                  beta, y, low, T, D, nullptr);
  });
}
