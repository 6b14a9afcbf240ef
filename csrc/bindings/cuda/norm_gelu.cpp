#include "../norm_gelu.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const NormGeluForward& args, const Call& call) { launch(call, args, cuda::launch_norm_gelu_forward); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) { m.impl("norm_gelu_", TORCH_BOX(&norm_gelu<OnCuda>)); }

}  // namespace gcahng::binding
