#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mlp_in.cu"
#include "arguments.h"

using namespace gcahng;

static MlpInForward mlp_in_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .h = in.data(),
          .bias = in.data(),
          .g = in.data(),
          .mean = in.data(),
          .rstd = in.data(),
          .T = in.whole(),
          .W = in.whole()};
}
GCAHNG_EMULATE(mlp_in_fwd, launch_mlp_in_forward)

static MlpInBackward mlp_in_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .h = in.data(),
          .bias = in.data(),
          .dn = in.data(),
          .rows = {in.data(), in.data(), in.data(), in.data()},
          .g = in.data(),
          .dh = in.data(),
          .db = in.data(),
          .T = in.whole(),
          .W = in.whole()};
}
GCAHNG_EMULATE_WITH_SCRATCH(mlp_in_bwd, launch_mlp_in_backward, mlp_in_backward_scratch)
