#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/similarity.cu"

using gcahng::DType;

extern "C" const char* emulate_similarity_forward(int seed, int dtype, int64_t N, const void* anchors,
                                                  const int64_t* node, const void* negatives, const bool* counted,
                                                  double scale, void* loss, void* dn, int64_t D) {
  return emu::report(seed, [&] {
    return gcahng::cuda::launch_similarity(static_cast<DType>(dtype), anchors, node, negatives, counted, scale, loss,
                                           dn, N, D, nullptr);
  });
}
