#include "../similarity.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const SimilarityForward& args, const Call& call) {
    launch(call, args, cuda::launch_similarity_forward);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) { m.impl("similarity_", TORCH_BOX(&similarity<OnCuda>)); }

}  // namespace gcahng::binding
