#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/gate.cu"
#include "arguments.h"

using namespace gcahng;

static GateForward gate_fwd(emu::Arguments& in) {
  GateForward args{.dtype = in.dtype(),
                   .low_type = in.dtype(),
                   .tile = in.tile(),
                   .dropout = in.dropout(),
                   .tokens = {in.data(), in.data(), in.data()},
                   .norm = {in.data(), in.data()},
                   .e = in.data(),
                   .out = {in.data(), in.data()},
                   .weight_i = in.data(),
                   .weight_j = in.data(),
                   .D = in.whole(),
                   .edge_type = in.dtype()};
  args.out = edges_out(args.dtype, args.edge_type, args.out.full, args.out.low);
  return args;
}
GCAHNG_EMULATE(gate_fwd, launch_gate_forward)

static GateBackward gate_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .tile = in.tile(),
          .dropout = in.dropout(),
          .tokens = {in.data(), in.data(), in.data()},
          .norm = {in.data(), in.data()},
          .e = in.data(),
          .de1 = in.data(),
          .weight_i = in.data(),
          .weight_j = in.data(),
          .de = in.data(),
          .sums = {in.data(), in.data(), in.data(), in.data(), in.data()},
          .D = in.whole(),
          .edge_type = in.dtype()};
}
GCAHNG_EMULATE_WITH_SCRATCH(gate_bwd, launch_gate_backward, gate_backward_scratch)
