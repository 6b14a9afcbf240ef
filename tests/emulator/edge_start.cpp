#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/edge_start.cu"
#include "tile_arguments.h"

using gcahng::DType;

extern "C" const char* emulate_edge_start_forward(int seed, int dtype, int low_type, const int64_t* tile, const void* x,
                                               void* e, void* low, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_edge_start_forward(static_cast<DType>(dtype), static_cast<DType>(low_type),
                                                emu::tile(tile), x, e, low, D, nullptr);
  });
}

extern "C" int64_t edge_start_backward_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::edge_start_backward_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_edge_start_backward(int seed, int dtype, const int64_t* tile, const void* x,
                                                        const void* de, void* dx, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_edge_start_backward(static_cast<DType>(dtype), emu::tile(tile), x, de, dx, scratch,
                                                         D, nullptr);
  });
}
