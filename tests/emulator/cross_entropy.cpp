#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/cross_entropy.cu"

using gcahng::DType;

extern "C" const char* emulate_cross_entropy_forward(int seed, int dtype, int low_type, int64_t R, const void* logits,
                                                     const void* bias, const int64_t* labels, double scale, void* loss,
                                                     void* d, int64_t M) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_cross_entropy(static_cast<DType>(dtype), static_cast<DType>(low_type), logits, bias,
                                              labels, scale, loss, d, R, M, nullptr);
  });
}
