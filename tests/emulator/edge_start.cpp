#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/edge_start.cu"
#include "arguments.h"

using namespace gcahng;

static EdgeStartForward edge_start_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .tile = in.tile(),
          .x = in.data(),
          .out = {in.data(), in.data()},
          .D = in.whole()};
}
GCAHNG_EMULATE(edge_start_fwd, launch_edge_start_forward)

static EdgeStartBackward edge_start_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .x = in.data(),
          .de = in.data(),
          .dx = in.data(),
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(edge_start_bwd, launch_edge_start_backward, edge_start_backward_scratch)
