#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/diversity.cu"
#include "arguments.h"

using namespace gcahng;

static DiversityForward diversity_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .theta = in.data(),
          .sum = in.data(),
          .square = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(diversity_fwd, launch_diversity_forward, diversity_forward_scratch)

static DiversityBackward diversity_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .theta = in.data(),
          .mean = in.data(),
          .scale = in.data(),
          .dtheta = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(diversity_bwd, launch_diversity_backward)
