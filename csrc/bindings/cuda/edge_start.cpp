#include "../edge_start.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const EdgeStartForward& args, const Call& call) {
    launch(call, args, cuda::launch_edge_start_forward);
  }
  static void run(const EdgeStartBackward& args, const Call& call) {
    launch(call, args, cuda::launch_edge_start_backward, cuda::edge_start_backward_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("edge_start_fwd_", TORCH_BOX(&edge_start_fwd<OnCuda>));
  m.impl("edge_start_bwd_", TORCH_BOX(&edge_start_bwd<OnCuda>));
}

}  // namespace gcahng::binding
