#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/gate.cu"
#include "tile_arguments.h"

using gcahng::DType;

extern "C" const char* emulate_gate_forward(int seed, int dtype, int low_type, const int64_t* tile,
                                            const int64_t* dropout, double scale, const int64_t* draw, const void* u,
                                            const void* c, const void* v, const void* gamma, const void* beta,
                                            const void* e, void* e1, void* low, void* p, void* q, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_gate_forward(static_cast<DType>(dtype), static_cast<DType>(low_type), emu::tile(tile),
                                             emu::dropout(dropout, scale), draw, {u, c, v}, gamma, beta, e, e1, low,
                                             {p, q}, D, nullptr);
  });
}

extern "C" int64_t gate_backward_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::gate_backward_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_gate_backward(int seed, int dtype, const int64_t* tile, const int64_t* dropout,
                                             double scale, const int64_t* draw, const void* u, const void* c,
                                             const void* v, const void* gamma, const void* e, const void* de1, void* p,
                                             void* q, void* de, void* du, void* dc, void* dv, void* dgamma, void* dbeta,
                                             void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_gate_backward(static_cast<DType>(dtype), emu::tile(tile), emu::dropout(dropout, scale),
                                              draw, {u, c, v}, gamma, e, de1, {p, q}, de, {du, dc, dv, dgamma, dbeta},
                                              scratch, D, nullptr);
  });
}
