#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/cross_entropy.cu"
#include "arguments.h"

using namespace gcahng;

static CrossEntropyForward cross_entropy(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .logits = in.data(),
          .bias = in.data(),
          .labels = in.indices(),
          .scale = in.number(),
          .loss = in.data(),
          .d = in.data(),
          .R = in.whole(),
          .M = in.whole()};
}
GCAHNG_EMULATE(cross_entropy, launch_cross_entropy_forward)
