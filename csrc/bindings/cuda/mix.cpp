#include "../mix.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const MixForward& args, const Call& call) { launch(call, args, cuda::launch_mix_forward); }
  static void run(const MixBackwardTheta& args, const Call& call) {
    launch(call, args, cuda::launch_mix_backward_theta);
  }
  static void run(const MixBackwardZ& args, const Call& call) {
    launch(call, args, cuda::launch_mix_backward_z, cuda::mix_backward_z_scratch, args.dtype);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("mix_fwd_", TORCH_BOX(&mix_fwd<OnCuda>));
  m.impl("mix_bwd_theta_", TORCH_BOX(&mix_bwd_theta<OnCuda>));
  m.impl("mix_bwd_z_", TORCH_BOX(&mix_bwd_z<OnCuda>));
}

}  // namespace gcahng::binding
