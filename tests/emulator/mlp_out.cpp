#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mlp_out.cu"

using namespace gcahng;
using namespace gcahng::cuda;

extern "C" const char* emulate_mlp_out_forward(int seed, int dtype, int low_type, int64_t T, const void* out,
                                             const void* e1, const void* mean, const void* rstd, const void* w,
                                             const void* d, const void* gamma, const void* beta, void* s, void* y,
                                             void* low, int64_t D) {
  return emu::report(seed, [&] {
    return launch_mlp_out_forward(DType(dtype), DType(low_type), out, e1, mean, rstd, w, d, gamma, beta, s, y, low, T, D,
                                nullptr);
  });
}

extern "C" int64_t close_sum_scratch(int64_t T, int64_t D) { return mlp_out_backward_scratch(T, D); }

extern "C" const char* emulate_mlp_out_backward(int seed, int dtype, int low_type, int64_t T, const void* s,
                                              const void* e1, const void* dy, const void* mean, const void* rstd,
                                              const void* w, const void* d, const void* gamma, void* ds, void* low,
                                              void* scaled, void* m1, void* m2, void* sums, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return launch_mlp_out_backward(DType(dtype), DType(low_type), s, e1, dy, mean, rstd, w, d, gamma, ds, low, scaled, m1,
                                 m2, sums, scratch, T, D, nullptr);
  });
}
