#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/head.cu"
#include "tile_arguments.h"

using namespace gcahng;
using namespace gcahng::cuda;

extern "C" int64_t head_sum_scratch(int64_t T, int64_t D) { return head_scratch(T, D); }

extern "C" const char* emulate_head_moments(int seed, int dtype, const int64_t* tile, const void* e, void* sums,
                                            void* scratch, int64_t D) {
  return emu::report(seed,
                     [&] { return launch_head_moments(DType(dtype), emu::tile(tile), e, sums, scratch, D, nullptr); });
}

extern "C" const char* emulate_head_forward(int seed, int dtype, int low_type, int64_t T, const void* p, const void* b,
                                            void* theta, int64_t D) {
  return emu::report(seed,
                     [&] { return launch_head_forward(DType(dtype), DType(low_type), p, b, theta, T, D, nullptr); });
}

extern "C" const char* emulate_head_backward(int seed, int dtype, int low_type, int64_t T, const void* theta,
                                             const void* dtheta, void* dpre, void* sum, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return launch_head_backward(DType(dtype), DType(low_type), theta, dtheta, dpre, sum, scratch, T, D, nullptr);
  });
}

extern "C" const char* emulate_head_sums(int seed, int dtype, int low_type, int64_t T, const void* dy, const void* e,
                                         void* wide_, void* sums, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return launch_head_sums(DType(dtype), DType(low_type), dy, e, wide_, sums, scratch, T, D, nullptr);
  });
}

extern "C" const char* emulate_head_norm(int seed, int dtype, const int64_t* tile, const void* dy, const void* e,
                                         const void* scale, const void* a, const void* b, void* de, int64_t D) {
  return emu::report(
      seed, [&] { return launch_head_norm(DType(dtype), emu::tile(tile), dy, e, scale, a, b, de, D, nullptr); });
}
