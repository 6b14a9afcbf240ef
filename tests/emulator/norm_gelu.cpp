#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/norm_gelu.cu"
#include "arguments.h"

using namespace gcahng;

static NormGeluForward norm_gelu(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .t = in.data(),
          .norm = {in.data(), in.data()},
          .out = {in.data(), in.data()},
          .T = in.whole(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE(norm_gelu, launch_norm_gelu_forward)
