#include "../mlp_in.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const MlpInForward& args, const Call& call) { launch(call, args, cuda::launch_mlp_in_forward); }
  static void run(const MlpInBackward& args, const Call& call) {
    launch(call, args, cuda::launch_mlp_in_backward, cuda::mlp_in_backward_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("mlp_in_fwd_", TORCH_BOX(&mlp_in_fwd<OnCuda>));
  m.impl("mlp_in_bwd_", TORCH_BOX(&mlp_in_bwd<OnCuda>));
}

}  // namespace gcahng::binding
