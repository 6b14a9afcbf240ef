#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mix.cu"
#include "arguments.h"

using namespace gcahng;

static MixForward mix_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .inputs = {in.data(), in.data(), in.data(), in.data()},
          .theta = in.data(),
          .negatives = in.data(),
          .logits = in.data(),
          .squares = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(mix_fwd, launch_mix_forward)

static MixBackwardTheta mix_bwd_theta(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .inputs = {in.data(), in.data(), in.data(), in.data()},
          .dn = in.data(),
          .dtheta = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(mix_bwd_theta, launch_mix_backward_theta)

static MixBackwardZ mix_bwd_z(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .inputs = {in.data(), in.data(), in.data(), in.data()},
          .theta = in.data(),
          .dlogits = in.data(),
          .square = in.number(),
          .dn = in.data(),
          .dz = in.data(),
          .dd_plus = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(mix_bwd_z, launch_mix_backward_z, mix_backward_z_scratch)
