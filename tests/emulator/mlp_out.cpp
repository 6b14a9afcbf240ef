#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/mlp_out.cu"
#include "arguments.h"

using namespace gcahng;

static MlpOutForward mlp_out_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .product = in.data(),
          .e1 = in.data(),
          .moments = {in.data(), in.data()},
          .fold = {in.data(), in.data()},
          .norm = {in.data(), in.data()},
          .s = in.data(),
          .out = {in.data(), in.data()},
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(mlp_out_fwd, launch_mlp_out_forward)

static MlpOutBackward mlp_out_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .s = in.data(),
          .e1 = in.data(),
          .dy = in.data(),
          .moments = {in.data(), in.data()},
          .fold = {in.data(), in.data()},
          .gamma = in.data(),
          .ds = in.data(),
          .low = in.data(),
          .scaled = in.data(),
          .mean_dn = in.data(),
          .mean_n_dn = in.data(),
          .sums = in.data(),
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(mlp_out_bwd, launch_mlp_out_backward, mlp_out_backward_scratch)
