#include "../diversity.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const DiversityForward& args, const Call& call) {
    launch(call, args, cuda::launch_diversity_forward, cuda::diversity_forward_scratch, args.dtype);
  }
  static void run(const DiversityBackward& args, const Call& call) {
    launch(call, args, cuda::launch_diversity_backward);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("diversity_fwd_", TORCH_BOX(&diversity_fwd<OnCuda>));
  m.impl("diversity_bwd_", TORCH_BOX(&diversity_bwd<OnCuda>));
}

}  // namespace gcahng::binding
