#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/edge_to_node.cu"
#include "tile_arguments.h"

using gcahng::DType;

extern "C" int64_t edge_to_node_forward_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::edge_to_node_forward_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_edge_to_node_forward(int seed, int dtype, int low_type, const int64_t* tile,
                                                    const void* p, const void* b, void* sum, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_edge_to_node_forward(static_cast<DType>(dtype), static_cast<DType>(low_type),
                                                     emu::tile(tile), p, b, sum, scratch, D, nullptr);
  });
}

extern "C" int64_t edge_to_node_backward_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::edge_to_node_backward_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_edge_to_node_backward(int seed, int dtype, int low_type, const int64_t* tile,
                                                     const void* p, const void* b, const void* ds, void* dp, void* db,
                                                     void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_edge_to_node_backward(static_cast<DType>(dtype), static_cast<DType>(low_type),
                                                      emu::tile(tile), p, b, ds, dp, db, scratch, D, nullptr);
  });
}
