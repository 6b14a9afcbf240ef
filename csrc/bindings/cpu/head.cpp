#include "../head.h"

#include "common.h"

namespace gcahng::binding {
namespace {

struct OnCpu : Cpu {
  static void run(const HeadMoments& args, const Call& call) {
    const int64_t units = args.tile.units();
    Scratch scratch(call, DType::f64, 2 * units * args.D);
    void* sums = scratch.take(2 * units * args.D);
    const auto& stem = GCAHNG_CPU(head);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.moments(args, sums, begin, end); });
    add_partials(DType::f64, sums, args.sums, 2, units, args.D);
  }

  static void run(const HeadForward& args, const Call&) {
    const auto& stem = GCAHNG_CPU(head);
    each_row(args.T, 2 * args.D, [&](int64_t begin, int64_t end) { stem.forward(args, begin, end); });
  }

  static void run(const HeadBackward& args, const Call& call) {
    const int64_t blocks = blocks_of(args.T);
    Scratch scratch(call, args.dtype, args.sum ? blocks * args.D : 0);
    void* sum = args.sum ? scratch.take(blocks * args.D) : nullptr;
    const auto& stem = GCAHNG_CPU(head);
    each_block(args.T, [&](int64_t begin, int64_t end) { stem.backward(args, sum, begin, end); });
    if (sum) add_partials(args.dtype, sum, args.sum, 1, blocks, args.D);
  }

  static void run(const HeadSums& args, const Call& call) {
    const int64_t blocks = blocks_of(args.T);
    Scratch scratch(call, args.dtype, 2 * blocks * args.D);
    void* sums = scratch.take(2 * blocks * args.D);
    const auto& stem = GCAHNG_CPU(head);
    each_block(args.T, [&](int64_t begin, int64_t end) { stem.sums(args, sums, begin, end); });
    add_partials(args.dtype, sums, args.sums, 2, blocks, args.D);
  }

  static void run(const HeadNorm& args, const Call&) {
    const auto& stem = GCAHNG_CPU(head);
    each_unit(args.tile, [&](int64_t begin, int64_t end) { stem.norm(args, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gcahng, CPU, m) {
  m.impl("head_moments_", TORCH_BOX(&head_moments<OnCpu>));
  m.impl("head_fwd_", TORCH_BOX(&head_fwd<OnCpu>));
  m.impl("head_bwd_", TORCH_BOX(&head_bwd<OnCpu>));
  m.impl("head_sums_", TORCH_BOX(&head_sums<OnCpu>));
  m.impl("head_norm_", TORCH_BOX(&head_norm<OnCpu>));
}

}  // namespace gcahng::binding
