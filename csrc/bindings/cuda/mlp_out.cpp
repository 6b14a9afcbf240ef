#include "../mlp_out.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const MlpOutForward& args, const Call& call) { launch(call, args, cuda::launch_mlp_out_forward); }
  static void run(const MlpOutBackward& args, const Call& call) {
    launch(call, args, cuda::launch_mlp_out_backward, cuda::mlp_out_backward_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("mlp_out_fwd_", TORCH_BOX(&mlp_out_fwd<OnCuda>));
  m.impl("mlp_out_bwd_", TORCH_BOX(&mlp_out_bwd<OnCuda>));
}

}  // namespace gcahng::binding
