#include "cuda_emulator.h"
// The emulator's macros must come before the kernels.
#include "../../csrc/cuda/edge_to_node.cu"
#include "arguments.h"

using namespace gcahng;

static EdgeToNodeForward edge_to_node_fwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .tile = in.tile(),
          .product = in.data(),
          .bias = in.data(),
          .sum = in.data(),
          .D = in.whole()};
}
GCAHNG_EMULATE_WITH_SCRATCH(edge_to_node_fwd, launch_edge_to_node_forward, edge_to_node_forward_scratch)

static EdgeToNodeBackward edge_to_node_bwd(emu::Arguments& in) {
  return {.dtype = in.dtype(),
          .low_type = in.dtype(),
          .tile = in.tile(),
          .product = in.data(),
          .bias = in.data(),
          .ds = in.data(),
          .dp = in.data(),
          .db = in.data(),
          .D = in.whole()};
}
GCAHNG_EMULATE_WITH_SCRATCH(edge_to_node_bwd, launch_edge_to_node_backward, edge_to_node_backward_scratch)
