#include "../edge_to_node.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const EdgeToNodeForward& args, const Call& call) {
    launch(call, args, cuda::launch_edge_to_node_forward, cuda::edge_to_node_forward_scratch, args.dtype);
  }
  static void run(const EdgeToNodeBackward& args, const Call& call) {
    launch(call, args, cuda::launch_edge_to_node_backward, cuda::edge_to_node_backward_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("edge_to_node_fwd_", TORCH_BOX(&edge_to_node_fwd<OnCuda>));
  m.impl("edge_to_node_bwd_", TORCH_BOX(&edge_to_node_bwd<OnCuda>));
}

}  // namespace gcahng::binding
