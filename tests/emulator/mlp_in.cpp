#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mlp_in.cu"

using namespace gcahng;
using namespace gcahng::cuda;

extern "C" const char* emulate_mlp_in_forward(int seed, int dtype, int low_type, int64_t T, const void* h,
                                              const void* b, void* g, void* mean, void* rstd, int64_t W) {
  return emu::report(
      seed, [&] { return launch_mlp_in_forward(DType(dtype), DType(low_type), h, b, g, mean, rstd, T, W, nullptr); });
}

extern "C" int64_t hidden_sum_scratch(int64_t T, int64_t W) { return mlp_in_backward_scratch(T, W); }

extern "C" const char* emulate_mlp_in_backward(int seed, int dtype, int low_type, int64_t T, const void* h,
                                               const void* b, const void* dn, const void* mean, const void* rstd,
                                               const void* m1, const void* m2, void* g, void* dh, void* db,
                                               void* scratch, int64_t W) {
  return emu::report(seed, [&] {
    return launch_mlp_in_backward(DType(dtype), DType(low_type), h, b, dn, mean, rstd, m1, m2, g, dh, db, scratch, T, W,
                                  nullptr);
  });
}
