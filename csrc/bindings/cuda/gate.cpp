#include "../gate.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const GateForward& args, const Call& call) { launch(call, args, cuda::launch_gate_forward); }
  static void run(const GateBackward& args, const Call& call) {
    launch(call, args, cuda::launch_gate_backward, cuda::gate_backward_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("gate_fwd_", TORCH_BOX(&gate_fwd<OnCuda>));
  m.impl("gate_bwd_", TORCH_BOX(&gate_bwd<OnCuda>));
}

}  // namespace gcahng::binding
