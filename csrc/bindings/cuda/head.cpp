#include "../head.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCuda : Cuda {
  static void run(const HeadMoments& args, const Call& call) {
    launch(call, args, cuda::launch_head_moments, cuda::head_moments_scratch, DType::f64);
  }
  static void run(const HeadForward& args, const Call& call) { launch(call, args, cuda::launch_head_forward); }
  static void run(const HeadBackward& args, const Call& call) {
    launch(call, args, cuda::launch_head_backward, cuda::head_backward_scratch, args.dtype);
  }
  static void run(const HeadSums& args, const Call& call) {
    launch(call, args, cuda::launch_head_sums, cuda::head_sums_scratch, args.dtype);
  }
  static void run(const HeadNorm& args, const Call& call) { launch(call, args, cuda::launch_head_norm); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CUDA, m) {
  m.impl("head_moments_", TORCH_BOX(&head_moments<OnCuda>));
  m.impl("head_fwd_", TORCH_BOX(&head_fwd<OnCuda>));
  m.impl("head_bwd_", TORCH_BOX(&head_bwd<OnCuda>));
  m.impl("head_sums_", TORCH_BOX(&head_sums<OnCuda>));
  m.impl("head_norm_", TORCH_BOX(&head_norm<OnCuda>));
}

}  // namespace gcahng::binding
