#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/diversity.cu"
#include "tile_arguments.h"

using gcahng::DType;

extern "C" int64_t diversity_forward_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::diversity_forward_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_diversity_forward(int seed, int dtype, const int64_t* tile, const void* theta, void* sum,
                                                 void* square, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_diversity_forward(static_cast<DType>(dtype), emu::tile(tile), theta, sum, square,
                                                  scratch, D, nullptr);
  });
}

extern "C" const char* emulate_diversity_backward(int seed, int dtype, const int64_t* tile, const void* theta,
                                                  const void* mean, const void* scale, void* dtheta, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_diversity_backward(static_cast<DType>(dtype), emu::tile(tile), theta, mean, scale,
                                                   dtheta, D, nullptr);
  });
}
