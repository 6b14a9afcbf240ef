#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mix.cu"
#include "tile_arguments.h"

using gcahng::DType;

extern "C" const char* emulate_mix_forward(int seed, int dtype, const int64_t* tile, const void* z, const void* d_plus,
                                           const void* kappa, const void* pull, const void* theta, void* negatives,
                                           void* logits, void* squares, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_mix_forward(static_cast<DType>(dtype), emu::tile(tile), {z, d_plus, kappa, pull}, theta,
                                            negatives, logits, squares, D, nullptr);
  });
}

extern "C" const char* emulate_mix_backward_theta(int seed, int dtype, const int64_t* tile, const void* z,
                                                  const void* d_plus, const void* kappa, const void* pull,
                                                  const void* dn, void* dtheta, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_mix_backward_theta(static_cast<DType>(dtype), emu::tile(tile), {z, d_plus, kappa, pull},
                                                   dn, dtheta, D, nullptr);
  });
}

extern "C" int64_t mix_backward_z_scratch(const int64_t* tile, int64_t D) {
  return gcahng::cuda::mix_backward_z_scratch(emu::tile(tile), D);
}

extern "C" const char* emulate_mix_backward_z(int seed, int dtype, const int64_t* tile, const void* z,
                                              const void* d_plus, const void* kappa, const void* pull,
                                              const void* theta, const void* dlogits, double square, void* dz,
                                              void* d_d_plus, void* scratch, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_mix_backward_z(static_cast<DType>(dtype), emu::tile(tile), {z, d_plus, kappa, pull},
                                               theta, dlogits, square, dz, d_d_plus, scratch, D, nullptr);
  });
}
