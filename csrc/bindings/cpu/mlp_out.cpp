#include "../mlp_out.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const MlpOutForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(mlp_out);
    each_row(args.T, 4 * args.D, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const MlpOutBackward& args, const Call& call) {
    const int64_t blocks = blocks_of(args.T);
    Scratch scratch(call, args.dtype, args.sums ? 4 * blocks * args.D : 0);
    void* sums = args.sums ? scratch.take(4 * blocks * args.D) : nullptr;
    const auto& stem = GCAHNG_CPU(mlp_out);
    each_block(args.T, [&](int64_t begin, int64_t end) { stem.backward(args, sums, begin, end); });
    if (sums) add_partials(args.dtype, sums, args.sums, 4, blocks, args.D);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("mlp_out_fwd_", TORCH_BOX(&mlp_out_fwd<OnCpu>));
  m.impl("mlp_out_bwd_", TORCH_BOX(&mlp_out_bwd<OnCpu>));
}

}  // namespace gcahng::binding
