#include "../mlp_in.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const MlpInForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(mlp_in);
    each_row(args.T, 4 * args.W, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const MlpInBackward& args, const Call& call) {
    const int64_t blocks = blocks_of(args.T);
    Scratch scratch(call, args.dtype, args.db ? blocks * args.W : 0);
    void* db = args.db ? scratch.take(blocks * args.W) : nullptr;
    const auto& stem = GCAHNG_CPU(mlp_in);
    each_block(args.T, [&](int64_t begin, int64_t end) { stem.backward(args, db, begin, end); });
    if (db) add_partials(args.dtype, db, args.db, 1, blocks, args.W);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("mlp_in_fwd_", TORCH_BOX(&mlp_in_fwd<OnCpu>));
  m.impl("mlp_in_bwd_", TORCH_BOX(&mlp_in_bwd<OnCpu>));
}

}  // namespace gcahng::binding
