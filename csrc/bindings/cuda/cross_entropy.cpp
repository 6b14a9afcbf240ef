#include "../cross_entropy.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const CrossEntropyForward& args, const Call& call) {
    launch(call, args, cuda::launch_cross_entropy_forward);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) { m.impl("cross_entropy_", TORCH_BOX(&cross_entropy<OnCuda>)); }

}  // namespace gcahng::binding
