#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/head.cu"
#include "arguments.h"

using namespace gcahng;

static HeadMoments head_moments(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .e = in.data(),
          .sums = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(head_moments, launch_head_moments, head_moments_scratch)

static HeadForward head_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .product = in.data(),
          .bias = in.data(),
          .theta = in.data(),
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(head_fwd, launch_head_forward)

static HeadBackward head_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .theta = in.data(),
          .dtheta = in.data(),
          .dpre = in.data(),
          .sum = in.data(),
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(head_bwd, launch_head_backward, head_backward_scratch)

static HeadSums head_sums(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .dy = in.data(),
          .e = in.data(),
          .wide = in.data(),
          .sums = in.data(),
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(head_sums, launch_head_sums, head_sums_scratch)

static HeadNorm head_norm(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .dy = in.data(),
          .e = in.data(),
          .scale = in.data(),
          .a = in.data(),
          .b = in.data(),
          .de = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(head_norm, launch_head_norm)
